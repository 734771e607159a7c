"""The frame of a chart that is not by epoch: its axes, and where its ticks stand.

Lengths are in units of the charts' viewBox, with y counted downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tlkit.reports.curves import BOTTOM, LEFT, PLOT_HEIGHT, WIDTH, Tick, linear_ticks, place, tick_texts

TOP = 22.0  # room for the name of the axis above it
RIGHT = 20.0  # room for half of the last tick's label


@dataclass(frozen=True)
class Axis:
    """Values along one side of a plot.

    Args:
        ticks: Round numbers in ascending order, the ends of the axis among them.
        texts: How they are written.
        start, end: Where the first and the last tick stand.
        log: Whether equal ratios are equally long.
    """

    ticks: Sequence[float]
    texts: Sequence[str]
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return place(value, low, high, self.start, self.end)

    @property
    def marks(self) -> list[Tick]:
        """The ticks where they stand."""
        return [Tick(self.at(tick), text) for tick, text in zip(self.ticks, self.texts, strict=True)]


@dataclass(frozen=True)
class Plot:
    """Edges and axes of a plot.

    Args:
        height: Height of the viewBox.
        x, y: The axes.
        x_name, y_name: What they count, in words.
    """

    height: float
    x: Axis
    y: Axis
    x_name: str
    y_name: str

    @property
    def left(self) -> float:
        """Left edge."""
        return self.x.start

    @property
    def right(self) -> float:
        """Right edge."""
        return self.x.end

    @property
    def top(self) -> float:
        """Upper edge."""
        return self.y.end

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.y.start


def shares_axis(start: float, end: float, low: float = 0.0, high: float = 1.0, most: int = 5) -> Axis:
    """Per cent on round numbers around ``low`` to ``high``."""
    ticks = [min(tick, 1.0) for tick in linear_ticks(low, high, most)]
    ticks = list(dict.fromkeys(max(tick, 0.0) for tick in ticks))
    return Axis(ticks, [f"{text} %" for text in tick_texts([100 * tick for tick in ticks])], start, end)


def frame(x: tuple[float, float], y: tuple[float, float], x_name: str, y_name: str) -> Plot:
    """A plot of shares against shares: ranges of both."""
    bottom = TOP + PLOT_HEIGHT
    across, up = shares_axis(LEFT, WIDTH - RIGHT, *x), shares_axis(bottom, TOP, *y)
    return Plot(bottom + BOTTOM, across, up, x_name, y_name)
