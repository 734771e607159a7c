"""Strategies: how a network is transferred, as phases over its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tlkit import config
from tlkit.errors import TlkitError
from tlkit.training.phases import Decision, Outcome, Phase, Strategy

HEAD = "head"
PRETRAINED_RATE = 0.1
"""Rate of pretrained stages as a part of the head's (the seed of differential rates)."""
EPOCHS = {"full": 10, "differential": 10, "lp-ft": 10, "random": 30}
PATIENCE = 3
AUTO_EPOCHS = 3
BUDGET = 6.0
"""Times the probe's own cost that `auto` may take in all."""
LEAST_SECONDS = 20.0
"""No clock stops `auto` before this time: of problems so small, much of the time is not spent on images."""
BACKWARD = 2.5
"""Cost of the backward pass through a stage that trains, in forward passes of it."""
RATES = {
    "sgd": {"full": 1e-2, "differential": 1e-2, "lp-ft": 3e-3, "gradual": 1e-2, "auto": 3e-3, "random": 1e-1},
    "adam": {"full": 3e-4, "differential": 1e-3, "lp-ft": 1e-4, "gradual": 1e-3, "auto": 3e-4, "random": 1e-3},
}
"""Highest learning rate by family of optimiser and strategy."""


@dataclass(frozen=True)
class Situation:
    """What a strategy knows before it begins.

    Args:
        stages: Names of the network's stages in their order.
        costs: Forward cost of each stage as a part of the network's; sums to 1.
        trained_on: Training images outside the choosing part.
        chosen_on: Images of the choosing part; 0 where there is none.
        choosing_is_apart: The choosing part was cut from the training images, which then could all be trained on.
        seen: Images that the probe passes through the network.
        lr: Highest learning rate.
    """

    stages: tuple[str, ...]
    costs: tuple[float, ...]
    trained_on: int
    chosen_on: int
    choosing_is_apart: bool
    seen: int
    lr: float


def strategy(name: str, situation: Situation, training: config.Training, unfreezing: config.Unfreezing) -> Strategy:
    """The strategy of that name; ``random`` trains everything from random weights."""
    match name:
        case "probe":
            return _probe()
        case "full" | "random":
            return _full(name, situation, training)
        case "differential":
            return _differential(situation, training)
        case "lp-ft":
            return _lp_ft(situation, training)
        case "gradual":
            return _gradual(situation, training, unfreezing)
        case "auto":
            return _auto(situation, training)
    raise ValueError(name)


def default_rate(strategy: str, optimizer: str) -> float:
    """Highest learning rate where none is given.

    Raises:
        TlkitError: Nothing is known of the optimiser.
    """
    family = "sgd" if optimizer in ("sgd", "momentum", "nesterov") else "adam"
    if family == "adam" and "adam" not in optimizer:
        raise TlkitError(f"no rate is known for {optimizer}", where="--lr", remedy="give --lr NUMBER, or --lr auto")
    return RATES[family][strategy]


def uses_solver(strategy: str) -> bool:
    """Whether the strategy begins with a head fitted in closed form on features of all images."""
    return strategy in ("probe", "lp-ft", "gradual", "auto")


def patience(strategy: str, training: config.Training) -> int:
    """Epochs without improvement after which a phase ends; 0 for never."""
    return training.patience if training.patience is not None else PATIENCE if strategy == "gradual" else 0


def chooses(strategy: str, training: config.Training) -> bool:
    """Whether the strategy needs images to choose on."""
    return strategy == "auto" or patience(strategy, training) > 0


def longest(strategy: Strategy) -> list[Phase]:
    """The phases that a strategy goes through if every one of them pays."""
    phases = []
    try:
        phase = next(strategy)
        while True:
            if phase.listed:
                phases.append(phase)
            loss = 1 / (1 + len(phases))
            seconds = float(phase.solves)  # a budget is a multiple of the probe's time; no clock stops a trial here
            phase = strategy.send(Outcome(phase.epochs, seconds, (loss, loss)))
    except StopIteration:
        return phases


def certain(name: str, strategy: Strategy) -> list[Phase]:
    """The phases trained by the loop that will come whatever the ones before turn out like."""
    return [] if name == "auto" else [phase for phase in longest(strategy) if not phase.solves]


def differential_rates(stages: Sequence[str], lr: float, layer_decay: float, whole: Sequence[str]) -> dict[str, float]:
    """The head at ``lr``; pretrained stages at a tenth of it, each a factor of ``layer_decay`` below the one above it.

    Args:
        stages: Those that train.
        lr: Rate of the head.
        layer_decay: Factor from one pretrained stage to the one below.
        whole: All stages of the network, which depth is counted in.
    """
    pretrained = [name for name in whole if name != HEAD]
    depth = {name: len(pretrained) - 1 - place for place, name in enumerate(pretrained)}
    return {name: lr if name == HEAD else lr * PRETRAINED_RATE * layer_decay ** depth[name] for name in stages}


def _probe() -> Strategy:
    yield Phase((HEAD,), on_all=True)
    return Decision()


def _full(name: str, situation: Situation, training: config.Training) -> Strategy:
    stages, epochs = situation.stages, training.epochs or EPOCHS[name]
    yield Phase(stages, epochs, dict.fromkeys(stages, situation.lr), chooses=patience(name, training) > 0)
    return Decision()


def _differential(situation: Situation, training: config.Training) -> Strategy:
    stages, epochs = situation.stages, training.epochs or EPOCHS["differential"]
    rates = differential_rates(stages, situation.lr, training.layer_decay, stages)
    yield Phase(stages, epochs, rates, chooses=patience("differential", training) > 0)
    return Decision()


def _lp_ft(situation: Situation, training: config.Training) -> Strategy:
    """Linear probing, then fine-tuning from its head (Kumar et al. 2022, arXiv:2202.10054)."""
    stages, epochs = situation.stages, training.epochs or EPOCHS["lp-ft"]
    yield Phase((HEAD,))
    yield Phase(stages, epochs, dict.fromkeys(stages, situation.lr), chooses=patience("lp-ft", training) > 0)
    return Decision()


def _gradual(situation: Situation, training: config.Training, unfreezing: config.Unfreezing) -> Strategy:
    """The new head, then ever more stages with it (Howard and Ruder 2018, section 3.3: gradual unfreezing)."""
    yield Phase((HEAD,))
    stops = patience("gradual", training) > 0
    for stages in _first(unfrozen(situation.stages, unfreezing.order), unfreezing.stages):
        rates = differential_rates(stages, situation.lr, training.layer_decay, situation.stages)
        yield Phase(stages, unfreezing.epochs_per_stage, rates, chooses=stops)
    return Decision()


def _first(phases: list[tuple[str, ...]], count: int | None) -> list[tuple[str, ...]]:
    """What ``--stages`` leaves, which counts the head's phase too."""
    return phases if count is None else phases[: count - 1]


def unfrozen(stages: Sequence[str], order: str = "top-down") -> list[tuple[str, ...]]:
    """The stages that train in each phase after the head's; a neck goes with the last stage.

    Args:
        stages: Names of the network's stages in their order.
        order: Which join first: ``top-down`` the last ones, ``bottom-up`` the first ones.
    """
    blocks: list[tuple[str, ...]] = [(name,) for name in stages if name not in (HEAD, "neck")]
    if "neck" in stages:
        blocks[-1:] = [(*blocks[-1], "neck")] if blocks else [("neck",)]
    joining = blocks[::-1] if order == "top-down" else blocks
    trained: set[str] = {HEAD}
    phases = []
    for block in joining:
        trained |= set(block)
        phases.append(tuple(name for name in stages if name in trained))
    return phases


def _auto(situation: Situation, training: config.Training) -> Strategy:
    """The probe; then stages from the top down, each phase kept only if that clearly lowers the loss.

    Clearly means on the choosing part, by more than one paired standard error. Where the choosing part was cut from the
    training images, what was kept is trained once more, on all of them.
    """
    best = probe = yield Phase((HEAD,), on_all=True)
    if not situation.chosen_on:
        return Decision(told="kept the probe: there are too few training images to choose on")
    apart = situation.choosing_is_apart
    if apart:  # what is compared must not have seen the choosing part
        best = yield Phase((HEAD,), remember="probe", listed=False)
    budget = _Budget(situation, training, probe.seconds)
    kept: list[Phase] = []
    verdicts: dict[int, tuple[bool, str]] = {}
    why = "no stage is left"
    rejected = False
    for number, stages in enumerate(unfrozen(situation.stages), start=2):
        epochs, seconds = budget.next_trial(stages)
        if not epochs:
            why = "there is no time for more"
            break
        rates = differential_rates(stages, situation.lr, training.layer_decay, situation.stages)
        phase = Phase(stages, epochs, rates, remember="accepted", seconds=seconds, trial=True)
        outcome = yield phase
        gain, error = paired_gain(best.losses, outcome.losses)
        rejected = not gain > error  # also where it is not a number
        found = f"loss on the choosing part {-gain:+.4f}, standard error {error:.4f}"
        found += ", stopped by the clock" if outcome.stopped else ""
        verdicts[number] = not rejected, found
        budget.spend(phase, outcome, kept=not rejected)
        if rejected:
            why = f"training {_named(stages)} did not clearly help ({found})"
            break
        best = outcome
        kept.append(replace(phase, epochs=outcome.epochs, remember=None, seconds=None, on_all=True, trial=False))
    if not kept:
        return Decision("probe" if apart else "accepted" if rejected else None, verdicts, f"kept the probe: {why}")
    told = f"trained {_named(kept[-1].stages)} ({verdicts[len(kept) + 1][1]}); {why}"
    if not apart:
        return Decision("accepted" if rejected else None, verdicts, told)
    for number, phase in enumerate(kept):
        yield replace(phase, start=None if number else "probe")
    return Decision(verdicts=verdicts, told=f"{told}; then trained alike on all training images")


def _named(stages: Sequence[str]) -> str:
    return " and ".join(reversed(stages)) if len(stages) < 4 else f"{stages[-1]} down to {stages[0]}"


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean by which the loss of the same images fell, and its standard error."""
    falls = np.subtract(before, after)
    if len(falls) < 2:
        return 0.0, math.inf
    return float(falls.mean()), float(falls.std(ddof=1) / math.sqrt(len(falls)))


class _Budget:
    """What trials may still cost, so that what they keep can also be trained on all images.

    Epochs are planned by a count of multiplications, which is the same on each machine and each day; clocks only stop
    what takes longer than planned. A run with the same seed thus decides the same, unless a clock says that it stopped.
    """

    def __init__(self, situation: Situation, training: config.Training, probe_seconds: float) -> None:
        self.situation = situation
        limit = config.seconds(training.time_limit) if training.time_limit else None
        limited = training.epochs is not None or limit is not None
        again = situation.chosen_on / situation.trained_on if situation.choosing_is_apart else 0.0
        self.again = 1 + again if situation.choosing_is_apart else 0.0  # cost of training on all, in trials
        self.epochs = training.epochs
        self.passes = (
            math.inf if limited else (BUDGET - 2) * situation.seen
        )  # the probe itself, and the last predictions
        self.seconds = (
            limit if limit is not None else math.inf if limited else max(BUDGET * probe_seconds, LEAST_SECONDS)
        ) - probe_seconds

    def next_trial(self, stages: Sequence[str]) -> tuple[int, float | None]:
        """Epochs, and seconds after which it is stopped; no epochs where nothing is left."""
        left = AUTO_EPOCHS if self.epochs is None else min(AUTO_EPOCHS, self.epochs)
        epochs = int(min(left, self.passes / self._cost(stages, kept=True)))
        seconds = self.seconds / (1 + self.again)
        if seconds <= 0:
            return 0, None
        return epochs, None if math.isinf(seconds) else seconds

    def spend(self, phase: Phase, outcome: Outcome, kept: bool) -> None:
        """Count a trial, and where it was kept what training it on all images will cost."""
        self.passes -= outcome.epochs * self._cost(phase.stages, kept)
        self.seconds -= outcome.seconds * (1 + (self.again if kept else 0))
        if outcome.stopped:
            self.seconds = 0
        if self.epochs is not None:
            self.epochs -= outcome.epochs

    def _cost(self, stages: Sequence[str], kept: bool) -> float:
        """Of an epoch, in passes of one image through the whole network."""
        at = self.situation
        trains = sum(cost for name, cost in zip(at.stages, at.costs, strict=True) if name in stages)
        one = at.trained_on * (1 + BACKWARD * trains)
        return one * (1 + (self.again if kept else 0)) + at.chosen_on
