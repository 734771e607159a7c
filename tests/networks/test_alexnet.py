"""AlexNet in its three forms, and LeNet: sizes and costs as published, and timm's whole surface."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from tlkit.config import Preprocess
from tlkit.errors import TlkitError
from tlkit.networks.build import build, save_network
from tlkit.networks.complexity import complexity
from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing


class Form(NamedTuple):
    """What a network is, written down a second time.

    Args:
        size: Of its images, in pixels.
        convolutions: Channels, kernel, stride, padding, groups, window of the pooling after it (0: none).
        full: Widths of the fully connected layers, the classifier's last.
        norms: Whether there is a batch norm after each convolution.
        dropped: The layers whose inputs go through dropout.
        smallest: The smallest images of which something is left, in pixels.
    """

    size: int
    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    full: tuple[int, ...]
    norms: bool
    dropped: tuple[str, ...]
    smallest: int


FORMS = {
    "alexnet": Form(
        227,
        ((96, 11, 4, 0, 1, 3), (256, 5, 1, 2, 1, 3), (384, 3, 1, 1, 1, 0), (384, 3, 1, 1, 1, 0), (256, 3, 1, 1, 1, 3)),
        (4096, 4096, 1000),
        False,
        ("pre_logits.fc7", "head"),  # section 4.2: of the outputs of the first two fully connected layers
        67,
    ),
    "alexnet_2gpu": Form(
        227,
        ((96, 11, 4, 0, 1, 3), (256, 5, 1, 2, 2, 3), (384, 3, 1, 1, 1, 0), (384, 3, 1, 1, 2, 0), (256, 3, 1, 1, 2, 3)),
        (4096, 4096, 1000),
        False,
        ("pre_logits.fc7", "head"),
        67,
    ),
    "alexnet_torchvision": Form(
        224,
        ((64, 11, 4, 2, 1, 3), (192, 5, 1, 2, 1, 3), (384, 3, 1, 1, 1, 0), (256, 3, 1, 1, 1, 0), (256, 3, 1, 1, 1, 3)),
        (4096, 4096, 1000),
        False,
        ("pre_logits.fc6", "pre_logits.fc7"),  # torchvision has it before them
        63,
    ),
    "lenet": Form(28, ((20, 5, 1, 0, 1, 2), (50, 5, 1, 0, 1, 2)), (500, 10), True, ("head",), 16),
}
PARAMETERS = {"alexnet": 62_378_344, "alexnet_2gpu": 60_965_224, "alexnet_torchvision": 61_100_840, "lenet": 432_220}
MACS = {"alexnet": 1_135_256_096, "alexnet_2gpu": 724_406_816, "alexnet_torchvision": 714_188_480, "lenet": 2_869_000}
MAPS = {  # channels and side after each convolution, and after its pooling
    "alexnet": ([(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)], [(96, 27), (256, 13), *2 * [(384, 13)]]),
    "alexnet_2gpu": ([(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)], [(96, 27), (256, 13), *2 * [(384, 13)]]),
    "alexnet_torchvision": (
        [(64, 55), (192, 27), (384, 13), (256, 13), (256, 13)],
        [(64, 27), (192, 13), (384, 13), (256, 13)],
    ),
    "lenet": ([(20, 24), (50, 8)], [(20, 12)]),
}
LAST = {"lenet": (50, 4)}
ALL = tuple(FORMS)
QUICK = ("lenet", "alexnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:3]))


def on_meta(name: str, **arguments: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def make(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


class Made(dict[str, Any]):
    """Networks by name, made when they are asked for."""

    def __missing__(self, name: str) -> Any:
        with torch.inference_mode(False):  # whoever asks first
            return self.setdefault(name, make(name))


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Each network with its weights. Read only."""
    return Made()


def images(name: str, count: int = 2, size: int | None = None, channels: int = 3) -> Tensor:
    size = size or FORMS[name].size
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def meta_images(name: str, count: int = 2, channels: int = 3) -> Tensor:
    return torch.empty(count, channels, FORMS[name].size, FORMS[name].size, device="meta")


def maps_of(name: str) -> list[tuple[int, int, int]]:
    """Channels and sides of the feature maps, which are taken after the pooling."""
    return [(channels, side, side) for channels, side in (*MAPS[name][1], LAST.get(name, (256, 6)))]


def after(side: int, kernel: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - kernel) // stride + 1


# Sizes and costs


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_costs(name: str) -> None:
    """As published, by adding up, and as counted."""
    form = FORMS[name]
    side, before, params, macs = form.size, 3, 0, 0
    for channels, kernel, stride, padding, groups, window in form.convolutions:
        side = after(side, kernel, stride, padding)
        weights = channels * before // groups * kernel**2
        params += weights + channels + 2 * channels * form.norms
        macs += side**2 * weights
        side = after(side, window, 2, 0) if window else side
        before = channels
    before *= side**2
    for width in form.full:
        params, macs, before = params + (before + 1) * width, macs + before * width, width
    assert (params, macs) == (PARAMETERS[name], MACS[name])

    counted = complexity(on_meta(name), meta_images(name, 1)).whole
    assert (counted.params, counted.macs) == (params, macs)


@pytest.mark.parametrize("name", ALL)
def test_sizes_of_maps(name: str, made: dict[str, Any]) -> None:
    """Layer by layer, in a pass over an image: the sizes before and after pooling."""
    network, found = made[name], {}
    handles = [
        module.register_forward_hook(lambda module, args, out, key=key: found.update({key: tuple(out.shape[1:])}))
        for key, module in network.named_modules()
    ]
    with torch.inference_mode():
        network(images(name, 1))
    for handle in handles:
        handle.remove()
    numbers = range(1, len(FORMS[name].convolutions) + 1)
    assert [found[f"features.conv{number}"] for number in numbers] == [
        (channels, side, side) for channels, side in MAPS[name][0]
    ]
    pooled = {number for number, conv in enumerate(FORMS[name].convolutions, 1) if conv[-1]}
    last = [f"features.{'pool' if number in pooled else 'act'}{number}" for number in numbers]
    assert [found[layer] for layer in last] == maps_of(name)
    assert {key for key in found if key.startswith("features.pool")} == {f"features.pool{number}" for number in pooled}
    widths = [shape for key, shape in found.items() if key.startswith("pre_logits.fc") or key == "head"]
    assert widths == [(width,) for width in FORMS[name].full]


@pytest.mark.parametrize("name", ALL)
def test_order_of_layers(name: str) -> None:
    """Section 3.3 and 3.4: normalisation after the ReLU of the first two convolutions, then overlapping pooling."""
    kinds = [type(module).__name__ for module in on_meta(name).features]
    norm, local = ["BatchNorm2d"] * FORMS[name].norms, ["LocalResponseNorm"] * (name == "alexnet_2gpu")
    expected: list[str] = []
    for number, (*_, window) in enumerate(FORMS[name].convolutions):
        expected += ["Conv2d", *norm, "ReLU", *(local if number < 2 else []), *(["MaxPool2d"] if window else [])]
    assert kinds == expected


# The paper's own parts


@pytest.mark.parametrize("layer", ["lrn1", "lrn2"])
def test_local_response_normalisation(layer: str, made: dict[str, Any]) -> None:
    """Section 3.3: b_i = a_i / (k + alpha * sum of a_j^2 over the n channels around i) ^ beta, alpha not divided."""
    k, n, alpha, beta = 2.0, 5, 1e-4, 0.75
    channels = {"lrn1": 96, "lrn2": 256}[layer]
    a = 60 * torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.empty_like(a)
    for i in range(channels):
        around = a[:, max(0, i - n // 2) : min(channels - 1, i + n // 2) + 1]
        assert around.shape[1] == (n if 2 <= i < channels - 2 else 3 + min(i, channels - 1 - i))
        expected[:, i] = a[:, i] / (k + alpha * (around**2).sum(1)) ** beta
    found = made["alexnet_2gpu"].features.get_submodule(layer)(a)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    divided = a / (k + alpha / n * (a**2)) ** beta
    assert (found - divided).abs().max() > 1, "numbers for which alpha makes a difference"


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_two_towers(number: int, made: dict[str, Any]) -> None:
    """Section 3.5: the third convolution sees both towers, the others the maps of their own alone."""
    layer = made["alexnet_2gpu"].features.get_submodule(f"conv{number}")
    separate = number in (2, 4, 5)
    inputs = torch.randn(1, layer.in_channels, 13, 13, generator=torch.Generator().manual_seed(3))
    half, out = layer.in_channels // 2, layer.out_channels // 2
    with torch.inference_mode():
        whole = layer(inputs)
        for tower in (0, 1):
            one = inputs.clone()
            one[:, tower * half : (tower + 1) * half] = 0
            changed = (layer(one) != whole).flatten(2).any(2)[0]
            assert changed[tower * out : (tower + 1) * out].all()
            others = changed[(1 - tower) * out : (2 - tower) * out]
            assert not others.any() if separate else others.all()


def test_towers_stay_apart_from_the_fourth_convolution_on(made: dict[str, Any]) -> None:
    layers = made["alexnet_2gpu"].features
    names = [name for name, _ in layers.named_children()]
    inputs = torch.rand(1, 384, 13, 13, generator=torch.Generator().manual_seed(4))
    one = torch.cat([inputs[:, :192], torch.zeros(1, 192, 13, 13)], 1)
    with torch.inference_mode():
        tail = layers[names.index("act3") :]
        whole, left = tail(inputs.clone()), tail(one)
    assert torch.equal(whole[:, :128], left[:, :128]) and not torch.equal(whole[:, 128:], left[:, 128:])


@pytest.mark.parametrize("name", ["alexnet", "alexnet_torchvision", "lenet"])
def test_one_tower_elsewhere(name: str) -> None:
    assert {module.groups for module in on_meta(name).modules() if isinstance(module, nn.Conv2d)} == {1}
    assert not any(isinstance(module, nn.LocalResponseNorm) for module in on_meta(name).modules())


@pytest.mark.parametrize("name", ALL)
def test_which_layers_dropout_stands_before(name: str) -> None:
    """Where everything is dropped, these layers see zeros, in training alone."""
    network, seen = make(name, drop_rate=1.0), {}
    for key, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, key=key: seen.update({key: bool(args[0].any())}) and None
            )
    with torch.inference_mode():
        network.train()(images(name))
        in_training = dict(seen)
        network.eval()(images(name))
    assert len(seen) == len(FORMS[name].full) and all(seen.values())
    dropped = [key for key, anything in in_training.items() if not anything]
    # what comes after a layer that sees zeros is its bias, and so not zero
    assert dropped == list(FORMS[name].dropped)
    assert all(anything for key, anything in in_training.items() if key not in FORMS[name].dropped)


@pytest.mark.parametrize("rate", [None, 0.2, 0.0])
@pytest.mark.parametrize("name", ALL)
def test_drop_rate(name: str, rate: float | None) -> None:
    network = on_meta(name) if rate is None else on_meta(name, drop_rate=rate)
    found = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    assert found == [0.5 if rate is None else rate] * len(FORMS[name].dropped)


# What timm expects of a network


@pytest.mark.parametrize("name", ALL)
def test_timm_knows_it(name: str) -> None:
    assert timm.is_model(name) and name in timm.list_models() and name in timm.list_models(f"{name[:4]}*")
    tagged = timm.list_pretrained(f"{name}.*")
    assert tagged == (["alexnet_torchvision.tv_in1k"] if name == "alexnet_torchvision" else [])


@pytest.mark.parametrize("name", ALL)
def test_configuration(name: str) -> None:
    form, network, config = FORMS[name], on_meta(name), get_pretrained_cfg(name)
    assert config.input_size == network.pretrained_cfg["input_size"] == (3, form.size, form.size)
    assert config.num_classes == network.num_classes == form.full[-1]
    assert config.pool_size == (maps_of(name)[-1][1:])
    assert isinstance(network.get_submodule(config.first_conv), nn.Conv2d)
    assert config.first_conv == next(iter(network.state_dict())).removesuffix(".weight")
    assert network.get_submodule(config.classifier) is network.get_classifier()
    assert (config.interpolation, config.fixed_input_size) == ("bilinear", False)
    assert bool(config.url) == (name == "alexnet_torchvision")
    assert resolve_model_data_config(network)["input_size"] == (3, form.size, form.size)
    if name == "lenet":
        assert (config.crop_pct, config.mean, config.std) == (1.0, (0.5,) * 3, (0.5,) * 3)
    else:  # 227 and 224 px out of the 256 that images are resized to
        assert round(form.size / config.crop_pct) == 256
        assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", ALL)
def test_features_and_head(name: str, made: dict[str, Any]) -> None:
    network, x = made[name], images(name)
    with torch.inference_mode():
        maps = network.forward_features(x.clone())
        hidden = network.forward_head(maps, pre_logits=True)
        logits = network.forward_head(maps)
        assert torch.equal(logits, network(x.clone())) and torch.equal(network.head(hidden), logits)
    assert maps.shape == (2, *maps_of(name)[-1]) and maps.shape[1] == network.num_features
    assert hidden.shape == (2, network.head_hidden_size) == (2, FORMS[name].full[-2])
    assert logits.shape == (2, network.num_classes) == (2, FORMS[name].full[-1])
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", ALL)
def test_images_are_left_as_they_are(name: str, made: dict[str, Any]) -> None:
    """Activations work in place, but never on what they are given."""
    x = images(name)
    kept = x.clone()
    with torch.inference_mode():
        made[name](x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", ALL)
def test_another_classifier(name: str, classes: int) -> None:
    expected = (2, classes or FORMS[name].full[-2])
    network = on_meta(name)
    assert network.get_classifier() is network.head and network.head.out_features == FORMS[name].full[-1]
    network.reset_classifier(classes)
    for one in (network, on_meta(name, num_classes=classes)):
        assert one(meta_images(name)).shape == expected
        assert one.forward_head(one.forward_features(meta_images(name)), pre_logits=True).shape == (
            2,
            FORMS[name].full[-2],
        )
        assert one.num_classes == classes and one.head_hidden_size == FORMS[name].full[-2]
        assert isinstance(one.get_classifier(), nn.Linear if classes else nn.Identity)
        assert all(parameter.is_meta for parameter in one.parameters())
    network.reset_classifier(5)
    assert network(meta_images(name)).shape == (2, 5)


def test_a_new_classifier_is_where_the_network_is() -> None:
    network = timm.create_model("lenet", dtype=torch.bfloat16)
    network.reset_classifier(3)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert on_meta("lenet", device="meta").head.weight.is_meta


@pytest.mark.parametrize("name", ALL)
def test_grey_images(name: str) -> None:
    network = on_meta(name, in_chans=1)
    assert network(meta_images(name, channels=1)).shape == (2, FORMS[name].full[-1])
    assert network.in_chans == network.features.conv1.in_channels == 1
    kernel = FORMS[name].convolutions[0][1]
    less = 2 * FORMS[name].convolutions[0][0] * kernel**2
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name] - less


@pytest.mark.parametrize("name", ALL)
def test_feature_maps_are_as_described(name: str, made: dict[str, Any]) -> None:
    """``feature_info`` against ``forward_intermediates`` and against the named modules, with all arguments."""
    network, x = made[name], images(name)
    count = len(network.feature_info)
    by_hook: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(entry["module"]).register_forward_hook(
            lambda module, args, out, key=entry["module"]: by_hook.update({key: out.clone()})
        )
        for entry in network.feature_info
    ]
    with torch.inference_mode():
        last, maps = network.forward_intermediates(x.clone())
        features = network.forward_features(x.clone())
    for handle in handles:
        handle.remove()
    assert [tuple(found.shape[1:]) for found in maps] == maps_of(name)
    assert [entry["num_chs"] for entry in network.feature_info] == [channels for channels, *_ in maps_of(name)]
    stride, reductions = 1, []
    for _, _, step, _, _, window in FORMS[name].convolutions:
        stride *= step * (2 if window else 1)
        reductions.append(stride)
    assert [entry["reduction"] for entry in network.feature_info] == reductions
    assert torch.equal(last, features) and torch.equal(maps[-1], features)
    for found, entry in zip(maps, network.feature_info, strict=True):
        assert torch.equal(found, by_hook[entry["module"]]), "nothing after it has changed it in place"
    for indices, expected in (
        (None, range(count)),
        (1, [count - 1]),
        (2, [count - 2, count - 1]),
        ([0], [0]),
        ([0, 1], [0, 1]),
        ([-2], [count - 2]),
    ):
        for stop_early in (False, True):
            with torch.inference_mode():
                only = network.forward_intermediates(
                    x.clone(), indices=indices, stop_early=stop_early, intermediates_only=True
                )
                end, both = network.forward_intermediates(x.clone(), indices=indices, stop_early=stop_early)
            assert isinstance(only, list) and len(only) == len(both) == len(expected)
            for number, one, two in zip(expected, only, both, strict=True):
                assert torch.equal(one, maps[number]) and torch.equal(two, maps[number])
            assert torch.equal(end, maps[max(expected)] if stop_early else features)
    with pytest.raises(AssertionError, match="NCHW"):
        network.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError):
        network.forward_intermediates(x, indices=[count])


def test_stopping_early_computes_no_more(made: dict[str, Any]) -> None:
    calls: list[int] = []
    handle = made["alexnet"].features.conv3.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        made["alexnet"].forward_intermediates(images("alexnet", 1), indices=[0, 1], stop_early=True)
        assert calls == []
        made["alexnet"].forward_intermediates(images("alexnet", 1), indices=[0, 1])
    handle.remove()
    assert calls == [1]


@pytest.mark.parametrize("prune_head", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_pruning(name: str, prune_head: bool) -> None:
    """What is kept still runs; the head goes with the last map, which it is made for."""
    whole = maps_of(name)
    for index in range(len(whole)):
        network = on_meta(name)
        assert network.prune_intermediate_layers([index], prune_head=prune_head) == [index]
        entry = network.feature_info[index]
        assert list(network.features.named_children())[-1][0] == entry["module"].removeprefix("features.")
        last, maps = network.forward_intermediates(meta_images(name), indices=[index])
        assert last.shape == maps[0].shape == (2, *whole[index])
        out = network(meta_images(name))
        if not prune_head and index == len(whole) - 1:
            assert out.shape == (2, FORMS[name].full[-1]) and network.head_hidden_size == FORMS[name].full[-2]
        else:
            assert out.shape == (2, *whole[index])
            assert network.num_features == network.head_hidden_size == whole[index][0]
            assert network.num_classes == 0 and isinstance(network.get_classifier(), nn.Identity)
            assert not any(isinstance(module, nn.Linear) for module in network.modules())


def test_pruning_by_a_count() -> None:
    network = on_meta("alexnet")
    assert network.prune_intermediate_layers(2, prune_head=True) == [3, 4]
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_747_200  # the five convolutions


@pytest.mark.parametrize("how", [{}, {"feature_cls": "getter"}], ids=["list", "getter"])
@pytest.mark.parametrize("name", QUICK)
def test_features_only(name: str, how: dict[str, Any], made: dict[str, Any]) -> None:
    whole, x = maps_of(name), images(name)
    with torch.inference_mode():
        expected = made[name].forward_intermediates(x.clone(), intermediates_only=True)
        for indices in (None, (0, 1), (1,)):
            torch.manual_seed(0)
            given = {"out_indices": indices} if indices else {}
            network = timm.create_model(name, features_only=True, **given, **how).eval()
            found = network(x.clone())
            wanted = list(indices or range(len(whole)))
            assert [tuple(one.shape[1:]) for one in found] == [whole[number] for number in wanted]
            for number, one in zip(wanted, found, strict=True):
                assert torch.equal(one, expected[number])
            assert network.feature_info.channels() == [whole[number][0] for number in wanted]
            info = made[name].feature_info
            assert network.feature_info.reduction() == [info[number]["reduction"] for number in wanted]


@pytest.mark.parametrize("name", QUICK)
def test_gradient_checkpointing(name: str, made: dict[str, Any]) -> None:
    """The same gradients, from features that are computed a second time."""
    found: dict[bool, dict[str, Tensor]] = {}
    size = FORMS[name].smallest + 1
    for enable in (False, True):
        network, calls = copy.deepcopy(made[name]), []
        network.features.conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        network.set_grad_checkpointing(enable)
        network(images(name, size=size)).square().sum().backward()
        assert len(calls) == (2 if enable else 1)
        found[enable] = {key: parameter.grad for key, parameter in network.named_parameters()}
        assert all(gradient is not None and gradient.any() for gradient in found[enable].values())
    for key, gradient in found[False].items():
        torch.testing.assert_close(found[True][key], gradient, rtol=1e-6, atol=0)
    network.set_grad_checkpointing(False)
    assert network.grad_checkpointing is False


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_groups_of_parameters(name: str, coarse: bool) -> None:
    """A group for each convolution with its normalisation, one for the hidden layers, and one for the classifier."""
    network = on_meta(name)
    names = [key for key, _ in network.named_parameters()]
    groups = group_parameters(network, network.group_matcher(coarse=coarse))
    count = len(FORMS[name].convolutions)
    assert list(groups) == list(range(count + 2))
    assert list(chain(*groups.values())) == names
    for number in range(count):
        assert {key.split(".")[1][-1] for key in groups[number]} == {str(number + 1)}
    assert all(key.startswith("pre_logits.fc") for key in groups[count])
    assert groups[count + 1] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("name", ALL)
def test_layer_decay(name: str) -> None:
    network = on_meta(name)
    scales = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert len(scales) == len(list(network.parameters()))
    last = len(FORMS[name].convolutions) + 1
    for key, parameter in network.named_parameters():
        depth = last if key.startswith("head") else last - 1 if "fc" in key else int(key.split(".")[1][-1]) - 1
        assert scales[id(parameter)] == (0.5 ** (last - depth), 0.05 if parameter.ndim > 1 else 0.0)


@pytest.mark.filterwarnings("ignore")  # that scripting is deprecated
@pytest.mark.parametrize("name", QUICK)
def test_scripted_and_exported(name: str, made: dict[str, Any]) -> None:
    """As timm's VGG can be."""
    network, x = made[name], images(name)
    with torch.no_grad():
        expected = network(x.clone())
        scripted: Any = torch.jit.script(network)
        assert torch.equal(scripted(x.clone()), expected)
        assert torch.equal(scripted.forward_head(scripted.forward_features(x.clone())), expected)
        exported = torch.export.export(network, (x.clone(),)).module()
        torch.testing.assert_close(exported(x.clone()), expected, rtol=1e-5, atol=1e-6)


# Sizes of images


@pytest.mark.parametrize("name", ALL)
def test_images_of_other_sizes(name: str, made: dict[str, Any]) -> None:
    form = FORMS[name]
    shapes = ((form.smallest, form.smallest), (form.size + 33, form.size + 33), (form.smallest + 20, form.size))
    with torch.inference_mode():
        for height, width in shapes:
            x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))
            network = made[name]
            assert network(x).shape == (2, form.full[-1])
            maps = network.forward_features(x)
            side = maps_of(name)[-1][1]
            pooled = torch.nn.functional.adaptive_avg_pool2d(maps, side).flatten(1)
            assert torch.equal(network.pre_logits[1](network.pre_logits[0](maps)), pooled)


@pytest.mark.parametrize("name", ALL)
def test_images_that_are_too_small(name: str) -> None:
    form = FORMS[name]
    for size in (form.smallest - 1, 4):
        with pytest.raises(RuntimeError):
            on_meta(name)(torch.empty(2, 3, size, size, device="meta"))


def test_images_that_are_too_small_are_refused_in_one_line() -> None:
    with pytest.raises(TlkitError) as caught:
        build("lenet", "random", Preprocess(image_size=15))
    line = str(caught.value)
    assert line.startswith("--image-size: the network does not take images of 15 px (") and "\n" not in line
    assert line.endswith("; try another size")


# Through a run folder, and cut into stages


@pytest.mark.parametrize("name", QUICK)
def test_round_trip(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    loaded = build(name, "random", Preprocess(crop=0.75))
    assert (loaded.name, loaded.title, loaded.weights, loaded.preprocessing.size) == (
        name,
        name,
        "random",
        FORMS[name].size,
    )
    loaded.network.reset_classifier(3)  # type: ignore[operator]
    save_network(tmp_path, loaded := replace(loaded, classes=("a", "b", "c")))
    again = build(str(tmp_path), "default")
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    by_file = build(name, str(tmp_path / "model.safetensors")).network
    x = images(name)
    with torch.inference_mode():
        expected = loaded.network(x)
        assert expected.shape == (2, 3)
        for network in (again.network, timms, by_file):
            assert torch.equal(network(x), expected)
    assert (again.name, again.classes, again.preprocessing) == (name, ("a", "b", "c"), loaded.preprocessing)
    assert Preprocessing.from_timm(resolve_model_data_config(timms)) == loaded.preprocessing
    (tmp_path / "model.safetensors").unlink()  # of a quarter of a gigabyte


@pytest.mark.parametrize("name", ALL)
def test_stages_are_an_ordered_partition(name: str) -> None:
    network, count = on_meta(name), len(FORMS[name].convolutions)
    cut = stages(network)
    assert [stage.name for stage in cut] == ["stem", *(f"stage{number}" for number in range(1, count)), "neck", "head"]
    assert list(chain(*(stage.parameters for stage in cut))) == [key for key, _ in network.named_parameters()]
    modules = [key for key, _ in network.named_modules()]
    assert sorted(chain(*(stage.modules for stage in cut))) == sorted(modules)
    for number, stage in enumerate(cut[:count], 1):
        assert {key.split(".")[1] for key in stage.parameters} <= {f"conv{number}", f"norm{number}"}
    assert [stage.output for stage in cut[1:count]] == [entry["module"] for entry in network.feature_info[1:]]
    assert cut[-1].parameters == ("head.weight", "head.bias") and all("fc" in key for key in cut[-2].parameters)
    sides = [shape[1] for shape in maps_of(name)]
    assert all(left >= right for left, right in pairwise(sides))


@pytest.mark.parametrize("name", ALL)
def test_dropout_directly_before_the_classifier_goes_with_it(name: str) -> None:
    """As `tlkit.networks.stages.Stage` says, and as it is in VGG."""
    network = on_meta(name)
    of = {key: stage.name for stage in stages(network) for key in stage.modules}
    drops = [key for key, module in network.named_modules() if isinstance(module, nn.Dropout)]
    assert [of[key] for key in drops] == ["head" if layer == "head" else "neck" for layer in FORMS[name].dropped]


@pytest.mark.parametrize("name", ["lenet", "alexnet"])
def test_a_training_step_reaches_everything(name: str, made: dict[str, Any]) -> None:
    network = copy.deepcopy(made[name]).train()
    torch.manual_seed(1)
    logits = network(images(name, 4, size=FORMS[name].smallest + 10))
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
