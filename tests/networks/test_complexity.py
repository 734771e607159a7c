"""Costs of stages against PyTorch's own counter of floating-point operations."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tlkit.networks.complexity import noise, stage_costs
from tlkit.networks.freezing import freeze
from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing


def make(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7)


def counted(network: Any, image: torch.Tensor) -> dict[str, float]:
    """Each stage's share by PyTorch's counter: of each module what is counted in it and in nothing inside it."""
    # the fused attention has no formula on a CPU: its products are counted where they are written out
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(image)
    whole = type(network).__name__
    flops = {
        name.removeprefix(whole).removeprefix("."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(whole)
    }
    own = {
        name: flops.get(name, 0)
        - sum(flops.get(f"{name}.{child}" if name else child, 0) for child, _ in module.named_children())
        for name, module in network.named_modules()
    }
    return {stage.name: sum(own[name] for name in stage.modules) / flops[""] for stage in stages(network)}


@pytest.mark.parametrize(
    ("name", "size", "tolerance"),
    [
        ("resnet18", 96, 1e-6),
        ("test_resnet", 64, 1e-6),
        ("tf_efficientnet_lite0", 96, 1e-6),
        ("mobilenetv3_small_100", 96, 1e-6),
        ("densenet121", 64, 1e-6),
        ("convnext_atto", 64, 1e-6),
        ("regnetx_002", 64, 1e-6),
        ("vit_tiny_patch16_224", 224, 0.02),  # products of queries and keys are left out
        ("swin_tiny_patch4_window7_224", 224, 0.02),
    ],
)
def test_costs_are_those_of_pytorchs_counter(name: str, size: int, tolerance: float) -> None:
    network, image = make(name), torch.randn(1, 3, size, size)
    costs = stage_costs(network, image)
    assert list(costs) == [stage.name for stage in stages(network)]
    assert sum(costs.values()) == pytest.approx(1)
    assert costs == pytest.approx(counted(network, image), abs=tolerance)


def test_a_first_convolution_by_hand() -> None:
    """Height x width x outputs x inputs x kernel area, for each output."""
    network = make("resnet18")
    stem = 32 * 32 * 64 * 3 * 49
    stage1 = 4 * 16 * 16 * 64 * 64 * 9
    costs = stage_costs(network, torch.randn(1, 3, 64, 64))
    assert costs["stem"] / costs["stage1"] == pytest.approx(stem / stage1)
    assert costs["head"] / costs["stem"] == pytest.approx(512 * 7 / stem)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_the_network_is_left_as_it_was(name: str, training: bool) -> None:
    network = make(name).train(training)
    freeze(network, ["stem"])
    network.train(training)
    modes = {key: module.training for key, module in network.named_modules()}
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    size = network.pretrained_cfg["input_size"][-1]
    stage_costs(network, torch.randn(1, 3, size, size))
    assert {key: module.training for key, module in network.named_modules()} == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_are_taken_off_where_the_input_does_not_fit() -> None:
    network = make("test_resnet").train()
    with pytest.raises(RuntimeError):
        stage_costs(network, torch.randn(1, 5, 32, 32))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_noise_is_one_input_and_always_the_same() -> None:
    preprocessing = Preprocessing(24, 1.0, "center", "bilinear", (0.5,), (0.5,), "L")
    network = make("test_resnet")
    before = torch.get_rng_state()
    found = noise(network, preprocessing)
    assert found.shape == (1, 1, 24, 24)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(found, noise(network, preprocessing))
