"""Optimisers with a rate for each stage, and without decay of norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from tlkit.errors import TlkitError, did_you_mean
from tlkit.networks.stages import stages


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
        TlkitError: No optimiser of that name.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    check_name(name)
    made: torch.optim.Optimizer = create_optimizer_v2(groups, opt=name, lr=0.0, momentum=momentum)
    return made


def check_name(name: str) -> None:
    """Raise where there is no optimiser of that name.

    Raises:
        TlkitError: With the nearest name.
    """
    known = list_optimizers()
    if name not in known:
        remedy = did_you_mean(name, known) or "use sgd, adamw, or one of timm.optim.list_optimizers()"
        raise TlkitError(f"unknown optimiser '{name}'", where="--optimizer", remedy=remedy)
