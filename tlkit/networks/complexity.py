"""What a network costs to compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing


def stage_costs(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Share of each stage in the multiplications of convolutions and linear layers; the shares sum to 1.

    Args:
        network: Any timm network.
        image: One input (1, C, H, W).
    """
    counts: dict[str, int] = {}

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        # a convolution's filter, or a linear layer's row, is applied once for each of its outputs
        counts[names[module]] = counts.get(names[module], 0) + output.numel() * module.weight[0].numel()  # type: ignore

    names = {module: name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    hooks = [module.register_forward_hook(count) for module in names]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    whole = sum(counts.values()) or 1
    return {stage.name: sum(counts.get(name, 0) for name in stage.modules) / whole for stage in stages(network)}


def noise(network: nn.Module, preprocessing: Preprocessing) -> Tensor:
    """One random input (1, C, S, S), where the network is."""
    device = next(network.parameters()).device
    shape = (1, len(preprocessing.mean), preprocessing.size, preprocessing.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
