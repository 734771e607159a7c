"""Freezing, stated over a network's stages: what is frozen has no gradients and never moves, buffers included."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkit.networks.stages import find_stages, stages


def freeze(network: nn.Module, names: Collection[str], norms: str = "train") -> None:
    """Freeze the named stages and no others.

    A frozen stage has no gradients, and stays in evaluation mode through every later ``.train()``, of the network or of
    whatever holds it, and in its copies: batch norm keeps its running statistics, dropout and stochastic depth are off.

    Args:
        network: Any timm network.
        names: Stages to freeze; an empty collection unfreezes everything.
        norms: Batch norm of the other stages: ``train`` as usual; ``stats-frozen`` normalises by its running
            statistics, which stay, while scale and shift train; ``frozen`` does not train at all.

    Raises:
        TlkitError: The network has no stage of that name.
    """
    frozen = find_stages(network, names)
    for stage in stages(network):
        held = stage in frozen
        for parameter in stage.parameters:
            network.get_parameter(parameter).requires_grad_(not held)
        for name in stage.modules:
            module = network.get_submodule(name)
            still = norms != "train" and isinstance(module, _BatchNorm)
            _hold_in_eval(module, held or still)
            if norms == "frozen" and still:
                module.requires_grad_(False)


def _hold_in_eval(module: nn.Module, held: bool) -> None:
    module.__dict__.pop("train", None)
    if held:
        module.training = False
        module.train = partial(_train_what_is_inside, module)  # type: ignore[method-assign]


def _train_what_is_inside(module: nn.Module, mode: bool = True) -> nn.Module:
    """What ``.train()`` does to a frozen module, which may hold others that are not (a network whose head is frozen).

    With `partial` rather than as a bound method it survives pickling.
    """
    for child in module.children():
        child.train(mode)
    return module


def train_mode(module: nn.Module) -> None:
    """Put what is trained into training mode; what `freeze` froze stays in evaluation mode, buffers untouched."""
    module.train()


def has_idle_parameters(network: nn.Module, images: Tensor) -> bool:
    """Whether something that trains gets no gradient from images (B, C, H, W): some networks hold what they never use.

    Processes that learn together must know, or they wait for it.
    """
    network.eval()
    with torch.enable_grad():
        network(images).float().sum().backward()
    idle = any(tensor.grad is None for _, tensor in trainable_parameters(network))
    network.zero_grad()
    return idle


def trainable_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what is not frozen."""
    return ((name, tensor) for name, tensor in network.named_parameters() if tensor.requires_grad)
