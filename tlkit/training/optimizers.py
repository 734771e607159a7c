"""Optimisers with a rate for each stage, and without decay of norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from tlkit.errors import TlkitError, did_you_mean
from tlkit.networks.stages import stages

UNUSABLE = ("adahessian", "kron")
"""Of timm's optimisers: the one needs second derivatives, the other gigabytes for a convolution's weights."""


def parameter_groups(network: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """What trains, by stage; each stage's norms, biases and whatever the network exempts from decay stand apart.

    Args:
        network: With what does not train frozen.
        rates: Highest learning rate of each stage that trains.
        weight_decay: Of all but the exempt.

    Returns:
        Groups as optimisers take them, with ``stage`` and ``peak`` (the highest rate); none is empty.
    """
    exempt = set(getattr(network, "no_weight_decay", set)())
    groups = []
    for stage in stages(network):
        of_stage = {name: network.get_parameter(name) for name in stage.parameters}
        trained = {name: tensor for name, tensor in of_stage.items() if tensor.requires_grad}
        decayed = [tensor for name, tensor in trained.items() if tensor.ndim > 1 and name not in exempt]
        spared = [tensor for name, tensor in trained.items() if tensor.ndim <= 1 or name in exempt]
        for tensors, decay in ((decayed, weight_decay), (spared, 0.0)):
            if tensors:
                rate = rates[stage.name]
                groups.append({"params": tensors, "lr": rate, "peak": rate, "weight_decay": decay, "stage": stage.name})
    return groups


def create_optimizer(name: str, groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
    """An optimiser over `parameter_groups`.

    Args:
        name: ``sgd`` (with plain, not Nesterov's momentum), ``adamw``, or one of timm's.
        groups: Each with its rate and decay.
        momentum: For those that have one.

    Raises:
        TlkitError: No optimiser of that name, or it refuses its rate or momentum.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    check_name(name)
    highest = max(group["peak"] for group in groups)  # some refuse a rate of 0
    made: torch.optim.Optimizer
    try:
        made = create_optimizer_v2(groups, opt=name, lr=highest, momentum=momentum)
    except ValueError as error:  # Nesterov's momentum of 0
        raise TlkitError(f"{name} refuses: {error}", where="--optimizer", remedy="use other values of it") from error
    for group in made.param_groups:
        if group.get("max_lr_snapshot") is not None:  # corrected decay: by lr^2 over the highest lr, here of the stage
            group["max_lr_snapshot"] = group["peak"]
    return made


def check_name(name: str) -> None:
    """Raise where there is no optimiser of that name, or where it cannot run.

    Raises:
        TlkitError: With the nearest name.
    """
    known = [other for other in list_optimizers() if not other.startswith(UNUSABLE)]
    if name not in known:
        remedy = did_you_mean(name, known) or "use sgd, adamw, or one of timm.optim.list_optimizers()"
        raise TlkitError(f"unknown optimiser '{name}'", where="--optimizer", remedy=remedy)
    try:
        create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], opt=name, lr=1.0)
    except (AssertionError, ImportError) as error:  # of those from other packages
        raise TlkitError(f"{name} cannot be used here ({error})", where="--optimizer", remedy="use another") from error
