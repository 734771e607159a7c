"""What is done to a decoded image before the network sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from tlkit.preprocessing import Preprocessing

View = Callable[[Tensor, int], Tensor]
"""An image (C, h, w), resized but not yet cropped, and the input side S, to its views (k, C, S, S)."""


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
    side, mode = preprocessing.resized_side, InterpolationMode(preprocessing.interpolation)
    match preprocessing.crop_mode:
        case "squash":
            image = transforms.resize(image, [side, side], mode)
        case "border":
            scale = side / max(image.size)
            width, height = (max(1, round(length * scale)) for length in image.size)
            image = transforms.resize(image, [height, width], mode)
            left, top = (side - width) // 2, (side - height) // 2
            fill = [round(255 * mean) for mean in preprocessing.mean]
            image = transforms.pad(image, [left, top, side - width - left, side - height - top], fill=fill)
        case _:
            image = transforms.resize(image, [side], mode)
    return transforms.pil_to_tensor(image)


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
