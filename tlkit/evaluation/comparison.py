"""Whether one network is better than another on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test of two networks' results on the same images (McNemar 1947; exact form, two-sided).

    Args:
        first: Whether the first network is right about each image (N).
        second: The same of the second.

    Returns:
        ``only_first`` and ``only_second``, the images that only one is right about; ``p``, how likely so uneven a
        division (or more so) is where both are equally good: 1 where they never differ.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in the order given."""
    order, adjusted, highest = np.argsort(values, kind="stable"), [0.0] * len(values), 0.0
    for rank, place in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted
