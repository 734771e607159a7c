"""What is done to a decoded image before the network sees it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from tlkit.preprocessing import Preprocessing

LONGEST = 16  # times the shorter side: of longer images only the middle is kept, for resized they would fill the memory

View = Callable[[Tensor, int], Tensor]
"""An image (C, h, w), resized but not yet cropped, and the input side S, to its views (k, C, S, S)."""


SPARE = 1.25


def least_side(preprocessing: Preprocessing) -> int:
    """Pixels that the shorter side of a decoded image must have at least, where a file can be decoded at reduced scale.

    Somewhat more than the image is resized to: an eighth-scale decode that needs no further resizing has finer detail,
    and aliases of it, that the usual resizing takes away.
    """
    return math.ceil(SPARE * preprocessing.resized_side)


def resize(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Bring an image to the size from which views are cropped.

    Args:
        image: Upright RGB image.
        preprocessing: What the network expects.

    Returns:
        8-bit tensor (C, h, w) with both sides at least ``preprocessing.size``.
    """
    if preprocessing.colour_mode == "L":
        image = image.convert("L")
    size, side, mode = preprocessing.size, preprocessing.resized_side, InterpolationMode(preprocessing.interpolation)
    match preprocessing.crop_mode:
        case "squash":
            image = transforms.resize(image, [side, side], mode)
        case "border":
            ratio = max(image.size) / side
            width, height = (max(1, round(length / ratio)) for length in image.size)
            image = transforms.resize(image, [height, width], mode)
            left, top = _margin(width, side, size), _margin(height, side, size)
            fill = [round(255 * mean) for mean in preprocessing.mean]
            image = transforms.pad(image, [left, top, side - width - left, side - height - top], fill=fill)
        case _:
            keep = LONGEST * min(image.size)
            if max(image.size) > keep:
                image = transforms.center_crop(image, [min(image.height, keep), min(image.width, keep)])
            image = transforms.resize(image, [side], mode)
    return transforms.pil_to_tensor(image)


def _margin(length: int, side: int, size: int) -> int:
    """Padding before an image of ``length`` in a square of ``side``, the central ``size`` of which is as timm's."""
    cut = round((side - size) / 2)
    return cut + (size - length) // 2 if length < size else cut - round((length - size) / 2)


def center(image: Tensor, size: int) -> Tensor:
    """The one view cut from the centre: (C, h, w) to (1, C, size, size)."""
    return transforms.center_crop(image, [size, size]).unsqueeze(0)


def center_and_mirror(image: Tensor, size: int) -> Tensor:
    """The centre and its mirror image: (C, h, w) to (2, C, size, size)."""
    cropped = transforms.center_crop(image, [size, size])
    return torch.stack([cropped, transforms.horizontal_flip(cropped)])


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """8-bit images (B, C, H, W) to the network's input, ``(x / 255 - mean) / std``, in float32."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
