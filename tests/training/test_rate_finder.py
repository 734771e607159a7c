"""The learning-rate range test on made-up curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tlkit.training.rate_finder import HIGHEST, LOWEST, STEPS, gives_up, rate_at, smoothed, suggest


@pytest.mark.parametrize("steps", [2, 10, STEPS])
def test_rates_are_geometric(steps: int) -> None:
    assert [rate_at(step, steps) for step in range(steps)] == pytest.approx(np.geomspace(LOWEST, HIGHEST, steps))
    assert rate_at(0, 1) == LOWEST


def test_smoothing_is_a_moving_average_without_bias() -> None:
    assert smoothed([3.0] * 20) == pytest.approx([3.0] * 20), "a constant stays what it is, from the start"
    losses = np.random.default_rng(0).random(30)
    for count in (1, 2, 30):
        weights = 0.9 ** np.arange(count)[::-1]
        assert smoothed(losses.tolist())[count - 1] == pytest.approx((weights * losses[:count]).sum() / weights.sum())


def unsmoothed(curve: np.ndarray) -> list[float]:
    """Losses whose smoothed curve is the given one."""
    sums = curve * (1 - 0.9 ** np.arange(1, len(curve) + 1))
    return ((sums - 0.9 * np.concatenate([[0.0], sums[:-1]])) / 0.1).tolist()


RATES = [rate_at(step) for step in range(STEPS)]


@pytest.mark.parametrize("steepest", [15, 40, 63])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_the_steepest_rate_is_suggested(steepest: int, noise: float) -> None:
    """A logistic fall, steepest at its middle, and a rise (steeper than the fall, but upwards) after it."""
    steps = np.arange(STEPS)
    curve = 2 - 1.5 / (1 + np.exp(-(steps - steepest) / 4)) + 3 * np.clip(steps - 85, 0, None)
    curve += np.random.default_rng(0).normal(0, noise, STEPS)
    assert smoothed(unsmoothed(curve)) == pytest.approx(curve.tolist())
    found = suggest(RATES, unsmoothed(curve))
    assert found is not None
    assert abs(RATES.index(found) - steepest) <= (0 if noise == 0 else 2)


def test_a_fall_after_the_minimum_does_not_count() -> None:
    curve = np.concatenate([np.linspace(2, 1.5, 30), np.linspace(9, 1.6, 70)])
    found = suggest(RATES, unsmoothed(curve))
    assert found is not None and RATES.index(found) < 30


@pytest.mark.parametrize(
    "losses",
    [[0.0] * 50, np.linspace(1, 3, 100).tolist(), [1.0, 0.9], [1.0], [], [math.nan] * 5],
    ids=["flat", "rising", "two", "one", "none", "nothing finite"],
)
def test_nothing_is_suggested_where_nothing_falls(losses: list[float]) -> None:
    assert suggest(RATES[: len(losses)], losses) is None


@pytest.mark.parametrize("tail", [[math.nan], [math.inf], [math.inf, math.nan, math.nan]])
def test_an_end_that_is_not_finite_is_passed_over(tail: list[float]) -> None:
    curve = 2 - 1.5 / (1 + np.exp(-(np.arange(80) - 40) / 4))
    losses = [*unsmoothed(curve), *tail]
    assert suggest(RATES[: len(losses)], losses) == suggest(RATES[:80], losses[:80]) == RATES[40]


def test_it_gives_up_where_the_loss_has_left() -> None:
    assert not gives_up([1.0] * 10)
    assert not gives_up([1.0] * 10 + [10.0]), "one step is not the curve"
    assert gives_up([1.0] * 10 + [10.0] * 6)
    assert gives_up([1.0, math.nan]) and gives_up([math.inf])
    assert not gives_up([1.0, 60.0]), "the first steps tell little"
