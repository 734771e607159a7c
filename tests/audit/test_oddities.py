"""What is odd, just at its threshold and just short of it; each format that is read has its endings."""

from __future__ import annotations

from typing import Any

import pytest

from tlkit.audit.looks import Look
from tlkit.audit.oddities import (
    SUFFIXES,
    has_wrong_suffix,
    is_blank,
    is_blurred,
    odd_aspects,
    rare_classes,
    small_ones,
)
from tlkit.data.decode import FORMATS, HEIC_SUFFIXES, IMAGE_SUFFIXES, Stored


def look(width: int = 256, height: int = 256, kind: str = "PNG", contrast: int = 200, sharpness: float = 1.0) -> Look:
    return Look(Stored(kind, "RGB", width, height), "", b"", b"", contrast, sharpness)


@pytest.mark.parametrize(("contrast", "blank"), [(0, True), (10, True), (11, False), (255, False)])
def test_blank(contrast: int, blank: bool) -> None:
    assert is_blank(look(contrast=contrast)) is blank


@pytest.mark.parametrize(
    ("options", "blurred"),
    [
        ({"sharpness": 0.0899}, True),
        ({"sharpness": 0.09}, False),
        ({"sharpness": 0.0}, True),
        ({"sharpness": 0.0, "contrast": 10}, False),  # blank, and said to be so
        ({"sharpness": 0.0, "contrast": 11}, True),
        ({"sharpness": 0.0, "width": 64, "height": 64}, True),
        ({"sharpness": 0.0, "width": 63, "height": 640}, False),  # too small to tell
        ({"sharpness": 0.0, "width": 640, "height": 63}, False),
    ],
    ids=str,
)
def test_blurred(options: dict[str, Any], blurred: bool) -> None:
    assert is_blurred(look(**options)) is blurred


SIZES: list[tuple[list[tuple[int, int]], list[int], list[int]]] = [
    ([], [], []),
    ([(1, 1)], [], []),
    ([(1, 10_000)], [], []),  # the only one there is: odd compared to what?
    ([(100, 100)] * 4 + [(250, 100), (100, 250)], [4, 5], []),
    ([(100, 100)] * 4 + [(249, 100), (100, 249)], [], []),
    ([(200, 100)] * 4 + [(250, 100), (499, 100)], [], []),  # compared to what is usual
    ([(200, 100)] * 4 + [(500, 100), (100, 500)], [4, 5], []),
    ([(100, 100)] * 4 + [(25, 25), (26, 26), (25, 40)], [], [4, 6]),
    ([(400, 100)] * 4 + [(100, 25), (4000, 1000)], [], [4]),
    ([(32, 32)] * 9 + [(8, 8)], [], [9]),
    ([(32, 32)] * 9 + [(320, 320)], [], []),
    ([(32, 32)] * 9 + [(1, 10_000)], [9], [9]),
]


@pytest.mark.parametrize(("sizes", "long", "small"), SIZES, ids=str)
def test_odd_sizes(sizes: list[tuple[int, int]], long: list[int], small: list[int]) -> None:
    """2.5 times as long as is usual, or a quarter of the usual size."""
    looks = [look(*size) for size in sizes]
    for mask, rows in ((odd_aspects(looks), long), (small_ones(looks), small)):
        assert mask.shape == (len(sizes),) and mask.dtype == bool
        assert mask.nonzero()[0].tolist() == rows


@pytest.mark.parametrize(
    ("images", "rare"),
    [
        ({}, []),
        ({"a": 0}, []),
        ({"a": 1}, []),
        ({"a": 100, "b": 10, "c": 11, "d": 9, "e": 1}, ["b", "d", "e"]),
        ({"a": 9, "b": 1}, []),
        ({"a": 10, "b": 1, "c": 0}, ["b"]),  # no image at all is another fault
        ({"a": 0, "b": 0}, []),
    ],
    ids=str,
)
def test_rare_classes(images: dict[str, int], rare: list[str]) -> None:
    assert rare_classes(images) == rare


# Endings


def test_each_format_that_is_read_has_endings() -> None:
    assert set(SUFFIXES) == set(FORMATS)
    assert all(SUFFIXES.values())


def test_each_ending_that_is_looked_for_is_of_some_format() -> None:
    assert frozenset().union(*SUFFIXES.values()) >= IMAGE_SUFFIXES | HEIC_SUFFIXES
    assert frozenset().union(*SUFFIXES.values()) - {".mpo"} == IMAGE_SUFFIXES | HEIC_SUFFIXES


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_right_endings(kind: str) -> None:
    for suffix in SUFFIXES[kind]:
        for name in (f"a{suffix}", f"folder.png/a.b{suffix.upper()}", f"größe\n{suffix}"):
            assert not has_wrong_suffix(name, look(kind=kind)), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "PNG"),
        ("a.png", "JPEG"),
        ("a.png.jpg", "PNG"),
        ("a.jpg", "WEBP"),
        ("a.png", "GIF"),
        ("a.jpg/png", "PNG"),
        ("a.tif", "BMP"),
        ("a.heic", "JPEG"),
        ("a", "JPEG"),
        (".jpg", "JPEG"),
    ],
)
def test_wrong_endings(name: str, kind: str) -> None:
    assert has_wrong_suffix(name, look(kind=kind))
