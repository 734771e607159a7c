"""What is done at random to a training image, and to a batch of them."""

from __future__ import annotations

import math
from dataclasses import replace

from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from tlkit.data.transforms import center, least_side, resize
from tlkit.preprocessing import Preprocessing

PRESETS: tuple[str, ...] = ("none", "light", "standard", "strong")
"""From what evaluation does to the strongest changes."""

SMALL = 64
"""Pixels. Inputs up to this side are cropped from the whole image with a margin around it, as is usual for CIFAR: in a
part of so small an image too little is left to see."""

MARGIN = 7 / 8  # input side divided by the side that it is cut from, at most: places for the crop to differ
SMALLEST_AREA = {"standard": 0.35, "strong": 0.2}
RATIO = (3 / 4, 4 / 3)


def augment(image: Image.Image, preprocessing: Preprocessing, preset: str) -> Tensor:
    """A training view of an image. Draws from torch's global generator alone.

    ========  ==========================================  =====================================================
    preset    crop                                        then
    ========  ==========================================  =====================================================
    none      as for evaluation                           nothing
    light     of the evaluation's scale, anywhere         mirrored or not
    standard  0.35 to 1 of the area, ratio 3/4 to 4/3     the same; brightness, contrast and saturation by 0.7 to 1.3
    strong    0.2 to 1 of the area, ratio 3/4 to 4/3      mirrored or not; TrivialAugmentWide (Mueller & Hutter, 2021);
                                                          in one of four a box is erased (Zhong et al., 2020)
    ========  ==========================================  =====================================================

    Inputs of at most `SMALL` pixels are cropped in all presets but ``none`` at the evaluation's scale, from the image
    and an eighth of the input's side around it (He et al., 2016, section 4.2). The evaluation's scale leaves at least
    an eighth of the side for the crop to move in: where it shows the whole image, ``light`` shows 7/8 of its sides.
    Ratio and area are those of the squashed or bordered square, where evaluation makes one. Of images so long
    that no such crop fits, ``standard`` and ``strong`` show the middle, as torchvision does.

    Args:
        image: Upright RGB image of any size.
        preprocessing: What the network expects.
        preset: One of `PRESETS`.

    Returns:
        8-bit tensor (C, S, S).
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset '{preset}'")
    if preset == "none":
        return center(resize(image, preprocessing), preprocessing.size)[0]
    crop = _crop_with_margin if preprocessing.size <= SMALL else _crop
    view = v2.RandomHorizontalFlip()(crop(image, preprocessing, preset))
    if preset == "light":
        return transforms.pil_to_tensor(view)
    if preset == "standard":
        return transforms.pil_to_tensor(v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)(view))
    fill = _mean_colour(preprocessing)
    mode = "nearest" if preprocessing.interpolation == "nearest" else "bilinear"  # Pillow does not turn with lanczos
    view = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode(mode), fill=fill)(view)
    return v2.RandomErasing(p=0.25, value=fill)(transforms.pil_to_tensor(view))


def least_side_for(preset: str, preprocessing: Preprocessing) -> int:
    """Pixels that the shorter side of a decoded image must have at least (``decode(min_side=...)``).

    As many as evaluation needs, and enough for the smallest crop not to be enlarged where the file has the pixels.
    """
    if preset == "none" or preprocessing.size <= SMALL:
        return least_side(preprocessing)
    return max(least_side(preprocessing), least_side(_with_margin(preprocessing)), _enough(preprocessing, preset))


def mix(images: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with the one before it. Draws from torch's global generator on the CPU alone.

    MixUp (Zhang et al., 2018): ``lam * x_i + (1 - lam) * x_j``. CutMix (Yun et al., 2019): a box of ``x_i`` is taken
    from ``x_j``, and ``lam`` is the part of the area that is left. Labels are mixed as ``lam * y_i + (1 - lam) * y_j``.

    Args:
        images: Normalised, floating point (B, C, H, W), in random order; left as they are.
        labels: Numbers of their classes (B).
        classes: Number of classes K.
        mixup: ``lam`` of MixUp is drawn from Beta(mixup, mixup), one for the batch; 0 turns it off.
        cutmix: The same for CutMix. With both, one of the two is drawn for the batch.

    Returns:
        Mixed images (B, C, H, W) of the same type, and soft labels (B, K) in float32.
    """
    kinds = [
        kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0
    ]
    if not kinds:
        return images, one_hot(labels, classes).float()
    mixed: tuple[Tensor, Tensor] = v2.RandomChoice(kinds)(images, labels)
    return mixed


def _crop(image: Image.Image, preprocessing: Preprocessing, preset: str) -> Image.Image:
    """A part of the image, resized to the input's size: less work than to resize the whole image first."""
    if preprocessing.colour_mode == "L":
        image = image.convert("L")
    margin = _with_margin(preprocessing)
    if preprocessing.crop_mode == "border":  # made as small as it may be, or a very long image would fill the memory
        side = max(margin.resized_side, _enough(preprocessing, preset))
        image = transforms.to_pil_image(resize(image, replace(preprocessing, crop=preprocessing.size / side)))
    width, height = image.size
    natural = width / height if preprocessing.crop_mode == "squash" else 1.0
    if preset == "light":
        square = width * height if preprocessing.crop_mode == "squash" else min(width, height) ** 2
        largest = smallest = (margin.size / margin.resized_side) ** 2 * square / (width * height)
        ratio = (natural, natural)
    else:
        smallest, largest = SMALLEST_AREA[preset], 1.0
        ratio = (RATIO[0] * natural, RATIO[1] * natural)
    mode = v2.InterpolationMode(preprocessing.interpolation)
    view: Image.Image = v2.RandomResizedCrop(preprocessing.size, (smallest, largest), ratio, mode)(image)
    return view


def _crop_with_margin(image: Image.Image, preprocessing: Preprocessing, _: str) -> Image.Image:
    """A part of the image and what is around it: its reflection, or more of the border."""
    border = preprocessing.crop_mode == "border"
    crop = v2.RandomCrop(
        preprocessing.size,
        padding=preprocessing.size // 8,
        padding_mode="constant" if border else "reflect",
        fill=_mean_colour(preprocessing) if border else 0,
    )
    view: Image.Image = transforms.to_pil_image(crop(resize(image, preprocessing)))
    return view


def _with_margin(preprocessing: Preprocessing) -> Preprocessing:
    return replace(preprocessing, crop=min(preprocessing.crop, MARGIN))


def _enough(preprocessing: Preprocessing, preset: str) -> int:
    """Side of a square image of which the preset's smallest crop has as many pixels as the input."""
    return math.ceil(preprocessing.size / math.sqrt(SMALLEST_AREA.get(preset, 1.0)))


def _mean_colour(preprocessing: Preprocessing) -> list[int]:
    return [round(255 * mean) for mean in preprocessing.mean]
