"""Images that are odd by themselves or among the others: blank, blurred, long, small; classes that are rare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tlkit.audit.looks import Look
from tlkit.data.decode import HEIC_SUFFIXES

BLANK = 10
"""Grey values, of 255, between the darkest and the brightest half per cent of an image up to which it shows nothing."""
BLURRED = 0.09
LEAST_SIDE = 64
"""Pixels of the shorter side below which sharpness says nothing."""
LONGER = 2.5
"""Times the usual ratio of the longer to the shorter side from which an image is odd."""
SMALLER = 4
"""Times smaller than the usual shorter side that an odd image is."""
RARE = 10
"""Times fewer images than the largest class has that a rare one has."""

SUFFIXES: dict[str, frozenset[str]] = {
    "JPEG": frozenset({".jpg", ".jpeg", ".jpe", ".jfif"}),
    "MPO": frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}),
    "PNG": frozenset({".png"}),
    "WEBP": frozenset({".webp"}),
    "BMP": frozenset({".bmp", ".dib"}),
    "DIB": frozenset({".bmp", ".dib"}),
    "TIFF": frozenset({".tif", ".tiff"}),
    "GIF": frozenset({".gif"}),
    "PPM": frozenset({".ppm", ".pgm", ".pbm", ".pnm"}),
    "AVIF": frozenset({".avif"}),
    "JPEG2000": frozenset({".jp2"}),
    "HEIF": HEIC_SUFFIXES,
}
"""Endings of the names of files of each format that `tlkit.data.decode` reads."""


def is_blank(look: Look) -> bool:
    """Whether an image is all but of one colour."""
    return look.contrast <= BLANK


def is_blurred(look: Look) -> bool:
    """Whether an image has no fine detail at the size at which a network sees it."""
    small = min(look.stored.width, look.stored.height) < LEAST_SIDE
    return not small and not is_blank(look) and look.sharpness < BLURRED


def has_wrong_suffix(path: str, look: Look) -> bool:
    """Whether the name says another format than the file is of."""
    return Path(path).suffix.lower() not in SUFFIXES[look.stored.format]


def odd_aspects(looks: Sequence[Look]) -> np.ndarray:
    """Mask (N) of images that are much longer than the others: what a square cut from their middle shows is little."""
    sides = _sides(looks)
    ratio = sides.max(1) / sides.min(1)
    return ratio >= LONGER * np.median(ratio) if len(ratio) else np.zeros(0, dtype=bool)


def small_ones(looks: Sequence[Look]) -> np.ndarray:
    """Mask (N) of images that are much smaller than the others, thumbnails among photos."""
    shorter = _sides(looks).min(1)
    return shorter * SMALLER <= np.median(shorter) if len(shorter) else np.zeros(0, dtype=bool)


def _sides(looks: Sequence[Look]) -> np.ndarray:
    return np.array([(look.stored.width, look.stored.height) for look in looks], dtype=np.float64).reshape(-1, 2)


def rare_classes(images: Mapping[str, int]) -> list[str]:
    """Classes with a tenth of the largest one's images or fewer, though some."""
    most = max(images.values(), default=0)
    return [name for name, count in images.items() if 0 < count * RARE <= most]
