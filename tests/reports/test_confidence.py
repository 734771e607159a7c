"""Reliability and coverage on the report page, against numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tlkit.evaluation import metrics
from tlkit.reports import confidence
from tlkit.reports.outcome import Outcome


def outcome(sure: list[float], right: list[bool]) -> Outcome:
    return Outcome(np.zeros(len(sure), int), 1 - np.array(right, int), np.array(sure), 2)


def test_coverage_curve() -> None:
    sure, right = np.array([0.6, 0.9, 0.8, 0.8]), np.array([False, True, True, False])
    kept, accuracy = confidence.coverage_curve(sure, right)
    assert kept.tolist() == [0.25, 0.75, 1.0]  # equal confidences are kept together
    assert accuracy == pytest.approx([1, 2 / 3, 1 / 2])


def test_coverage_curve_is_thinned_but_keeps_its_ends() -> None:
    random = np.random.default_rng(0)
    sure = random.uniform(0.3, 1, 10_000)
    right = random.uniform(size=10_000) < sure
    kept, accuracy = confidence.coverage_curve(sure, right)
    assert len(kept) == 200 and kept[0] == 1e-4 and kept[-1] == 1
    assert accuracy[-1] == right.mean()
    assert all(before < after for before, after in itertools.pairwise(kept))


def test_curve_goes_through_the_table() -> None:
    drawn = confidence.coverage(outcome([0.55, 0.65, 0.75, 0.97], [False, True, False, True]))
    assert drawn is not None
    full = next(dot for dot in drawn.dots if dot.value == 0)
    assert full.x == drawn.plot.right and drawn.path.endswith(f"L{full.x:g} {full.y:g}")


def test_reliability_bars_stand_on_their_bins() -> None:
    sure, right = [0.52, 0.53, 0.99, 0.99], [True, False, True, True]
    drawn = confidence.reliability(outcome(sure, right))
    assert drawn is not None
    low, high = drawn.bars
    plot, middle = drawn.plot, (drawn.plot.top + drawn.plot.bottom) / 2
    assert (low.y, high.y) == (middle, plot.top)
    assert low.x == pytest.approx(plot.x.at(7 / metrics.BINS) + 0.5, abs=0.1)
    assert high.x + high.width == pytest.approx(plot.right - 0.5, abs=0.1)
    assert [bar.height for bar in drawn.counts] == [confidence.COUNTS_HEIGHT] * 2 and drawn.most == 2


def test_without_images_nothing_is_drawn() -> None:
    assert confidence.reliability(outcome([], [])) is confidence.coverage(outcome([], [])) is None


@pytest.mark.parametrize("right", [True, False])
def test_one_image(right: bool) -> None:
    drawn = confidence.coverage(outcome([0.7], [right]))
    assert drawn is not None and drawn.path == "" and len(drawn.dots) == 4
    assert all(drawn.plot.top <= dot.y <= drawn.plot.bottom for dot in drawn.dots)
