"""What the commands that train share: data, network, phases, results, and going on after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.keeping import kept_when_stopped
from tlkit.commands.labelled import report_skipped, skipped, stored_split
from tlkit.commands.passing import how
from tlkit.commands.planning import show_plan
from tlkit.commands.reading import labelled, read, refuse_too_few, seen_before
from tlkit.commands.results import write_results
from tlkit.data.folders import SPLITS, Samples
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files, unreadable_files
from tlkit.data.splits import choosing_part
from tlkit.data.transforms import least_side
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, build, weight_bytes
from tlkit.networks.complexity import noise, stage_costs
from tlkit.networks.frozen_pass import How
from tlkit.networks.names import known_name
from tlkit.networks.stages import stages
from tlkit.networks.variants import has_small_stem
from tlkit.training import strategies
from tlkit.training.cache import FeatureCache, default_folder
from tlkit.training.checkpoint import Checkpoint, read_checkpoint
from tlkit.training.closed_head import HeadOptions
from tlkit.training.features import Features, extract
from tlkit.training.optimizers import check_name
from tlkit.training.setup import TRAIN_VIEWS, Settings
from tlkit.training.strategies import Situation
from tlkit.training.trainer import Trainer

SMALL_INPUT = 64
"""Inputs up to this side, in pixels, get a stem that does not shrink them."""


@dataclass(frozen=True)
class Options:
    """What a command that trains was asked for.

    Args:
        command: Its name.
        groups: Its option groups as given, for the recipe.
        strategy: Name of the strategy; ``random`` trains everything from random weights.
        model: A timm name, or a run.
        weights: As `tlkit.networks.build.build` takes them.
        stem: ``standard``, ``small`` or ``auto``.
        norm: Another normalisation than the network's own; None for that.
        train_views: Of the images that a linear head is fitted on.
        preset: Augmentation where none is given.
    """

    command: str
    groups: tuple[config.Checked, ...]
    strategy: str
    model: str
    weights: str
    data: config.Data
    training: config.Training
    augmentation: config.Augmentation
    preprocess: config.Preprocess
    compute: config.Compute
    passing: config.Passing = field(default_factory=config.Passing)
    caching: config.Caching = field(default_factory=config.Caching)
    unfreezing: config.Unfreezing = field(default_factory=config.Unfreezing)
    stem: str = "standard"
    norm: str | None = None
    train_views: str = "center"
    preset: Literal["light", "standard"] = "light"

    def __post_init__(self) -> None:
        check_name(self.training.optimizer)
        refuse_idle(self)

    @property
    def recipe(self) -> dict[str, Any]:
        return config.effective_recipe(self.command, self.groups)

    @property
    def name(self) -> str:
        """The strategy's name for people: training everything is full, whatever it starts from."""
        return "full" if self.strategy == "random" else self.strategy

    @property
    def rate(self) -> float:
        """Highest learning rate; 1 where it is to be searched for."""
        given = self.training.lr
        if self.strategy == "probe" or given == "auto":
            return 1.0
        return float(given) if given else strategies.default_rate(self.strategy, self.training.optimizer)


def refuse_idle(options: Options) -> None:
    """Raise where an option was given that would do nothing: nobody should believe that it did.

    Raises:
        TlkitError: Names the option.
    """
    name, training = options.strategy, options.training
    uses_loop = name != "probe"
    schedule = training.schedule
    judges = strategies.uses_solver(name) or strategies.chooses(name, training)
    idle: list[tuple[config.Checked, tuple[str, ...], bool, str]] = [
        (options.unfreezing, ("stages", "epochs_per_stage", "order"), name != "gradual", f"--strategy {name}"),
        (training, tuple(one.name for one in fields(training)), not uses_loop, f"--strategy {name}"),
        (
            options.augmentation,
            ("augment", "mixup", "cutmix", "label_smoothing", "balanced_sampling"),
            not uses_loop,
            f"--strategy {name}",
        ),
        (options.caching, ("cached_views",), name not in ("gradual", "auto"), f"--strategy {options.name}"),
        (options.data, ("select_on",), not judges, f"--strategy {options.name}, which chooses nothing"),
        (training, ("epochs",), name == "gradual", "gradual unfreezing: give --epochs-per-stage"),
        (training, ("patience",), name == "auto", "--strategy auto, which judges whole phases"),
        (training, ("layer_decay",), name in ("full", "lp-ft", "random"), f"--strategy {options.name}"),
        (training, ("anchor",), options.weights == "random", "random weights"),
        (training, ("min_lr",), schedule != "cosine", f"--schedule {schedule}"),
        (training, ("step_every", "gamma"), schedule not in ("step", "plateau"), f"--schedule {schedule}"),
        (training, ("warmup",), schedule == "one-cycle", "--schedule one-cycle, which has a rise of its own"),
    ]
    for group, names, is_idle, why in idle:
        defaults = type(group)()
        for option in names:
            if is_idle and getattr(group, option) != getattr(defaults, option):
                flag = config.option_name(option)
                raise TlkitError(f"does nothing with {why}", where=flag, remedy=f"leave {flag} out")
    if options.train_views != "center" and not strategies.uses_solver(name):
        raise TlkitError(f"does nothing with --strategy {name}", where="--train-views", remedy="leave it out")


Make = Callable[..., Options]


def learn(
    make: Make, groups: tuple[Any, ...], output: config.Output, resume: config.Resume, console: Console
) -> dict[str, Any]:
    """Train as the options say, or go on with a run.

    Args:
        make: Options from the command's groups.
        groups: The groups as given.
        output: Where to.
        resume: The run to go on with.
        console: Who is told.
    """
    started = time.monotonic()
    if resume.resume is not None:
        return _go_on(make, groups, resume, console, started)
    options = make(*groups)
    run_folder.refuse_existing(output.out)
    samples = read(options)
    loaded = _build(options, console)
    for remark in (*samples.remarks(), *seen_before(options, samples)):
        console.warn(remark)
    if output.plan:
        return _plan(options, samples, loaded, console)
    copies = 1 if options.strategy == "probe" else 6  # weights, optimiser, best so far: in the stored state
    run_folder.require_space(output.out, copies * weight_bytes(loaded.network))
    run = run_folder.new_run(output.out, options.command)
    with kept_when_stopped(run, options.command, console, keep_state=resume.keep_state):
        rows = zip(samples.paths, (samples.classes[label] for label in samples.labels), samples.splits, strict=True)
        run_folder.write_rows(run / run_folder.SPLITS, ("path", "label", "split"), rows)
        run_folder.write_recipe(run, options.recipe)  # after the splits: who finds it can resume
        return _train(options, samples, loaded, run, resume, None, console, started)


def _go_on(
    make: Make, groups: tuple[Any, ...], resume: config.Resume, console: Console, started: float
) -> dict[str, Any]:
    run = resume.resume
    assert run is not None
    recipe, command = run_folder.read_recipe(run), make.__module__.rpartition(".")[2]
    if recipe.get("command") != command:
        raise TlkitError(f"this is a run of '{recipe.get('command')}'", where=run, remedy="resume it with that command")
    if (run / run_folder.SUMMARY).is_file():
        console.line(f"{run} is finished; its report is {run / run_folder.REPORT}")
        return run_folder.read_json(run / run_folder.SUMMARY)
    options = make(*(config.group_from_recipe(type(group), recipe) for group in groups))
    stored = read_checkpoint(run)
    samples = stored_split(labelled(options), run)
    samples = samples.take(samples.splits != "")
    refuse_too_few(samples, options)
    loaded = _build(options, console)
    if stored is None:
        (run / run_folder.METRICS).unlink(missing_ok=True)
    run_folder.remove_half_written(run)
    with kept_when_stopped(run, command, console, fresh=False, keep_state=resume.keep_state):
        return _train(options, samples, loaded, run, resume, stored, console, started)


def _build(options: Options, console: Console) -> Loaded:
    torch.manual_seed(options.compute.seed)
    loaded = build(options.model, options.weights, options.preprocess, stem=_stem(options), norm=options.norm)
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


def _train(
    options: Options,
    samples: Samples,
    loaded: Loaded,
    run: Path,
    resume: config.Resume,
    stored: Checkpoint | None,
    console: Console,
    started: float,
) -> dict[str, Any]:
    console.say(f"{loaded.title}, weights: {loaded.weights}; {_counts(samples)}")
    passes = how(options.compute, console, options.passing)
    cache = FeatureCache(default_folder(), config.size(options.caching.cache_budget))
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
    chosen_on, choosing = _choosing(options, samples)
    _new_head(options, loaded, samples)
    trainer = Trainer(
        loaded,
        samples,
        choosing,
        _settings(options, samples),
        how=passes,
        cache=cache,
        run=run,
        checkpoint_every=resume.checkpoint_every,
        features=features,
        features_seconds=time.monotonic() - began,
        notes={"skipped": left_out},
    )
    if stored is not None:
        trainer.restore(stored)
        state = trainer.state
        console.say(f"going on with phase {len(state.outcomes) + 1}, epoch {state.phase.place.epoch + 1}")
    situation = _situation(options, samples, choosing, chosen_on, loaded)
    with trainer.saved_when_stopped():
        plan = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
        again = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
        decision = trainer.carry_out(plan, strategies.certain(options.strategy, again))
        probabilities = trainer.predict_all()
        return write_results(options, trainer, decision, probabilities, chosen_on, left_out, console, started)


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


def _choosing(options: Options, samples: Samples) -> tuple[str, np.ndarray]:
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


def _situation(options: Options, samples: Samples, choosing: np.ndarray, chosen_on: str, loaded: Loaded) -> Situation:
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


def _plan(options: Options, samples: Samples, loaded: Loaded, console: Console) -> dict[str, Any]:
    chosen_on, choosing = _choosing(options, samples)
    situation = _situation(options, samples, choosing, chosen_on, loaded)
    plan = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
    return show_plan(options, samples, loaded, situation, plan, console)
