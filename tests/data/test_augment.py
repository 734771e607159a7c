"""Training views: their shapes, what each preset changes and how far, the seed; mixed batches against their labels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from tlkit.data.augment import PRESETS, augment, least_side_for, mix
from tlkit.data.transforms import center, least_side, normalise, resize
from tlkit.preprocessing import Preprocessing

IMAGENET = Preprocessing(
    size=224,
    crop=0.875,
    crop_mode="center",
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
MEAN = (124, 116, 104)
GREY = replace(IMAGENET, mean=(0.4,), std=(0.3,), colour_mode="L")
CIFAR = replace(IMAGENET, size=32, crop=1.0)
SIZES = [(300, 260), (50, 40), (1, 1), (2, 3), (1, 10_000), (10_000, 1), (700, 30), (224, 224), (32, 32)]


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))


def map_of_places(width: int, height: int) -> Image.Image:
    """Red is the place from left to right, green from top to bottom, in 1/255 of the sides."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    return Image.fromarray((255 * np.stack([x, y, 0 * x], axis=-1)).round().astype(np.uint8))


def extent(view: Tensor) -> tuple[float, float, float, float]:
    """Left, top, width and height of a crop of `map_of_places`, as parts of the image; mirrored or not."""
    x, y = view[0].double().mean(0) / 255, view[1].double().mean(1) / 255
    steps = len(x) - 1
    width, height = (abs(float(line[-1] - line[0])) * (steps + 1) / steps for line in (x, y))
    return float(x.mean()) - width / 2, float(y.mean()) - height / 2, width, height


def seeded(seed: int, call: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(seed)
    return call()


def views(image: Image.Image, preprocessing: Preprocessing, preset: str, count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [augment(image, preprocessing, preset) for _ in range(count)]


# Any image, any network


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("preprocessing", [IMAGENET, GREY, CIFAR, replace(GREY, size=64), replace(IMAGENET, crop=1.0)])
@pytest.mark.parametrize("preset", PRESETS)
def test_shape_and_type(preset: str, preprocessing: Preprocessing, crop_mode: str) -> None:
    preprocessing = replace(preprocessing, crop_mode=crop_mode)
    for size in SIZES:
        for view in views(picture(*size), preprocessing, preset, 2):
            assert view.dtype == torch.uint8
            assert view.shape == (len(preprocessing.mean), preprocessing.size, preprocessing.size)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_interpolation(preset: str, interpolation: str) -> None:
    for preprocessing in (replace(IMAGENET, size=80), GREY, CIFAR):
        for view in views(picture(90, 70), replace(preprocessing, interpolation=interpolation), preset, 20):
            assert view.shape[1:] == (preprocessing.size, preprocessing.size)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_smallest_input(preset: str) -> None:
    assert views(picture(9, 20), replace(CIFAR, size=8), preset, 1)[0].shape == (3, 8, 8)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'wild'"):
        augment(picture(40, 40), CIFAR, "wild")


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("preprocessing", [IMAGENET, GREY, CIFAR], ids=["224 px", "grey", "32 px"])
def test_none_is_what_evaluation_sees(preprocessing: Preprocessing, crop_mode: str) -> None:
    preprocessing = replace(preprocessing, crop_mode=crop_mode)
    for size in SIZES:
        image, state = picture(*size), torch.get_rng_state()
        found = augment(image, preprocessing, "none")
        assert torch.equal(found, center(resize(image, preprocessing), preprocessing.size)[0])
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


# The seed


@pytest.mark.parametrize("preprocessing", [IMAGENET, CIFAR], ids=["224 px", "32 px"])
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_torch_s_seed_alone_decides(preset: str, preprocessing: Preprocessing) -> None:
    image = picture(300, 260)
    random.seed(1)
    np.random.seed(1)
    first = [seeded(seed, lambda: augment(image, preprocessing, preset)) for seed in range(8)]
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    again = [seeded(seed, lambda: augment(image, preprocessing, preset)) for seed in range(8)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index, union-attr]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({view.numpy().tobytes() for view in first}) == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_the_image_is_left_as_it_is(preset: str) -> None:
    for preprocessing, size in ((replace(IMAGENET, crop=1.0), (224, 224)), (CIFAR, (32, 32)), (IMAGENET, (300, 260))):
        image = picture(*size)
        before = image.tobytes()
        views(image, preprocessing, preset, 10)
        assert image.tobytes() == before


# Crops


@pytest.mark.parametrize("preprocessing", [IMAGENET, CIFAR], ids=["224 px", "32 px"])
@pytest.mark.parametrize("preset", ["light", "standard"])
def test_half_of_the_views_are_mirrored(preset: str, preprocessing: Preprocessing) -> None:
    found = views(map_of_places(300, 260), preprocessing, preset, 200)
    mirrored = sum(bool((view[0, :, 0] > view[0, :, -1]).all()) for view in found)
    assert 70 <= mirrored <= 130  # 100, and 4 standard deviations of 7
    assert all((view[1, 0] < view[1, -1]).all() for view in found), "never upside down"


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (512, 512)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop, scale", [(0.875, 0.875), (0.7, 0.7), (1.0, 0.875), (0.95, 0.875)])
def test_light_crops_at_the_scale_of_evaluation(
    crop: float, scale: float, crop_mode: str, size: tuple[int, int]
) -> None:
    preprocessing = replace(IMAGENET, crop=crop, crop_mode=crop_mode)
    found = [extent(view) for view in views(map_of_places(*size), preprocessing, "light", 200)]
    shorter = min(size)
    expected = [scale * (shorter / length if crop_mode == "center" else 1) for length in size]
    for left, top, width, height in found:
        assert (width, height) == pytest.approx(expected, abs=0.012)
        assert left > -0.01 and top > -0.01 and left + width < 1.01 and top + height < 1.01
    for axis in (0, 1):  # uniform over all places, ends included
        places, room = [one[axis] for one in found], 1 - expected[axis]
        assert min(places) < 0.05 * room + 0.01 and max(places) > 0.95 * room - 0.01
        assert sum(places) / len(places) == pytest.approx(room / 2, abs=0.25 * room * 0.5 + 0.005)


def test_light_shows_what_evaluation_shows() -> None:
    """The crop that happens to be in the middle is, but for resampling at other places, the evaluation's."""
    image, expected = picture(512, 512), center(resize(picture(512, 512), IMAGENET), 224)[0].int()
    found = views(image, IMAGENET, "light", 300)
    nearest = min((view.int() - expected).abs().float().mean().item() for view in found)
    furthest = max((view.int() - expected).abs().float().mean().item() for view in found)
    assert nearest < 2 < 10 < furthest


@pytest.mark.parametrize("preset, smallest", [("standard", 0.35), ("strong", 0.2)])
@pytest.mark.parametrize("size", [(256, 256), (320, 240), (200, 300)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_areas_and_ratios_of_crops(
    monkeypatch: pytest.MonkeyPatch, crop_mode: str, size: tuple[int, int], preset: str, smallest: float
) -> None:
    """Mean area as drawn uniformly, given that the crop fits into the image; by quadrature."""
    monkeypatch.setattr(v2, "ColorJitter", lambda **_: v2.Identity())
    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda **_: v2.Identity())
    monkeypatch.setattr(v2, "RandomErasing", lambda **_: v2.Identity())
    preprocessing = replace(IMAGENET, size=96, crop_mode=crop_mode)
    found = [extent(view) for view in views(map_of_places(*size), preprocessing, preset, 600)]
    natural = size[0] / size[1] if crop_mode == "center" else 1.0
    area = torch.linspace(smallest, 1, 2001, dtype=torch.float64)[:, None]
    ratio = torch.linspace(math.log(3 / 4), math.log(4 / 3), 2001, dtype=torch.float64).exp()
    fits = (area * ratio / natural <= 1) & (area / ratio * natural <= 1)
    accepted = area.expand_as(fits)[fits]
    areas = torch.tensor([width * height for _, _, width, height in found], dtype=torch.float64)
    error = float(accepted.std()) / math.sqrt(len(found))
    assert float(areas.mean()) == pytest.approx(float(accepted.mean()), abs=4 * error + 0.005)
    assert areas.min() > smallest - 0.02 and areas.min() < smallest + 0.05
    ratios = [width / height * natural for _, _, width, height in found]
    assert min(ratios) > 3 / 4 - 0.03 and max(ratios) < 4 / 3 + 0.03
    assert min(ratios) < 0.8 and max(ratios) > 1.25


def test_very_long_images_are_seen_everywhere_by_light() -> None:
    places = [extent(view)[0] for view in views(map_of_places(2000, 100), IMAGENET, "light", 100)]
    assert min(places) < 0.1 and max(places) > 0.85


def test_standard_crops_are_torchvision_s() -> None:
    image = picture(300, 260)
    found = seeded(5, lambda: augment(image, IMAGENET, "standard"))
    geometry = v2.RandomResizedCrop(224, (0.35, 1.0), interpolation=v2.InterpolationMode.BILINEAR)
    colours = v2.ColorJitter(0.3, 0.3, 0.3)
    expected = seeded(5, lambda: v2.Compose([geometry, v2.RandomHorizontalFlip(), colours, v2.PILToTensor()])(image))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_small_images_are_cropped_with_a_margin(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """The recipe for CIFAR: 4 px around an image of 32 px, as numpy reflects it, in all 81 places, mirrored or not."""
    monkeypatch.setattr(v2, "ColorJitter", lambda **_: v2.Identity())
    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda **_: v2.Identity())
    monkeypatch.setattr(v2, "RandomErasing", lambda **_: v2.Identity())
    image = picture(32, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1)
    possible = {}
    for top in range(9):
        for left in range(9):
            cut = padded[:, top : top + 32, left : left + 32]
            possible[cut.tobytes()] = possible[cut[:, :, ::-1].tobytes()] = (top, left)
    found = [possible[view.numpy().tobytes()] for view in views(image, CIFAR, preset, 800)]
    assert len(set(found)) == 81


def test_borders_stay_borders() -> None:
    """Around a bordered image there is more border, and what is cut is the bordered square's."""
    small = views(Image.new("RGB", (32, 16), "white"), replace(CIFAR, crop_mode="border"), "light", 50)
    large = views(Image.new("RGB", (640, 320), "white"), replace(IMAGENET, crop_mode="border"), "light", 50)
    for view in (*small, *large):
        assert view.flatten(1).unique(dim=1).T.tolist() == [list(MEAN), [255, 255, 255]]
    squares = views(Image.new("RGB", (640, 320), "white"), replace(IMAGENET, crop_mode="border", crop=1.0), "light", 50)
    white = [(view[0] == 255).float().mean().item() for view in squares]
    assert white == pytest.approx([4 / 7] * 50, abs=0.01)  # half of the square, all of it inside the crop's 7/8


# Colours and boxes


def test_standard_changes_colours_moderately() -> None:
    found = views(Image.new("RGB", (64, 64), (120, 80, 160)), IMAGENET, "standard", 300)
    colours = torch.stack([view[:, 0, 0] for view in found]).float()
    assert all((view == view[:, :1, :1]).all() for view in found)
    assert ((colours > 120 * 0.4 - 40) & (colours < 255)).all()
    assert (colours.mean(0) - torch.tensor([120.0, 80, 160])).abs().max() < 6
    brightness = colours.mean(1)
    assert brightness.min() < 95 and brightness.max() > 145
    saturation = colours.max(1).values - colours.min(1).values
    assert saturation.min() < 60 and saturation.max() > 100


def test_colours_of_light_are_the_image_s() -> None:
    for view in views(Image.new("RGB", (64, 64), (120, 80, 160)), IMAGENET, "light", 20):
        assert (view == torch.tensor([120, 80, 160]).view(3, 1, 1)).all()


@pytest.mark.parametrize("preprocessing", [IMAGENET, GREY, CIFAR], ids=["224 px", "grey", "32 px"])
def test_strong_erases_boxes_of_the_mean_colour(monkeypatch: pytest.MonkeyPatch, preprocessing: Preprocessing) -> None:
    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda **_: v2.Identity())
    mean = torch.tensor([round(255 * mean) for mean in preprocessing.mean]).view(-1, 1, 1)
    shares = []
    for view in views(Image.new("RGB", (64, 64), "white"), preprocessing, "strong", 400):
        box = (view == mean).all(0)
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns), "one box"
        assert (view[:, ~box] == 255).all()
        shares.append(box.float().mean().item())
    erased = [share for share in shares if share]
    assert 65 <= len(erased) <= 135  # a quarter of 400, and 4 standard deviations of 8.7
    assert min(erased) > 0.015 and 0.25 < max(erased) < 0.36


@pytest.mark.parametrize("preprocessing", [IMAGENET, CIFAR], ids=["224 px", "32 px"])
def test_strong_uses_every_change_of_trivial_augment(
    monkeypatch: pytest.MonkeyPatch, preprocessing: Preprocessing
) -> None:
    used = set()
    original = v2.TrivialAugmentWide._apply_image_or_video_transform

    def watched(self: v2.TrivialAugmentWide, image: object, name: str, *rest: object, **named: object) -> object:
        used.add(name)
        return original(self, image, name, *rest, **named)

    monkeypatch.setattr(v2.TrivialAugmentWide, "_apply_image_or_video_transform", watched)
    views(picture(40, 40), preprocessing, "strong", 150)
    assert used == v2.TrivialAugmentWide._AUGMENTATION_SPACE.keys() and len(used) == 14


def test_what_is_turned_in_is_the_mean_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        v2.TrivialAugmentWide,
        "_AUGMENTATION_SPACE",
        {"Rotate": (lambda bins, height, width: torch.full((bins,), 45.0), True)},
    )
    for view in views(Image.new("RGB", (64, 64), "white"), IMAGENET, "strong", 5):
        assert view[:, 0, 0].tolist() == view[:, -1, -1].tolist() == list(MEAN)


# The size to decode at


@pytest.mark.parametrize("preprocessing", [IMAGENET, CIFAR, replace(IMAGENET, crop=1.0, size=320)])
def test_enough_pixels_are_decoded(preprocessing: Preprocessing) -> None:
    sides = [least_side_for(preset, preprocessing) for preset in PRESETS]
    assert sides == sorted(sides) and sides[0] == least_side(preprocessing)
    if preprocessing is CIFAR:
        assert set(sides) == {40}
    if preprocessing is IMAGENET:
        assert sides == [320, 320, 379, 501]  # 1.25 * 256, 224 / sqrt(0.35), 224 / sqrt(0.2)


# Mixed batches


CLASSES = 7
LABELS = torch.tensor([3, 0, 6, 6, 1, 2])


def flat_batch(dtype: torch.dtype = torch.float32, side: int = 20) -> Tensor:
    """Each image of one value: its number, so that pixels tell where they are from."""
    return torch.arange(6, dtype=dtype).view(6, 1, 1, 1).expand(6, 3, side, side).contiguous()


def share_of_own(soft: Tensor) -> Tensor:
    """The part of each image's own label, where its neighbour's is another."""
    before = LABELS.roll(1)
    own = soft[torch.arange(6), LABELS]
    other = soft[torch.arange(6), before]
    assert torch.allclose(soft.sum(1), torch.ones(6), atol=1e-6)
    different = before != LABELS
    assert torch.allclose((own + other)[different], torch.ones(int(different.sum())), atol=1e-6)
    assert torch.equal(soft[3], torch.nn.functional.one_hot(LABELS[3], CLASSES).float()), "6 mixed with 6"
    assert own[different].max() - own[different].min() < 1e-6, "one share for the batch"
    return own[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixup_mixes_pixels_as_labels(dtype: torch.dtype) -> None:
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        images = flat_batch(dtype)
        mixed, soft = mix(images, LABELS, CLASSES, mixup=0.8, cutmix=0)
        assert mixed.dtype == dtype and soft.dtype == torch.float32 and soft.shape == (6, CLASSES)
        assert torch.equal(images, flat_batch(dtype)), "the batch is left as it is"
        own = share_of_own(soft)
        expected = own * flat_batch() + (1 - own) * flat_batch().roll(1, 0)
        assert torch.allclose(mixed.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05)
        shares.append(float(own))
    variance = 1 / (4 * (2 * 0.8 + 1))  # of Beta(a, a)
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 200))
    assert np.var(shares) == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cutmix_takes_boxes_as_large_as_the_labels_say(dtype: torch.dtype) -> None:
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, soft = mix(flat_batch(dtype), LABELS, CLASSES, mixup=0, cutmix=1.0)
        assert mixed.dtype == dtype and soft.dtype == torch.float32
        kept = mixed == flat_batch(dtype)
        taken = mixed == flat_batch(dtype).roll(1, 0)
        assert (kept ^ taken).all(), "each pixel is from one of the two"
        box = taken[0, 0]
        assert torch.equal(box, box.any(1)[:, None] & box.any(0)) and (taken == box).all()
        own = share_of_own(soft)
        assert float(own) == pytest.approx(kept[0].float().mean().item(), abs=1e-6)
        shares.append(float(own))
    assert min(shares) < 0.3 and max(shares) > 0.9


def test_one_of_the_two_is_drawn_for_each_batch() -> None:
    torch.manual_seed(0)
    whole = [mix(flat_batch(), LABELS, CLASSES, mixup=1.0, cutmix=1.0)[0] for _ in range(200)]
    cut = sum(bool((mixed == mixed.round()).all()) for mixed in whole)
    assert 72 <= cut <= 128  # 100, and 4 standard deviations of 7


def test_no_mixing() -> None:
    images = torch.randn(6, 3, 20, 20)
    state = torch.get_rng_state()
    mixed, soft = mix(images, LABELS, CLASSES, mixup=0, cutmix=0)
    assert torch.equal(mixed, images) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(soft, torch.eye(CLASSES)[LABELS]) and soft.dtype == torch.float32


@pytest.mark.parametrize("alphas", [(0.2, 0), (0, 1.0), (0.8, 1.0)], ids=str)
def test_mixing_follows_torch_s_seed(alphas: tuple[float, float]) -> None:
    images = torch.randn(6, 3, 20, 20)
    random.seed(1)
    before = random.getstate()
    first, again = (seeded_mix(4, images, LABELS, alphas) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert random.getstate() == before


@pytest.mark.parametrize("alpha", [0.001, 0.01, 100.0])
def test_extreme_alphas(alpha: float) -> None:
    for _ in range(50):
        for mixed, soft in (
            mix(flat_batch(), LABELS, CLASSES, mixup=alpha, cutmix=0),
            mix(flat_batch(), LABELS, CLASSES, mixup=0, cutmix=alpha),
        ):
            assert mixed.isfinite().all() and torch.allclose(soft.sum(1), torch.ones(6), atol=1e-6)


def test_a_batch_of_one() -> None:
    images = torch.randn(1, 3, 8, 8)
    mixed, soft = mix(images, torch.tensor([2]), 3, mixup=0.5, cutmix=0.5)
    assert torch.allclose(mixed, images, atol=1e-6) and torch.allclose(soft, torch.tensor([[0.0, 0, 1]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0), (0.8, 1.0), (0, 0)], ids=str)
def test_mixing_on_a_gpu_is_that_on_the_cpu(alphas: tuple[float, float]) -> None:
    state = torch.cuda.get_rng_state()
    for seed in range(5):
        here, there = (
            seeded_mix(seed, flat_batch().to(device), LABELS.to(device), alphas) for device in ("cpu", "cuda")
        )
        for one, other in zip(here, there, strict=True):
            assert other.is_cuda and torch.allclose(one, other.cpu(), atol=1e-6)
    torch.cuda.set_rng_state(state)


def seeded_mix(seed: int, images: Tensor, labels: Tensor, alphas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return mix(images, labels, CLASSES, mixup=alphas[0], cutmix=alphas[1])


def test_a_training_batch_goes_all_the_way() -> None:
    torch.manual_seed(0)
    batch = torch.stack([augment(picture(60 + k, 50), CIFAR, "strong") for k in range(6)])
    mixed, soft = mix(normalise(batch, CIFAR), LABELS, CLASSES, mixup=0.2, cutmix=1.0)
    assert mixed.shape == (6, 3, 32, 32) and soft.shape == (6, CLASSES)
    assert transforms.to_pil_image(batch[0]).size == (32, 32)
