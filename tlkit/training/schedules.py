"""Learning-rate schedules: pure functions of the step, as factors of the highest rate."""

from __future__ import annotations

import math
from collections.abc import Sequence


def constant(step: int) -> float:
    """alpha_t = alpha_0."""
    return 1.0


def step_decay(step: int, every: float, gamma: float) -> float:
    """alpha_t = alpha_0 * gamma ** floor(t / s).

    Args:
        step: t, in steps.
        every: s, in steps.
        gamma: What each decay multiplies the rate by.
    """
    return gamma ** math.floor(step / every)


def cosine(step: int, steps: int, least: float = 0.0) -> float:
    """alpha_t = alpha_min + (alpha_max - alpha_min) / 2 * (1 + cos(pi * t / T)).

    Cosine annealing without restarts (Loshchilov and Hutter 2017, "SGDR", equation 5).

    Args:
        step: t, in [0, T].
        steps: T.
        least: alpha_min / alpha_max.
    """
    return least + (1 - least) / 2 * (1 + math.cos(math.pi * step / steps))


def warm_up(step: int, steps: int) -> float:
    """Rises linearly over the first ``steps`` steps, (t + 1) / (T_w + 1), and is 1 from then on.

    Gradual warm-up (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2); no step has rate zero.
    """
    return min(1.0, (step + 1) / (steps + 1))


def one_cycle(step: int, steps: int, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> float:
    """Rises from 1 / start to 1 over a part of the steps, then falls to 1 / (start * end), both as half cosines.

    Super-convergence (Smith and Topin 2018), in the form and with the constants of ``torch.optim.OneCycleLR``.

    Args:
        step: t, in [0, T - 1].
        steps: T.
        rise: Part of the steps over which the rate rises.
        start: Highest rate divided by the first.
        end: First rate divided by the last.
    """
    top, last = rise * steps - 1, steps - 1
    if step <= top:
        return _between(1 / start, 1.0, step / top if top > 0 else 1.0)
    return _between(1.0, 1 / (start * end), (step - top) / (last - top))


def _between(first: float, last: float, part: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * part))


def plateau(losses: Sequence[float], patience: int, gamma: float) -> float:
    """The rate after epochs with these losses: multiplied by gamma when ``patience`` epochs have brought no lower one.

    A function of the losses alone, so that it has no state of its own to restore. As ``torch``'s
    ``ReduceLROnPlateau(threshold=0, patience=patience - 1)``.

    Args:
        losses: Of each epoch so far.
        patience: Epochs, at least 1.
        gamma: What each reduction multiplies the rate by.
    """
    best, waited, reductions = math.inf, 0, 0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited >= patience:
            reductions, waited = reductions + 1, 0
    return float(gamma**reductions)
