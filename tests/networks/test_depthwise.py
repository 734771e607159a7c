"""Depthwise convolutions in bf16 with the quick backward: the same forward, gradients as near as bf16 is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkit.networks import depthwise
from tlkit.networks.depthwise import QuickDepthwise

SHAPES = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for kernel, padding, dilation in [(3, 1, 1), (3, 0, 1), (5, 2, 1), (3, 2, 2), (7, 3, 1), ((3, 5), (1, 2), 1)]
    for stride in (1, 2)
]
BF16 = 2.0**-8
"""Relative error of one rounding to bf16, at most."""


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the quick way is taken."""
    taken: list[int] = []
    apply = depthwise._Depthwise.apply

    def counted(*arguments: Any) -> Any:
        taken.append(1)
        return apply(*arguments)

    monkeypatch.setattr(depthwise._Depthwise, "apply", counted)
    return taken


def gradients(layer: nn.Conv2d, images: Tensor, quick: bool, autocast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of images and weights of a weighted sum of the output."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if quick:
            with QuickDepthwise():
                output = layer(images)
        else:
            output = layer(images)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    of_images, of_weight = torch.autograd.grad((output.float() * pull).sum(), [images, layer.weight])
    return output, of_images, of_weight


def made(channels: int = 8, **shape: Any) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, groups=channels, bias=False, **shape)
    return layer, torch.randn(3, channels, 14, 15)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: dict[str, Any], channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = made(**shape)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    plain = gradients(layer, images, quick=False)
    exact = gradients(layer, images, quick=False, autocast=False)
    taken = passes(monkeypatch)
    quick = gradients(layer, images, quick=True)
    assert taken == [1]
    assert quick[0].dtype == torch.bfloat16 and torch.equal(quick[0], plain[0]), "forward, bit for bit"
    for number in (1, 2):
        assert quick[number].dtype == torch.float32
        near(quick[number], exact[number], 2 * BF16)
        near(quick[number], plain[number], 3 * BF16)
        # no worse than the plain way
        error, plain_error = ((g[number] - exact[number]).norm() for g in (quick, plain))
        assert error <= 1.1 * plain_error + 1e-6


def test_gradients_that_nobody_wants() -> None:
    layer, images = made(kernel_size=3, padding=1)
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        layer(images).sum().backward()
        assert layer.weight.grad is not None
        layer.weight.grad = None
        layer.weight.requires_grad_(False)
        wanted = images.clone().requires_grad_()
        layer(wanted).sum().backward()
        assert wanted.grad is not None and layer.weight.grad is None
        assert not layer(images).requires_grad


def test_a_whole_block_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between other layers, of which it passes gradients on."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 4, 1, bias=False),
    )
    images = torch.randn(8, 3, 16, 16)
    taken = passes(monkeypatch)

    def found(quick: bool, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if quick:
                with QuickDepthwise():
                    output = block(images)
            else:
                output = block(images)
        loss = (output.float() - 1).square().mean()
        return list(torch.autograd.grad(loss, list(block.parameters())))

    exact = found(False, False)
    for quick, plain, reference in zip(found(True, True), found(False, True), exact, strict=True):
        error, plain_error = (quick - reference).norm(), (plain - reference).norm()
        assert error <= max(1.5 * plain_error, 8 * BF16 * reference.norm())
    assert taken == [1]


UNTOUCHED: dict[str, Any] = {
    "in float32": ({}, None, None),
    "in fp16": ({}, torch.float16, None),
    "without gradients": ({}, torch.bfloat16, torch.no_grad),
    "with a bias": ({"bias": True}, torch.bfloat16, None),
    "not depthwise": ({"groups": 2}, torch.bfloat16, None),
    "all channels together": ({"groups": 1}, torch.bfloat16, None),
    "two outputs a channel": ({"out_channels": 16}, torch.bfloat16, None),
    "padding in words": ({"padding": "same"}, torch.bfloat16, None),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_the_rest_goes_the_usual_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, dtype, context = UNTOUCHED[case]
    torch.manual_seed(0)
    layer = nn.Conv2d(
        **{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 8, "padding": 1, "bias": False} | options
    )
    images = torch.randn(2, 8, 9, 9)
    taken = passes(monkeypatch)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), (context or torch.enable_grad)():
        expected = layer(images)
        with QuickDepthwise():
            found = layer(images)
    assert taken == []
    assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_functions_called_with_names_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = made(kernel_size=3)
    taken = passes(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        F.conv2d(images, layer.weight, groups=8)
        torch.conv2d(input=images, weight=layer.weight, groups=8)
    assert taken == []


def test_outside_the_context_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = made(kernel_size=3)
    taken = passes(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        with QuickDepthwise():
            layer(images)
        layer(images)
    assert taken == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_it_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = made(kernel_size=3)
    taken = passes(monkeypatch)
    with torch.autocast("cuda", torch.bfloat16), torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        layer.cuda()(images.cuda()).sum().backward()
    assert taken == []
