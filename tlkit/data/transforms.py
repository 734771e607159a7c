"""What is done to a decoded image before the network sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from tlkit.preprocessing import Preprocessing

LONGEST = 16  # times the shorter side: of longer images only the middle is kept, for resized they would fill the memory

SPARE = 1.25


def least_side(preprocessing: Preprocessing, scale: float = 1.0) -> int:
    """Pixels that the shorter side of a decoded image must have at least, where a file can be decoded at reduced scale.

    Somewhat more than the image is resized to: an eighth-scale decode that needs no further resizing has finer detail,
    and aliases of it, that the usual resizing takes away.
    """
    return math.ceil(SPARE * scaled_side(preprocessing, scale))


def scaled_side(preprocessing: Preprocessing, scale: float) -> int:
    """The side that an image is resized to at a scale: at least that of the network's input."""
    return max(preprocessing.size, round(preprocessing.resized_side * scale))


def resize(image: Image.Image, preprocessing: Preprocessing, scale: float = 1.0) -> Tensor:
    """Bring an image to the size from which views are cropped.

    Args:
        image: Upright RGB image.
        preprocessing: What the network expects.
        scale: Multiple of the size that it is stored with.

    Returns:
        8-bit tensor (C, h, w) with both sides at least ``preprocessing.size``.
    """
    if preprocessing.colour_mode == "L":
        image = image.convert("L")
    size, side, mode = (
        preprocessing.size,
        scaled_side(preprocessing, scale),
        InterpolationMode(preprocessing.interpolation),
    )
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


@dataclass(frozen=True)
class View:
    """Which views of an image the network is shown: crops, at one scale or several, of the mirrored image too.

    Args:
        crops: Maps an image (C, h, w), resized but not yet cropped, and the input side S to (k, C, S, S), the central
            crop last.
        scales: Multiples of the side that images are resized to, that itself (1) first.
        mirrored: Whether the same is cut from the mirrored image.
    """

    crops: Callable[[Tensor, int], Tensor] = center
    scales: tuple[float, ...] = (1.0,)
    mirrored: bool = False

    def __call__(self, image: Image.Image, preprocessing: Preprocessing) -> Tensor:
        """The views (V, C, S, S) of an upright RGB image, in 8 bits."""
        views = []
        for scale in self._scales(preprocessing):
            resized = resize(image, preprocessing, scale)
            views.append(self.crops(resized, preprocessing.size))
            if self.mirrored:
                views.append(self.crops(transforms.horizontal_flip(resized), preprocessing.size))
        return torch.cat(views)

    def _scales(self, preprocessing: Preprocessing) -> list[float]:
        """The scales, but for those that the smallest possible side makes the same as an earlier one."""
        sides = {scaled_side(preprocessing, scale): scale for scale in reversed(self.scales)}
        return [scale for scale in self.scales if sides[scaled_side(preprocessing, scale)] == scale]

    def least_side(self, preprocessing: Preprocessing) -> int:
        """`least_side` for the largest of the scales."""
        return least_side(preprocessing, max(self.scales))

    def count(self, preprocessing: Preprocessing) -> int:
        """How many views there are of an image."""
        return (self.center + 1) * len(self._scales(preprocessing)) * (2 if self.mirrored else 1)

    @property
    def center(self) -> int:
        """Place of the central crop, at the usual scale and not mirrored, among the views."""
        return len(self.crops(torch.zeros(1, 1, 1), 1)) - 1


CENTER = View()


def seen(width: int, height: int, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Which part of an upright picture the central view shows.

    Args:
        width: Of the picture, in any unit.
        height: Of the picture, in the same unit.
        preprocessing: What the network expects.

    Returns:
        Left and top end, width and height as shares of the picture's; outside of [0, 1] where it was padded.
    """
    part = preprocessing.size / preprocessing.resized_side
    match preprocessing.crop_mode:
        case "squash":
            across, down = part, part
        case "border":
            across, down = part * max(width, height) / width, part * max(width, height) / height
        case _:
            across, down = part * min(width, height) / width, part * min(width, height) / height
    return (1 - across) / 2, (1 - down) / 2, across, down


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """8-bit images (B, C, H, W) to the network's input, ``(x / 255 - mean) / std``, in float32."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
