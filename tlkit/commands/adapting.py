"""The trainings of `adapt`: each method with each seed, after that of the source alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tlkit import config, processes, run_folder
from tlkit.adaptation import gap
from tlkit.adaptation.inputs import Images, Inputs, Vectors, refuse_too_few, unreadable
from tlkit.adaptation.learn import Domain, Learner, Plan, stored_history
from tlkit.adaptation.method import chosen, method
from tlkit.adaptation.objective import Head, Whole
from tlkit.cache_folder import default_folder
from tlkit.commands.adapted import figures
from tlkit.commands.console import Console
from tlkit.commands.domains import Pair, refuse_unusable
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.commands.reading import same_network
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files, unreadable_files
from tlkit.data.transforms import CENTER, least_side
from tlkit.errors import TlkitError
from tlkit.networks import variants
from tlkit.networks.bottleneck import bottleneck_width, without_bottleneck
from tlkit.networks.build import Loaded, build
from tlkit.networks.complexity import noise
from tlkit.networks.forward import channels_last, features_of
from tlkit.networks.freezing import freeze, has_idle_parameters
from tlkit.networks.frozen_pass import How
from tlkit.networks.stages import stages
from tlkit.training.cache import FeatureCache
from tlkit.training.features import extract
from tlkit.training.optimizers import parameter_groups
from tlkit.training.strategies import HEAD, default_rate, differential_rates
from tlkit.training.tracking import History, Tracking

SOURCE_ONLY = "source-only"
BOTTLENECK = 256
EPOCHS = {"probe": 30, "full": 10, "differential": 10, "random": 20}
PRESETS = {"probe": "none", "random": "none"}
"""Augmentation where none is given: of small networks from random weights none, as the field's tables have it."""
LARGEST = {"random": 64}
"""Images of each domain in a step where nothing is said and there are enough; else 32."""


@dataclass(frozen=True)
class Asked:
    """What `adapt` was asked for: its option groups."""

    domains: config.Domains
    adaptation: config.Adaptation
    network: config.Network
    optimisation: config.Optimisation
    variation: config.Variation
    preprocess: config.Preprocess
    compute: config.Compute
    passing: config.Passing
    caching: config.CacheBudget
    tracking: config.Tracking

    @property
    def strategy(self) -> str:
        """The strategy's name; ``auto`` decided."""
        given = self.adaptation.strategy
        return given if given != "auto" else "full" if self.network.weights == "random" else "probe"

    @property
    def kind(self) -> str:
        """The strategy's name, or ``random`` where everything is trained from random weights: what defaults go by."""
        is_random = self.network.weights == "random" and self.strategy != "probe"
        return "random" if is_random else self.strategy


Features = tuple[np.ndarray, np.ndarray]
"""Of some images of the source and of the target."""


@dataclass(frozen=True)
class Result:
    """What came out of a training.

    Args:
        method: The method's name.
        seed: Its seed.
        network: With the weights of the chosen epoch.
        history: One row for each epoch.
        probabilities: Of the target's images (N, K) in the epoch ``selected``, the ``last`` and the ``oracle``; of the
            source's that were set apart (M, K), ``source_val``.
        before: What the classifier of the source-only network sees (of that network: before it was trained).
        after: What this one's sees.
        told: Figures, as JSON has them.
    """

    method: str
    seed: int
    network: nn.Module
    history: list[dict[str, Any]]
    probabilities: dict[str, np.ndarray]
    before: Features
    after: Features
    told: dict[str, Any]


class Trainings:
    """All trainings of one command.

    Args:
        asked: The options.
        pair: Images of both domains; each can be read.
        loaded: The network to start from, before its head is made.
        how: Device, precision, processes; who is told.
        inputs: What a learner is given of source and target.
        left_out: Files that could not be read.
    """

    def __init__(
        self,
        asked: Asked,
        pair: Pair,
        loaded: Loaded,
        how: How,
        inputs: tuple[Inputs, Inputs],
        left_out: list[dict[str, str]],
    ) -> None:
        self.asked, self.pair, self.loaded, self.how, self.left_out = asked, pair, loaded, how, left_out
        self.methods = chosen(asked.adaptation.method)
        self.seeds = range(asked.compute.seed, asked.compute.seed + asked.adaptation.seeds)
        train, rows = pair.source.splits == "train", np.arange(len(pair.target))
        self.source = Domain(inputs[0], pair.source.labels, np.flatnonzero(train), np.flatnonzero(~train))
        self.target = Domain(inputs[1], pair.labels, rows, rows)
        seed = asked.compute.seed
        self.shown = gap.sampled(len(pair.source), seed), gap.sampled(len(pair.target), seed)
        """Rows of source and target that distances are measured on."""
        self.plan = self._plan()
        if asked.strategy != "probe":  # else its features were computed already
            network = self._network(self.seeds[0]).eval()
            with torch.no_grad():
                features_of(network, noise(network, loaded.preprocessing))
        self.remarks: list[str] = []
        for name in list(self.methods):  # before anything is trained
            if (refuse := method(name).refuse) is None:
                continue
            try:
                refuse(self._learning(self._network(self.seeds[0])))
            except TlkitError as error:
                if name in asked.adaptation.method:
                    raise
                self.methods.remove(name)  # of all methods those that can adapt this network
                self.remarks.append(f"{name} is left out: {error.what}")

    @property
    def epochs(self) -> int:
        """Of each training."""
        return self.asked.optimisation.epochs or EPOCHS[self.asked.kind]

    @property
    def steps(self) -> int:
        """Of each epoch."""
        return max(len(self.source.trained), len(self.target.trained)) // self.plan.each

    def _plan(self) -> Plan:
        """How each training goes.

        Raises:
            TlkitError: A domain has fewer images than a step takes, or the network has not so many stages.
        """
        asked, source, target = self.asked, self.pair.source, self.pair.target
        images = {"train": len(self.source.trained), "": len(self.target.trained)}
        given = asked.compute.batch_size
        if given is not None and (given < 4 or given % 2):
            what = f"a step of {given} images is not two or more of each domain, as many of the one as of the other"
            raise TlkitError(what, where="--batch-size", remedy="give an even number from 4 on")
        each, several = given // 2 if given else default_each(min(images.values()), asked.kind), processes.count()
        if given is None:
            each = max(several, each - each % several)
        elif each % several:
            what = f"{each} images of each domain cannot be shared among {several} processes alike"
            raise TlkitError(what, where="--batch-size", remedy=f"give a multiple of {2 * several}")
        refuse_too_few(images["train"], each, source.root, "training")
        refuse_too_few(images[""], each, target.root)
        weights = None
        if asked.variation.class_weights == "balanced":
            counts = np.bincount(source.labels[self.source.trained], minlength=len(source.classes))
            weights = torch.tensor(counts.sum() / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
        optimisation = replace(asked.optimisation, bn=asked.optimisation.bn or "train")
        rates = self._rates()
        return Plan(
            optimisation=optimisation,
            epochs=self.epochs,
            each=each,
            rates=rates,
            head_rate=rates[HEAD],
            select=asked.adaptation.select,
            label_smoothing=asked.variation.label_smoothing,
            class_weights=weights,
            balanced=asked.variation.balanced_sampling,
        )

    def _rates(self) -> dict[str, float]:
        """Highest learning rate of each stage that trains."""
        asked = self.asked
        given, optimizer = asked.optimisation.lr, asked.optimisation.optimizer
        kind = "differential" if asked.kind == "probe" else asked.kind
        lr = float(given) if given else default_rate(kind, optimizer)
        names = [stage.name for stage in stages(self._network(self.seeds[0]))]
        if asked.strategy == "probe":
            return {HEAD: lr}
        count = asked.adaptation.stages or len(names)
        if count > len(names):
            what = f"{count} is too many: the network has {len(names)} stages ({', '.join(names)})"
            raise TlkitError(what, where="--stages", remedy="leave it out to train all of them")
        trained = names[-count:]
        if asked.strategy == "differential":
            return differential_rates(trained, lr, asked.optimisation.layer_decay, names)
        return dict.fromkeys(trained, lr)

    def _network(self, seed: int) -> nn.Module:
        """The network that a training starts from: what of it is new is drawn by the seed.

        That is all of it where everything is trained from random weights; a frozen backbone is the same for all seeds,
        since its features are.
        """
        asked, loaded, classes = self.asked, self.loaded, self.pair.source.classes
        torch.manual_seed(seed)
        network: Any = _build(asked).network if asked.kind == "random" else copy.deepcopy(loaded.network)
        width = asked.adaptation.bottleneck
        if width is None:
            width = 0 if asked.kind == "random" or bottleneck_width(network) else BOTTLENECK
        if width and not bottleneck_width(network):
            network.reset_classifier(len(classes))
            variants.become(network, variants.Design(loaded.name, loaded.stem, loaded.norm, width))
        elif loaded.classes != classes:
            network.reset_classifier(len(classes))
        return channels_last(network)

    def _learning(self, network: nn.Module) -> nn.Module:
        """What of the network trains."""
        return Head(network) if self.asked.strategy == "probe" else Whole(network)

    def carry_out(self, run: Path, checkpoint_every: str, warn: Callable[[str], None]) -> Iterator[Result]:
        """Train each method with each seed, after the source alone; go on where a stopped run left off.

        Args:
            run: The run's folder.
            checkpoint_every: How often the state is saved.
            warn: Told where tracking fails.

        Yields:
            One for each method that was asked for and each seed, as it is finished.
        """
        names = [SOURCE_ONLY, *(name for name in self.methods if name != SOURCE_ONLY)]
        state = run / run_folder.STATE
        units = [(seed, name) for seed in self.seeds for name in names]
        told = processes.on_first(lambda: "".join(stored_history(state / f"{name}-{seed}") for seed, name in units))
        if processes.is_first():
            run_folder.write_text(run / run_folder.METRICS, told)
        reference = None
        for seed, name in units:
            compared = None if name == SOURCE_ONLY else reference
            tracking = self._tracking(run, name, seed, warn)
            with tracking.started(fresh=not told and (seed, name) == units[0]):
                result = self._train(name, seed, run, checkpoint_every, compared, tracking.follow)
                tracking.finish(result.history, result.told["metrics"])
            reference = result if name == SOURCE_ONLY else reference
            if name in self.methods:
                yield result

    def _tracking(self, run: Path, name: str, seed: int, warn: Callable[[str], None]) -> Tracking:
        """Of one training; in a run that goes on, those of finished ones stay as they are."""
        return Tracking(
            self.asked.tracking.track,
            run,
            run_folder.read_recipe(run) | {"method": name, "seed": seed},
            accelerator=self.how.accelerator,
            warn=warn,
            part=f"{name}-{seed}",
            done=run / run_folder.STATE / f"{name}-{seed}" / "tracked",
        )

    def _train(
        self,
        name: str,
        seed: int,
        run: Path,
        checkpoint_every: str,
        reference: Result | None,
        follow: Callable[[History], None],
    ) -> Result:
        network, one, asked, plan, loaded = self._network(seed), method(name), self.asked, self.plan, self.loaded
        trained = set(plan.rates)
        freeze(network, [s.name for s in stages(network) if s.name not in trained], plan.optimisation.bn or "train")
        module = self._learning(network)
        loss = one.loss(network.head_hidden_size, len(self.pair.source.classes)) if one.loss is not None else None  # type: ignore[arg-type]
        given = asked.adaptation.weight
        learner = Learner(
            module,
            parameter_groups(network, plan.rates, plan.optimisation.weight_decay),
            one,
            loss,
            name=name,
            seed=seed,
            source=self.source,
            target=self.target,
            weight=one.weight if given is None else given,
            plan=plan,
            how=self.how,
            folder=run / run_folder.STATE / f"{name}-{seed}",
            checkpoint_every=checkpoint_every,
            record=lambda row: run_folder.append_metrics(run, row) if processes.is_first() else None,
            follow=follow,
            idle=lambda: (
                asked.strategy != "probe" and has_idle_parameters(network, noise(network, loaded.preprocessing))
            ),
        )
        before = reference.after if reference is not None else self._features(learner)
        learner.run()
        after, progress = self._features(learner), learner.progress
        probabilities = {key: tensor.numpy() for key, tensor in learner.kept.items()}
        alone = reference.probabilities["selected"] if reference is not None else None
        told = {
            "method": name,
            "seed": seed,
            "selected_epoch": progress.best,
            "epochs": plan.epochs,
            **({"oracle_epoch": progress.oracle} if progress.oracle else {}),
            "seconds": round(learner.seconds, 3),
            **figures(probabilities, alone, self.source.labels[self.source.measured], self.pair.labels),
            **self._gaps(before, after),
        }
        return Result(name, seed, network.cpu(), progress.history, probabilities, before, after, told)

    def _features(self, learner: Learner) -> Features:
        """What the classifier sees of the images that distances are measured on."""
        source, target = self.shown
        return learner.features(self.source.inputs, source), learner.features(self.target.inputs, target)

    def _gaps(self, before: Features, after: Features) -> dict[str, Any]:
        """Distances of the domains before and after adaptation, by one kernel."""
        seed = self.asked.compute.seed
        variance = gap.bandwidth(*before)
        was, is_now = (gap.measure(*both, variance, seed) for both in (before, after))
        return {
            "mmd2": {"before": was.mmd2, "after": is_now.mmd2, "p_before": was.p, "p_after": is_now.p},
            "a_distance": {"before": was.a_distance, "after": is_now.a_distance},
        }


def prepare(asked: Asked, pair: Pair, console: Console) -> Trainings:
    """Build the network, read every image once, and check that all can be done."""
    torch.manual_seed(asked.compute.seed)
    loaded = _build(asked)
    for remark in loaded.remarks:
        console.warn(remark)
    console.say(f"{loaded.title}, weights: {loaded.weights}; {pair.told()}")
    passes = how(asked.compute, console, asked.passing)
    found = [_inputs(asked, loaded, samples, title, passes) for samples, title in _named(pair)]
    bad = [file for _, _, files in found for file in files]
    for (samples, _), (_, _, files) in zip(_named(pair), found, strict=True):
        refuse_bad_files(files, len(samples), samples.root, asked.domains.on_error)
    report_skipped(console, bad)
    if bad:
        pair = pair.readable(*(mask for _, mask, _ in found))
        refuse_unusable(pair.source)
    inputs = [
        made if made is not None else _images(asked, loaded, samples, title, passes)
        for (made, _, _), (samples, title) in zip(found, _named(pair), strict=True)
    ]
    trainings = Trainings(asked, pair, loaded, passes, (inputs[0], inputs[1]), skipped(bad))
    for remark in trainings.remarks:
        console.warn(remark)
    return trainings


def _named(pair: Pair) -> list[tuple[Samples, str]]:
    return [(pair.source, "source"), (pair.target, "target")]


def _build(asked: Asked) -> Loaded:
    at = asked.network
    return same_network(lambda: build(at.model, at.weights, asked.preprocess, norm=at.norm))


def _inputs(
    asked: Asked, loaded: Loaded, samples: Samples, title: str, passes: How
) -> tuple[Inputs | None, np.ndarray, list[BadFile]]:
    """Features of a frozen backbone, or nothing where images are wanted; a mask of what can be read, and the rest."""
    if asked.strategy != "probe":
        side = least_side(loaded.preprocessing)
        bad = unreadable_files(samples.root, samples.paths, side, workers=passes.workers, progress=passes.progress)
        return None, unreadable(bad, samples), bad
    backbone: Any = without_bottleneck(loaded.network)
    if not backbone.num_classes:  # some backbones (DINOv2, CLIP) come without a classifier
        backbone.reset_classifier(2)
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, CENTER)
    cache = FeatureCache(default_folder(), config.size(asked.caching.cache_budget))
    features = extract(replace(loaded, network=backbone), dataset, passes, cache)
    labels = samples.labels[features.rows]
    vectors = Vectors(features.values[:, 0], labels, passes.accelerator.device)
    return vectors, unreadable(features.bad, samples), features.bad


def _images(asked: Asked, loaded: Loaded, samples: Samples, title: str, passes: How) -> Images:
    preset = asked.variation.augment or PRESETS.get(asked.kind, "light")
    return Images(samples, loaded.preprocessing, preset, passes, f"reading {title}")


def default_each(images: int, kind: str) -> int:
    """Images of each domain in a step: a power of two that the smaller one has; four are the least."""
    largest = LARGEST.get(kind, 32)
    return next((size for size in (64, 32, 16, 8) if size <= largest and images >= size), 4)
