"""One training, from images and a network to a run: what each command that trains does, and cross-validation often."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tlkit import config, processes, run_folder
from tlkit.cache_folder import default_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.commands.reading import refuse_too_few, same_network
from tlkit.commands.results import CrossValidation, write_results
from tlkit.data.folders import SPLITS, Samples
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files, unreadable_files
from tlkit.data.splits import choosing_part
from tlkit.data.transforms import least_side
from tlkit.networks.build import Loaded, build
from tlkit.networks.complexity import noise, stage_costs
from tlkit.networks.frozen_pass import How
from tlkit.networks.names import known_name
from tlkit.networks.stages import stages
from tlkit.networks.variants import has_small_stem
from tlkit.training import strategies
from tlkit.training.cache import FeatureCache
from tlkit.training.checkpoint import Checkpoint
from tlkit.training.closed_head import HeadOptions
from tlkit.training.features import Features, extract
from tlkit.training.setup import TRAIN_VIEWS, Settings
from tlkit.training.strategies import Situation
from tlkit.training.tracking import Tracking
from tlkit.training.trainer import Trainer

if TYPE_CHECKING:
    from tlkit.commands.learning import Options

SMALL_INPUT = 64
"""Inputs up to this side, in pixels, get a stem that does not shrink them."""


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        summary: What is told of it.
        samples: The images that could be read (N).
        probabilities: What the network makes of them (N, K).
    """

    summary: dict[str, Any]
    samples: Samples
    probabilities: np.ndarray


def build_network(options: Options, console: Console) -> Loaded:
    """The network that the options ask for, before anything is trained."""
    torch.manual_seed(options.compute.seed)
    loaded = same_network(
        lambda: build(options.model, options.weights, options.preprocess, stem=_stem(options), norm=options.norm)
    )
    for remark in loaded.remarks:
        console.warn(remark)
    return loaded


def _stem(options: Options) -> Literal["standard", "small"]:
    """The stem that is asked for; ``auto`` is small for small inputs, where the network's family has one."""
    if options.stem != "auto":
        return "small" if options.stem == "small" else "standard"
    size = options.preprocess.image_size
    if size is None or size > SMALL_INPUT or run_folder.is_run(options.model):
        return "standard"
    return "small" if has_small_stem(known_name(options.model)) else "standard"


def train(
    options: Options,
    samples: Samples,
    loaded: Loaded,
    run: Path,
    resume: config.Resume,
    stored: Checkpoint | None,
    console: Console,
    started: float,
    crossed: CrossValidation | None = None,
    *,
    alone: bool = True,
) -> Trained:
    """Train, and write what a finished run leaves.

    Args:
        options: What was asked for.
        samples: Images with labels and splits.
        loaded: The network to start from.
        run: The run's folder, which has its splits and recipe.
        resume: How often the state is saved.
        stored: The state to go on from.
        console: Who is told.
        started: When the command was.
        crossed: What cross-validation found, of a last training on all images.
        alone: Whether the command has trained nothing before, which a tracker that cannot be started would cost.
    """
    console.say(f"{loaded.title}, weights: {loaded.weights}; {_counts(samples)}")
    passes = how(options.compute, console, options.passing)
    cache = FeatureCache(default_folder(), config.size(options.caching.cache_budget))
    tracking = Tracking(options.tracking.track, run, options.recipe, accelerator=passes.accelerator, warn=console.warn)
    began = time.monotonic()
    if stored is None:
        features, bad = _first_pass(options, samples, loaded, passes, cache)
        refuse_bad_files(bad, len(samples), samples.root, options.data.on_error)
        report_skipped(console, bad)
        left_out = skipped(bad)
    else:
        features, left_out = None, list(stored.values["skipped"])
    unreadable = {file["path"] for file in left_out}
    samples = samples.take(np.array([path not in unreadable for path in samples.paths]))
    refuse_too_few(samples, options, " that can be read")
    chosen_on, choosing = choosing_images(options, samples)
    _new_head(options, loaded, samples)
    trainer = Trainer(
        loaded,
        samples,
        choosing,
        _settings(options, samples),
        how=passes,
        cache=cache,
        run=run,
        follow=tracking.follow,
        checkpoint_every=resume.checkpoint_every,
        features=features,
        features_seconds=time.monotonic() - began,
        notes={"skipped": left_out},
    )
    if stored is not None:
        trainer.restore(stored)
        state = trainer.state
        console.say(f"going on with phase {len(state.outcomes) + 1}, epoch {state.phase.place.epoch + 1}")
    situation = situation_of(options, samples, choosing, chosen_on, loaded)
    with tracking.started(fresh=stored is None and alone), trainer.saved_when_stopped():
        plan = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
        again = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
        decision = trainer.carry_out(plan, strategies.certain(options.strategy, again))
        probabilities = trainer.predict_all()
        if not processes.is_first():
            return Trained({}, trainer.samples, probabilities)
        summary = write_results(
            options, trainer, decision, probabilities, chosen_on, left_out, console, started, crossed
        )
        tracking.finish(trainer.state.history, summary["metrics"])
    return Trained(summary, trainer.samples, probabilities)


def _first_pass(
    options: Options, samples: Samples, loaded: Loaded, how: How, cache: FeatureCache
) -> tuple[Features | None, list[BadFile]]:
    """Read every image once: through the network, where a head is to be fitted. Files that cannot be read are found."""
    if not strategies.uses_solver(options.strategy):
        side = least_side(loaded.preprocessing)
        return None, unreadable_files(samples.root, samples.paths, side, workers=how.workers, progress=how.progress)
    if not loaded.network.num_classes:  # some backbones (DINOv2, CLIP) come without a classifier
        loaded.network.reset_classifier(len(samples.classes))  # type: ignore[operator]
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, TRAIN_VIEWS[options.train_views])
    features = extract(loaded, dataset, how, cache, options.train_views)
    return features, features.bad


def _new_head(options: Options, loaded: Loaded, samples: Samples) -> None:
    """A fresh classifier, unless the network knows these very classes or its head is to be fitted in closed form."""
    if not strategies.uses_solver(options.strategy) and loaded.classes != samples.classes:
        torch.manual_seed(options.compute.seed)
        loaded.network.reset_classifier(len(samples.classes))  # type: ignore[operator]


def choosing_images(options: Options, samples: Samples) -> tuple[str, np.ndarray]:
    """Name and mask of the images on which epochs and phases are chosen."""
    if not strategies.chooses(options.strategy, options.training):
        return "", np.zeros(len(samples), dtype=bool)
    return choosing_part(samples, on_val=options.data.select_on == "val", seed=options.compute.seed)


def _settings(options: Options, samples: Samples) -> Settings:
    images = int((samples.splits == "train").sum())
    norms = options.training.bn or ("train" if options.weights == "random" else "stats-frozen")
    return Settings(
        training=replace(options.training, bn=norms),
        augmentation=replace(options.augmentation, augment=options.augmentation.augment or options.preset),
        compute=options.compute,
        caching=options.caching,
        batch_size=options.compute.batch_size or default_batch_size(images, options.strategy),
        patience=strategies.patience(options.strategy, options.training),
        head=HeadOptions(
            seed=options.compute.seed,
            balanced=options.augmentation.class_weights == "balanced",
            on_val=options.data.select_on == "val",
        ),
        train_views=options.train_views,
    )


def default_batch_size(images: int, strategy: str) -> int:
    """A power of two that leaves at least eight steps in an epoch: 8 to 32, or to 128 from random weights."""
    largest = 128 if strategy == "random" else 32
    return next((size for size in (128, 64, 32, 16) if size <= largest and images >= 8 * size), 8)


def situation_of(options: Options, samples: Samples, choosing: np.ndarray, chosen_on: str, loaded: Loaded) -> Situation:
    names = tuple(stage.name for stage in stages(loaded.network))
    costs = dict.fromkeys(names, 0.0)
    if options.strategy == "auto":
        costs = stage_costs(loaded.network, noise(loaded.network, loaded.preprocessing))
    train = samples.splits == "train"
    return Situation(
        stages=names,
        costs=tuple(costs[name] for name in names),
        trained_on=int((train & ~choosing).sum()),
        chosen_on=int(choosing.sum()),
        choosing_is_apart=chosen_on == "train",
        seen=len(samples),
        lr=options.rate,
    )


def _counts(samples: Samples) -> str:
    parts = [f"{(samples.splits == name).sum()} {name}" for name in SPLITS if (samples.splits == name).any()]
    return f"{len(samples.classes)} classes, images: {', '.join(parts)}"
