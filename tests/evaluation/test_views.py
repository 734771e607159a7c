"""Test-time views: every entry of the table over images of any shape, against torchvision; names and how they join."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from tlkit.data.transforms import View, center, resize
from tlkit.errors import TlkitError
from tlkit.evaluation.views import MERGES, VIEWS, five_crop, remark, views_named
from tlkit.preprocessing import Preprocessing

BASE = Preprocessing(
    size=32,
    crop=0.8,
    crop_mode="center",
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SIZES = [(300, 1), (1, 300), (40, 40), (41, 40), (40, 43), (57, 90), (200, 33), (5, 7), (1, 1)]
JOINED = ["flip+multi-scale", "five-crop+multi-scale", "multi-scale+ten-crop", "flip+five-crop"]


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", [*VIEWS, *JOINED])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.8, 0.5])
def test_any_view_of_any_image(name: str, crop_mode: str, crop: float) -> None:
    """As many as are counted, of the network's size, with the central one where it is said to be."""
    view = views_named(name)
    for side, size in product((32, 33), SIZES):
        preprocessing = replace(BASE, size=side, crop=crop, crop_mode=crop_mode)
        found = view(picture(*size), preprocessing)
        assert found.dtype == torch.uint8
        assert found.shape == (view.count(preprocessing), 3, side, side), (size, side)
        expected = View()(picture(*size), preprocessing)[0]
        assert torch.equal(found[view.center], expected), (size, side)


@pytest.mark.parametrize("name", VIEWS)
def test_grey_networks_have_views_of_one_channel(name: str) -> None:
    grey = replace(BASE, mean=(0.5,), std=(0.5,), colour_mode="L")
    assert VIEWS[name](picture(50, 40), grey).shape == (VIEWS[name].count(grey), 1, 32, 32)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_different_ones(name: str) -> None:
    found = VIEWS[name](picture(90, 57), BASE)
    assert len({view.numpy().tobytes() for view in found}) == len(found)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [1.0, 0.8, 0.77])
def test_crops_are_torchvisions_in_their_order(size: tuple[int, int], crop_mode: str, crop: float) -> None:
    """Four corners and the centre, then the same of the mirrored image."""
    preprocessing = replace(BASE, crop=crop, crop_mode=crop_mode)
    resized = resize(picture(*size), preprocessing)
    ten = torch.stack(transforms.ten_crop(resized, [32, 32]))
    assert torch.equal(VIEWS["ten-crop"](picture(*size), preprocessing), ten)
    assert torch.equal(VIEWS["five-crop"](picture(*size), preprocessing), ten[:5])
    assert torch.equal(five_crop(resized, 32), ten[:5])
    assert torch.equal(VIEWS["flip"](picture(*size), preprocessing), ten[[4, 9]])


def test_corners_are_the_corners() -> None:
    image = torch.arange(6 * 8).view(1, 6, 8)
    top_left, top_right, bottom_left, bottom_right, middle = five_crop(image, 4)
    assert torch.equal(top_left, image[:, :4, :4]) and torch.equal(top_right, image[:, :4, 4:])
    assert torch.equal(bottom_left, image[:, 2:, :4]) and torch.equal(bottom_right, image[:, 2:, 4:])
    assert torch.equal(middle, image[:, 1:5, 2:6])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flip_is_the_centre_of_the_mirrored_image(size: tuple[int, int]) -> None:
    """Mirrored once it is resized: resizing is not in all bits the same from both sides."""
    mirrored = resize(picture(*size), BASE).flip(-1)
    found = VIEWS["flip"](picture(*size), BASE)
    assert torch.equal(found[1], center(mirrored, 32)[0])
    of_file = View()(picture(*size).transpose(Image.Transpose.FLIP_LEFT_RIGHT), BASE)[0]
    margin = mirrored.shape[2] - 32
    if margin % 2 == 0:
        assert (found[1].int() - of_file.int()).abs().max() <= 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scales_are_of_the_side_that_images_are_resized_to(size: tuple[int, int]) -> None:
    """Of 224 of 256 px these are the paper's 256, 224 and 288."""
    preprocessing = replace(BASE, size=28, crop=0.875)
    assert preprocessing.resized_side == 32
    found = VIEWS["multi-scale"](picture(*size), preprocessing)
    assert len(found) == 3
    for view, side in zip(found, (32, 28, 36), strict=True):
        resized = resize(picture(*size), replace(preprocessing, crop=28 / side - 1e-9))
        assert min(resized.shape[1:]) == side
        assert torch.equal(view, center(resized, 28)[0])


def test_scales_below_the_networks_input_are_one_and_the_same() -> None:
    """At crop 1, seven eighths of the side would leave nothing to be cropped: that scale is the first one again."""
    whole = replace(BASE, crop=1.0)
    assert VIEWS["multi-scale"].count(whole) == 2
    assert VIEWS["multi-scale"].count(BASE) == 3
    found = VIEWS["multi-scale"](picture(50, 40), whole)
    assert torch.equal(found[0], View()(picture(50, 40), whole)[0])
    assert torch.equal(found[1], center(resize(picture(50, 40), whole, 9 / 8), 32)[0])


def test_files_are_decoded_large_enough_for_the_largest_scale() -> None:
    for name in (*VIEWS, *JOINED):
        view = views_named(name)
        assert view.least_side(BASE) >= math.floor(max(view.scales) * BASE.resized_side), name
    assert VIEWS["multi-scale"].least_side(BASE) > VIEWS["center"].least_side(BASE)


# Names


def test_joined_views_are_each_of_the_one_at_each_of_the_other() -> None:
    image, joined = picture(60, 50), views_named("multi-scale+ten-crop")
    preprocessing = replace(BASE, size=28, crop=0.875)
    found = joined(image, preprocessing)
    assert joined.count(preprocessing) == len(found) == 30
    for number, scale in enumerate((1, 7 / 8, 9 / 8)):
        expected = torch.stack(transforms.ten_crop(resize(image, preprocessing, scale), [28, 28]))
        assert torch.equal(found[10 * number : 10 * number + 10], expected)
    assert views_named("flip+five-crop") == VIEWS["ten-crop"]


@pytest.mark.parametrize(
    "names", [*(name.split("+") for name in JOINED), ["flip", "multi-scale", "five-crop"]], ids=str
)
def test_the_order_of_the_names_does_not_matter(names: list[str]) -> None:
    assert {views_named("+".join(order)) for order in permutations(names)} == {views_named("+".join(names))}


@pytest.mark.parametrize("name", VIEWS)
def test_the_centre_beside_others_adds_nothing(name: str) -> None:
    assert views_named(name) == VIEWS[name] == views_named(f"center+{name}") == views_named(f"{name}+center")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ten-corp", "did you mean 'ten-crop'?"),
        ("flip+multiscale", "did you mean 'multi-scale'?"),
        ("nonsense", ", ".join(VIEWS)),
        ("", "choose of"),
        ("flip+", "choose of"),
        ("Flip", "did you mean 'flip'?"),
    ],
)
def test_an_unknown_view_is_refused(name: str, told: str) -> None:
    with pytest.raises(TlkitError) as raised:
        views_named(name)
    assert told in str(raised.value) and "there is no view" in str(raised.value)
    assert raised.value.where == "--tta"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("five-crop+ten-crop", "cropped"),
        ("ten-crop+flip", "mirrored"),
        ("flip+flip", "mirrored"),
        ("multi-scale+multi-scale", "scaled"),
    ],
)
def test_views_that_say_the_same_are_refused(name: str, told: str) -> None:
    with pytest.raises(TlkitError, match=f"cannot be joined: both say what is {told}"):
        views_named(name)


@pytest.mark.parametrize("command", ["evaluate", "predict", "extract-features", "compare"])
def test_the_help_of_every_command_names_each_view(tlkit: Callable[..., Any], command: str) -> None:
    shown = tlkit(command, "--help").out
    told = re.sub(r"[^a-z0-9+,.()-]+", " ", shown[shown.index("--tta") :][:2000])
    for name in VIEWS:
        assert re.search(rf"\b{name}\b", told), name


@pytest.mark.parametrize("command", ["evaluate", "predict", "compare"])
def test_the_help_of_every_command_names_each_merge(tlkit: Callable[..., Any], command: str) -> None:
    shown = tlkit(command, "--help").out
    assert all(name in shown[shown.index("--merge") :] for name in MERGES)


def test_who_has_no_room_for_crops_is_told() -> None:
    whole = replace(BASE, crop=1.0)
    for name in VIEWS:
        crops = name in ("five-crop", "ten-crop")
        assert (remark(VIEWS[name], whole) is not None) == crops, name
        assert remark(VIEWS[name], BASE) is None
    assert "--crop" in (remark(VIEWS["ten-crop"], whole) or "")
