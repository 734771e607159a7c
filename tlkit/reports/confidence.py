"""Charts of what confidence is worth: reliability by bin, and accuracy of what is kept above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tlkit.evaluation import metrics
from tlkit.reports.curves import Dot, path
from tlkit.reports.outcome import Outcome
from tlkit.reports.plot import Plot, frame

COUNTS_HEIGHT = 44.0  # of the bars below that say how many images a bin has
COUNTS_GAP = 40.0  # between the plot and those: the ticks of the plot stand there
POINTS_SHOWN = 200


class Bar(NamedTuple):
    """An upright bar, its images, mean confidence and accuracy."""

    x: float
    y: float
    width: float
    height: float
    bin: dict[str, Any]


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram.

    Args:
        plot: Accuracy against confidence.
        height: Of the viewBox, with the counts.
        base: Where the bars of counts stand.
        bars: Accuracy of each bin.
        counts: Images of each bin, drawn as bars.
        means: Mean confidence and accuracy of each bin.
        most: Images of the fullest bin.
    """

    plot: Plot
    height: float
    base: float
    bars: list[Bar]
    counts: list[Bar]
    means: list[Dot]
    most: int


@dataclass(frozen=True)
class Coverage:
    """Share of images kept against accuracy of those.

    Args:
        plot: The axes.
        path: Commands of an SVG path, over all thresholds.
        dots: Some thresholds, with their accuracy.
        rows: The same as a table.
    """

    plot: Plot
    path: str
    dots: list[Dot]
    rows: list[dict[str, Any]]


def reliability(outcome: Outcome) -> Reliability | None:
    """Accuracy of images by confidence; None without images."""
    if not len(outcome.truth):
        return None
    bins = metrics.reliability(outcome.confidence, outcome.right)
    plot = frame((0, 1), (0, 1), "confidence", "accuracy")
    most = max(each["images"] for each in bins)
    base = plot.bottom + COUNTS_GAP + COUNTS_HEIGHT
    bars, counts, means = [], [], []
    for each in bins:
        left, right = plot.x.at(each["low"]) + 0.5, plot.x.at(each["high"]) - 0.5
        top = plot.y.at(each["accuracy"])
        tall = max(round(COUNTS_HEIGHT * each["images"] / most, 1), 0.8)  # a single image is seen, too
        bars.append(Bar(round(left, 1), top, round(right - left, 1), round(plot.bottom - top, 1), each))
        counts.append(Bar(round(left, 1), round(base - tall, 1), round(right - left, 1), tall, each))
        means.append(Dot(plot.x.at(each["confidence"]), top, each["images"], each["accuracy"]))
    return Reliability(plot, base + 16, base, bars, counts, means, most)


def coverage(outcome: Outcome) -> Coverage | None:
    """What is gained by leaving unsure images aside; None without images."""
    if not len(outcome.truth):
        return None
    kept, accuracy = coverage_curve(outcome.confidence, outcome.right)
    rows = metrics.coverage(outcome.confidence, outcome.right)
    plot = frame((0, 1), (float(accuracy.min()), float(accuracy.max())), "share of images kept", "accuracy of those")
    spots = [(plot.x.at(x), plot.y.at(y)) for x, y in zip(kept.tolist(), accuracy.tolist(), strict=True)]
    dots = [
        Dot(plot.x.at(row["coverage"]), plot.y.at(row["accuracy"]), row["images"], row["threshold"])
        for row in rows
        if row["images"]
    ]
    return Coverage(plot, path(spots), dots, rows)


def coverage_curve(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of images kept and accuracy of those, at each confidence that occurs, thinned to `POINTS_SHOWN` points.

    Args:
        confidence: Probability of the predicted class (N).
        right: Whether it is the true one (N).
    """
    order = np.argsort(-confidence, kind="stable")
    sure = confidence[order]
    kept = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))  # equal confidences are kept or left together
    accuracy = np.cumsum(right[order])[kept] / (kept + 1)
    shown = np.unique(np.linspace(0, len(kept) - 1, min(POINTS_SHOWN, len(kept))).round().astype(int))
    return (kept[shown] + 1) / len(confidence), accuracy[shown]
