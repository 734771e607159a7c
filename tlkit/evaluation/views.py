"""Test-time views by name, and how what the network makes of them is merged; a new view is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from tlkit.data.transforms import CENTER, View, center
from tlkit.errors import TlkitError, did_you_mean
from tlkit.preprocessing import Preprocessing


def five_crop(image: Tensor, size: int) -> Tensor:
    """The four corners and the centre (Krizhevsky et al. 2012, 4.1): (C, h, w) to (5, C, size, size)."""
    return torch.stack(transforms.five_crop(image, [size, size]))


VIEWS: dict[str, View] = {
    "center": CENTER,
    "flip": View(mirrored=True),
    "five-crop": View(crops=five_crop),
    "ten-crop": View(crops=five_crop, mirrored=True),
    # 256 px and 32 px less and more, as in Simonyan and Zisserman 2015, 4.2
    "multi-scale": View(scales=(1.0, 7 / 8, 9 / 8)),
}


def views_named(name: str) -> View:
    """The views of a name, or of several joined by ``+``: ``multi-scale+ten-crop`` is ten-crop at each scale.

    Raises:
        TlkitError: There is no such view, or two of them say the same thing.
    """
    chosen: dict[str, object] = {}
    said_by: dict[str, str] = {}
    for word in name.split("+"):
        if word not in VIEWS:
            remedy = did_you_mean(word, VIEWS) or f"choose of {', '.join(VIEWS)}, several joined by +"
            raise TlkitError(f"there is no view '{word}'", where="--tta", remedy=remedy)
        for field in fields(View):
            value = getattr(VIEWS[word], field.name)
            if value == field.default:
                continue
            if field.name in chosen:
                what = f"'{said_by[field.name]}' and '{word}' cannot be joined: both say what is {_SAYS[field.name]}"
                raise TlkitError(what, where="--tta", remedy="leave one of them out")
            chosen[field.name], said_by[field.name] = value, word
    return View(**chosen)  # type: ignore[arg-type]


_SAYS = {"crops": "cropped", "scales": "scaled", "mirrored": "mirrored"}


def remark(view: View, preprocessing: Preprocessing) -> str | None:
    """What to tell a person whose views differ little from each other."""
    if view.crops is center or preprocessing.resized_side > preprocessing.size:
        return None
    return (
        f"images are resized to the network's {preprocessing.size} px, so that crops differ along the longer side"
        " alone; --crop 0.875 gives them room"
    )


def merge(probabilities: Tensor, how: str) -> Tensor:
    """One distribution for each image of those of its views.

    Probabilities and not logits, whose scale differs between views; each result adds up to 1.

    Args:
        probabilities: (N, V, K).
        how: A key of `MERGES`.

    Returns:
        Probabilities (N, K).
    """
    if probabilities.shape[1] == 1:
        return probabilities[:, 0]
    merged = MERGES[how](probabilities)
    return merged / merged.sum(-1, keepdim=True)


def _geometric(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log().mean(1).softmax(-1)


MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda probabilities: probabilities.mean(1),
    "geometric": _geometric,
    "max": lambda probabilities: probabilities.amax(1),
}
