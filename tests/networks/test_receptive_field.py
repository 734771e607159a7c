"""Receptive fields against gradients: the pixels that a position depends on, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SpaceToDepth, SqueezeExcite
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from tlkit.networks.complexity import complexity
from tlkit.networks.receptive_field import Field
from tlkit.networks.skeleton import skeleton
from tlkit.networks.trace import trace


class Of(nn.Module):
    """A module made of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, maps: Tensor) -> Tensor:
        return self.function(maps)


class Sum(nn.Module):
    """Branches that meet."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = sum(branch(maps) for branch in self.branches)  # type: ignore[assignment]
        return total


class Joined(Sum):
    """Branches whose channels are put one after another."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.branches], 1)


class Positions(nn.Module):
    """A module over positions (B, N, C), in a row and put back into a map."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, maps: Tensor) -> Tensor:
        row = self.inside(maps.flatten(2).transpose(1, 2))
        back: Tensor = row.transpose(1, 2).reshape(len(maps), -1, *maps.shape[2:])
        return back


class ChannelsLast(nn.Module):
    """A module over maps (B, H, W, C)."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, maps: Tensor) -> Tensor:
        back: Tensor = self.inside(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return back


def conv(kernel: int | tuple[int, int] = 3, inputs: int = 2, outputs: int = 2, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **more)


def row(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def followed(network: nn.Module, size: tuple[int, int]) -> Field:
    """What `trace` says of the network's output."""
    field = trace(network, torch.zeros(1, channels(network), *size, dtype=torch.float64)).outputs[""].field
    assert field is not None
    return field


def channels(network: nn.Module) -> int:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first else 2


def extents(network: nn.Module, size: tuple[int, int], dims: tuple[int, int] = (-2, -1), seeds: int = 1) -> list[int]:
    """Rows and columns of pixels that a position in the middle depends on: from the first to the last.

    Args:
        network: Of real numbers in float64, where what does not depend on a pixel has a gradient of exactly 0.
        size: Height and width of images.
        dims: Height and width among the dimensions of the output.
        seeds: Images: one suffices but for maxima, whose gradient reaches the largest number alone.
    """
    torch.manual_seed(0)
    images = torch.randn(seeds, channels(network), *size, dtype=torch.float64, requires_grad=True)
    output = network.double().eval()(images)
    for dim in dims:
        output = output.narrow(dim, output.shape[dim] // 2, 1)
    (output * torch.randn_like(output)).sum().backward()
    assert images.grad is not None
    reached = images.grad.abs().amax((0, 1)) > 0
    spans = []
    for dim, side in ((1, size[0]), (0, size[1])):
        places = reached.any(dim).nonzero().flatten().tolist()
        assert places[0] > 0 and places[-1] < side - 1, "the border cuts the field off: make the image larger"
        spans.append(places[-1] - places[0] + 1)
    return spans


torch.manual_seed(0)  # weights of the networks in these tables: the same each time
PLAIN: dict[str, tuple[nn.Module, tuple[float, float], tuple[float, float]]] = {
    "one convolution": (conv(), (3, 3), (1, 1)),
    "pointwise": (conv(1), (1, 1), (1, 1)),
    "oblong kernel": (conv((1, 7)), (1, 7), (1, 1)),
    "oblong stride": (row(conv(3, stride=(2, 1)), conv(3)), (7, 5), (2, 1)),
    "even kernel": (conv(4, stride=2, padding=1), (4, 4), (2, 2)),
    "dilated": (row(conv(3, dilation=2), conv(3, dilation=(1, 4))), (7, 13), (1, 1)),
    "strided": (row(conv(3, stride=2), conv(3, stride=2), conv()), (15, 15), (4, 4)),
    "same padding": (row(conv(3, padding="same"), conv(5, padding="valid")), (7, 7), (1, 1)),
    "reflected padding": (conv(5, padding=2, padding_mode="reflect"), (5, 5), (1, 1)),
    "padding apart": (row(nn.ZeroPad2d(2), conv(5, stride=2), conv()), (9, 9), (2, 2)),
    "depthwise": (row(conv(5, groups=2), conv(1)), (5, 5), (1, 1)),
    "a stride that leaves pixels out": (row(conv(1, stride=3), conv()), (7, 7), (3, 3)),
    "average pooling": (row(conv(), nn.AvgPool2d(2), conv()), (8, 8), (2, 2)),
    "overlapping pooling": (row(conv(), nn.AvgPool2d(3, 2, 1), conv()), (9, 9), (2, 2)),
    "maximum pooling": (row(conv(), nn.MaxPool2d(3, 2), conv(1)), (5, 5), (2, 2)),
    "dilated maximum pooling": (nn.MaxPool2d(2, 1, dilation=3), (4, 4), (1, 1)),
    "adaptive pooling that divides": (row(conv(3, padding=1), nn.AdaptiveAvgPool2d(16), conv()), (11, 11), (3, 3)),
    "functions": (Of(lambda x: F.avg_pool2d(F.gelu(F.max_pool2d(x, 2)), 3, stride=1)), (6, 6), (2, 2)),
    "normalised and activated": (row(conv(), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(), conv()), (5, 5), (1, 1)),
    "layer norm of channels": (row(conv(), LayerNorm2d(2), nn.GELU(), conv()), (5, 5), (1, 1)),
    "residual": (row(conv(), Sum(nn.Identity(), conv(3, padding=1)), conv()), (7, 7), (1, 1)),
    "residual with a stride": (Sum(conv(1, stride=2), row(conv(3, padding=1), conv(3, 2, 2, stride=2, padding=1))),
                               (5, 5), (2, 2)),
    "the longest branch of an inception": (
        Joined(conv(1), conv(5, padding=2), row(nn.AvgPool2d(3, 1, 1), conv(1)), conv((1, 9), padding=(0, 4))),
        (5, 9),
        (1, 1),
    ),
    "dense": (row(Joined(nn.Identity(), conv(3, padding=1)), Joined(nn.Identity(), conv(3, 4, 2, padding=1))),
              (5, 5), (1, 1)),
    "gated": (Of(lambda x: x * torch.sigmoid(F.avg_pool2d(x, 5, 1, 2))), (5, 5), (1, 1)),
    "gated linear unit": (row(conv(3, 2, 4), nn.GLU(1), conv()), (5, 5), (1, 1)),
    "split channels": (
        row(conv(3, 2, 4), Of(lambda x: sum(F.avg_pool2d(part, 3, 1) for part in x.chunk(2, 1)))), (5, 5), (1, 1),
    ),
    "shuffled channels": (
        row(conv(3, 2, 4), Of(lambda x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)), conv(3, 4)),
        (5, 5), (1, 1),
    ),
    "channels last": (row(conv(), ChannelsLast(row(nn.LayerNorm(2), nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))),
                          conv()), (5, 5), (1, 1)),
    "flattened and restored": (row(conv(), Positions(row(nn.LayerNorm(2), nn.Linear(2, 2))), conv()), (5, 5), (1, 1)),
    "stacked": (row(conv(), Of(lambda x: torch.stack([x, 2 * x], 1).sum(1)), conv()), (5, 5), (1, 1)),
    "stacked and unbound": (row(conv(), Of(lambda x: torch.stack([x, -x], -1).unbind(-1)[1]), conv()), (5, 5), (1, 1)),
    "cut at the border": (row(conv(), Of(lambda x: x[:, :, 1:-1, 2:]), conv()), (5, 5), (1, 1)),
    "every second position": (row(conv(), Of(lambda x: x[:, :, ::2, ::2]), conv()), (7, 7), (2, 2)),
    "a channel": (row(conv(), Of(lambda x: x[:, :1].expand(-1, 2, -1, -1)), conv()), (5, 5), (1, 1)),
    "squeezed": (row(conv(), Of(lambda x: x.unsqueeze(1).squeeze(1)), conv()), (5, 5), (1, 1)),
    "mean of channels": (row(conv(), Of(lambda x: x.mean(1, keepdim=True)), conv(3, 1)), (5, 5), (1, 1)),
    "swapped axes": (row(conv((1, 5)), Of(lambda x: x.transpose(2, 3).transpose(2, 3)), conv((3, 1))), (3, 5), (1, 1)),
    "nearest upsampling": (row(conv(3, stride=2), nn.Upsample(scale_factor=2)), (3, 3), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_the_field_is_the_extent_of_the_gradients(name: str) -> None:
    """Each figure is by hand, by the followed operations, and by gradients."""
    network, size, stride = copy.deepcopy(PLAIN[name])
    image = (48, 48)
    field = followed(network.double(), image)
    assert (field.size, field.stride, field.dims, field.limit) == (size, stride, (-2, -1), "")
    assert extents(network, image, seeds=64 if "maximum" in name or name == "functions" else 1) == list(size)


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int) -> None:
    """Convolutions and pooling of any kernel, stride, dilation and padding, along each side its own."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, int]:
        first, second = torch.randint(low, high + 1, (2,), generator=random).tolist()
        return first, second

    modules: list[nn.Module] = []
    for _ in range(4):
        if torch.rand((), generator=random) < 0.3:
            modules.append(nn.AvgPool2d(draw(1, 3), draw(1, 2), ceil_mode=bool(seed % 2)))
        else:
            more = {"stride": draw(1, 2), "dilation": draw(1, 3), "padding": draw(0, 2)}
            modules.append(conv(draw(1, 4), **more))
    network, image = row(conv(1), *modules).double(), (256, 256)
    field = followed(network, image)
    # a dilation above the previous stride leaves pixels out, but the first and the last are seen
    assert extents(network, image) == list(field.size)


ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.LogSigmoid),
)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_functions_leave_positions_alone_and_are_counted(kind: type[nn.Module]) -> None:
    found = trace(row(conv(), kind(), conv()), torch.zeros(1, 2, 12, 12))
    field = found.outputs[""].field
    assert field is not None and (field.size, field.limit) == ((5, 5), "")
    assert found.elements_by_kind == {"activation": 2 * 10 * 10}


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_interpolation_sees_at_most_its_neighbours(mode: str) -> None:
    """Between two (linear) or four (cubic) of them, wherever the position falls."""
    network = row(conv(3, stride=2), nn.Upsample(scale_factor=2, mode=mode)).double()
    taps = {"bilinear": 2, "bicubic": 4}[mode]
    field = followed(network, (48, 48))
    assert field.size == (3 + 2 * (taps - 1),) * 2 and field.stride == (1, 1)
    assert extents(network, (48, 48)) == list(field.size)


def test_positions_that_stay_channels_last() -> None:
    network = row(conv(3, stride=2), Of(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(2, 3)).double()
    field = followed(network, (32, 32))
    assert (field.size, field.stride, field.dims, field.limit) == ((3, 3), (2, 2), (-3, -2), "")
    assert extents(network, (32, 32), dims=(-3, -2)) == [3, 3]


def test_positions_in_a_row_are_still_positions() -> None:
    network = row(conv(4, stride=4), Of(lambda x: x.flatten(2).transpose(1, 2)), nn.LayerNorm(2)).double()
    field = followed(network, (32, 24))
    assert (field.size, field.stride, field.dims, field.grid) == ((4, 4), (4, 4), (-2,), (8, 6))


# Where a position depends on all of the image, or is none any more


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, tokens: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(tokens, tokens, tokens)
        return (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens


class OverPositions(nn.Module):
    """A linear layer that mixes positions, as MLP-Mixer's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(100, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.mix(tokens.transpose(1, 2)).transpose(1, 2)
        return mixed


LIMITS: dict[str, tuple[nn.Module, str]] = {
    "fused attention": (Positions(Attention(True)), "attention in 1.inside"),
    "attention": (Positions(Attention(False)), "attention in 1.inside"),
    "squeeze and excitation": (SqueezeExcite(2, rd_channels=2), "global pooling in 1"),
    "global pooling": (nn.AdaptiveAvgPool2d(1), "global pooling in 1"),
    "mean of positions": (Of(lambda x: x.mean((2, 3))), "global pooling in 1"),
    "largest of positions": (Of(lambda x: x.amax((2, 3), keepdim=True)), "global pooling in 1"),
    "layer norm over positions": (nn.LayerNorm([2, 10, 10]), "normalisation over positions in 1"),
    "layer norm along one side": (nn.LayerNorm(10), "normalisation over positions in 1"),
    "linear over positions": (Positions(OverPositions()), "a linear layer over positions in 1.inside.mix"),
    "linear along one side": (nn.Linear(10, 10), "a linear layer over positions in 1"),
    "flattened maps": (row(nn.Flatten(), nn.Linear(200, 5)), "positions taken apart in 1.0"),
    "group norm": (nn.GroupNorm(1, 2), "statistics over all positions in 1"),
    "instance norm": (nn.InstanceNorm2d(2), "statistics over all positions in 1"),
    "space to depth": (SpaceToDepth(), "positions taken apart in 1"),
    "uneven pooling": (nn.AdaptiveAvgPool2d(3), "pooling from 10 x 10 to 3 x 3 in 1"),
    "softmax over positions": (Of(lambda x: x.flatten(2).softmax(-1)), "softmax over positions in 1"),
    "a gate between columns": (nn.GLU(), "a gate between positions in 1"),
    "sum along a side": (Of(lambda x: x.cumsum(2)), "a sum over positions in 1"),
    "turned round": (Of(lambda x: x.flip(-1)), "positions in another order in 1"),
    "rolled": (Of(lambda x: x.roll(3, -1)), "roll in 1"),
    "Fourier transform": (Of(lambda x: torch.fft.fft2(x).real), "fft_fft2 in 1"),
    "transposed convolution": (nn.ConvTranspose2d(2, 2, 2, stride=2), "conv_transpose2d in 1"),
    "a window along channels": (Of(lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), (1, 2))),
                                "a window over something else than positions in 1"),
    "convolution in time": (Of(lambda x: F.conv1d(x.flatten(2), torch.ones(1, 2, 3, dtype=x.dtype))),
                            "a convolution over 1 dimensions in 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_where_the_field_ends_is_told_with_the_modules_name(name: str) -> None:
    network, limit = copy.deepcopy(LIMITS[name])
    field = followed(row(conv(), network).double(), (14, 14) if "depth" in name else (12, 12))
    assert field.limit == limit


def test_what_ends_the_field_first_is_kept() -> None:
    network = row(conv(), SqueezeExcite(2, rd_channels=2), nn.GroupNorm(1, 2), conv(), nn.AdaptiveAvgPool2d(1))
    assert followed(network.double(), (16, 16)).limit == "global pooling in 1"


@pytest.mark.parametrize("name", ["group norm", "instance norm", "squeeze and excitation", "attention"])
def test_there_the_whole_image_matters_indeed(name: str) -> None:
    torch.manual_seed(0)
    network = row(conv(), copy.deepcopy(LIMITS[name][0])).double().eval()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 1)  # with positive numbers throughout no ReLU stops a gradient
    images = torch.rand(1, 2, 12, 12, dtype=torch.float64).requires_grad_()
    network(images)[..., 4, 4].sum().backward()
    assert images.grad is not None and bool((images.grad.abs().amax((0, 1)) > 0).all())


def test_statistics_of_one_position_are_no_statistics_over_positions() -> None:
    network = row(conv(12), nn.GroupNorm(1, 2), nn.Flatten()).double()
    assert followed(network, (12, 12)).limit == ""


# Real networks


def smooth(network: nn.Module) -> nn.Module:
    """The same windows, all of whose inputs have gradients: a maximum has one, a ReLU often none, and the last
    normalisation of a residual block begins with a scale of 0."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        holder, _, child = name.rpartition(".")
        if isinstance(module, nn.MaxPool2d):
            window = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
            setattr(network.get_submodule(holder), child, window)
        elif isinstance(module, nn.ReLU | nn.ReLU6 | nn.Hardtanh):
            setattr(network.get_submodule(holder), child, nn.Softplus())
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network


class Features(nn.Module):
    """A network up to its last feature map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(images)
        return features


VGG16 = (4, 4, "M", 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M")
REAL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "test_resnet": (lambda: timm.create_model("test_resnet"), 167),
    "test_convnext": (lambda: timm.create_model("test_convnext"), 920),
    "vgg16": (lambda: VGG(cfg=list(VGG16)), 212),
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2), channels=(4, 4, 4, 4)), 435),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3), channels=(2, 2, 2, 2)), 427),
    "mobilenetv2_035": (lambda: timm.create_model("mobilenetv2_035"), 491),
    "convnext_atto": (lambda: ConvNeXt(depths=(2, 2, 6, 2), dims=(2, 2, 2, 2), conv_mlp=True), 1136),
}
"""Networks, with few channels where that is an argument, and the field by the formula; VGG-16's is in the paper."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "test_convnext" else []) for name in REAL]
)
def test_real_networks_by_gradients(name: str) -> None:
    torch.manual_seed(0)
    make, size = REAL[name]
    network = make().eval()
    whole = complexity(network, torch.zeros(1, 3, 224, 224)).whole
    assert (whole.receptive_field, whole.receptive_field_limit) == (size, "")
    side = (size // 32 + 4) * 32
    assert extents(smooth(Features(network)), (side, side)) == [size, size]


@pytest.mark.slow
def test_densenet_by_gradients() -> None:
    network = DenseNet(block_config=(6, 12, 24, 16), growth_rate=2, bn_size=1).eval()
    assert complexity(network, torch.zeros(1, 3, 224, 224)).whole.receptive_field == 2071
    assert extents(smooth(Features(network)), (2176, 2176)) == [2071, 2071]


@pytest.mark.parametrize("size", [64, 224, 320])
def test_the_field_does_not_depend_on_the_image(size: int) -> None:
    network = skeleton("resnet18").network
    assert complexity(network, torch.empty(1, 3, size, size, device="meta")).whole.receptive_field == 435


def test_stages_and_layers_have_fields_of_their_own() -> None:
    """VGG-11 by hand: each convolution adds two strides, each pooling one; the stride doubles."""
    found = complexity(skeleton("vgg11").network, torch.empty(1, 3, 64, 64, device="meta"))
    fields = [part.receptive_field for part in found.layers if part.kind == "Conv2d" and part.name.startswith("feat")]
    assert fields == [3, 8, 18, 26, 46, 62, 102, 134]
    pools = [(part.receptive_field, part.stride) for part in found.layers if part.kind == "MaxPool2d"]
    assert pools == [(4, 2), (10, 4), (30, 8), (70, 16), (150, 32)]
