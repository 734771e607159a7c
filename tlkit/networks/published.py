"""Published accuracies on ImageNet-1k, each with its weights, its test protocol and where it is printed.

The table is ``published.csv`` beside this file: accuracy in percent, as published (100 - error for papers). ``weights``
is timm's tag, or ``paper`` for weights that timm does not have. Such a network may differ from the one that is built
under its name: He et al. (2016) have the stride of a bottleneck in its first 1 x 1 convolution, not in the 3 x 3.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PAPER = "paper"
"""In place of a tag: weights that timm does not have."""


@dataclass(frozen=True)
class Published:
    """One published result; figures of different protocols are not to be compared."""

    model: str
    """timm's name without a tag, or one of our own networks."""
    weights: str
    """timm's tag (``tv_in1k``), or `PAPER`."""
    top1: float | None
    """Accuracy in [0, 1]; None where it was not published."""
    top5: float | None
    protocol: str
    """Images, crops and networks: ``val, ten crops of 224 px``."""
    source: str


def published(model: str) -> list[Published]:
    """What is published of a model (a timm name without a tag, or our own), public weights first; [] for others."""
    return list(_table().get(model, ()))


@cache
def _table() -> dict[str, tuple[Published, ...]]:
    """All results by model, in the order of the file."""
    table: dict[str, tuple[Published, ...]] = {}
    text = files("tlkit.networks").joinpath("published.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        top1, top5 = _fraction(row.pop("top1")), _fraction(row.pop("top5"))
        result = Published(**row, top1=top1, top5=top5)
        table[result.model] = (*table.get(result.model, ()), result)
    return table


def _fraction(percent: str) -> float | None:
    return float(f"{percent}e-2") if percent else None  # 70.4 gives 0.704; 70.4 / 100 does not
