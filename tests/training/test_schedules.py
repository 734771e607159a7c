"""Every schedule at every step against its closed form, and against PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from tlkit.training.schedules import constant, cosine, one_cycle, plateau, step_decay, warm_up

LENGTHS = [1, 2, 3, 4, 5, 7, 10, 37, 100, 1000]

CLOSED_FORMS: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
    "constant": (constant, lambda t: 1.0),
    **{
        f"step, every {s}, gamma {gamma}": (
            lambda t, s=s, gamma=gamma: step_decay(t, s, gamma),
            lambda t, s=s, gamma=gamma: gamma ** math.floor(t / s),
        )
        for s in (1, 3, 10, 2.5)
        for gamma in (0.1, 0.5, 1.0)
    },
    **{
        f"cosine over {steps}, least {least}": (
            lambda t, steps=steps, least=least: cosine(t, steps, least),
            lambda t, steps=steps, least=least: (
                0.03 * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * t / steps))) / 0.03
            ),
        )
        for steps in (1000, 2000)
        for least in (0.0, 0.01, 1.0)
    },
    **{
        f"warm-up over {steps}": (
            lambda t, steps=steps: warm_up(t, steps),
            lambda t, steps=steps: (t + 1) / (steps + 1) if t < steps else 1.0,
        )
        for steps in (0, 1, 5, 100)
    },
}
"""Schedule, and the factor that its formula gives."""


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_at_every_step(name: str) -> None:
    schedule, formula = CLOSED_FORMS[name]
    found = [schedule(step) for step in range(1000)]
    assert found == pytest.approx([formula(step) for step in range(1000)], abs=1e-12)


@pytest.mark.parametrize("least", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", LENGTHS)
def test_cosine_has_its_ends_and_middle(steps: int, least: float) -> None:
    assert cosine(0, steps, least) == 1.0
    assert cosine(steps, steps, least) == pytest.approx(least, abs=1e-15)
    assert cosine(steps, 2 * steps, least) == pytest.approx((1 + least) / 2)


@pytest.mark.parametrize("steps", [1, 2, 9, 500])
def test_warm_up_rises_evenly_from_above_nought_to_one(steps: int) -> None:
    rates = [warm_up(step, steps) for step in range(steps + 2)]
    assert rates[0] > 0 and rates[steps - 1] < rates[steps] == rates[steps + 1] == 1.0
    assert [b - a for a, b in pairwise(rates[: steps + 1])] == pytest.approx([1 / (steps + 1)] * steps)


def torch_rates(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The rate at each step under one of PyTorch's schedulers, of an optimiser whose rate is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("steps", LENGTHS)
def test_one_cycle_is_pytorchs(steps: int) -> None:
    expected = torch_rates(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps), steps)
    assert [one_cycle(step, steps) for step in range(steps)] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rise, start, end", [(0.1, 10.0, 1e3), (0.5, 25.0, 1e4), (0.9, 2.0, 5.0)])
def test_one_cycle_with_other_constants_is_pytorchs(rise: float, start: float, end: float) -> None:
    expected = torch_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, 1.0, total_steps=61, pct_start=rise, div_factor=start, final_div_factor=end
        ),
        61,
    )
    assert [one_cycle(step, 61, rise, start, end) for step in range(61)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rise", [0.1, 0.2, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10, 20])
def test_one_cycle_is_a_rate_however_short(steps: int, rise: float) -> None:
    """PyTorch's divides by zero where the rise is one step exactly."""
    assert all(0 < one_cycle(step, steps, rise) <= 1 for step in range(steps))


@pytest.mark.parametrize("least", [0.0, 0.2])
@pytest.mark.parametrize("steps", LENGTHS)
def test_cosine_is_pytorchs(steps: int, least: float) -> None:
    expected = torch_rates(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=least), steps + 1
    )
    assert [cosine(step, steps, least) for step in range(steps + 1)] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("every", [1, 2, 7, 30])
@pytest.mark.parametrize("gamma", [0.1, 0.9])
def test_step_decay_is_pytorchs(every: int, gamma: float) -> None:
    expected = torch_rates(lambda optimizer: lr_scheduler.StepLR(optimizer, every, gamma), 100)
    assert [step_decay(step, every, gamma) for step in range(100)] == pytest.approx(expected)


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_plateau_is_pytorchs(patience: int, seed: int) -> None:
    """Over losses that fall, with noise, and that repeat themselves now and then."""
    random = np.random.default_rng(seed)
    losses = np.round(2 * np.exp(-np.arange(40) / 10) + random.normal(0, 0.2, 40), 1).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=0.5, patience=patience - 1, threshold=0, eps=0
    )
    assert plateau([], patience, 0.5) == 1.0
    for count, loss in enumerate(losses, start=1):
        scheduler.step(loss)
        assert plateau(losses[:count], patience, 0.5) == optimizer.param_groups[0]["lr"], f"after {count} epochs"
    assert plateau(losses, patience, 0.5) < 1, "it did come to a plateau"


def test_plateau_by_hand() -> None:
    assert [plateau([3, 2, 2, 2, 1, 1, 1][:count], 2, 0.1) for count in range(8)] == pytest.approx(
        [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01]
    )
    assert plateau([1.0, math.nan, math.nan], 2, 0.1) == pytest.approx(0.1), "not a number is no better"
