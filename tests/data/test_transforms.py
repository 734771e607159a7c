"""Preprocessing equals timm's, image for image; views; what is not to fill the memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms.v2.functional
from PIL import Image

from tlkit.data.transforms import LONGEST, View, center, normalise, resize, seen
from tlkit.preprocessing import Preprocessing

IMAGENET = Preprocessing(
    size=224,
    crop=0.875,
    crop_mode="center",
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
GREY = replace(IMAGENET, mean=(0.4,), std=(0.3,), colour_mode="L")


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    fine = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse.resize((width, height))) + fine).clip(0, 255).astype(np.uint8))


def of_timm(image: Image.Image, preprocessing: Preprocessing, normalize: bool = False) -> torch.Tensor:
    """What timm feeds its networks with in evaluation: 8-bit, or normalised."""
    transform = timm.data.create_transform(
        input_size=(len(preprocessing.mean), preprocessing.size, preprocessing.size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop,
        crop_mode=preprocessing.crop_mode,
        normalize=normalize,
    )
    found = transform(image.convert(preprocessing.colour_mode))
    assert isinstance(found, torch.Tensor)
    return found


SIZES = [(100, 75), (75, 101), (31, 300), (301, 30), (224, 224), (7, 5), (640, 427), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("side", "crop"), [(64, 0.875), (32, 0.7), (33, 1.0), (63, 0.95), (48, 0.9)])
def test_the_same_pixels_as_timm(
    side: int, crop: float, crop_mode: str, interpolation: str, size: tuple[int, int]
) -> None:
    preprocessing = replace(IMAGENET, size=side, crop=crop, crop_mode=crop_mode, interpolation=interpolation)
    found = center(resize(picture(*size), preprocessing), side)
    assert found.dtype == torch.uint8 and found.shape == (1, 3, side, side)
    assert torch.equal(found[0], of_timm(picture(*size), preprocessing))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_grey_networks_see_what_timm_shows_them(crop_mode: str) -> None:
    preprocessing = replace(GREY, size=32, crop_mode=crop_mode)
    found = center(resize(picture(100, 75), preprocessing), 32)
    assert found.shape == (1, 1, 32, 32)
    assert torch.equal(found[0], of_timm(picture(100, 75), preprocessing))
    normalised = normalise(found, preprocessing)[0]
    assert torch.allclose(normalised, of_timm(picture(100, 75), preprocessing, normalize=True), atol=1e-6)


@pytest.mark.parametrize("preprocessing", [IMAGENET, replace(IMAGENET, mean=(0.5,) * 3, std=(0.5,) * 3)])
def test_the_whole_way_is_timm_s(preprocessing: Preprocessing) -> None:
    image = picture(300, 260)
    found = normalise(center(resize(image, preprocessing), preprocessing.size), preprocessing)
    assert found.dtype == torch.float32
    assert torch.allclose(found[0], of_timm(image, preprocessing, normalize=True), atol=1e-6)


@pytest.mark.parametrize("preprocessing", [IMAGENET, GREY])
def test_normalising_is_torchvision_s(preprocessing: Preprocessing) -> None:
    channels = len(preprocessing.mean)
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    expected = torchvision.transforms.v2.functional.normalize(
        images.float() / 255, list(preprocessing.mean), list(preprocessing.std)
    )
    assert torch.allclose(normalise(images, preprocessing), expected, atol=1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.7, 0.875, 1.0])
@pytest.mark.parametrize("size", [*SIZES, (1, 10_000), (10_000, 1)], ids=str)
def test_any_image_is_large_enough_to_crop_and_no_burden(size: tuple[int, int], crop: float, crop_mode: str) -> None:
    preprocessing = replace(IMAGENET, size=64, crop=crop, crop_mode=crop_mode)
    shape = resize(Image.new("RGB", size), preprocessing).shape
    assert min(shape[1:]) == preprocessing.resized_side
    assert max(shape[1:]) <= LONGEST * preprocessing.resized_side


@pytest.mark.parametrize("size", [(20, 20 * LONGEST + 80), (20 * LONGEST + 80, 20)])
def test_the_middle_of_a_very_long_image_is_still_timm_s(size: tuple[int, int]) -> None:
    preprocessing = replace(IMAGENET, size=32, crop=0.8)
    found = center(resize(picture(*size), preprocessing), 32)[0]
    assert (found.int() - of_timm(picture(*size), preprocessing).int()).abs().max() <= 1


def test_border_is_filled_with_the_mean() -> None:
    preprocessing = replace(IMAGENET, size=40, crop=1.0, crop_mode="border")
    found = center(resize(Image.new("RGB", (20, 10), "white"), preprocessing), 40)[0]
    assert found[:, 0, 0].tolist() == [124, 116, 104] and (found[:, 10:30] == 255).all()
    assert found[:, 9, 20].tolist() == found[:, 30, 20].tolist() == [124, 116, 104]


def test_mirror() -> None:
    preprocessing = replace(IMAGENET, size=32, crop=0.8)
    resized = resize(picture(50, 41), preprocessing)
    views = View(mirrored=True)(picture(50, 41), preprocessing)
    assert views.shape == (2, 3, 32, 32)
    assert torch.equal(views[0], center(resized, 32)[0]) and torch.equal(views[1], center(resized.flip(-1), 32)[0])


# What the central view shows


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (256, 256), (1000, 100), (90, 720), (401, 299)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
def test_the_part_that_is_seen_is_what_the_view_shows(size: tuple[int, int], crop_mode: str, crop: float) -> None:
    """A picture whose red says how far right, green how far down, a pixel is: its view says where it was cut from."""
    width, height = size
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    image = Image.fromarray((np.stack([across, down, np.full_like(across, 0.5)], 2) * 255).round().astype(np.uint8))
    blank = (0.0, 0.0, 1.0)  # padding is known by its blue
    preprocessing = replace(IMAGENET, size=64, crop=crop, crop_mode=crop_mode, interpolation="bilinear", mean=blank)
    view = View()(image, preprocessing)[0].numpy().astype(float) / 255
    left, top, wide, high = seen(width, height, preprocessing)
    rows, columns = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    inside = np.abs(view[2] - 0.5) < 0.1
    expected_x, expected_y = left + (columns + 0.5) / 64 * wide, top + (rows + 0.5) / 64 * high
    # rounding the resized image to whole pixels, and cutting at whole ones, moves things by a pixel
    near_x, near_y = 1.5 * wide / 64 + 0.006, 1.5 * high / 64 + 0.006
    edge = 1.5 / min(width, height) + 0.01  # half a source pixel is not interpolated at the border
    assert np.abs(view[0] - expected_x)[inside].max() < near_x + edge
    assert np.abs(view[1] - expected_y)[inside].max() < near_y + edge
    # padding stands where the part reaches outside of the picture, and nowhere else
    outside = (expected_x < 0) | (expected_x > 1) | (expected_y < 0) | (expected_y > 1)
    far = (np.abs(expected_x) > near_x) & (np.abs(expected_x - 1) > near_x)
    far &= (np.abs(expected_y) > near_y) & (np.abs(expected_y - 1) > near_y)
    assert (inside == ~outside)[far].all()
    assert outside.any() == (crop_mode == "border" and size[0] != size[1] and max(wide, high) > 1.01)


@pytest.mark.parametrize(
    ("mode", "crop", "expected"),
    [
        ("center", 1.0, (1 / 8, 0, 3 / 4, 1)),
        ("center", 0.5, (5 / 16, 1 / 4, 3 / 8, 1 / 2)),
        ("squash", 1.0, (0, 0, 1, 1)),
        ("squash", 0.5, (1 / 4, 1 / 4, 1 / 2, 1 / 2)),
        ("border", 1.0, (0, -1 / 6, 1, 4 / 3)),
        ("border", 0.5, (1 / 4, 1 / 6, 1 / 2, 2 / 3)),
    ],
)
def test_the_part_that_is_seen_of_four_by_three(mode: str, crop: float, expected: tuple[float, ...]) -> None:
    assert seen(400, 300, replace(IMAGENET, crop=crop, crop_mode=mode)) == pytest.approx(expected)
    left, top, wide, high = expected
    assert seen(3, 4, replace(IMAGENET, crop=crop, crop_mode=mode)) == pytest.approx((top, left, high, wide))
