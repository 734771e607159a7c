"""The learning-rate range test: rates that rise from step to step, and the one at which the loss falls fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tlkit.errors import TlkitError
from tlkit.progress import Progress
from tlkit.training.fit import Batches, Diverged, Place, fit

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    if not np.isfinite(curve).any():
        return None
    end = int(np.nanargmin(curve)) + 1
    if end < 3:
        return None
    slopes = np.gradient(curve[:end], np.log(np.asarray(rates[:end])))
    steepest = int(slopes.argmin())
    falls = slopes[steepest] < -1e-9 * abs(curve[0])  # by more than rounding
    return float(rates[steepest]) if falls else None


def epochs(images: int, batch_size: int) -> int:
    """Epochs that hold enough steps."""
    return math.ceil(STEPS / max(1, images // batch_size))


def search(
    objective: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    epochs: int,
    parts: int,
    seed: int,
    say: Callable[[str], None],
    progress: Progress,
) -> float:
    """Train with rising rates and suggest one, to be multiplied by the groups' ``peak``; the weights are spoilt by it.

    Raises:
        TlkitError: The loss falls at no rate.
    """
    place = Place(parts=parts)
    losses: list[float] = []
    seen = 0.0

    def after_step() -> bool:
        nonlocal seen
        total = float(place.totals["loss"].item())
        losses.append(total - seen)
        seen = total
        progress("searching a learning rate", len(losses), STEPS)
        return len(losses) >= STEPS or gives_up(losses)

    def next_epoch(_: object) -> bool:
        nonlocal seen
        place.epoch, place.step, place.totals, seen = place.epoch + 1, 0, {}, 0.0
        return False

    with suppress(Diverged):  # the highest rates are meant to
        fit(
            objective,
            batches,
            optimizer,
            rate_at,
            accelerator=accelerator,
            epochs=epochs,
            place=place,
            seed=seed,
            after_step=after_step,
            after_epoch=next_epoch,
            say=say,
        )
    if len(losses) < STEPS:
        progress("searching a learning rate", len(losses), len(losses))
    found = suggest([rate_at(step) for step in range(len(losses))], losses)
    if found is None:
        raise TlkitError("the loss falls at no learning rate", where="--lr auto", remedy="give --lr NUMBER")
    return found
