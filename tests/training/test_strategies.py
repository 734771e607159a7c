"""Strategies stepped by hand over made-up situations: their phases, what `auto` keeps, and what it may cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tlkit import config
from tlkit.errors import TlkitError
from tlkit.training.phases import Decision, Outcome, Phase
from tlkit.training.strategies import (
    AUTO_EPOCHS,
    BACKWARD,
    BUDGET,
    EPOCHS,
    PATIENCE,
    RATES,
    Situation,
    chooses,
    default_rate,
    differential_rates,
    paired_gain,
    patience,
    strategy,
    unfrozen,
    uses_solver,
)

STAGES = ("stem", "stage1", "stage2", "stage3", "neck", "head")
COSTS = (0.1, 0.2, 0.3, 0.25, 0.1, 0.05)


def situation(**options: Any) -> Situation:
    values: dict[str, Any] = {
        "stages": STAGES,
        "costs": COSTS,
        "trained_on": 80,
        "chosen_on": 20,
        "choosing_is_apart": True,
        "seen": 10_000,
        "lr": 0.01,
    }
    return Situation(**(values | options))


LOSSES = tuple(np.random.default_rng(0).uniform(0.5, 1.5, 20).tolist())


def lower(by: float, losses: Iterable[float] = LOSSES, spread: float = 0.0) -> tuple[float, ...]:
    """Losses that fell by that much on average, more for some images than for others."""
    return tuple(loss - by - spread * (-1) ** row for row, loss in enumerate(losses))


def play(
    name: str,
    outcome: Callable[[Phase, int], Outcome] = lambda phase, number: Outcome(phase.epochs, 1.0, LOSSES),
    at: Situation | None = None,
    training: dict[str, Any] | None = None,
    unfreezing: dict[str, Any] | None = None,
) -> tuple[list[Phase], Decision]:
    """Carry a strategy out on paper; ``outcome`` is told each phase and its number, from 1."""
    running = strategy(
        name, at or situation(), config.Training(**(training or {})), config.Unfreezing(**(unfreezing or {}))
    )
    phases = [next(running)]
    while True:
        try:
            phases.append(running.send(outcome(phases[-1], len(phases))))
        except StopIteration as end:
            return phases, end.value


# Plain strategies


def test_the_order_of_unfreezing() -> None:
    assert unfrozen(STAGES) == [
        ("stage3", "neck", "head"),
        ("stage2", "stage3", "neck", "head"),
        ("stage1", "stage2", "stage3", "neck", "head"),
        STAGES,
    ]
    assert unfrozen(STAGES, "bottom-up") == [
        ("stem", "head"),
        ("stem", "stage1", "head"),
        ("stem", "stage1", "stage2", "head"),
        STAGES,
    ]
    assert unfrozen(("stem", "stage1", "head")) == [("stage1", "head"), ("stem", "stage1", "head")]
    assert unfrozen(("neck", "head")) == [("neck", "head")]
    assert unfrozen(("head",)) == []


def test_differential_rates() -> None:
    """Pretrained stages at a tenth of the head's, also where not all of them train; times decay^depth."""
    assert differential_rates(STAGES, 0.01, 1.0, STAGES) == pytest.approx(
        dict.fromkeys(STAGES[:-1], 0.001) | {"head": 0.01}
    )
    decayed = {"stem": 0.5**4, "stage1": 0.5**3, "stage2": 0.25, "stage3": 0.5, "neck": 1.0}
    expected = {name: 0.001 * factor for name, factor in decayed.items()} | {"head": 0.01}
    assert differential_rates(STAGES, 0.01, 0.5, STAGES) == pytest.approx(expected)
    some = ("stem", "stage1", "head")
    assert differential_rates(some, 0.01, 0.5, STAGES) == pytest.approx({name: expected[name] for name in some})


def test_probe() -> None:
    phases, decision = play("probe")
    assert phases == [Phase(("head",), on_all=True)]
    assert phases[0].solves and decision == Decision()


@pytest.mark.parametrize("name", ["full", "random"])
@pytest.mark.parametrize("epochs", [None, 4])
def test_full(name: str, epochs: int | None) -> None:
    (phase,), decision = play(name, training={"epochs": epochs})
    assert phase == Phase(STAGES, epochs or EPOCHS[name], dict.fromkeys(STAGES, 0.01))
    assert not phase.solves and not phase.chooses and decision == Decision()


def test_differential() -> None:
    (phase,), _ = play("differential", training={"layer_decay": 0.8, "patience": 2})
    assert phase.rates == differential_rates(STAGES, 0.01, 0.8, STAGES)
    assert phase.epochs == EPOCHS["differential"] and phase.chooses


def test_lp_ft() -> None:
    (probe, whole), _ = play("lp-ft", training={"epochs": 5})
    assert probe == Phase(("head",)) and probe.solves
    assert whole == Phase(STAGES, 5, dict.fromkeys(STAGES, 0.01))


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
@pytest.mark.parametrize("count", [None, 1, 2, 3, 5, 99])
def test_gradual_counts_the_head_among_its_phases(order: str, count: int | None) -> None:
    phases, decision = play("gradual", unfreezing={"order": order, "stages": count, "epochs_per_stage": 2})
    assert len(phases) == min(count or 5, 5)
    assert phases[0] == Phase(("head",))
    assert [phase.stages for phase in phases[1:]] == unfrozen(STAGES, order)[: len(phases) - 1]
    for phase in phases[1:]:
        assert phase.epochs == 2 and phase.chooses
        assert phase.rates == differential_rates(phase.stages, 0.01, 1.0, STAGES)
    assert decision == Decision()
    assert not any(phase.chooses for phase in play("gradual", training={"patience": 0})[0])


def test_patience() -> None:
    names = ("probe", "full", "differential", "lp-ft", "gradual", "auto", "random")
    default = config.Training()
    assert {name: patience(name, default) for name in names} == dict.fromkeys(names, 0) | {"gradual": PATIENCE}
    assert {name for name in names if chooses(name, default)} == {"gradual", "auto"}
    assert all(patience(name, config.Training(patience=2)) == 2 for name in names)
    assert {name for name in names if chooses(name, config.Training(patience=0))} == {"auto"}
    assert {name for name in names if uses_solver(name)} == {"probe", "lp-ft", "gradual", "auto"}


def test_default_rates() -> None:
    for name in ("full", "differential", "lp-ft", "gradual", "auto", "random"):
        assert default_rate(name, "sgd") == default_rate(name, "nesterov") == RATES["sgd"][name]
        assert default_rate(name, "adamw") == default_rate(name, "nadamw") == RATES["adam"][name]
    with pytest.raises(TlkitError, match="--lr: no rate is known for lion; give --lr"):
        default_rate("full", "lion")
    with pytest.raises(ValueError, match="nothing"):
        play("nothing")


# Paired gain


def test_paired_gain_by_hand() -> None:
    """Falls of 1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 3, standard error sqrt(14 / 3 / 4)."""
    gain, error = paired_gain([5, 5, 5, 9], [4, 3, 2, 3])
    assert gain == pytest.approx(3)
    assert error == pytest.approx(math.sqrt(14 / 12))
    assert paired_gain([1, 2, 3], [0.5, 1.5, 2.5]) == (0.5, 0.0)
    assert paired_gain([1.0], [0.0]) == paired_gain([], []) == (0.0, math.inf)


# Auto


def outcomes_with(accepted: int) -> Callable[[Phase, int], Outcome]:
    seen = 0

    def outcome(phase: Phase, _: int) -> Outcome:
        nonlocal seen
        seen += phase.trial
        return Outcome(phase.epochs, 1.0 if not phase.trial else 0.01, lower(0.1 * min(seen, accepted)))

    return outcome


@pytest.mark.parametrize("accepted", [0, 1, 2, 3, 4])
def test_auto_with_a_part_of_train(accepted: int) -> None:
    """Stops at the first trial that is rejected, and trains what was kept once more, on all images, from the probe."""
    phases, decision = play("auto", outcomes_with(accepted))
    trials = [phase for phase in phases if phase.trial]
    number = min(accepted + 1, 4)
    assert phases[0] == Phase(("head",), on_all=True)
    assert phases[1] == Phase(("head",), remember="probe", listed=False)
    assert phases[2 : 2 + number] == trials
    assert [phase.stages for phase in trials] == unfrozen(STAGES)[:number]
    assert all(phase.remember == "accepted" and not phase.on_all and phase.start is None for phase in trials)
    assert all(phase.rates == differential_rates(phase.stages, 0.01, 1.0, STAGES) for phase in trials)
    again = phases[2 + number :]
    assert again == [
        Phase(trial.stages, trial.epochs, trial.rates, on_all=True, start=None if row else "probe")
        for row, trial in enumerate(trials[:accepted])
    ]
    assert [kept for kept, _ in decision.verdicts.values()] == [row < accepted for row in range(number)]
    assert list(decision.verdicts) == list(range(2, 2 + number))
    assert decision.weights == (None if accepted else "probe")
    assert ("kept the probe" in decision.told) == (accepted == 0)


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_auto_with_images_of_val(accepted: int) -> None:
    """Nothing is trained again; after a rejection the weights before it are taken back."""
    phases, decision = play("auto", outcomes_with(accepted), situation(choosing_is_apart=False))
    number = min(accepted + 1, 4)
    assert phases[0] == Phase(("head",), on_all=True)
    assert [phase.trial for phase in phases[1:]] == [True] * number
    assert decision.weights == ("accepted" if accepted < 4 else None)
    assert list(decision.verdicts) == list(range(2, 2 + number))


@pytest.mark.parametrize(("excess", "kept"), [(-1e-6, False), (0.0, False), (1e-6, True)])
def test_auto_keeps_a_gain_of_more_than_one_standard_error(excess: float, kept: bool) -> None:
    """Falls of 1 and 0 on two images: mean 1/2, standard error 1/2."""

    def outcome(phase: Phase, _: int) -> Outcome:
        return Outcome(phase.epochs, 1.0, (0.0 - excess, 1.0 - excess) if phase.trial else (1.0, 1.0))

    assert paired_gain((1.0, 1.0), (0.0, 1.0)) == (0.5, 0.5)
    phases, decision = play("auto", outcome, situation(chosen_on=2))
    assert decision.verdicts[2][0] == kept
    assert len([phase for phase in phases if phase.trial]) == 1 + kept


def test_auto_does_not_keep_what_is_no_number() -> None:
    _, decision = play("auto", lambda phase, _: Outcome(phase.epochs, 1.0, (math.nan,) * 20 if phase.trial else LOSSES))
    assert decision.weights == "probe" and decision.verdicts[2][0] is False


def test_auto_compares_with_the_last_that_was_kept() -> None:
    """The second trial lowers the probe's loss clearly, but not the first trial's."""

    def outcome(phase: Phase, number: int) -> Outcome:
        return Outcome(phase.epochs, 1.0, lower({3: 0.4, 4: 0.3}.get(number, 0.0)) if phase.trial else LOSSES)

    phases, decision = play("auto", outcome)
    assert {number: kept for number, (kept, _) in decision.verdicts.items()} == {3: False, 2: True}
    assert [phase.stages for phase in phases if phase.trial] == unfrozen(STAGES)[:2]


def test_auto_with_too_few_images() -> None:
    phases, decision = play("auto", at=situation(chosen_on=0))
    assert phases == [Phase(("head",), on_all=True)]
    assert decision.weights is None and "too few" in decision.told


def cost_of(phase: Phase, at: Situation, again: bool) -> float:
    """Of the phase's epochs, in passes of one image forward through the network."""
    trains = sum(cost for name, cost in zip(at.stages, at.costs, strict=True) if name in phase.stages)
    one = at.trained_on * (1 + BACKWARD * trains)
    return phase.epochs * (one + at.chosen_on + (one * (1 + at.chosen_on / at.trained_on) if again else 0))


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("seen", [0, 50, 120, 250, 400, 1000, 3000])
def test_auto_keeps_to_its_budget(seen: int, apart: bool) -> None:
    """All that it trains costs at most four times the probe, whose cost is one pass of what it has seen."""
    at = situation(seen=seen, choosing_is_apart=apart)
    phases, decision = play("auto", outcomes_with(4), at)
    trials = [phase for phase in phases if phase.trial]
    spent = sum(cost_of(phase, at, again=apart) for phase in trials)
    assert spent <= (BUDGET - 2) * seen
    assert all(1 <= phase.epochs <= AUTO_EPOCHS for phase in trials)
    left = (BUDGET - 2) * seen - spent
    rest = unfrozen(STAGES)[len(trials) :]
    if rest:
        assert cost_of(Phase(rest[0], 1), at, again=apart) > left, "one more epoch would not have fitted"
        assert "there is no time for more" in decision.told
    else:
        assert "no stage is left" in decision.told
    for phase in trials:
        if phase.epochs < AUTO_EPOCHS:
            before = sum(cost_of(other, at, again=apart) for other in trials[: trials.index(phase)])
            assert before + cost_of(replace(phase, epochs=phase.epochs + 1), at, again=apart) > (BUDGET - 2) * seen
    if seen == 0:
        assert not trials and decision.weights == ("probe" if apart else None)


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1]), (2, [2]), (4, [3, 1]), (7, [3, 3, 1]), (50, [3, 3, 3, 3])])
def test_epochs_bound_the_sum_of_trials(epochs: int, expected: list[int]) -> None:
    phases, _ = play("auto", outcomes_with(4), situation(seen=1), {"epochs": epochs})
    assert [phase.epochs for phase in phases if phase.trial] == expected, "the budget of the probe's cost is off"


def test_a_time_limit_leaves_time_to_train_again() -> None:
    """100 s, of which the probe took 10: half and a bit of the rest is kept for all images."""
    at, training = situation(), {"time_limit": "100s"}

    def outcome(phase: Phase, number: int) -> Outcome:
        return Outcome(phase.epochs, 10.0 if number < 3 else 5.0, lower(0.1 * (number - 2) if phase.trial else 0.0))

    phases, _ = play("auto", outcome, at, training)
    again = 1 + 20 / 80
    trials = [phase for phase in phases if phase.trial]
    left = 90.0
    for phase in trials:
        assert phase.seconds == pytest.approx(left / (1 + again))
        left -= 5.0 * (1 + again)
    assert len(trials) == 4
    assert all(phase.seconds is None for phase in phases if not phase.trial)
    apart = play("auto", outcome, situation(choosing_is_apart=False), training)[0]
    assert apart[1].seconds == pytest.approx(90.0)


def test_no_time_no_trials() -> None:
    for training, seconds in (({"time_limit": "10s"}, 10.0), ({"time_limit": "0s"}, 0.5)):
        phases, decision = play("auto", lambda phase, _, s=seconds: Outcome(1, s, LOSSES), training=training)
        assert not any(phase.trial for phase in phases)
        assert decision.weights == "probe" and "there is no time" in decision.told


def test_a_clock_that_stops_a_trial_ends_them() -> None:
    def outcome(phase: Phase, number: int) -> Outcome:
        return Outcome(1, 1.0, lower(0.2 if phase.trial else 0.0), stopped="budget" if phase.trial else "")

    phases, decision = play("auto", outcome)
    assert [phase.trial for phase in phases] == [False, False, True, False]
    assert phases[-1].epochs == 1 and phases[-1].start == "probe", "as many epochs as the trial saw"
    assert "there is no time for more" in decision.told


@pytest.mark.parametrize(("probe", "whole"), [(10.0, 6 * 10.0), (2.0, 20.0)], ids=["six times", "never before 20 s"])
def test_the_clock_of_trials_is_six_times_the_probes(probe: float, whole: float) -> None:
    phases, _ = play("auto", lambda phase, number: Outcome(phase.epochs, probe, LOSSES))
    assert phases[2].seconds == pytest.approx((whole - probe) / (2 + 20 / 80))


@pytest.mark.parametrize("accepted", [0, 2, 4])
@pytest.mark.parametrize("apart", [True, False])
def test_a_replay_of_stored_outcomes_is_the_same_run(accepted: int, apart: bool) -> None:
    at, outcomes, outcome = situation(choosing_is_apart=apart, seen=700), [], outcomes_with(accepted)

    def recorded(phase: Phase, number: int) -> Outcome:
        outcomes.append(outcome(phase, number))
        return outcomes[-1]

    first = play("auto", recorded, at)
    stored = json.loads(json.dumps([done.to_dict() for done in outcomes]))
    replayed = [Outcome.from_dict(values) for values in stored]
    assert replayed == outcomes
    assert play("auto", lambda _, number: replayed[number - 1], at) == first
