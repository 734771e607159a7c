"""Pictures on the report page: which images are shown, as what thumbnails, and where the network looked on them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from tlkit.data.decode import UnreadableImage, decode
from tlkit.data.transforms import seen
from tlkit.errors import InputLost, TlkitError
from tlkit.preprocessing import Preprocessing
from tlkit.reports.outcome import Outcome
from tlkit.shards.folder import File

MISTAKES_SHOWN = 24
PICTURED = 300  # in all
OF_WRONG_CELL, OF_RIGHT_CELL = 4, 2
PICTURE_CHARACTERS = 3_500_000  # of all data URIs
AT_ONCE = 64  # files decoded before it is asked whether there is room for more
LARGE, SMALL = (192, 82), (160, 76)  # longest side in pixels and JPEG quality: of the mistakes shown first, of others

Heat = Callable[[Sequence[int]], Sequence[np.ndarray | None]]
"""Maps rows to small maps (h, w) in [0, 1] of where the network looked, or None."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Args:
        uri: The JPEG as a data URI.
        width, height: Pixels.
    """

    uri: str
    width: int
    height: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height in a square that the picture just fits into, in per cent."""
        longest = max(self.width, self.height)
        across, down = 100 * self.width / longest, 100 * self.height / longest
        return (100 - across) / 2, (100 - down) / 2, across, down


@dataclass(frozen=True)
class Overlay:
    """Where the network looked.

    Args:
        uri: The map as a PNG in a data URI.
        left, top, width, height: The part of the picture that it covers, in per cent of the picture's sides.
    """

    uri: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    """An image in the gallery.

    Args:
        row: Which image it is.
        cell: Its cell of the confusion matrix.
        worst: Whether it is among the mistakes shown first.
        thumbnail: None where the file has vanished or cannot be read.
        overlay: None where it is not known.
    """

    row: int
    cell: str
    worst: bool
    thumbnail: Thumbnail | None = None
    overlay: Overlay | None = None


def choose(outcome: Outcome, cells: Sequence[tuple[int, int]]) -> list[Picture]:
    """Which images are pictured: the most confident mistakes, then some of each cell that can be chosen.

    Args:
        outcome: The predictions.
        cells: (true class, predicted class) of cells that the page lets one choose.

    Returns:
        Pictures without thumbnails, the most wanted first: after the mistakes, the first of each cell, then the
        second of each ..., of rare cells last. Of right predictions the least and the most confident one.
    """
    wrong = np.flatnonzero(~outcome.right)
    worst = wrong[np.argsort(-outcome.confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    codes = np.array([truth * outcome.classes + guess for truth, guess in cells], np.int64)
    rows = np.flatnonzero(np.isin(outcome.cells, codes))
    rows = rows[np.lexsort((-outcome.confidence[rows], outcome.cells[rows]))]
    _, first, size = np.unique(outcome.cells[rows], return_index=True, return_counts=True)
    rank, size = np.arange(len(rows)) - np.repeat(first, size), np.repeat(size, size)
    right = outcome.right[rows]
    rank = np.where(right, (rank - size + 1) % np.maximum(size, 1), rank)  # the last one becomes the first
    wanted = rank < np.where(right, OF_RIGHT_CELL, OF_WRONG_CELL)
    order = np.lexsort((-size[wanted], right[wanted], rank[wanted]))
    chosen = dict.fromkeys(worst.tolist()) | dict.fromkeys(rows[wanted][order].tolist())
    return [
        Picture(row, f"{outcome.truth[row]}-{outcome.predicted[row]}", place < len(worst))
        for place, row in enumerate(list(chosen)[:PICTURED])
    ]


def gallery(
    outcome: Outcome, cells: Sequence[tuple[int, int]], files: Sequence[File], heat: Heat | None, recorded: Any
) -> list[Picture]:
    """The pictures of a page in their order: the mistakes shown first, then the others by confidence.

    Args:
        outcome: The predictions.
        cells: (true class, predicted class) of cells that the page lets one choose.
        files: The image files (N).
        heat: Called once for the mistakes shown first whose pictures can be read.
        recorded: The stored preprocessing, which says what part of a picture the network saw.
    """
    chosen = choose(outcome, cells)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without holding Python's lock
        made = pool.map(lambda one: thumbnail(files[one.row], *(LARGE if one.worst else SMALL)), chosen)
        pictures = [replace(one, thumbnail=small) for one, small in zip(chosen, made, strict=True)]
    pictures = _within_budget(pictures)
    if heat is not None:
        pictures = _with_overlays(pictures, heat, recorded)
    return sorted(pictures, key=lambda one: (not one.worst, -float(outcome.confidence[one.row])))


def thumbnails(files: Sequence[File], room: int) -> list[Thumbnail | None]:
    """Small thumbnails of the first files, one each, until their data URIs would have more than ``room`` characters."""
    made: list[Thumbnail | None] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), AT_ONCE):
            for one in pool.map(lambda path: thumbnail(path, *SMALL), files[start : start + AT_ONCE]):
                room -= len(one.uri) if one else 0
                if room < 0:
                    return made
                made.append(one)
    return made


def thumbnail(path: File, side: int, quality: int) -> Thumbnail | None:
    """The image as a small JPEG; None where the file has vanished or cannot be read."""
    try:
        image = decode(path, min_side=side)
    except (UnreadableImage, InputLost):
        return None
    image.thumbnail((side, side))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality)
    return Thumbnail(_uri("jpeg", jpeg.getvalue()), *image.size)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _within_budget(pictures: Sequence[Picture]) -> list[Picture]:
    """The mistakes shown first, and of the others as many as there is room for."""
    sizes = np.cumsum([len(one.thumbnail.uri) if one.thumbnail else 0 for one in pictures])
    return [one for one, size in zip(pictures, sizes, strict=True) if one.worst or size <= PICTURE_CHARACTERS]


def _with_overlays(pictures: list[Picture], heat: Heat, recorded: Any) -> list[Picture]:
    boxes = {one.row: box for one in pictures if one.worst and (box := _seen(one.thumbnail, recorded))}
    if not boxes:
        return pictures
    maps = dict(zip(boxes, heat(list(boxes)), strict=True))
    return [
        replace(one, overlay=Overlay(heat_uri(found), *boxes[one.row]))
        if (found := maps.get(one.row)) is not None
        else one
        for one in pictures
    ]


def _seen(picture: Thumbnail | None, recorded: Any) -> tuple[float, float, float, float] | None:
    """The part that the central view shows, in per cent; None where that is not known."""
    if picture is None or not isinstance(recorded, Mapping):
        return None
    try:
        part = seen(picture.width, picture.height, Preprocessing.from_dict(dict(recorded)))
    except (TlkitError, TypeError, ArithmeticError):  # a page without a map is better than none
        return None
    left, top, width, height = (round(100 * share, 2) for share in part)
    return left, top, width, height


def heat_uri(heat: np.ndarray) -> str:
    """A map (h, w) in [0, 1] as a PNG of its own size: from clear by way of yellow to a strong red."""
    warm = np.nan_to_num(np.asarray(heat, np.float64), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    green = 225 * (1 - warm) ** 0.8
    alpha = 215 * np.minimum(1.3 * warm, 1) ** 1.2  # what was hardly looked at stays clear
    colours = np.stack([np.full_like(warm, 235), green, 40 * (1 - warm), alpha], axis=-1)
    png = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8), "RGBA").save(png, "PNG", optimize=True)
    return _uri("png", png.getvalue())
