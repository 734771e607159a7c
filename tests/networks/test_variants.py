"""The stem for small images: parameters and map sizes as published, stored and read back, families without one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tlkit.config import Preprocess
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, architecture, build, save_network
from tlkit.networks.stages import stages
from tlkit.networks.variants import NAME, has_small_stem
from tlkit.preprocessing import Preprocessing

CLASSES = ("cat", "dog", "ship")
WITH = (
    "resnet18 resnet50 resnet50d resnet26t resnetrs50 resnetblur50 resnetaa50 seresnet50 ecaresnet26t resnet50_gn "
    "resnext50_32x4d wide_resnet50_2 res2net50_14w_8s skresnet18 resnest14d test_resnet "
    "densenet121 densenet161 densenetblur121d"
)
"""Stems of one and of three layers, with pooling by maximum, convolution and blurring."""
WITHOUT = (
    "vgg16 vit_tiny_patch16_224 efficientnet_b0 mobilenetv3_small_100 convnext_atto resnetv2_50 tresnet_m "
    "swin_tiny_patch4_window7_224"
)


def variant(base: str, **arguments: Any) -> Any:
    return timm.create_model(NAME, base=base, **arguments)


def on_meta(base: str, **arguments: Any) -> Any:
    with torch.device("meta"):
        return variant(base, **arguments).eval()


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def trained(name: str, preprocess: Preprocess | None = None) -> Loaded:
    torch.manual_seed(1)
    loaded = build(name, "random", preprocess, stem="small")
    loaded.network.reset_classifier(len(CLASSES))  # type: ignore[operator]
    with torch.no_grad():
        for key, buffer in loaded.network.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.1)
    return replace(loaded, classes=CLASSES)


def logits(network: Any, size: int = 32) -> Tensor:
    with torch.inference_mode():
        found = network.eval()(torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size))
    assert isinstance(found, Tensor)
    return found


# The stem


@pytest.mark.parametrize(
    "base, expected",
    [
        ("resnet18", 11_173_962),  # these are the CIFAR networks of that name as everyone counts them
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
        ("densenet121", 6_956_298),
    ],
)
def test_parameters_with_ten_classes(base: str, expected: int) -> None:
    assert count(on_meta(base, num_classes=10)) == expected


@pytest.mark.parametrize("base", WITH.split())
def test_feature_maps(base: str) -> None:
    """Their sizes are what ``feature_info`` says, and four times those of the standard stem."""
    network = on_meta(base)
    with torch.device("meta"):
        standard = timm.create_model(base)
    maps = network.forward_intermediates(torch.zeros(2, 3, 32, 32, device="meta"), intermediates_only=True)
    info = network.feature_info
    assert [tuple(found.shape[1:]) for found in maps] == [
        (entry["num_chs"], 32 // entry["reduction"], 32 // entry["reduction"]) for entry in info
    ]
    assert [entry["reduction"] for entry in info] == [1, 1, 2, 4, 8]
    assert [entry["reduction"] for entry in standard.feature_info] == [2, 4, 8, 16, 32]
    assert [entry["num_chs"] for entry in info] == [entry["num_chs"] for entry in standard.feature_info]
    assert network.forward_features(torch.zeros(2, 3, 32, 32, device="meta")).shape[2:] == (4, 4)
    assert [name for name, _ in network.named_modules() if name == info[0]["module"]]


@pytest.mark.parametrize("base", WITH.split())
def test_nothing_but_the_stem_differs(base: str) -> None:
    network = on_meta(base)
    with torch.device("meta"):
        standard = timm.create_model(base)
    rest = ("layer", "fc.", "features.dense", "features.transition", "features.norm5.", "classifier.")
    own, usual = (
        {name: tensor.shape for name, tensor in each.state_dict().items() if name.startswith(rest)}
        for each in (network, standard)
    )
    assert own == usual and len(own) > 60
    first = network.get_submodule(network.pretrained_cfg["first_conv"])
    assert (first.kernel_size, first.stride, first.padding, first.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())


@pytest.mark.parametrize("base", WITH.split())
def test_stages_are_an_ordered_partition(base: str) -> None:
    network = on_meta(base)
    cut = stages(network)
    assert [stage.name for stage in cut] == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    names = [name for name, _ in network.named_parameters()]
    assert list(chain(*(stage.parameters for stage in cut))) == names
    modules = [name for name, _ in network.named_modules()]
    assert sorted(chain(*(stage.modules for stage in cut))) == sorted(modules)
    assert cut[0].parameters[0] == network.pretrained_cfg["first_conv"] + ".weight"
    assert len(cut[0].parameters) == (1 if base.startswith("densenet") else 3)


@pytest.mark.parametrize("base, fan", [("resnet18", 9 * 64), ("densenet121", 9 * 3)])
def test_the_stem_begins_as_timm_s_do(base: str, fan: int) -> None:
    """He et al., 2015: a standard deviation of sqrt(2 / fan); timm takes the fan out in ResNet, in in DenseNet."""
    torch.manual_seed(0)
    network = variant(base)
    weight = network.get_parameter(network.pretrained_cfg["first_conv"] + ".weight")
    assert weight.requires_grad
    values, expected = weight.detach(), (2 / fan) ** 0.5
    assert float(values.std()) == pytest.approx(expected, rel=0.08)
    assert abs(float(values.mean())) < 4 * expected / values.numel() ** 0.5


def test_random_weights_follow_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        network: Any = build("resnet18", "random", stem="small").network
        return torch.cat([network.conv1.weight.flatten(), network.fc.weight.flatten()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("base", ["resnet18", "densenet121"])
def test_timm_s_arguments_go_through(base: str) -> None:
    network = variant(base, num_classes=5, in_chans=1, drop_rate=0.3, global_pool="max")
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    assert network.global_pool.pool_type == "max" and network.in_chans == 1
    assert 0.3 in (getattr(network, "drop_rate", None), getattr(getattr(network, "head_drop", None), "p", None))
    assert variant(base, dtype=torch.bfloat16).get_submodule(network.pretrained_cfg["first_conv"]).weight.dtype == (
        torch.bfloat16
    )


def test_the_standard_stem_is_the_network_s_own() -> None:
    torch.manual_seed(0)
    network = variant("resnet18", stem="standard", num_classes=4)
    torch.manual_seed(0)
    expected = timm.create_model("resnet18", num_classes=4)
    assert torch.equal(logits(network, 64), logits(expected, 64))
    assert network.pretrained_cfg["input_size"] == (3, 224, 224) and network.feature_info == expected.feature_info
    with pytest.raises(ValueError, match="no stem 'tiny'"):
        variant("resnet18", stem="tiny")


def test_a_training_step() -> None:
    network = build("resnet18", "random", stem="small").network.train()
    torch.nn.functional.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# Preprocessing


@pytest.mark.parametrize("base", ["resnet18", "resnet50.a1_in1k", "densenet121"])
def test_whole_images_of_32_px_by_default(base: str) -> None:
    config, loaded = get_pretrained_cfg(base), build(base, "random", stem="small")
    expected = Preprocessing(
        size=32, crop=1.0, crop_mode="center", interpolation=config.interpolation, mean=config.mean, std=config.std
    )
    assert loaded.preprocessing == expected
    assert (loaded.name, loaded.stem, loaded.title) == (base, "small", f"{base} (small stem)")
    assert loaded.classes is None and loaded.weights == "random" and not loaded.network.training
    for use_test_size in (False, True):
        data = resolve_model_data_config(loaded.network, use_test_size=use_test_size)
        assert Preprocessing.from_timm(data) == expected


@pytest.mark.parametrize(
    "preprocess", [Preprocess(image_size=64), Preprocess(image_size=40, crop=0.8), Preprocess(crop=0.9)]
)
def test_what_is_asked_for_instead(tmp_path: Path, preprocess: Preprocess) -> None:
    loaded = trained("resnet18", preprocess)
    expected = (preprocess.image_size or 32, preprocess.crop or 1.0)
    assert (loaded.preprocessing.size, loaded.preprocessing.crop) == expected
    save_network(tmp_path, loaded)
    assert build(str(tmp_path), "default").preprocessing == loaded.preprocessing
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert Preprocessing.from_timm(resolve_model_data_config(timms)) == loaded.preprocessing


# A run folder and back


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "densenet121", "resnet26t"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    loaded = trained(name)
    save_network(tmp_path, loaded)
    expected, base = logits(loaded.network), name.split(".")[0]
    assert expected.shape == (2, len(CLASSES))
    assert architecture(tmp_path) == base
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architecture"] == "tlkit_variant"
    assert (stored["model_args"]["base"], stored["model_args"]["stem"]) == (name, "small")

    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(timms), expected) and timms.num_classes == len(CLASSES)
    assert Preprocessing.from_timm(resolve_model_data_config(timms)) == loaded.preprocessing
    assert timms.pretrained_cfg["label_names"] == list(CLASSES)

    ways = (build(str(tmp_path), "default"), build(name, str(tmp_path)), build(base, str(tmp_path), stem="small"))
    for again in ways:
        assert torch.equal(logits(again.network), expected)
        assert (again.name, again.stem, again.title) == (base, "small", f"{base} (small stem)")
        assert (again.classes, again.preprocessing, again.weights) == (CLASSES, loaded.preprocessing, f"run {tmp_path}")
        assert again.remarks == [] and not again.network.training

    second = tmp_path / "second"
    second.mkdir()
    save_network(second, ways[0])
    assert torch.equal(logits(build(str(second), "default").network), expected)
    again_stored = json.loads((second / "config.json").read_text())
    assert again_stored["model_args"] == stored["model_args"] and architecture(second) == base
    fresh = build(str(tmp_path), "random")
    assert fresh.weights == "random" and not torch.equal(logits(fresh.network), expected)
    assert fresh.network.state_dict().keys() == loaded.network.state_dict().keys()


def test_from_a_file(tmp_path: Path) -> None:
    save_network(tmp_path, loaded := trained("resnet18"))
    again = build("resnet18", str(tmp_path / "model.safetensors"), stem="small")
    assert torch.equal(logits(again.network), logits(loaded.network)) and again.stem == "small"
    smaller = build("resnet18", str(tmp_path / "model.safetensors"), Preprocess(image_size=24), stem="small")
    assert torch.equal(logits(smaller.network), logits(loaded.network))


def test_timm_s_overlay_of_a_file(tmp_path: Path) -> None:
    save_network(tmp_path, loaded := trained("resnet18"))
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": len(CLASSES)}
    network = variant("resnet18", num_classes=len(CLASSES), pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(logits(network), logits(loaded.network))


def test_other_channels_from_a_run(tmp_path: Path) -> None:
    """timm sums the colours of the first convolution for a grey one."""
    save_network(tmp_path, loaded := trained("resnet26t"))
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    assert torch.allclose(grey.conv1.weight, loaded.network.get_parameter("conv1.weight").sum(1, keepdim=True))


# What is refused


@pytest.mark.parametrize("name", WITH.split())
def test_families_with_a_small_stem(name: str) -> None:
    state = torch.get_rng_state()
    assert has_small_stem(name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", WITHOUT.split())
def test_families_without_one(name: str) -> None:
    assert not has_small_stem(name)
    with pytest.raises(TlkitError) as caught:
        build(name, "random", stem="small")
    assert str(caught.value) == (
        f"--stem: {name} has no small stem; leave it out, or choose a ResNet, ResNeXt, Wide ResNet or DenseNet by its "
        "timm name"
    )
    with pytest.raises(ValueError, match="no small stem for"), torch.device("meta"):
        variant(name)


def test_a_network_is_asked_as_its_name_is() -> None:
    assert has_small_stem(on_meta("resnet18")) and has_small_stem(on_meta("densenet121"))
    with torch.device("meta"):
        assert not has_small_stem(timm.create_model("vgg11"))


def test_no_public_weights() -> None:
    with pytest.raises(
        TlkitError, match=r"--stem: there are no public weights for the small stem; give --weights rando"
    ):
        build("resnet18", "default", stem="small")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for tlkit_variant"):
        variant("resnet18", pretrained=True)


def test_weights_of_another_stem(tmp_path: Path) -> None:
    small, standard = tmp_path / "small", tmp_path / "standard"
    small.mkdir()
    standard.mkdir()
    save_network(small, trained("resnet18"))
    save_network(standard, build("resnet18", "random"))
    assert build(str(standard), "default").stem == "standard"
    assert build(str(standard), "default").title == "resnet18"
    for model, weights in ((str(standard), "default"), ("resnet18", str(standard))):
        with pytest.raises(TlkitError) as caught:
            build(model, weights, stem="small")
        assert str(caught.value) == (
            f"--stem: the network of {standard} has the standard stem; leave out --stem, or start from random weights"
        )
    with pytest.raises(TlkitError, match=r"these weights do not fit the network: 1 of another shape \(conv1.weight\)"):
        build("resnet18", str(standard / "model.safetensors"), stem="small")
    with pytest.raises(TlkitError, match=r"these weights do not fit the network: 1 of another shape \(conv1.weight\)"):
        build("resnet18", str(small / "model.safetensors"))
    with pytest.raises(TlkitError, match="this run holds a resnet18, not a resnet34"):
        build("resnet34", str(small))


def test_the_entry_point_is_no_model_of_its_own() -> None:
    with pytest.raises(TlkitError, match="tlkit_variant: unknown model"):
        build(NAME, "random")


def test_a_run_that_does_not_say_what_it_was_made_from(tmp_path: Path) -> None:
    save_network(tmp_path, trained("resnet18"))
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for arguments in ({}, {"base": "resnet_of_mine", "stem": "small"}, {"base": "resnet18", "stem": "tiny"}):
        path.write_text(json.dumps(stored | {"model_args": arguments}))
        with pytest.raises(TlkitError) as caught:
            build(str(tmp_path), "default")
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_does_not_wait_for_timm() -> None:
    code = (
        "import sys, tlkit.cli.app; sys.exit(any(name in sys.modules for name in ('timm', 'torch', 'tlkit.networks')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_whatever_reads_networks_knows_variants() -> None:
    code = "import tlkit.networks, timm; assert timm.is_model('tlkit_variant')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
