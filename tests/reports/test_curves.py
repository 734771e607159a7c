"""Learning curves: ticks, scales and places against numbers worked out by hand, and rows that lack this or that."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from tlkit.reports import curves
from tlkit.reports.curves import Value

STAGES = ("stem", "stage1", "stage2", "neck", "head")


def epoch(number: int, phase: int = 1, **figures: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {"phase": phase, "epoch": number, "epochs": 3, "losses": {"loss": 1 / number}, **figures}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.5, 1]),
        (0.09, 1.195, [0, 0.5, 1, 1.5]),
        (0.872, 0.941, [0.86, 0.88, 0.9, 0.92, 0.94, 0.96]),
        (0.2, 0.8, [0.2, 0.4, 0.6, 0.8]),
        (-1.0, 3.0, [-1, 0, 1, 2, 3]),
        (0.5, 0.5, [0.494, 0.496, 0.498, 0.5]),  # a single value: the hundredth below it
        (0.0, 0.0, [0, 0.05, 0.1]),
        (3.0, 2e9, [0, 5e8, 1e9, 1.5e9, 2e9]),
    ],
)
def test_linear_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert curves.linear_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2e-6, 3e-3, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
        (1e-4, 1e-2, [1e-4, 1e-3, 1e-2]),
        (3e-4, 1e-3, [2e-4, 5e-4, 1e-3]),
        (1e-3, 1e-3, [5e-4, 1e-3, 2e-3]),
        (4e-3, 4e-3, [2e-3, 5e-3]),
    ],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert curves.log_ticks(low, high) == ticks


@pytest.mark.parametrize("span", range(1, 60, 3))
@pytest.mark.parametrize("power", [-30, -7, 0, 5])
def test_log_ticks_enclose_their_range_and_stay_few(span: int, power: int) -> None:
    ticks = curves.log_ticks(3 * 10.0 ** (power - span), 7 * 10.0**power)
    assert ticks[0] <= 3 * 10.0 ** (power - span) and ticks[-1] >= 7 * 10.0**power
    assert 2 <= len(ticks) <= 11
    assert all(before < after for before, after in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    ("epochs", "ticks"),
    [(1, [1]), (8, list(range(1, 9))), (9, [2, 4, 6, 8]), (30, [5, 10, 15, 20, 25, 30]), (100, [20, 40, 60, 80, 100])],
)
def test_epoch_ticks(epochs: int, ticks: list[int]) -> None:
    assert curves.epoch_ticks(epochs) == ticks


def test_ticks_and_rates_in_words() -> None:
    assert curves.tick_texts([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert curves.tick_texts([80.0, 85.0, 90.0]) == ["80", "85", "90"]
    assert curves.tick_texts([0.0, 5e8, 1e9]) == ["0.0e+00", "5.0e+08", "1.0e+09"]
    rates = (0.0, 0.3, 0.01, 0.001, 0.00125, 1e-4, 2.5e-5, 1e-12)
    assert [curves.rate_text(rate) for rate in rates] == [
        *("0", "0.3", "0.01", "0.001", "0.00125"),
        *("1e-4", "2.5e-5", "1e-12"),
    ]


def test_scale_and_path() -> None:
    assert curves.place(0.25, 0, 1, 182, 22) == 142  # y counts downwards
    assert curves.place(1 / 3, 0, 1, 0, 100) == 33.3
    assert curves.path([(0, 10), (2.5, 7), (5, 0)]) == "M0 10L2.5 7L5 0"
    assert curves.path([(1, 2)]) == ""


def test_lines_are_cut_at_gaps_and_phases() -> None:
    values = [Value(number, 0.1) for number in (1, 2, 3, 5, 6)]
    cut = curves.runs(values, [1, 3])
    assert [[value.epoch for value in run] for run in cut] == [[1, 2], [3], [5, 6]]


def test_labels_are_spread_as_little_as_can_be() -> None:
    assert curves.spread([10, 50, 90], 13, 0, 100) == [10, 50, 90]
    assert curves.spread([50, 50], 10, 0, 100) == [45, 55]  # least squares: their mean stays
    assert curves.spread([50, 20, 52], 10, 0, 100) == [46, 20, 56]
    assert curves.spread([95, 99], 10, 0, 100) == [90, 100]
    assert curves.spread([2, 1, 0], 10, 0, 100) == [20, 10, 0]
    assert curves.spread([5] * 11, 13, 0, 100) == list(range(0, 101, 10))  # too many: the gaps shrink
    assert curves.spread([], 13, 0, 100) == []


def test_closed_form_heads_and_empty_rows_are_no_points() -> None:
    solved = {"phase": 1, "epoch": 1, "losses": {"0.01": 0.4, "0.1": 0.3}, "val": {"top1": 0.9}}
    empty: dict[str, Any] = {"phase": 2, "epoch": 1, "losses": None, "val": None}
    first, again = epoch(1, 2), epoch(1, 2, step=7)
    only_val = {"val": {"loss": 0.5}}
    assert curves.curve_rows([solved, empty, first, epoch(2, 2), again, only_val]) == [again, epoch(2, 2), only_val]
    assert curves.charts([solved, empty]) == []
    assert curves.charts([]) == []


def test_epochs_are_counted_on_and_phases_parted() -> None:
    rows = [epoch(1), epoch(2), epoch(3), epoch(1, phase=2)]
    (loss,) = curves.charts(rows)
    assert [tick.text for tick in loss.epoch_ticks] == ["1", "2", "3", "4"]
    width = loss.right - loss.left
    assert loss.rules == [pytest.approx(loss.left + 0.75 * width, abs=0.1)]
    assert [(mark.text, mark.place) for mark in loss.phases] == [
        ("phase 1", pytest.approx(loss.left + 0.375 * width, abs=0.1)),
        ("phase 2", pytest.approx(loss.left + 0.875 * width, abs=0.1)),
    ]
    assert not curves.charts(rows[:3])[0].phases  # a single phase needs no number ...
    assert curves.charts(rows[3:])[0].phases[0].text == "phase 2"  # ... but if it is not the first


def test_points_stand_where_their_figures_say() -> None:
    rows = [epoch(1, losses={"loss": 1.0}), epoch(2, losses={"loss": 0.5}, val={"loss": 0.0})]
    (loss,) = curves.charts(rows)
    training, val = loss.lines
    assert (training.names, val.names) == (("training",), ("val",))
    (x1, y1), (x2, y2) = ((dot.x, dot.y) for dot in training.dots)
    assert (x1, x2) == (
        pytest.approx(loss.left + (loss.right - loss.left) / 4, abs=0.1),
        pytest.approx(loss.left + (loss.right - loss.left) * 3 / 4, abs=0.1),
    )
    assert (y1, y2) == (loss.top, (loss.top + loss.bottom) / 2)
    assert training.path == f"M{x1:g} {y1:g}L{x2:g} {y2:g}"
    assert val.path == "" and val.dots[0][:2] == (x2, loss.bottom)  # one value: a point


def test_top1_is_left_out_when_there_is_none_and_bridged_where_it_was_not_measured() -> None:
    rows = [epoch(number, val={"top1": 0.9} if number in (1, 4) else None) for number in range(1, 5)]
    loss, top1 = curves.charts(rows)
    assert (loss.key, top1.key) == ("loss", "top1")
    assert [value.epoch for value in top1.lines[0].values] == [1, 4] and top1.lines[0].path.count("L") == 1
    assert [tick.text for tick in top1.ticks] == ["89.0 %", "89.5 %", "90.0 %"]
    assert [chart.key for chart in curves.charts([epoch(1)])] == ["loss"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e200, None, "0.3", [0.3]])
def test_what_is_no_number_leaves_a_gap(value: Any) -> None:
    rows = [epoch(1), epoch(2, losses={"loss": value}, rates={"head": value}, choosing=value), epoch(3)]
    (loss,) = curves.charts(rows)
    assert [found.epoch for found in loss.lines[0].values] == [1, 3]


@pytest.mark.parametrize("key", ["phase", "epoch", "epochs", "losses", "rates", "choosing", "val"])
def test_any_key_may_be_absent(key: str) -> None:
    figures = {"rates": {"head": 0.1}, "choosing": {"loss": 0.5, "top1": 0.8}, "val": {"loss": 0.6, "top1": 0.7}}
    rows = [epoch(number, **figures) for number in (1, 2)]
    for row in rows:
        del row[key]
    assert all(len(line.values) == 2 for chart in curves.charts(rows) for line in chart.lines)


def test_rates_by_stage_from_stem_to_head() -> None:
    phase1 = [epoch(k, rates={"head": 0.01}) for k in (1, 2)]
    phase2 = [epoch(k, 2, rates=dict.fromkeys(STAGES, 1e-4)) for k in (1, 2)]
    assert list(curves.stage_rates(phase1 + phase2)) == [STAGES[:-1], ("head",)]
    _, chart = curves.charts(phase1 + phase2)
    backbone, head = chart.lines
    assert [label.text for label in chart.labels] == ["stem–neck", "head"]
    assert chart.labels[0].y - chart.labels[1].y == curves.LINE_HEIGHT  # both end at 1e-4: the head goes above
    assert head.path.count("M") == 2 and backbone.path.count("M") == 1  # a line ends with its phase
    assert (head.dash, backbone.dash) == (1, 0)
    assert [tick.text for tick in chart.ticks] == ["1e-4", "0.001", "0.01"]
    assert [float(run.split()[-1]) for run in head.path.split("M")[1:]] == [chart.top, chart.bottom]


def test_names_of_lines() -> None:
    order = list(STAGES)
    assert curves._line_name(("neck",), order) == "neck"
    assert curves._line_name(("stem", "stage1", "stage2"), order) == "stem–stage2"
    assert curves._line_name(("stem", "neck", "head"), order) == "stem +2"
    assert curves.shorten("x" * 11) == "x" * 11 and curves.shorten("x" * 12) == "x" * 10 + "…"


def test_a_schedule_may_end_at_zero() -> None:
    rows = [epoch(k, rates={"stem": rate / 10, "head": rate}) for k, rate in ((1, 0.1), (2, 0.05), (3, 1e-5), (4, 0))]
    _, chart = curves.charts(rows)
    assert chart.gaps and all(line.path.count("L") == 1 for line in chart.lines)
    assert [line.values[-1] for line in chart.lines] == [(4, 0.0), (4, 0.0)]
    assert [tick.text for tick in chart.ticks] == ["0.001", "0.01", "0.1"]
    assert not any(chart.key == "rate" for chart in curves.charts([epoch(1, rates={"head": 0.0})]))


def test_single_epoch_gives_points_beside_their_names() -> None:
    _, chart = curves.charts([epoch(1, rates={"stem": 1e-4, "head": 1e-3})])
    assert [line.path for line in chart.lines] == ["", ""]
    assert [len(line.dots) for line in chart.lines] == [1, 1]
    assert [label.y for label in chart.labels] == [line.dots[0].y for line in chart.lines]


@pytest.mark.parametrize("stages", [2, 8, 12, 40])
def test_labels_never_overlap(stages: int) -> None:
    rates = {f"stage{k}": 1e-3 * (1 + k / 1000) for k in range(stages)}
    _, chart = curves.charts([epoch(k, rates=rates) for k in (1, 2, 3)])
    assert len(chart.labels) == len(chart.lines) == min(stages, curves.LINES_SHOWN)
    assert chart.left_out == max(stages - curves.LINES_SHOWN, 0)
    heights = sorted(label.y for label in chart.labels)
    assert all(after - before >= curves.LINE_HEIGHT - 0.11 for before, after in itertools.pairwise(heights))
    assert heights[0] >= chart.top and heights[-1] <= chart.bottom


def test_stages_that_train_in_turn_are_named_where_they_end() -> None:
    rows = [epoch(k, p, rates={name: 1e-4 / k}) for p, name in enumerate(STAGES, start=1) for k in (1, 2)]
    _, chart = curves.charts(rows)
    inside = [label for label in chart.labels if label.leader is None]
    assert [label.text for label in inside] == list(STAGES[:-1])
    for one, other in itertools.combinations(inside, 2):
        reach = (len(one.text) + len(other.text)) * curves.CHARACTER / 2
        assert abs(one.x - other.x) >= reach or abs(one.y - other.y) >= curves.LINE_HEIGHT
