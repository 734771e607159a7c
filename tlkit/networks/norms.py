"""Normalisation: batch, layer, instance and group norm in place of a network's own."""

from __future__ import annotations

from math import prod
from typing import Any

from timm.layers import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkit.networks.trace import trace

MOST_GROUPS = 32
"""Of group norm, as in its paper (Wu and He, 2018, arXiv:1803.08494, section 4.1)."""


def groups_of(norm: str, channels: int) -> int:
    """Groups of channels that are normalised together, over all positions of one image.

    One for layer norm (Ba et al., 2016, arXiv:1607.06450), as many as channels for instance norm (Ulyanov et al., 2016,
    arXiv:1607.08022), the largest divisor of the channels up to 32 for group norm.
    """
    match norm:
        case "layer":
            return 1
        case "instance":
            return channels
        case "group":
            return max(count for count in range(1, MOST_GROUPS + 1) if channels % count == 0)
    raise ValueError(norm)


def set_norm(network: nn.Module, norm: str) -> None:
    """Put another normalisation in the place of each batch norm of maps; scales, shifts and activations stay.

    Args:
        network: Changed in place.
        norm: ``batch`` changes nothing; ``layer``, ``instance`` and ``group`` as in `groups_of`; ``none`` leaves it
            out.
    """
    if norm == "batch":
        return
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            holder, _, child = name.rpartition(".")
            setattr(network.get_submodule(holder), child, _instead_of(module, norm))


def _instead_of(module: nn.BatchNorm2d, norm: str) -> nn.Module:
    if norm == "none":
        if not isinstance(module, BatchNormAct2d):
            return nn.Identity()
        if hasattr(module.act, "inplace"):  # what comes in is no longer copied, and others may need it as it is
            module.act.inplace = False
        return nn.Sequential(module.drop, module.act)
    channels, affine, device = module.num_features, module.affine, module.weight.device if module.affine else None
    groups = groups_of(norm, channels)
    made: Any
    if isinstance(module, BatchNormAct2d):
        made = GroupNormAct(channels, groups, eps=module.eps, affine=affine, device=device)
        made.drop, made.act = module.drop, module.act
    else:
        made = nn.GroupNorm(groups, channels, eps=module.eps, affine=affine, device=device)
    if affine:  # what the network's own initialisation made of them (zero for the last norm of residual blocks)
        made.weight, made.bias = module.weight, module.bias
    return made


def norm_of(network: nn.Module) -> str:
    """``batch`` where all normalisation is batch norm of maps, ``none`` where there is none, else ``other``."""
    kinds = {type(module) for module in network.modules() if _normalises(module)}
    if not kinds:
        return "none"
    return "batch" if all(issubclass(kind, nn.BatchNorm2d) for kind in kinds) else "other"


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d) or (
        "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None
    )


def normalised_alone(network: nn.Module, image: Tensor) -> list[str]:
    """Names of the norms of groups that see a single number for each, which leaves nothing of it but the shift.

    Args:
        network: Any network, on the meta device too.
        image: Two inputs or more (B, C, H, W), where the network is: torch refuses to normalise a lone number.

    Raises:
        TlkitError: The network does not take such images.
    """
    outputs = trace(network, image).outputs  # of the same shape as what came in
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)}
    return [name for name, norm in norms.items() if name in outputs and prod(outputs[name].shape) == norm.num_groups]
