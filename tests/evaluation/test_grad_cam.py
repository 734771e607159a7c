"""Grad-CAM: closed form where there is one, a bright blob, and networks of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tlkit import compute, config
from tlkit.data.folders import Samples
from tlkit.evaluation.grad_cam import grad_cam, heat_maps
from tlkit.networks.build import Loaded
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing


class Pooled(nn.Module):
    """Convolutions, global average pooling, a linear head, with as much of timm's surface as stages need."""

    def __init__(self, channels: int = 6, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(5, channels, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(channels, classes)
        self.num_classes = classes
        self.feature_info = [{"module": "stem"}, {"module": "body"}]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def maps(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(self.stem(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.maps(images).mean((2, 3)))
        return logits


def noise(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wants_gradients", [True, False])
def test_after_average_pooling_it_is_the_class_activation_map(seed: int, wants_gradients: bool) -> None:
    """Zhou et al. 2016, equation 2: the classifier's weights times the maps; Grad-CAM keeps what is positive of it."""
    network = Pooled(seed=seed).eval().requires_grad_(wants_gradients)
    images, targets = noise(6, 16, seed), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        expected = torch.einsum("bc,bchw->bhw", network.fc.weight[targets], network.maps(images)).relu().numpy()
    found = grad_cam(network, images, targets)
    assert any(one is not None for one in found)
    for heat, one in zip(found, expected, strict=True):
        if one.max() > 0 and heat is not None and heat.shape == one.shape:
            np.testing.assert_allclose(heat, one / one.max(), atol=1e-5)
        else:  # nothing there speaks for the class: an earlier stage is asked
            assert one.max() == 0 or heat is None


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
def test_as_many_channels_as_the_map_is_high_is_no_map_of_channels(side: int, channels_last: bool) -> None:
    """(B, C, h, w) with C = h = w looks like (B, h, w, C), which it is not; memory in another order is the same."""
    network = Pooled(channels=side).eval()
    images, targets = noise(4, 2 * side), torch.tensor([0, 1, 2, 3])
    if channels_last:
        network, images = (
            network.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    with torch.no_grad():
        expected = torch.einsum("bc,bchw->bhw", network.fc.weight[targets], network.maps(images)).relu().numpy()
    compared = 0
    for heat, one in zip(grad_cam(network, images, targets), expected, strict=True):
        if one.max() > 0:
            assert heat is not None
            np.testing.assert_allclose(heat, one / one.max(), atol=1e-5)
            compared += 1
    assert compared


def test_images_do_not_touch_each_other_and_nothing_is_left_behind() -> None:
    network = Pooled().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, targets = noise(5, 16), torch.tensor([0, 1, 2, 3, 0])
    together = grad_cam(network, images, targets)
    for row in range(5):
        (alone,) = grad_cam(network, images[row : row + 1], targets[row : row + 1])
        assert (alone is None) == (together[row] is None)
        if alone is not None:
            np.testing.assert_allclose(alone, together[row], atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert not images.requires_grad


def test_a_class_that_nothing_speaks_for_has_no_map() -> None:
    network = Pooled().eval()
    with torch.no_grad():
        network.fc.weight[2] = 0
    found = grad_cam(network, noise(2, 16), torch.tensor([2, 0]))
    assert found[0] is None


def test_inside_of_a_pass_without_gradients() -> None:
    network = Pooled().eval().requires_grad_(False)
    with torch.no_grad():
        inside = grad_cam(network, noise(2, 16), torch.tensor([0, 1]))
    outside = grad_cam(network, noise(2, 16), torch.tensor([0, 1]))
    for first, second in zip(inside, outside, strict=True):
        np.testing.assert_array_equal(first, second)


# The kinds of networks that there are: name, side, whether there must be a map

KINDS = [
    ("resnet18", 64, True),
    ("test_resnet", 64, True),
    ("densenet121", 64, True),
    ("vgg11", 64, True),
    ("convnext_atto", 64, True),
    ("tf_efficientnet_lite0", 64, True),
    ("mobilenetv3_small_100", 64, True),
    ("swin_tiny_patch4_window7_224", 224, True),
    ("vit_tiny_patch16_224", 224, True),
    ("deit_tiny_distilled_patch16_224", 224, True),
    ("mixer_s32_224", 224, True),
    ("test_vit", 160, True),
    ("alexnet_torchvision", 224, False),
]


@pytest.mark.parametrize(("name", "side", "mapped"), KINDS, ids=[kind[0] for kind in KINDS])
def test_any_kind_of_network_has_maps(name: str, side: int, mapped: bool) -> None:
    import tlkit.networks

    assert tlkit.networks
    torch.manual_seed(0)
    try:
        network = timm.create_model(name, num_classes=5).eval().requires_grad_(False)
    except RuntimeError as error:
        pytest.skip(str(error))
    with torch.no_grad():  # a fresh classifier may be all zeros
        found = network.get_classifier()
        for layer in found if isinstance(found, tuple | list) else [found]:
            layer.weight.normal_(std=0.1)
    images = noise(3, side)
    heats = grad_cam(network, images, torch.tensor([0, 1, 2])) + grad_cam(network, images, torch.tensor([3, 4, 0]))
    assert len(heats) == 6
    for heat in heats:
        if heat is not None:
            assert heat.ndim == 2 and heat.shape[0] == heat.shape[1] > 1 and heat.dtype == np.float32
            assert heat.min() >= 0 and heat.max() == 1
    if mapped:
        assert any(heat is not None for heat in heats)


def test_the_class_tokens_network_is_looked_at_before_its_last_block() -> None:
    """In the last block's output only the class token has a gradient: the heat is that of the block before."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5).eval()
    nn.init.normal_(network.head.weight)
    assert network.num_prefix_tokens == 1 and network.global_pool == "token"
    images, kept = noise(2, 160), {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[number] = output

        return hook

    for number, block in enumerate(network.blocks):
        block.register_forward_hook(keep(number))
    network(images.requires_grad_()).gather(1, torch.tensor([[0], [3]])).sum().backward()
    last, before = kept[len(network.blocks) - 1], kept[len(network.blocks) - 2]
    assert last.grad is not None and last.grad[:, 1:].abs().max() == 0
    assert before.grad is not None
    side = int((before.shape[1] - 1) ** 0.5)
    slopes = before.grad[:, 1:].mean(1, keepdim=True)
    expected = (slopes * before[:, 1:]).sum(-1).relu().view(2, side, side).detach().numpy()
    for block in network.blocks:
        block._forward_hooks.clear()
    found = grad_cam(network, images.detach(), torch.tensor([0, 3]))
    for heat, one in zip(found, expected, strict=True):
        assert heat is not None and one.max() > 0
        np.testing.assert_allclose(heat, one / one.max(), atol=1e-4)


class Bright(nn.Module):
    """Sums brightness for class 0, and darkness for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 8, stride=8, bias=False)
        self.fc = nn.Linear(2, 2, bias=False)
        self.num_classes = 2
        self.feature_info = [{"module": "conv"}]
        with torch.no_grad():
            self.conv.weight[0], self.conv.weight[1] = 1.0, -1.0
            self.fc.weight.copy_(torch.eye(2))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).mean((2, 3)))
        return logits


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 6), (4, 2), (7, 7)])
def test_the_heat_is_where_the_blob_is(row: int, column: int, tmp_path: Path) -> None:
    """Through files, preprocessing and batches: 64 px, a blob of 8, another class's network of dark pixels."""
    names = [f"{number}.png" for number in range(11)]
    for number, name in enumerate(names):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        place = (row, column) if number % 2 else (7 - row, 7 - column)
        pixels[8 * place[0] : 8 * place[0] + 8, 8 * place[1] : 8 * place[1] + 8] = 250
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / names[3]).write_bytes(b"gone")
    preprocessing = Preprocessing(64, 1.0, "center", "bilinear", (0.2,) * 3, (1.0,) * 3)
    loaded = Loaded(Bright(), "bright", preprocessing, ("bright", "dark"), "made")
    splits = np.full(11, "", dtype="<U5")
    samples = Samples(tmp_path, names, np.zeros(11, dtype=np.int64), splits, ("bright", "dark"))
    how = How(compute.accelerator(config.Compute(device="cpu", precision="fp32")))
    of = heat_maps(loaded, samples, np.zeros(11, dtype=np.int64), how)
    rows = [10, 3, *range(9), 9]
    for number, heat in zip(rows, of(rows), strict=True):
        if number == 3:
            assert heat is None
            continue
        place = (row, column) if number % 2 else (7 - row, 7 - column)
        assert heat is not None and heat.shape == (8, 8)
        assert np.unravel_index(heat.argmax(), heat.shape) == place
        assert heat[place] == 1 and np.delete(heat.ravel(), 8 * place[0] + place[1]).max() < 0.1
    assert of([]) == []
    (dark,) = heat_maps(loaded, samples, np.ones(11, dtype=np.int64), how)([0])
    assert dark is not None and dark[7 - row, 7 - column] == 0
