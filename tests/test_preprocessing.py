"""Preprocessing: read from timm, stored, read back, overridden."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
import timm
import timm.data
import torch

from tlkit.errors import TlkitError
from tlkit.preprocessing import RESAMPLING, Preprocessing

SAMPLE = Preprocessing(
    size=224,
    crop=0.875,
    crop_mode="center",
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

# Published with the weights; timm keeps them in each pretrained_cfg. Size, crop, interpolation, mean of red.
PUBLISHED = {
    "resnet18.tv_in1k": (224, 0.875, "bilinear", 0.485),
    "resnet50.a1_in1k": (224, 0.95, "bicubic", 0.485),
    "tf_efficientnet_lite0.in1k": (224, 0.875, "bicubic", 0.5),
    "tf_efficientnet_lite2.in1k": (260, 0.890, "bicubic", 0.5),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": (224, 0.9, "bicubic", 0.5),
    "vit_base_patch16_clip_224.openai_ft_in1k": (224, 0.9, "bicubic", 0.48145466),
    "convnext_tiny.in12k_ft_in1k": (224, 0.95, "bicubic", 0.485),
    "inception_v3.tv_in1k": (299, 0.875, "bicubic", 0.5),
    "deit3_base_patch16_384.fb_in1k": (384, 1.0, "bicubic", 0.485),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (224, 0.9, "bicubic", 0.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_from_timm(name: str) -> None:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    found = Preprocessing.from_timm(config)
    assert (found.size, found.crop, found.interpolation, found.mean[0]) == PUBLISHED[name]
    assert found.colour_mode == "RGB" and len(found.mean) == len(found.std) == 3
    assert found.crop_mode == config["crop_mode"]


def of_timm(**changes: Any) -> dict[str, Any]:
    """timm's data configuration of a network with these entries in its own."""
    return timm.data.resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224)} | changes)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_read_from_a_network(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    found = Preprocessing.from_timm(timm.data.resolve_model_data_config(network))
    assert (found.colour_mode, found.size) == ("RGB", 224)
    assert found.to_timm()["input_size"] == [3, 224, 224]


def test_read_from_a_grey_network() -> None:
    found = Preprocessing.from_timm(of_timm(input_size=(1, 28, 28), mean=(0.1307,), std=(0.3081,)))
    assert (found.colour_mode, found.size, found.mean, found.std) == ("L", 28, (0.1307,), (0.3081,))
    with pytest.raises(TlkitError, match="3 means and 3 standard deviations for 1 channel"):
        Preprocessing.from_timm(of_timm(input_size=(1, 28, 28)))  # ImageNet's colours: no way to guess the grey


@pytest.mark.parametrize("shape", [(4, 224, 224), (2, 64, 64), (3, 224, 192)])
def test_other_networks_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(TlkitError, match=r"inputs of \d x \d+ x \d+; choose a network"):
        Preprocessing.from_timm(of_timm(input_size=shape))


@pytest.mark.parametrize("interpolation", [*RESAMPLING, "random"])
def test_interpolation_of_timm(interpolation: str) -> None:
    found = Preprocessing.from_timm(of_timm(interpolation=interpolation) | {"crop_mode": ""})
    assert found.interpolation == (interpolation if interpolation in RESAMPLING else "bicubic")
    assert found.crop_mode == "center"


GREY = SAMPLE.with_overrides(size=28, crop=1.0, crop_mode="border", interpolation="nearest")
ROUND_TRIPS = [SAMPLE, GREY, Preprocessing(28, 1.0, "squash", "lanczos", (0.5,), (0.25,), "L")]


@pytest.mark.parametrize("sample", ROUND_TRIPS)
def test_stored_as_json_and_read_back(sample: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    assert sample.to_dict() == json.loads(json.dumps(asdict(sample)))


@pytest.mark.parametrize("sample", ROUND_TRIPS)
def test_through_timm_and_back(sample: Preprocessing) -> None:
    stored = json.loads(json.dumps(sample.to_timm()))
    assert Preprocessing.from_timm(timm.data.resolve_data_config(pretrained_cfg=stored)) == sample


@pytest.mark.parametrize("size", [28, 224, 240, 260, 299, 384, 448])
@pytest.mark.parametrize("crop", [0.7, 0.875, 0.89, 0.9, 0.904, 0.922, 0.95, 0.96, 1.0])
@pytest.mark.parametrize("crop_mode", ["squash"])
def test_the_side_before_the_crop_is_timm_s(size: int, crop: float, crop_mode: str) -> None:
    sample = SAMPLE.with_overrides(size=size, crop=crop)
    transform = timm.data.create_transform(size, is_training=False, crop_pct=crop, crop_mode=crop_mode)
    assert list(transform.transforms[0].size) == [sample.resized_side] * 2
    assert sample.resized_side == math.floor(size / crop) >= size


OVERRIDES: dict[str, Any] = {
    "size": 32,
    "crop": 0.5,
    "crop_mode": "squash",
    "interpolation": "nearest",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.2, 0.1),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_each_value_can_be_overridden_alone(name: str) -> None:
    changed = SAMPLE.with_overrides(**{name: OVERRIDES[name]})
    assert asdict(changed) == asdict(SAMPLE) | {name: OVERRIDES[name]}


def test_overriding_nothing_or_all() -> None:
    assert SAMPLE.with_overrides() == SAMPLE
    assert SAMPLE.with_overrides(**OVERRIDES) == Preprocessing(**OVERRIDES)
    with pytest.raises(FrozenInstanceError):
        SAMPLE.size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mean", "std", "colour_mode"),
    [((0.5,), (0.5,), "RGB"), ((0.5,) * 3, (0.5,), "RGB"), ((0.5,) * 3, (0.5,) * 3, "L")],
)
def test_one_mean_and_deviation_for_each_channel(
    mean: tuple[float, ...], std: tuple[float, ...], colour_mode: str
) -> None:
    with pytest.raises(TlkitError, match=r"preprocessing: \d means and \d standard deviations for \d channel"):
        Preprocessing(224, 0.875, "center", "bicubic", mean, std, colour_mode)


@pytest.mark.parametrize("change", [{"mean": None}, {"std": 3}, {"unknown": 1}], ids=str)
def test_a_stored_form_that_is_broken_or_of_another_version(change: dict[str, Any]) -> None:
    stored = SAMPLE.to_dict() | change
    with pytest.raises(TlkitError, match="the stored preprocessing cannot be read"):
        Preprocessing.from_dict(stored)
    del stored["mean"]
    with pytest.raises(TlkitError, match=r"the stored preprocessing cannot be read .*'mean'"):
        Preprocessing.from_dict(stored)
