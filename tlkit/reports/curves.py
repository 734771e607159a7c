"""Learning curves: where the lines, ticks and labels of the report page's charts go; the markup is the page's.

Lengths are in units of the charts' viewBox, with y counted downwards; epochs are counted on through all phases, from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WIDTH, PLOT_HEIGHT = 320.0, 160.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 13.0, 22.0, 36.0  # margins: tick labels, half a tick label, phases, epochs
CHARACTER, LINE_HEIGHT = 7.4, 13.0  # of a label: mean width, and what it needs in height
LABEL_LENGTH = 11  # characters of a stage's name beside its line; the legend has all of it
LINES_SHOWN = 12  # rates of more stages cannot be told apart
DOTS_SHOWN = 25  # more points of one line run into each other
DASHES = 6  # patterns that the page's style sheet knows
DECADES_SHOWN = 3  # of a line in one phase: what a schedule sinks to at its end would press the rest together
INFINITE = 1e100  # far above any float32; keeps the scales' own arithmetic finite
SPLITS = ("losses", "choosing", "val")  # where a row keeps the figures of each line, in the legend's order
NAMES = {"losses": "training", "choosing": "choosing part", "val": "val"}

Point = tuple[float, float]


class Value(NamedTuple):
    """One epoch of a line: the figure as it was measured."""

    epoch: int
    value: float


class Dot(NamedTuple):
    """A value that is marked on its line."""

    x: float
    y: float
    epoch: int
    value: float


class Tick(NamedTuple):
    """A round number on an axis, and where it stands."""

    place: float
    text: str


class Label(NamedTuple):
    """The name beside a line; its line leads to it from ``(from_x, from_y)``, or nothing does."""

    x: float
    y: float
    text: str
    anchor: str
    leader: Point | None


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        names: What it shows, in words; several stages where their rates are the same throughout.
        values: What was measured, by epoch; never empty.
        path: Commands of an SVG path; empty where no two points are joined.
        dots: The values that are marked.
        dash: Which dash pattern, from 0 (none).
        hue: Hue in degrees; None where the pattern's own colour serves.
    """

    names: tuple[str, ...]
    values: tuple[Value, ...]
    path: str
    dots: tuple[Dot, ...]
    dash: int
    hue: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart as the page draws it.

    Args:
        key: ``loss``, ``top1`` (a fraction) or ``rate``.
        height: Height of the viewBox.
        left, right, top, bottom: Edges of the plot.
        epoch_ticks: Ticks along x.
        ticks: Ticks along y.
        rules: Where along x one phase ends and the next one begins.
        phases: Number of each phase, above its epochs.
        lines: The lines, in the legend's order.
        labels: Names that stand beside their lines.
        left_out: How many lines were too many.
        gaps: Whether values have no place on the axis.
    """

    key: str
    height: float
    left: float
    right: float
    top: float
    bottom: float
    epoch_ticks: Sequence[Tick]
    ticks: Sequence[Tick]
    rules: Sequence[float]
    phases: Sequence[Tick]
    lines: Sequence[Line]
    labels: Sequence[Label] = ()
    left_out: int = 0
    gaps: bool = False


def charts(history: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """The charts of a run: loss, top-1 and learning rates by epoch, each where there is anything to draw.

    Args:
        history: Rows of ``metrics.jsonl``; whatever a row lacks, the lines do without.
    """
    rows = curve_rows(history)
    drawn = (
        _measured(rows, "loss", {split: _values(rows, split, "loss") for split in SPLITS}),
        _measured(rows, "top1", {split: _values(rows, split, "top1") for split in SPLITS[1:]}),
        _rates(rows),
    )
    return [chart for chart in drawn if chart is not None]


def curve_rows(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that are points of curves, one for each epoch.

    A head in closed form has no epochs (its losses belong to strengths of the penalty), so its row is left out. Of an
    epoch that was run again after a stop, the last row counts.
    """
    rows: dict[Any, Mapping[str, Any]] = {}
    for number, row in enumerate(history):
        losses, rates = _mapping(row, "losses"), _mapping(row, "rates")
        if "loss" in losses or rates or (not losses and any(_mapping(row, split) for split in SPLITS)):
            phase, epoch = row.get("phase"), row.get("epoch")
            rows[number if phase is None or epoch is None else (phase, epoch)] = row
    return list(rows.values())


# Scales


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``.

    Args:
        low, high: Smallest and largest value; a range below a hundredth of them is widened to that, downwards.
        most: About how many ticks; there may be one more.
    """
    scale = max(abs(low), abs(high))
    if scale == 0:
        high = 0.1
    low = min(low, high - 0.01 * scale)
    step = _round_step((high - low) / (most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high`` (both above 0), in equal ratios or nearly.

    Powers of ten, every second, third ... in a long range, and 1, 2 and 5 times powers of ten in a short one.
    """
    decades = math.log10(high) - math.log10(low)
    marks, stride = (1, 2, 5) if decades <= 1.2 else (1,), max(1, math.ceil(decades / 8))
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + stride
    ticks = [float(f"{mark}e{power}") for power in range(first, last + 1, stride) for mark in marks]
    start = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    if start == end:  # one value: it stands in the middle
        start, end = start - 1, end + 1
    return ticks[start : end + 1]


def epoch_ticks(epochs: int, most: int = 8) -> list[int]:
    """The epochs that are written on the axis: all, or every 2nd, 5th, 10th ..."""
    step = max(1, round(_round_step(epochs / most)))
    return list(range(step, epochs + 1, step))


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where ``value`` stands between ``start`` (for ``low``) and ``end`` (for ``high``), to a tenth of a unit."""
    return round(start + (value - low) / (high - low) * (end - start), 1)


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    power = math.floor(math.log10(least))
    steps = [float(f"{mark}e{power + more}") for more in (0, 1) for mark in (1, 2, 5)]
    return next(step for step in steps if step >= least * (1 - 1e-9))


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Evenly spaced ticks in words, with the decimals that tell them apart."""
    step = ticks[1] - ticks[0]
    if step < 1e-4 or max(abs(ticks[0]), abs(ticks[-1])) >= 1e5:
        return [f"{tick:.1e}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def rate_text(rate: float) -> str:
    """A learning rate as it is typed: ``0.01``, ``0.001``, ``1e-4``, ``2.5e-5``."""
    if rate == 0 or 1e-3 <= abs(rate) < 1e4:
        return f"{rate:.3g}"
    mantissa, power = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


# Lines


def path(points: Sequence[Point]) -> str:
    """The commands of an SVG path through the points; empty for fewer than two."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if len(points) > 1 else ""


def phase_starts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, int]]:
    """(number of the phase, its first epoch) for each run of rows of one phase."""
    numbers = [row.get("phase") for row in rows]
    return [(number, i + 1) for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]


def runs(values: Sequence[Value], starts: Iterable[int]) -> list[list[Value]]:
    """The values cut where an epoch is missing or a phase starts."""
    cuts, found = set(starts), list[list[Value]]()
    for value in values:
        if not found or value.epoch in cuts or value.epoch != found[-1][-1].epoch + 1:
            found.append([])
        found[-1].append(value)
    return found


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as can be (least squares), in their order, at least ``gap`` apart.

    Pool adjacent violators: without the gaps, neighbours that would change places share their mean. The result stays
    between ``low`` and ``high``; where that is too narrow, the gaps shrink.
    """
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        blocks.append((wanted[i] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, size), (other, more) = blocks.pop(), blocks.pop()
            blocks.append(((mean * size + other * more) / (size + more), size + more))
    top = high - (len(wanted) - 1) * gap
    means = [min(max(mean, low), top) for mean, size in blocks for _ in range(size)]
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = round(means[rank] + rank * gap, 1)
    return placed


def shorten(text: str, length: int = LABEL_LENGTH) -> str:
    """The text, or its beginning and an ellipsis, in at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


# Charts


def _mapping(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = row.get(key)
    return found if isinstance(found, Mapping) else {}


def _values(rows: Sequence[Mapping[str, Any]], part: str, key: str) -> tuple[Value, ...]:
    """The finite numbers among the rows' figures: a loss that blew up leaves a gap, not a broken page."""
    found = ((epoch, _mapping(row, part).get(key)) for epoch, row in enumerate(rows, start=1))
    known = ((epoch, value) for epoch, value in found if isinstance(value, int | float) and abs(value) < INFINITE)
    return tuple(Value(epoch, float(value) if abs(value) > 1 / INFINITE else 0.0) for epoch, value in known)


def _frame(rows: Sequence[Mapping[str, Any]], left: float, right: float) -> dict[str, Any]:
    """What every chart shows along x: epochs and phases."""
    starts = phase_starts(rows)
    edges = [_epoch_x(len(rows), left, right)(first - 0.5) for _, first in starts]
    spans = list(zip(edges, [*edges[1:], right], strict=True))
    word = "phase {}" if min(end - start for start, end in spans) >= 8 * CHARACTER else "{}"
    named = [
        Tick(round((start + end) / 2, 1), word.format(number))
        for (number, _), (start, end) in zip(starts, spans, strict=True)
        if number is not None and end - start >= 2 * CHARACTER
    ]
    x = _epoch_x(len(rows), left, right)
    return {
        "left": left,
        "right": right,
        "top": TOP,
        "epoch_ticks": [Tick(x(epoch), str(epoch)) for epoch in epoch_ticks(len(rows))],
        "rules": edges[1:],
        "phases": [] if [number for number, _ in starts] == [1] else named,
    }


def _epoch_x(epochs: int, left: float, right: float) -> Callable[[float], float]:
    """Each epoch has a strip of the plot and stands in its middle, so that a single one needs no rule of its own."""
    return lambda epoch: place(epoch - 0.5, 0, epochs, left, right)


def _measured(rows: Sequence[Mapping[str, Any]], key: str, series: Mapping[str, tuple[Value, ...]]) -> Chart | None:
    """Loss or top-1: one line for each part of the images. Epochs without a measurement are bridged."""
    series = {split: values for split, values in series.items() if values}
    if not series:
        return None
    figures = [value.value for values in series.values() for value in values]
    ticks = linear_ticks(min(figures), max(figures))
    right, bottom = WIDTH - RIGHT, TOP + PLOT_HEIGHT
    x = _epoch_x(len(rows), LEFT, right)
    lines = []
    for split, values in series.items():
        points = [(x(epoch), place(value, ticks[0], ticks[-1], bottom, TOP)) for epoch, value in values]
        marked = len(values) <= DOTS_SHOWN
        dots = [Dot(*point, *value) for point, value in zip(points, values, strict=True) if marked]
        lines.append(Line((NAMES[split],), values, path(points), tuple(dots), SPLITS.index(split)))
    texts = [f"{text} %" for text in tick_texts([100 * tick for tick in ticks])] if key == "top1" else tick_texts(ticks)
    placed = [place(tick, ticks[0], ticks[-1], bottom, TOP) for tick in ticks]
    return Chart(
        key=key,
        height=bottom + BOTTOM,
        bottom=bottom,
        ticks=[Tick(y, text) for y, text in zip(placed, texts, strict=True)],
        lines=lines,
        **_frame(rows, LEFT, right),
    )


def stage_rates(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], tuple[Value, ...]]:
    """The rates by stage, from stem to head; stages whose rates are the same throughout share one entry.

    The row with the most stages gives their order: the first phase may know only the head.
    """
    tables = [_mapping(row, "rates") for row in rows]
    order = dict.fromkeys(name for rates in sorted(tables, key=len, reverse=True) for name in rates)
    stages: dict[tuple[Value, ...], tuple[str, ...]] = {}
    for name in order:
        if values := _values(rows, "rates", name):
            stages[values] = (*stages.get(values, ()), str(name))
    return {names: values for values, names in stages.items()}


def _rates(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Learning rates on a logarithmic axis. A line stops where its stage no longer trains, and where a phase ends."""
    found = stage_rates(rows)
    starts = [first for _, first in phase_starts(rows)]
    seen = {names: _on_log_axis(values, starts) for names, values in found.items()}
    stages = [(names, values) for names, values in seen.items() if values]
    if not stages:
        return None
    shown = stages[-LINES_SHOWN:]  # the nearest to the head: they train the longest
    texts = [_line_name(names, [name for other in found for name in other]) for names, _ in shown]
    margin = min(max(map(len, texts)), LABEL_LENGTH) * CHARACTER + 12 if len(shown) > 1 else RIGHT
    left, right, bottom = LEFT, WIDTH - margin, TOP + max(PLOT_HEIGHT, len(shown) * LINE_HEIGHT)
    figures = [value.value for _, values in shown for value in values]
    ticks = log_ticks(min(figures), max(figures))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    x = _epoch_x(len(rows), left, right)
    lines, ends = [], []
    for number, (names, values) in enumerate(shown):
        spots = [
            [Dot(x(value.epoch), place(math.log10(value.value), low, high, bottom, TOP), *value) for value in run]
            for run in runs(values, starts)
        ]
        drawn = "".join(path([(dot.x, dot.y) for dot in run]) for run in spots)
        single = tuple(run[0] for run in spots if len(run) == 1)
        lines.append(Line(names, found[names], drawn, single, number % DASHES, _hue(number, len(shown))))
        ends.append(spots[-1][-1])
    return Chart(
        key="rate",
        height=bottom + BOTTOM,
        bottom=bottom,
        ticks=[Tick(place(math.log10(tick), low, high, bottom, TOP), rate_text(tick)) for tick in ticks],
        lines=lines,
        labels=_labels(texts, ends, starts[-1], right, bottom) if len(shown) > 1 else (),
        left_out=len(stages) - len(shown),
        gaps=seen != found,
        **_frame(rows, left, right),
    )


def _on_log_axis(values: Sequence[Value], starts: Sequence[int]) -> tuple[Value, ...]:
    """The values without those that a schedule takes to 0, or nearly so, at the ends of a phase."""
    kept: list[Value] = []
    for run in runs(values, starts):
        floor = max(value.value for value in run) / 10**DECADES_SHOWN
        kept += [value for value in run if value.value >= floor > 0]
    return tuple(kept)


def _hue(number: int, lines: int) -> int:
    """From violet (stem) by way of blue and green to orange (head), in degrees."""
    return round(275 - 250 * number / max(lines - 1, 1)) if lines > 1 else 170


def _line_name(names: tuple[str, ...], order: Sequence[str]) -> str:
    """``head``, ``stem–stage3`` for neighbours, ``stem +2`` for stages that lie apart."""
    if len(names) == 1:
        return names[0]
    together = order.index(names[-1]) - order.index(names[0]) == len(names) - 1
    return f"{names[0]}–{names[-1]}" if together else f"{names[0]} +{len(names) - 1}"


def _labels(texts: Sequence[str], ends: Sequence[Dot], last_phase: int, right: float, bottom: float) -> list[Label]:
    """Names of the lines: to the right of those that reach the last phase, at the end of the others."""
    last = [i for i, end in enumerate(ends) if end.epoch >= last_phase][::-1]  # of equal ends, the head goes on top
    beside = dict(zip(last, spread([ends[i].y for i in last], LINE_HEIGHT, TOP, bottom), strict=True))
    placed: list[Label] = []
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        if i in beside:
            placed.append(Label(right + 8, beside[i], text, "start", (end.x, end.y)))
            continue
        half = min(len(text), LABEL_LENGTH) * CHARACTER / 2
        x = round(min(max(end.x, LEFT + half), right - half), 1)
        free = (y for y in _offsets(end.y, bottom) if not _taken(x, y, half, placed))
        placed.append(Label(x, next(free, end.y), text, "middle", None))
    return placed


def _offsets(y: float, bottom: float) -> Iterable[float]:
    """Heights for a label at a point, the best first: just above, just below, then further off."""
    for step in range(1, 8):
        yield from (each for each in (y + 4 - step * LINE_HEIGHT, y - 4 + step * LINE_HEIGHT) if TOP < each < bottom)


def _taken(x: float, y: float, half: float, placed: Iterable[Label]) -> bool:
    for label in placed:
        reach = half + min(len(label.text), LABEL_LENGTH) * CHARACTER / 2
        if label.anchor == "middle" and abs(label.x - x) < reach and abs(label.y - y) < LINE_HEIGHT:
            return True
    return False
