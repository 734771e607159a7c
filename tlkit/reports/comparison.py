"""The page of a comparison: which network is best on the same images, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tlkit import __version__
from tlkit.reports.curves import BOTTOM, CHARACTER, LEFT, LINE_HEIGHT, WIDTH, Label, log_ticks, shorten
from tlkit.reports.plot import RIGHT, TOP, Axis, Plot, shares_axis
from tlkit.reports.template import encodable, template
from tlkit.reports.words import brief, percent, plain, points
from tlkit.run_folder import write_text

LEVEL = 0.05  # of the adjusted p-value, below which a difference is called clear
ROW_HEIGHT = 30.0  # of a network among the intervals: its name, and the interval below it
NAME_LENGTH = 40
LABEL_LENGTH = 22  # characters of a name beside its point
SCATTER_HEIGHT = 220.0


@dataclass(frozen=True)
class Comparison:
    """What a comparison page tells.

    Args:
        title: Command and data, for instance ``compare hymenoptera_256``.
        summary: The object that ``compare --json`` prints.
    """

    title: str
    summary: Mapping[str, Any]


class Interval(NamedTuple):
    """A network's accuracy with its interval, as drawn."""

    y: float
    low: float
    middle: float
    high: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Intervals:
    """The chart of accuracies.

    Args:
        plot: Accuracy along x; y has no axis.
        lines: The networks, the best first.
    """

    plot: Plot
    lines: list[Interval]


class Point(NamedTuple):
    """A network among the others, as drawn; its name may find no room."""

    x: float
    y: float
    label: Label | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Scatter:
    """The chart of accuracy against work."""

    plot: Plot
    points: list[Point]


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page as UTF-8."""
    write_text(path, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML; what UTF-8 cannot hold is spelt out as an escape."""
    summary = comparison.summary
    rows = sorted(summary.get("rows") or [], key=lambda row: (not row.get("best"), -row["top1"]))
    keys = {key for row in rows for key, value in row.items() if value is not None}
    html = template("comparison.html").render(
        page=comparison,
        summary=summary,
        version=summary.get("version") or __version__,
        rows=rows,
        keys=keys,
        name=name,
        name_length=NAME_LENGTH,
        headline=_headline(rows, summary),
        verdicts=verdicts(rows),
        intervals=intervals(rows),
        scatter=scatter(rows),
    )
    return encodable(html)


def name(row: Mapping[str, Any]) -> str:
    """What a network is called."""
    return plain(row.get("title") or row.get("model"))


def _headline(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, str]:
    if not rows:
        return {"who": "There is no network to compare", "share": "", "interval": ""}
    split, ends = plain(summary.get("split")), rows[0].get("top1_ci95")
    noun = "images" if split == "all" else f"{split} images"
    often = "right" if len(rows) == 1 else "right most often"
    return {
        "who": f"{name(rows[0])} is {often} on {summary.get('images', 0):,} {noun}:",
        "share": percent(rows[0]["top1"]),
        "interval": f"(95 % interval {points(ends[0])} to {points(ends[1])})" if ends else "",
    }


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In plain words, the networks that the best one (the first) is clearly better than, and the others."""
    tested = [row for row in rows[1:] if row.get("mcnemar")]
    clear = [row for row in tested if row["mcnemar"]["p_holm"] < LEVEL]
    unclear = [row for row in tested if row["mcnemar"]["p_holm"] >= LEVEL]
    said = []
    if clear:
        said.append(f"It is clearly better than {_listed(clear)}.")
    if unclear:
        chance = "what sets them apart on these images may be chance"
        said.append(f"It is not clearly better than {_listed(unclear)}: {chance}.")
    return said


def _listed(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name(row) for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def intervals(rows: Sequence[Mapping[str, Any]]) -> Intervals | None:
    """Accuracies with their 95 % intervals under each other; None without networks."""
    if not rows:
        return None
    ends = [row.get("top1_ci95") or (row["top1"], row["top1"]) for row in rows]
    bottom = TOP + ROW_HEIGHT * len(rows)
    x = shares_axis(RIGHT, WIDTH - RIGHT, min(low for low, _ in ends), max(high for _, high in ends))
    plot = Plot(bottom + BOTTOM, x, Axis((0, 1), ("", ""), bottom, TOP - 12), "top-1 accuracy", "")
    lines = [
        Interval(TOP + ROW_HEIGHT * (place + 0.5), x.at(low), x.at(row["top1"]), x.at(high), row)
        for place, (row, (low, high)) in enumerate(zip(rows, ends, strict=True))
    ]
    return Intervals(plot, lines)


def scatter(rows: Sequence[Mapping[str, Any]]) -> Scatter | None:
    """Accuracy against multiply-accumulates of an image on a logarithmic axis; None where fewer than two are known."""
    known = [row for row in rows if row.get("macs")]
    if len(known) < 2:
        return None
    bottom = TOP + SCATTER_HEIGHT
    work, shares = [float(row["macs"]) for row in known], [row["top1"] for row in known]
    ticks = log_ticks(min(work), max(work))
    texts = [brief(tick) for tick in ticks]
    x = Axis(ticks, texts, LEFT, WIDTH - RIGHT, log=True)
    plot = Plot(bottom + BOTTOM, x, shares_axis(bottom, TOP, min(shares), max(shares)), "MACs per image", "top-1")
    spots = [(x.at(amount), plot.y.at(share)) for amount, share in zip(work, shares, strict=True)]
    labels = _labels([shorten(name(row), LABEL_LENGTH) for row in known], spots, plot)
    return Scatter(plot, [Point(*spot, label, row) for spot, label, row in zip(spots, labels, known, strict=True)])


def _labels(texts: Sequence[str], spots: Sequence[tuple[float, float]], plot: Plot) -> list[Label | None]:
    """Names near their points where they meet no other name or point and stay in the plot; None where none such is."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    taken.append((plot.left, plot.top - 20, plot.left + len(plot.y_name) * CHARACTER, plot.top - 6))
    placed: list[Label | None] = []
    for text, (x, y) in zip(texts, spots, strict=True):
        wide = len(text) * CHARACTER * 0.85
        found = None
        for left, middle in _places(x, y, wide):
            box = (left, middle - LINE_HEIGHT / 2, left + wide, middle + LINE_HEIGHT / 2)
            inside = plot.left - 30 <= left and box[2] <= WIDTH - 2 and box[1] >= 1 and box[3] <= plot.bottom
            if inside and not any(_overlap(box, other) for other in taken):
                leader = (x, y) if abs(middle - y) > LINE_HEIGHT * 1.2 else None
                found = Label(round(left + wide / 2, 1), round(middle, 1), text, "middle", leader)
                taken.append(box)
                break
        placed.append(found)
    return placed


def _places(x: float, y: float, wide: float) -> list[tuple[float, float]]:
    """Left end and middle of a name near a point, the best first: above, below, beside, then further off."""
    near = [(x - wide / 2, y - 11), (x - wide / 2, y + 11), (x + 6, y), (x - 6 - wide, y)]
    near += [(x + side - wide * share, y + up) for up in (-11, 11) for side, share in ((-6, 0), (6, 1))]
    far = [
        (x - wide * share, y + sign * steps * LINE_HEIGHT)
        for steps in (1, 2, 3, 4, 5, 6)
        for sign in (-1, 1)
        for share in (0.5, 0.1, 0.9, 0, 1)
    ]
    return near + far


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
