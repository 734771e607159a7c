"""What networks cost: against published figures, PyTorch's own counter of operations, and counts by hand."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tlkit.errors import TlkitError
from tlkit.networks.complexity import Complexity, complexity, noise, stage_costs
from tlkit.networks.freezing import freeze
from tlkit.networks.skeleton import channels_of, skeleton, untrained
from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing

PUBLISHED = {
    "alexnet_torchvision": (61_100_840, 0.714, 195),
    "vgg11": (132_863_336, 7.609, 150),
    "vgg11_bn": (132_868_840, 7.609, 150),
    "vgg13": (133_047_848, 11.308, 156),
    "vgg13_bn": (133_053_736, 11.308, 156),
    "vgg16": (138_357_544, 15.47, 212),
    "vgg16_bn": (138_365_992, 15.47, 212),
    "vgg19": (143_667_240, 19.632, 268),
    "vgg19_bn": (143_678_248, 19.632, 268),
    "resnet18": (11_689_512, 1.814, 435),
    "resnet34": (21_797_672, 3.664, 899),
    "resnet50": (25_557_032, 4.089, 427),
    "resnet101": (44_549_160, 7.801, 971),
    "resnet152": (60_192_808, 11.514, 1451),
    "resnext50_32x4d": (25_028_904, 4.23, 427),
    "resnext101_32x8d": (88_791_336, 16.414, 971),
    "resnext101_64x4d": (83_455_272, 15.46, 971),
    "densenet121": (7_978_856, 2.834, 2071),
    "densenet161": (28_681_000, 7.728, 2967),
    "densenet169": (14_149_480, 3.36, 3351),
    "densenet201": (20_013_928, 4.291, 3863),
}
"""Parameters and 10^9 MACs as the metadata of torchvision 0.29's weights state them, and the receptive field of the
last feature map by the formula of Araujo et al. (Distill, 2019)."""

VARIED = {
    **dict.fromkeys(
        (
            *(
                "resnet18",
                "resnet50",
                "resnext50_32x4d",
                "seresnet50",
                "ecaresnet26t",
                "resnest14d",
                "res2net50_26w_4s",
            ),
            *("densenet121", "vgg11_bn", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "regnety_002"),
            *("tf_efficientnet_lite0", "tf_efficientnetv2_b0", "hrnet_w18_small", "convnext_atto", "convnextv2_atto"),
            *("dla34", "cspresnet50", "repvgg_a0", "nfnet_f0", "poolformer_s12", "pvt_v2_b0", "mobilevit_xxs"),
            *("edgenext_xx_small", "focalnet_tiny_srf", "starnet_s1", "mambaout_femto", "vit_tiny_patch16_224"),
        ),
        64,
    ),
    **{
        "lenet": 32,
        "alexnet": 128,
        "alexnet_2gpu": 128,
        "inception_v3": 128,
        "resmlp_12_224": 224,
        "mixer_s32_224": 224,
    },
    **{"coatnet_0_rw_224": 224, "levit_128s": 224, "hiera_tiny_224": 224, "pit_ti_224": 224, "nest_tiny": 224},
    **{"swin_tiny_patch4_window7_224": 224, "lambda_resnet26t": 256, "botnet26t_256": 256},
}
"""One or more of many families, and a size of images."""

NO_CLASSIFIER, NOT_SQUARE = "has no classifier", "the network takes inputs of 3 x 1024 x 768"
UNCOUNTABLE = {
    **dict.fromkeys(
        (
            *("deepseek_vit_412m_enc", "gemma4_vit_167m_enc", "gemma4_vit_570m_enc", "mobilenetv5_300m_enc"),
            *("qwen3_vit_88m_enc", "qwen3_vit_306m_enc", "qwen3_vit_416m_enc"),
        ),
        NO_CLASSIFIER,
    ),
    **{f"vit_{size}_patch16_sapiens2": NOT_SQUARE for size in ("base", "large", "huge", "giant", "5b")},
}
"""All of timm 1.0.31's models that cannot be counted, and why."""
TWICE = {"vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"}
"""Differential attention (Ye et al., 2024, arXiv:2410.05258): timm's fused path multiplies each of its two maps of
weights with the values, its written-out path their difference."""


@pytest.fixture
def facts(shared_data: Path, read_csv: Callable[[Path], list[dict[str, str]]]) -> dict[str, dict[str, str]]:
    """The file that `PUBLISHED` restates, by model; skips where it is not there."""
    path = shared_data.parent / "facts" / "imagenet_models.csv"
    if not path.is_file():
        pytest.skip(f"the figures from outside are not there ({path})")
    return {row["model"]: row for row in read_csv(path)}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7)


def on_meta(name: str, size: int | None = None) -> tuple[Any, Tensor]:
    """A network without values, and an image for it."""
    loaded = skeleton(name, size)
    side = loaded.preprocessing.size
    return loaded.network, torch.empty(1, channels_of(loaded.network), side, side, device="meta")


def count(name: str, size: int | None = None) -> Complexity:
    return complexity(*on_meta(name, size))


def write_out_attention(network: nn.Module) -> None:
    """PyTorch's counter has no formula for the fused attention: have its products computed one by one."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def by_pytorch(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates by PyTorch's counter. Leaves the network frozen and its attention written out."""
    write_out_attention(network)
    network.requires_grad_(False)  # the counter fails where a module is handed its parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return int(flops // 2)


class Tiny(nn.Module):
    """A network of timm's surface: a convolution, a body, the mean of all positions, a classifier."""

    num_classes = 5

    def __init__(self, body: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = body
        self.fc = nn.Linear(channels, self.num_classes)
        self.feature_info = [{"module": "body", "num_chs": channels, "reduction": 1}]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, image: Tensor) -> Tensor:
        features: Tensor = self.body(self.stem(image))
        return features

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(nn.functional.adaptive_avg_pool2d(self.forward_features(image), 1).flatten(1))
        return logits


class Fourier(nn.Module):
    """A global filter (Rao et al., 2021, arXiv:2107.00645)."""

    def forward(self, maps: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(maps), s=maps.shape[-2:])


# Figures from elsewhere


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_operations_and_receptive_fields(name: str) -> None:
    params, giga, field = PUBLISHED[name]
    whole = count(name).whole
    assert whole.params == whole.trainable_params == params
    assert round(whole.macs / 1e9, 3) == giga
    assert (whole.receptive_field, whole.receptive_field_limit) == (field, "")
    assert whole.output_shape == (1000,)


def test_the_published_figures_are_those_of_the_file(facts: dict[str, dict[str, str]]) -> None:
    assert list(facts) == list(PUBLISHED)
    for name, row in facts.items():
        found = int(row["num_params"]), float(row["gmacs"]), int(row["receptive_field"])
        assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures_are_those_of_the_installed_torchvision(name: str) -> None:
    (meta,) = {
        (weights.meta["num_params"], weights.meta["_ops"])
        for weights in torchvision.models.get_model_weights(name.removesuffix("_torchvision"))
        if weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] > 0 or weights.name == "IMAGENET1K_V1"
    }
    assert meta == PUBLISHED[name][:2]


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("alexnet", 62_378_344, 1_135_256_096), ("alexnet_2gpu", 60_965_224, 724_406_816)],
)
def test_alexnet_by_hand(name: str, params: int, macs: int) -> None:
    """Krizhevsky et al., 2012, section 3.5: outputs of 55, 27 and 13 px; the paper's second, fourth and fifth layer see
    half of the channels."""
    groups = 2 if name == "alexnet_2gpu" else 1
    convolutions = 55**2 * 96 * 3 * 11**2 + 27**2 * 256 * 96 * 5**2 // groups
    convolutions += 13**2 * 9 * (384 * 256 + 384 * 384 // groups + 256 * 384 // groups)
    linear = 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    found = count(name)
    assert found.whole.macs == convolutions + linear == macs
    assert found.whole.params == params
    assert found.whole.receptive_field == 195


@pytest.mark.parametrize(
    ("name", "giga", "millions", "mega_activations"),
    [
        ("resnet50", 4.1, 25.6, 11.1),
        ("resnet101", 7.8, 44.5, 16.2),
        ("resnet152", 11.5, 60.2, 22.6),
        ("resnext50_32x4d", 4.2, 25.0, 14.4),
        ("regnetx_032", 3.2, 15.3, 11.4),
    ],
)
def test_published_activations(name: str, giga: float, millions: float, mega_activations: float) -> None:
    """Radosavovic et al., 2020, arXiv:2003.13678, tables 4 and 5: outputs of all convolutions, by fvcore's rule."""
    whole = count(name).whole
    assert round(whole.macs / 1e9, 1) == giga
    assert round(whole.params / 1e6, 1) == millions
    assert round(whole.activations / 1e6, 1) == mega_activations


@pytest.mark.parametrize("name", VARIED)
def test_operations_are_those_of_pytorchs_counter(name: str) -> None:
    network, image = on_meta(name, VARIED[name])
    found = complexity(network, image)
    assert found.whole.macs == by_pytorch(network, image)
    assert_sums(network, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_operations_of_a_sample_of_every_family(family: str) -> None:
    """All its models that cannot be counted, and at least four that can."""
    names = [name for name in timm.list_models(module=family) if name != "tlkit_variant"]
    chosen = set(random.Random(family).sample(names, min(4, len(names))))
    for name in sorted(chosen | (set(names) & (UNCOUNTABLE.keys() | TWICE))):
        if name in UNCOUNTABLE:
            with pytest.raises(TlkitError, match=UNCOUNTABLE[name]):
                skeleton(name)
            continue
        network, image = on_meta(name)
        found = complexity(network, image)
        reference = by_pytorch(network, image)
        if name in TWICE:
            assert reference < found.whole.macs < 1.1 * reference, name
        else:
            assert found.whole.macs == reference, name
        assert_sums(network, found)


@pytest.mark.slow
def test_the_sample_is_large() -> None:
    sizes = [len(timm.list_models(module=family)) for family in timm.list_modules()]
    assert sum(min(4, size) for size in sizes) >= 300
    assert set(timm.list_models()) >= UNCOUNTABLE.keys() | TWICE


def test_what_cannot_be_counted_is_refused_with_the_reason() -> None:
    for name in ("gemma4_vit_167m_enc", "vit_base_patch16_sapiens2"):
        with pytest.raises(TlkitError, match=UNCOUNTABLE[name]):
            skeleton(name)


# Sums and parts


def assert_sums(network: nn.Module, found: Complexity) -> None:
    """Stages, layers and kinds each sum to the whole, which is what the network itself has."""
    whole = found.whole
    assert whole.params == sum(parameter.numel() for parameter in network.parameters())
    assert whole.buffers == sum(buffer.numel() for buffer in network.buffers())
    for parts in (found.stages, found.layers):
        for field in ("params", "trainable_params", "buffers", "macs", "activations"):
            assert sum(getattr(part, field) for part in parts) == getattr(whole, field), field
    assert sum(found.macs_by_kind.values()) == whole.macs
    assert [part.name for part in found.stages] == [stage.name for stage in stages(network)]
    assert {layer.stage for layer in found.layers} <= {part.name for part in found.stages}
    for part in found.stages:
        mine = [layer for layer in found.layers if layer.stage == part.name]
        assert sum(layer.macs for layer in mine) == part.macs
        assert sum(layer.params for layer in mine) == part.params


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_atto", "test_vit", "tf_efficientnet_lite0"])
def test_layers_stand_under_their_own_names(name: str) -> None:
    network, image = on_meta(name)
    modules = dict(network.named_modules())
    for layer in complexity(network, image).layers:
        module = modules[layer.name]
        assert layer.kind == type(module).__name__
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        assert layer.params == own
        if isinstance(module, nn.Conv2d):
            out, fan, *kernel = module.weight.shape
            _, high, wide = layer.output_shape or ()
            assert layer.macs == out * fan * kernel[0] * kernel[1] * high * wide
        elif type(module) is nn.Linear:
            assert layer.macs == module.in_features * layer.activations


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "vgg11_bn", "convnext_atto"])
def test_activations_are_what_comes_out_of_convolutions_and_linear_layers(name: str) -> None:
    network, image = on_meta(name, 64)
    numbers = 0

    def add(module: nn.Module, args: Any, result: Tensor) -> None:
        nonlocal numbers
        numbers += result.numel()

    handles = [
        module.register_forward_hook(add) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    assert complexity(network, image).whole.activations == numbers > 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_a_vision_transformer_by_hand(fused: bool) -> None:
    """ViT-Ti/16 at 224 px: 12 layers, 3 heads of 64, 14 x 14 positions and a class token."""
    network, image = on_meta("vit_tiny_patch16_224")
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    found = complexity(network, image)
    tokens, width, hidden, heads, layers = 197, 192, 768, 3, 12
    products = 2 * tokens * tokens * width  # queries with keys, and their weights with values
    linear = tokens * width * (3 * width + width + 2 * hidden)
    assert found.macs_by_kind == {
        "convolution": 196 * 3 * 16 * 16 * width,
        "linear": layers * linear + width * 1000,
        "attention": layers * products,
    }
    per_layer = tokens * (3 * width + width + hidden + width)  # of linear layers
    per_layer += heads * tokens * tokens + tokens * width  # of the two products
    assert found.whole.activations == 196 * width + layers * per_layer + 1000
    assert found.elements_by_kind == {
        "normalisation": (2 * layers + 1) * tokens * width,
        "activation": layers * (tokens * hidden + heads * tokens * tokens),  # GELU, and softmax of the weights
    }
    products_are_in = [layer.macs for layer in found.layers if layer.name == "blocks.3.attn"]
    assert products_are_in == [products]


@pytest.mark.parametrize(
    "name", ["test_vit", "pit_ti_224", "cait_xxs24_224", "tiny_vit_5m_224", "xcit_nano_12_p16_224"]
)
def test_fused_attention_counts_as_what_it_is_made_of(name: str) -> None:
    network, image = on_meta(name)
    fused = complexity(network, image)
    assert any(module.fused_attn for module in network.modules() if hasattr(module, "fused_attn"))
    write_out_attention(network)
    written = complexity(network, image)
    assert fused.whole == written.whole
    assert fused.macs_by_kind == written.macs_by_kind
    assert fused.elements_by_kind == written.elements_by_kind


def test_attention_is_between_images_and_a_learnt_matrix_is_linear() -> None:
    """PyTorch's multi-head attention of three tokens with two heads of two."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(4, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, maps: Tensor) -> Tensor:
            tokens = maps.flatten(2).transpose(1, 2) @ self.mix
            return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(maps.shape)

    found = complexity(Tiny(Tokens()), torch.randn(1, 3, 1, 3))
    assert found.macs_by_kind == {
        "convolution": 3 * 4 * 27,
        "linear": 3 * 4 * 4 + 3 * 4 * 12 + 3 * 4 * 4 + 4 * 5,
        "attention": 2 * (2 * 3 * 3 * 2),
    }
    assert {layer.name: layer.macs for layer in found.layers}["body"] == 3 * 4 * 4


def test_elements_by_hand() -> None:
    body = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.GELU(), nn.AvgPool2d(2)
    )
    found = complexity(Tiny(body), torch.empty(1, 3, 8, 12))
    assert found.elements_by_kind == {
        "normalisation": 4 * 8 * 12 + 4 * 4 * 6,
        "activation": 4 * 8 * 12 + 4 * 4 * 6,
        "pooling": 4 * 4 * 6 + 4 * 2 * 3 + 4,
    }
    assert found.whole.macs == 8 * 12 * 4 * 27 + 4 * 5
    assert found.whole.activations == 4 * 8 * 12 + 5
    assert (found.whole.params, found.whole.buffers) == (4 * 27 + 4 + 4 * 5 + 5 + 8 + 8, 2 * 4 + 1)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_operations_that_are_not_counted_are_named(device: str) -> None:
    network = Tiny(nn.Sequential(Fourier(), Fourier())).to(device)
    found = complexity(network, torch.empty(1, 3, 8, 8, device=device))
    assert found.uncounted == {"fft_rfft2": 2, "fft_irfft2": 2}
    assert found.whole.macs == 64 * 4 * 27 + 4 * 5
    assert found.whole.receptive_field is None and "fft" in found.whole.receptive_field_limit
    assert count("test_resnet").uncounted == {}


def test_a_transposed_convolution_applies_its_filter_at_each_position_of_its_input() -> None:
    found = complexity(Tiny(nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=2)), torch.empty(1, 3, 6, 6))
    assert found.macs_by_kind["convolution"] == 36 * 4 * 27 + 36 * 4 * (4 // 2) * 16


def test_a_module_that_is_called_twice_counts_twice_and_its_tensors_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    found = complexity(Tiny(nn.Sequential(shared, nn.ReLU(), shared)), torch.empty(1, 3, 5, 5))
    assert found.whole.macs == 25 * 4 * 27 + 2 * 25 * 4 * 36 + 4 * 5
    assert found.whole.params == 4 * 27 + 4 + 4 * 36 + 4 * 5 + 5
    assert found.whole.receptive_field == 7


@pytest.mark.parametrize("frozen", [0, 1, 3, 5])
def test_frozen_stages_are_not_trainable(frozen: int) -> None:
    """ResNet-18 by stage: stem 9,536, then 147,968, 525,568, 2,099,712, 8,393,728, and 513,000 of the head."""
    sizes = {"stem": 9_536, "stage1": 147_968, "stage2": 525_568, "stage3": 2_099_712, "stage4": 8_393_728}
    sizes["head"] = 513_000
    network, image = on_meta("resnet18", 64)
    freeze(network, list(sizes)[:frozen])
    found = complexity(network, image)
    assert {part.name: part.params for part in found.stages} == sizes
    assert found.whole.trainable_params == sum(list(sizes.values())[frozen:])
    assert [part.trainable_params > 0 for part in found.stages] == [number >= frozen for number in range(6)]
    assert found.whole.params == 11_689_512


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "lenet"])
def test_weight_bytes_are_those_of_the_tensors_in_a_file(name: str, tmp_path: Path) -> None:
    network = untrained(name).network
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    content = (tmp_path / "weights.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    listed = json.loads(content[8 : 8 + header])
    ends = [entry["data_offsets"][1] for key, entry in listed.items() if key != "__metadata__"]
    assert count(name).weight_bytes == max(ends) == len(content) - 8 - header


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("test_resnet", None), ("test_vit", None), ("test_efficientnet", None), ("test_convnext", None)),
        *(("lenet", None), ("swin_tiny_patch4_window7_224", None), ("densenet121", 64), ("mobilenetv3_small_100", 64)),
        *(("mobilevit_xxs", 64), ("regnety_002", 64), ("dla34", 64)),
    ],
)
def test_a_count_without_values_is_that_of_real_tensors(name: str, size: int | None) -> None:
    loaded = untrained(name, size)
    side = loaded.preprocessing.size
    image = torch.randn(1, channels_of(loaded.network), side, side)
    assert complexity(loaded.network, image) == count(name, size)


def test_a_count_takes_no_memory() -> None:
    """VGG-19's parameters alone would take 575 MB."""
    program = """
import resource, sys
from pathlib import Path
import timm, torch

def peak():
    status = Path("/proc/self/status")  # getrusage there begins with what the parent process held
    if status.is_file():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

before = peak()
from tlkit.networks.skeleton import skeleton
from tlkit.networks.complexity import complexity
network = skeleton("vgg19").network
assert complexity(network, torch.empty(1, 3, 224, 224, device="meta")).whole.params == 143667240
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300, f"{done.stdout} MB"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_random_numbers_are_left_alone(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    count(name)
    assert torch.equal(torch.get_rng_state(), before)
    network, size = untrained(name).network, 160
    before = torch.get_rng_state()
    complexity(network, torch.zeros(1, 3, size, size))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 16), ("vit_base_patch16_224", 8), ("inception_v3", 32)])
def test_too_small_an_image_is_refused(name: str, size: int) -> None:
    with pytest.raises(TlkitError):
        count(name, size)


# Shares of stages, by which strategies weigh


def counted(network: Any, image: torch.Tensor) -> dict[str, float]:
    """Each stage's share by PyTorch's counter: of each module what is counted in it and in nothing inside it."""
    write_out_attention(network)
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
    ("name", "size"),
    [
        ("resnet18", 96),
        ("test_resnet", 64),
        ("tf_efficientnet_lite0", 96),
        ("mobilenetv3_small_100", 96),
        ("densenet121", 64),
        ("convnext_atto", 64),
        ("regnetx_002", 64),
        ("vit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_costs_are_those_of_pytorchs_counter(name: str, size: int) -> None:
    network, image = make(name), torch.randn(1, 3, size, size)
    costs = stage_costs(network, image)
    assert list(costs) == [stage.name for stage in stages(network)]
    assert sum(costs.values()) == pytest.approx(1)
    assert costs == pytest.approx(counted(network, image), abs=1e-9)


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
    with pytest.raises(TlkitError, match="does not take images of 32 px"):
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


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "deit3_small_patch16_224"]
)
def test_a_stages_parameters_are_those_of_the_partition(name: str) -> None:
    """Also those that the network itself holds: a ViT's class token and position embeddings are the stem's."""
    network = skeleton(name).network
    freeze(network, ["stem"])
    found = complexity(network, torch.empty(1, 3, 224, 224, device="meta"))
    expected = [sum(network.get_parameter(key).numel() for key in stage.parameters) for stage in stages(network)]
    assert [part.params for part in found.stages] == expected
    assert [part.trainable_params for part in found.stages] == [0, *expected[1:]]
    assert found.whole.trainable_params == sum(expected[1:])
