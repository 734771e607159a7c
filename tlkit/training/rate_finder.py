"""The learning-rate range test: rates that rise from step to step, and the one at which the loss falls fastest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9
GIVES_UP_AT = 4.0
"""Times the lowest smoothed loss at which the test ends."""


def rate_at(step: int, steps: int = STEPS) -> float:
    """Rates that rise exponentially from `LOWEST` to `HIGHEST`."""
    return float(LOWEST * (HIGHEST / LOWEST) ** (step / max(1, steps - 1)))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma and Ba 2015, section 3)."""
    mean, found = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**number))
    return found


def gives_up(losses: Sequence[float]) -> bool:
    """Whether the loss has left for good, so that higher rates tell nothing more."""
    curve = smoothed(losses)
    return not math.isfinite(curve[-1]) or (len(curve) > 5 and curve[-1] > GIVES_UP_AT * min(curve))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate, before its minimum.

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.

    Args:
        rates: Rising (N).
        losses: Training loss of the step taken at each rate (N).

    Returns:
        None where the loss never falls.
    """
    curve = np.array(smoothed(losses))
    end = int(np.nanargmin(curve)) + 1
    if end < 3:
        return None
    slopes = np.gradient(curve[:end], np.log(np.asarray(rates[:end])))
    steepest = int(slopes.argmin())
    return float(rates[steepest]) if slopes[steepest] < 0 else None
