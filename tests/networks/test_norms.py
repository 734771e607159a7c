"""Other normalisations than a network's own: counts, closed forms, what is kept, what is refused, runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkit.config import Preprocess
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, architecture, build, save_network
from tlkit.networks.norms import groups_of, norm_of, normalised_alone, set_norm
from tlkit.networks.skeleton import skeleton
from tlkit.networks.stages import stages
from tlkit.networks.variants import NAME, Design, design

Tlkit = Callable[..., Any]
NORMS = ("batch", "layer", "instance", "group", "none")
PER_IMAGE = ("layer", "instance", "group")
CLASSES = ("cat", "dog", "ship")
EPSILON = 1e-5

VGG11 = (64, 128, 256, 256, 512, 512, 512, 512)
OWN_BATCH = {  # parameters as published, channels in all batch norms together, number of batch norms
    "vgg11_bn": (132_868_840, 2752, 8),
    "resnet18": (11_689_512, 4800, 20),
    "resnet50": (25_557_032, 26_560, 53),
    "resnext50_32x4d": (25_028_904, 34_112, 53),
    "densenet121": (7_978_856, 41_824, 121),
    "lenet": (432_220, 70, 2),
}
NO_NORM = {  # parameters as published, channels of the convolutions
    "alexnet": (62_378_344, (96, 256, 384, 384, 256)),
    "alexnet_2gpu": (60_965_224, (96, 256, 384, 384, 256)),
    "alexnet_torchvision": (61_100_840, (64, 192, 384, 256, 256)),
    "vgg11": (132_863_336, VGG11),
}


def norms(network: nn.Module) -> dict[str, Any]:
    """All that normalises, by name; by the layers' classes alone."""
    kinds = _BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def expected_groups(norm: str, channels: int) -> int:
    if norm == "group":
        return next(groups for groups in range(32, 0, -1) if channels % groups == 0)
    return {"layer": 1, "instance": channels}[norm]


def closed_form(x: Tensor, groups: int, layer: Any) -> Tensor:
    """Wu and He, 2018, equations 1 to 6: mean and (biased) variance over the channels of a group and all positions."""
    parts = x.reshape(x.shape[0], groups, -1)
    mean = parts.sum(2, keepdim=True) / parts.shape[2]
    variance = ((parts - mean) ** 2).sum(2, keepdim=True) / parts.shape[2]
    normal = ((parts - mean) / (variance + EPSILON).sqrt()).reshape(x.shape)
    return normal * layer.weight[:, None, None] + layer.bias[:, None, None]


SMALL: dict[str, dict[str, Any]] = {
    "lenet": {"drop_rate": 0.0},
    "test_resnet": {},
    "densenet121": {"block_config": (2, 2), "growth_rate": 8},
    "alexnet_torchvision": {"hidden": (16, 16), "drop_rate": 0.0},
    "test_efficientnet": {},
}
"""Networks that take no time, and their arguments."""
SIDE = {"lenet": 28, "alexnet_torchvision": 96}


def small(base: str, norm: str, **arguments: Any) -> Any:
    """A network in float64, scales and shifts of its normalisations drawn."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, base=base, stem="standard", norm=norm, num_classes=4, **SMALL[base], **arguments)
    for module in norms(network).values():
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, std=0.3)
    return network.double().eval()


def images(base: str, number: int = 3, seed: int = 1) -> Tensor:
    side = SIDE.get(base, 64)
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def line_of(caught: pytest.ExceptionInfo[TlkitError]) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


# Counts


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        *((1, 1), (3, 3), (20, 20), (31, 31), (32, 32), (37, 1), (50, 25), (62, 31), (64, 32), (96, 32), (144, 24)),
        *((240, 30), (384, 32), (416, 32), (1000, 25), (1104, 24), (2048, 32)),
    ],
)
def test_groups(channels: int, groups: int) -> None:
    assert groups_of("group", channels) == groups == expected_groups("group", channels)
    assert groups_of("layer", channels) == 1 and groups_of("instance", channels) == channels
    for norm in ("batch", "none", "own"):
        with pytest.raises(ValueError, match=norm):
            groups_of(norm, channels)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("base", OWN_BATCH)
def test_instead_of_batch_norm(base: str, norm: str) -> None:
    """As many parameters as before, of the same names; none without."""
    published, channels, layers = OWN_BATCH[base]
    own, loaded = skeleton(base).network, skeleton(base, norm=norm)
    before, found = norms(own), norms(loaded.network)
    assert count(own) == published and len(before) == layers
    assert sum(module.num_features for module in before.values()) == channels
    assert (loaded.name, loaded.norm) == (base, "own" if norm == "batch" else norm)
    assert loaded.title == (base if norm == "batch" else f"{base} ({norm} norm)")
    if norm == "none":
        assert count(loaded.network) == published - 2 * channels and found == {}
        return
    assert count(loaded.network) == published
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in loaded.network.named_parameters()]
    assert list(found) == list(before)
    if norm == "batch":
        assert all(isinstance(module, nn.BatchNorm2d) for module in found.values())
        return
    assert not any(isinstance(module, _BatchNorm) for module in loaded.network.modules())
    assert list(loaded.network.buffers()) == []
    for name, module in found.items():
        assert isinstance(module, nn.GroupNorm)
        assert module.num_channels == before[name].num_features and module.eps == before[name].eps == EPSILON
        assert module.num_groups == expected_groups(norm, module.num_channels)
    assert [stage.parameters for stage in stages(own)] == [stage.parameters for stage in stages(loaded.network)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("base", NO_NORM)
def test_after_each_convolution(base: str, norm: str) -> None:
    """A scale and a shift more for each channel of a network that has none."""
    published, channels = NO_NORM[base]
    loaded = skeleton(base, norm=norm)
    found = norms(loaded.network)
    more = 0 if norm == "none" else 2 * sum(channels)
    assert count(loaded.network) == published + more
    assert (loaded.norm, loaded.title) == (("own", base) if norm == "none" else (norm, f"{base} ({norm} norm)"))
    if norm == "none":
        assert found == {}
        return
    layers: Any = list(loaded.network.features)  # type: ignore[arg-type]
    places = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert [layers[place + 1] for place in places] == list(found.values())
    assert all(isinstance(layers[place + 2], nn.ReLU) for place in places)
    if norm == "batch":
        assert [module.num_features for module in found.values()] == list(channels)
        assert all(type(module) is nn.BatchNorm2d for module in found.values())
    else:
        assert [module.num_channels for module in found.values()] == list(channels)
        assert [module.num_groups for module in found.values()] == [expected_groups(norm, many) for many in channels]
        assert not any(isinstance(module, _BatchNorm) for module in loaded.network.modules())


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_with_batch_norm_put_in_is_timms(depth: int) -> None:
    put, own = skeleton(f"vgg{depth}", norm="batch").network, skeleton(f"vgg{depth}_bn").network
    assert {key: value.shape for key, value in put.state_dict().items()} == {
        key: value.shape for key, value in own.state_dict().items()
    }
    assert str(put) == str(own)


# Numbers


@pytest.mark.parametrize("norm", PER_IMAGE)
@pytest.mark.parametrize("base", SMALL)
def test_each_layer_is_its_closed_form(base: str, norm: str) -> None:
    network, seen = small(base, norm), {}
    for name, module in norms(network).items():
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: [args[0].clone()]}) and None
        )
        module.register_forward_hook(lambda module, args, out, name=name: seen[name].append(out.clone()))
    with torch.inference_mode():
        network(images(base))
    assert seen.keys() == norms(network).keys() and len(seen) >= 2
    own = timm.create_model(base, num_classes=4, **SMALL[base])
    for name, (given, out) in seen.items():
        layer = network.get_submodule(name)
        expected = closed_form(given, expected_groups(norm, given.shape[1]), layer)
        if base not in ("alexnet_torchvision",) and isinstance(before := own.get_submodule(name), BatchNormAct2d):
            expected = before.act(expected)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", [*PER_IMAGE, "none"])
def test_all_of_lenet_by_hand(norm: str) -> None:
    network, x = small("lenet", norm), images("lenet")
    found = network(x)
    for number in (1, 2):
        conv = network.features.get_submodule(f"conv{number}")
        x = F.conv2d(x, conv.weight, conv.bias)
        if norm != "none":
            layer = network.features.get_submodule(f"norm{number}")
            x = closed_form(x, expected_groups(norm, x.shape[1]), layer)
        x = F.max_pool2d(x.clamp(min=0), 2)
    hidden = (x.flatten(1) @ network.pre_logits.fc3.weight.T + network.pre_logits.fc3.bias).clamp(min=0)
    expected = hidden @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_group_norm_of_resnet50_is_timms() -> None:
    """timm has one such network of its own: the same tensors, the same logits."""
    torch.manual_seed(0)
    theirs = timm.create_model("resnet50_gn", num_classes=3, zero_init_last=False).eval()
    ours = timm.create_model(NAME, base="resnet50", stem="standard", norm="group", num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", ["none", *PER_IMAGE])
@pytest.mark.parametrize("base", SMALL)
def test_training_is_as_evaluation_and_images_are_alone(base: str, norm: str) -> None:
    network, x, others = small(base, norm), images(base), images(base, seed=2)
    others[0] = x[0]
    with torch.inference_mode():
        whole = network(x)
        assert (whole[0] - whole[1]).abs().max() > 1e-6
        torch.testing.assert_close(network(others * torch.tensor([1, 9, 0.1]).view(3, 1, 1, 1))[0], whole[0])
        torch.testing.assert_close(network(x[:1]), whole[:1])
        if base != "test_efficientnet":  # it leaves blocks out in training
            torch.testing.assert_close(network.train()(x), whole)


@pytest.mark.parametrize("base", SMALL)
def test_batch_norm_is_neither(base: str) -> None:
    """That the test above can fail."""
    network, x = small(base, "batch").train(), images(base)
    with torch.inference_mode():
        whole = network(x)
        x[1:] *= 3
        assert (network(x)[0] - whole[0]).abs().max() > 1e-6
        assert (network.eval()(x) - whole).abs().max() > 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("base", SMALL)
def test_training_reaches_everything(base: str, norm: str) -> None:
    network = small(base, norm).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(network(images(base, 8)), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a shift of a whole map is taken away again by norms over such a map
        undone = norm in ("batch", "instance") and (name.endswith("bias") or base == "test_efficientnet")
        assert undone or not torch.equal(parameter, before[name]), name
    assert all(module.bias.grad.any() for module in norms(network).values()) or base == "test_efficientnet"
    assert losses[-1] < losses[0] or base in ("alexnet_torchvision", "test_efficientnet")  # these take longer


# What is kept


@pytest.mark.parametrize("norm", PER_IMAGE)
@pytest.mark.parametrize("base", ["resnet18", "test_resnet", "densenet121", "lenet", "test_efficientnet"])
def test_weights_begin_as_the_network_s_own(base: str, norm: str) -> None:
    """From the same seed; the last scales of residual blocks are zero, as timm makes them."""
    torch.manual_seed(3)
    own = build(base, "random").network
    torch.manual_seed(3)
    changed = build(base, "random", norm=norm).network
    parameters = dict(own.named_parameters())
    assert parameters.keys() == dict(changed.named_parameters()).keys()
    for name, parameter in changed.named_parameters():
        assert torch.equal(parameter, parameters[name]) and parameter.requires_grad, name
    if "resnet" in base:
        found = norms(changed)
        last = [found.get(f"{name[:-1]}3", module) for name, module in found.items() if name.endswith("bn2")]
        assert len(last) == {"resnet18": 8, "test_resnet": 4}[base] and not any(module.weight.any() for module in last)


def test_the_same_parameters_scale_and_shift() -> None:
    network = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12, eps=0.25), nn.BatchNorm2d(12, affine=False))
    scale, shift = network[1].weight, network[1].bias
    set_norm(network, "group")
    assert network[1].weight is scale and network[1].bias is shift
    assert (network[1].num_groups, network[1].eps) == (12, 0.25)
    assert isinstance(network[2], nn.GroupNorm) and network[2].weight is None and network[2].bias is None
    set_norm(network, "layer")  # there is no batch norm any more
    assert network[1].num_groups == 12


@pytest.mark.parametrize("norm", [*PER_IMAGE, "none"])
def test_activation_and_dropout_of_a_norm_stay(norm: str) -> None:
    network = nn.Sequential(
        BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout2d), BatchNormAct2d(8, apply_act=False)
    )
    act, drop = network[0].act, network[0].drop
    assert isinstance(act, nn.SiLU) and isinstance(drop, nn.Dropout2d)
    set_norm(network, norm)
    kept = list(network[0].modules())
    assert any(module is act for module in kept) and any(module is drop for module in kept)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    network.eval()
    given = x.clone()
    expected = x if norm == "none" else closed_form(x, groups_of(norm, 8), network[0])
    torch.testing.assert_close(network[0](given), expected * expected.sigmoid())
    assert torch.equal(given, x), "as after batch norm, what comes in is left as it is"
    plain = x if norm == "none" else closed_form(x, groups_of(norm, 8), network[1])
    torch.testing.assert_close(network[1](x), plain)


@pytest.mark.parametrize("base", ["densenet121", "resnetv2_18", "test_resnet"])
def test_nothing_is_changed_in_place_without_norms(base: str) -> None:
    """Where a normalisation and its activation stand before convolutions, other paths need what goes into them."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, base=base, stem="standard", norm="none").eval()
    assert norms(network) == {}
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found = network(x)
        maps = network.forward_intermediates(x, intermediates_only=True)
        by_hook = []
        for entry in network.feature_info:
            layer = network.get_submodule(entry["module"])
            layer.register_forward_hook(lambda module, args, out: by_hook.append(out.clone()))
        network(x)
    assert len(maps) == len(by_hook) == 5
    for one, two in zip(maps, by_hook, strict=True):
        assert torch.equal(one, two)
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    with torch.inference_mode():
        assert torch.equal(network(x), found)


def test_batch_changes_nothing() -> None:
    network = timm.create_model("test_resnet")
    modules = list(network.modules())
    set_norm(network, "batch")
    assert all(one is two for one, two in zip(network.modules(), modules, strict=True))


# Which networks have what


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("resnet18", "batch"),
        ("densenet121", "batch"),
        ("lenet", "batch"),
        ("vgg11_bn", "batch"),
        ("efficientnet_b0", "batch"),
        ("alexnet", "none"),
        ("alexnet_2gpu", "none"),  # local response normalisation has nothing to learn
        ("vgg11", "none"),
        ("vit_tiny_patch16_224", "other"),
        ("convnext_atto", "other"),
        ("resnet50_gn", "other"),
        ("levit_128s", "other"),
        ("resnetv2_50x1_bit", "other"),
    ],
)
def test_own_norm(base: str, expected: str) -> None:
    with torch.device("meta"):
        assert norm_of(timm.create_model(base)) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_designs(norm: str) -> None:
    state = torch.get_rng_state()
    for base in ("resnet18", "resnet18.a1_in1k", "densenet121", "vgg11_bn", "efficientnet_b0", "lenet"):
        assert design(base, norm=norm) == (Design(base) if norm == "batch" else Design(base, "standard", norm))
        assert design(base, norm=norm).is_variant == (norm != "batch")
    for base in ("alexnet", "alexnet_2gpu", "alexnet_torchvision", "vgg11"):
        assert design(base, norm=norm) == (Design(base) if norm == "none" else Design(base, "standard", norm))
    small_too = design("resnet18", "small", norm)
    assert small_too == Design("resnet18", "small", "own" if norm == "batch" else norm) and small_too.is_variant
    assert design("vit_tiny_patch16_224") == Design("vit_tiny_patch16_224")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", PER_IMAGE)
@pytest.mark.parametrize(
    "base", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet50_gn", "levit_128s"]
)
def test_families_with_another_norm(base: str, norm: str) -> None:
    for attempt in (lambda: build(base, "random", norm=norm), lambda: skeleton(base, norm=norm)):
        with pytest.raises(TlkitError) as caught:
            attempt()
        assert line_of(caught) == (
            f"--norm: {base} cannot be built with {norm} norm: its normalisation is not batch norm of maps; leave it "
            "out, or choose an AlexNet, VGG, ResNet, ResNeXt, DenseNet or lenet by its timm name"
        )


def test_a_repository_s_network_is_not_known() -> None:
    with pytest.raises(TlkitError, match=r"--norm: hf-hub:someone/something cannot be built with group norm"):
        design("hf-hub:someone/something", norm="group")


@pytest.mark.parametrize("base", ["resnet18", "resnet18.a1_in1k", "lenet"])
def test_the_own_norm_by_name_is_no_variant(base: str) -> None:
    loaded = build(base, "random", norm="batch")
    assert (loaded.norm, loaded.title) == ("own", base)
    assert loaded.network.pretrained_cfg["architecture"] == base.split(".")[0]
    assert build("lenet", "random", norm="none").title == "lenet (none norm)"


# What is refused


@pytest.mark.parametrize(
    ("base", "size", "norm", "layer"),
    [
        ("resnet18", 32, "instance", "layer4.0.bn1"),
        ("test_resnet", 32, "instance", "layer4.0.bn1"),
        ("densenet121", 32, "instance", "features.denseblock4.denselayer1.norm1"),
        ("resnest14d", 224, "group", "layer1.0.conv2.bn1"),  # 32 channels of pooled numbers
        ("resnest14d", 224, "instance", "layer1.0.conv2.bn1"),
    ],
)
def test_maps_of_one_number(base: str, size: int, norm: str, layer: str) -> None:
    with pytest.raises(TlkitError) as caught:
        skeleton(base, size, norm=norm)
    assert line_of(caught) == (
        f"--norm: {base} at {size} px has maps of one number, which {norm} norm would erase ({layer}); "
        "give a larger --image-size, or --norm layer"
    )
    assert skeleton(base, size, norm="layer").norm == "layer"


def test_maps_of_one_number_when_building() -> None:
    with pytest.raises(TlkitError, match=r"--norm: test_resnet at 32 px has maps of one number, .*\(layer4\.0\.bn1\)"):
        build("test_resnet", "random", Preprocess(image_size=32), norm="instance")
    assert build("test_resnet", "random", Preprocess(image_size=32), stem="small", norm="instance").norm == "instance"
    assert build("test_resnet", "random", Preprocess(image_size=64), norm="instance").preprocessing.size == 64
    assert build("test_resnet", "random", Preprocess(image_size=32), norm="group").preprocessing.size == 32


def test_images_that_are_too_small() -> None:
    with pytest.raises(TlkitError, match=r"--image-size: the network does not take images of 10 px \("):
        build("lenet", "random", Preprocess(image_size=10), norm="group")


@pytest.mark.parametrize("training", [True, False])
def test_looking_for_lone_numbers_leaves_no_trace(training: bool) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").train(training)
    set_norm(network, "instance")
    alone = normalised_alone(network, torch.zeros(2, 3, 32, 32))
    # the last stage has maps of one number, all others have more
    assert alone == [name for name in norms(network) if name.startswith("layer4.")] and len(alone) >= 2
    assert normalised_alone(network, torch.zeros(2, 3, 64, 64)) == []
    assert network.training == training and not any(module._forward_pre_hooks for module in network.modules())
    # which is what instance norm makes of one number: nothing but the shift
    layer = network.get_submodule(alone[-1])
    nn.init.normal_(layer.bias)
    out = layer(torch.randn(2, layer.num_channels, 1, 1))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(out[0, :, 0, 0], layer.bias, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", [*PER_IMAGE, "none"])
def test_no_public_weights(norm: str) -> None:
    with pytest.raises(TlkitError) as caught:
        build("resnet18", "default", norm=norm)
    assert line_of(caught) == (
        f"--norm: there are no public weights for {norm} norm: those of resnet18 were trained with its own "
        "normalisation; give --weights random, a run or a file that has it, or leave out --norm"
    )
    with pytest.raises(TlkitError, match="--stem: there are no public weights for the small stem"):
        build("resnet18", "default", stem="small", norm=norm)


@pytest.mark.parametrize("base", ["test_resnet", "lenet", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_files_of_the_other_kind(tmp_path: Path, base: str) -> None:
    with_batch, with_group = tmp_path / "batch", tmp_path / "group"
    for folder, norm in ((with_batch, None), (with_group, "group")):
        folder.mkdir()
        save_network(folder, build(base, "random", norm=norm))
    batch, group = (str(folder / "model.safetensors") for folder in (with_batch, with_group))
    remedy = "give the --norm that they were trained with, or leave it out"
    for norm in PER_IMAGE:
        with pytest.raises(TlkitError) as caught:
            build(base, batch, norm=norm)
        assert line_of(caught) == (
            f"{batch}: these weights were trained with batch norm, the network is without it; {remedy}"
        )
        assert build(base, group, norm=norm).norm == norm  # the same tensors: nobody can tell
    for norm in (None, "batch"):
        with pytest.raises(TlkitError) as caught:
            build(base, group, norm=norm)
        assert line_of(caught) == (
            f"{group}: these weights were trained without batch norm, the network is with it; {remedy}"
        )
    with pytest.raises(TlkitError, match="these weights do not fit the network: "):
        build(base, group, norm="none")


def test_files_without_scales(tmp_path: Path) -> None:
    """A network that has no normalisation of its own, and one that got one."""
    arguments = {"hidden": (8,), "num_classes": 1000}
    plain = tmp_path / "plain.pth"
    torch.save(timm.create_model("alexnet", **arguments).state_dict(), plain)
    with pytest.raises(TlkitError, match=r"these weights do not fit the network: \d+ missing \(.*features\.norm1"):
        build("alexnet", str(plain), norm="group")


# Runs


def trained(base: str, stem: str, norm: str, preprocess: Preprocess | None = None) -> Loaded:
    torch.manual_seed(1)
    loaded = build(base, "random", preprocess, stem=stem, norm=norm)
    loaded.network.reset_classifier(len(CLASSES))  # type: ignore[operator]
    with torch.no_grad():
        for parameter in loaded.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in loaded.network.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.1)
    return replace(loaded, classes=CLASSES)


def logits(network: Any, size: int) -> Tensor:
    with torch.inference_mode():
        found = network.eval()(torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size))
    assert isinstance(found, Tensor) and not torch.equal(found[0], found[1])
    return found


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_what_a_run_of_alexnet_says(tmp_path: Path, norm: str) -> None:
    """Of few parameters, so that it is quick: a normalisation that was put in is stored as well."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, base="alexnet", stem="standard", norm=norm, hidden=(8,), num_classes=3)
    save_network(tmp_path, replace(skeleton("alexnet", norm=norm), network=network.eval(), classes=CLASSES))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(again, 96), logits(network, 96))
    assert build(str(tmp_path), "default").title == f"alexnet ({norm} norm)"


@pytest.mark.parametrize(
    ("name", "stem", "norm", "title"),
    [
        ("resnet18", "small", "group", "resnet18 (small stem, group norm)"),
        ("test_resnet.r160_in1k", "standard", "layer", "test_resnet (layer norm)"),
        ("test_resnet", "standard", "instance", "test_resnet (instance norm)"),
        ("test_resnet", "small", "none", "test_resnet (small stem, none norm)"),
        pytest.param(
            *("densenet121", "small", "group", "densenet121 (small stem, group norm)"), marks=pytest.mark.slow
        ),
        ("lenet", "standard", "group", "lenet (group norm)"),
        ("lenet", "standard", "none", "lenet (none norm)"),
        ("test_efficientnet", "standard", "group", "test_efficientnet (group norm)"),
        pytest.param("alexnet", "standard", "batch", "alexnet (batch norm)", marks=pytest.mark.slow),
        pytest.param("vgg11", "standard", "group", "vgg11 (group norm)", marks=pytest.mark.slow),
    ],
)
def test_round_trip(tmp_path: Path, name: str, stem: str, norm: str, title: str) -> None:
    preprocess = Preprocess(image_size=64) if name.startswith(("test_", "vgg")) else None
    loaded, base = trained(name, stem, norm, preprocess), name.split(".")[0]
    assert (loaded.stem, loaded.norm, loaded.title) == (stem, norm, title.replace(base, name))
    save_network(tmp_path, loaded)
    size = loaded.preprocessing.size if loaded.preprocessing.size <= 100 else 96
    expected = logits(loaded.network, size)
    assert architecture(tmp_path) == base
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architecture"] == NAME
    assert {key: stored["model_args"][key] for key in ("base", "stem", "norm")} == {
        "base": name,
        "stem": stem,
        "norm": norm,
    }

    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(timms, size), expected) and timms.num_classes == len(CLASSES)
    ways = [build(str(tmp_path), "default"), build(name, str(tmp_path)), build(str(tmp_path), "default", norm=norm)]
    for again in ways:
        assert torch.equal(logits(again.network, size), expected)
        assert (again.name, again.stem, again.norm, again.title) == (base, stem, norm, title)
        assert (again.classes, again.preprocessing) == (CLASSES, loaded.preprocessing)
        assert again.remarks == [] and not again.network.training
    by_file = build(name, str(tmp_path / "model.safetensors"), preprocess, stem=stem, norm=norm)
    assert torch.equal(logits(by_file.network, size), expected) and by_file.norm == norm

    bare, fresh = skeleton(str(tmp_path)), build(str(tmp_path), "random")
    assert (bare.title, fresh.title) == (title, title) and count(bare.network) == count(loaded.network)
    assert not torch.equal(logits(fresh.network, size), expected)

    second = tmp_path / "second"
    second.mkdir()
    save_network(second, ways[0])
    assert build(str(second), "default").title == title
    assert torch.equal(logits(build(str(second), "default").network, size), expected)

    for other in (*PER_IMAGE, "batch", "none"):
        if other == norm:
            continue
        for attempt in (
            lambda other=other: build(str(tmp_path), "default", norm=other),
            lambda other=other: build(name, str(tmp_path), norm=other),
            lambda other=other: skeleton(str(tmp_path), norm=other),
        ):
            with pytest.raises(TlkitError) as caught:
                attempt()
            assert line_of(caught) == (
                f"--norm: the network of {tmp_path} was trained with {norm} norm; leave out --norm, or start from "
                "random weights"
            )
    for folder in (tmp_path, second):
        (folder / "model.safetensors").unlink()


def test_a_run_with_its_own_norm(tmp_path: Path) -> None:
    save_network(tmp_path, build("test_resnet", "random"))
    assert build(str(tmp_path), "default", norm="batch").title == "test_resnet"
    with pytest.raises(TlkitError) as caught:
        build(str(tmp_path), "default", norm="group")
    assert line_of(caught) == (
        f"--norm: the network of {tmp_path} was trained with its own normalisation; leave out --norm, or start from "
        "random weights"
    )


def test_a_run_with_instance_norm_at_too_small_a_size(tmp_path: Path) -> None:
    save_network(tmp_path, trained("test_resnet", "standard", "instance", Preprocess(image_size=64)))
    with pytest.raises(TlkitError) as caught:
        build(str(tmp_path), "default", Preprocess(image_size=32))
    assert "32 px" in line_of(caught)


# The command line

OPTIONS = ("--device", "cpu", "--precision", "fp32", "--quiet")


@pytest.fixture(scope="module")
def run(tlkit: Tlkit, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with group norm, pretrained on shapes. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    arguments = ("--model", "test_resnet", "--image-size", 32, "--epochs", 1, "--test-fraction", 0.25)
    done = tlkit("pretrain", shapes, *arguments, "--norm", "group", *OPTIONS, "--out", folder)
    assert done.code == 0, done.err
    return folder


def test_pretrain_stores_the_norm(run: Path) -> None:
    stored = json.loads((run / "config.json").read_text())
    assert (stored["architecture"], stored["model_args"]["base"]) == (NAME, "test_resnet")
    assert (stored["model_args"]["norm"], stored["model_args"]["stem"]) == ("group", "small")
    assert "norm: group" in (run / "recipe.yaml").read_text()
    loaded = build(str(run), "default")
    assert loaded.title == "test_resnet (small stem, group norm)"
    assert {type(module) for module in norms(loaded.network).values()} == {nn.GroupNorm}
    assert not any("running" in name for name in loaded.network.state_dict())


def test_evaluate_reads_it(tlkit: Tlkit, run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())["metrics"]["test"]
    again = tlkit("evaluate", run, *OPTIONS, "--json").json["metrics"]
    assert (again["top1"], again["images"]) == (told["top1"], told["images"])
    assert again["loss"] == pytest.approx(told["loss"], rel=1e-4)


@pytest.mark.parametrize("way", ["--model", "--weights"])
def test_finetune_starts_from_it(
    tlkit: Tlkit, make_shapes: Callable[..., Path], run: Path, tmp_path: Path, way: str
) -> None:
    data, out = make_shapes(tmp_path / "data", ("one", "two"), 8), tmp_path / "out"
    given = ("--model", run) if way == "--model" else ("--model", "test_resnet", "--weights", run)
    told = tlkit("finetune", data, "--strategy", "probe", *given, *OPTIONS, "--out", out, "--json").json
    assert told["classes"] == ["one", "two"]
    assert build(str(out), "default").title == "test_resnet (small stem, group norm)"
    before, after = (build(str(folder), "default").network.state_dict() for folder in (run, out))
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))
    refused = tlkit("finetune", data, *given, "--norm", "layer", *OPTIONS, "--out", tmp_path / "other")
    assert refused.code == 1 and not (tmp_path / "other").exists()
    assert refused.error.startswith(f"--norm: the network of {run} was trained with group norm; ")


def test_full_finetuning_of_it(tlkit: Tlkit, shapes: Path, run: Path, tmp_path: Path) -> None:
    arguments = ("--strategy", "full", "--epochs", 1, "--model", run, *OPTIONS, "--out", tmp_path / "out")
    done = tlkit("finetune", shapes, *arguments)
    assert done.code == 0, done.err
    before, after = (build(str(folder), "default").network.state_dict() for folder in (run, tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("bn1.weight"))


def test_count_params_with_a_norm(tlkit: Tlkit) -> None:
    for norm, expected in (("group", 11_689_512), ("none", 11_689_512 - 9600)):
        (model,) = tlkit("count-params", "resnet18", "--norm", norm, "--json").json["models"]
        assert model["params"] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--norm", "instance", "--stem", "standard"), "--norm: test_resnet at 32 px has maps of one number"),
        (("--norm", "group", "--model", "test_vit"), "--norm: test_vit cannot be built with group norm"),
    ],
)
def test_refusals_leave_nothing_behind(
    tlkit: Tlkit, shapes: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    model = () if "--model" in options else ("--model", "test_resnet")
    done = tlkit("pretrain", shapes, *model, "--image-size", 32, *options, *OPTIONS, "--out", tmp_path / "run")
    assert done.code == 1 and done.error.startswith(expected)
    assert not (tmp_path / "run").exists()


def test_an_unknown_norm(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> None:
    done = tlkit("pretrain", shapes, "--norm", "groups", "--out", tmp_path / "run")
    assert done.error == "--norm: unknown value 'groups'; did you mean 'group'?"
