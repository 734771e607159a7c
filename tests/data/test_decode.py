"""Decoding: formats, modes, orientations, reduced scale; whatever is broken is named, and nothing else is raised."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, features

from tlkit.data.decode import MAX_PIXELS, UnreadableImage, decode, heic_available

# what decode.py switches off, pytest switches on again
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

ORIENTATION = 0x0112


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth, and different in each corner."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [60 + 180 * x, 40 + 200 * y, 128 + 100 * np.sin(6 * x + 4 * y)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """With detail at every scale, as in a photo, so that resizing has something to lose."""
    rng = np.random.default_rng(0)
    total = np.asarray(picture(width, height), dtype=np.float32)
    for cells in (8, 32, 128):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += 0.2 * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) - 25
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of kinds that Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(path: Path, min_side: int = 0) -> np.ndarray:
    image = decode(path, min_side)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(path: Path) -> str:
    """Why a file is refused: short, one line, and without the path, which the caller prints before it."""
    with pytest.raises(UnreadableImage) as caught:
        decode(path, min_side=64)
    message = str(caught.value)
    assert 0 < len(message) < 140 and "\n" not in message
    for name in (str(path), repr(str(path)), path.name, repr(path.name)[1:-1]):
        assert name not in message
    return message


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Formats and modes


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("PPM", {}),
        ("JPEG2000", {"irreversible": False}),
    ],
    ids=str,
)
def test_lossless_formats_give_back_what_was_saved(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "x", encoded(picture(), kind, **options))
    assert np.array_equal(pixels(path), np.asarray(picture()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "quality": 30}),
        ("JPEG", {"subsampling": 0, "optimize": True}),
        ("WEBP", {}),
        ("TIFF", {"compression": "jpeg"}),
        ("GIF", {}),
        pytest.param("AVIF", {}, marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
    ],
    ids=str,
)
def test_lossy_formats_are_as_pillow_reads_them(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "x", encoded(picture(), kind, **options))
    assert np.array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))
    assert np.abs(pixels(path) - np.asarray(picture())).mean() < 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_the_first_of_several_frames(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    path = written(tmp_path / "x.jpg", content)
    assert getattr(Image.open(path), "n_frames", 1) == 3
    assert pixels(path).shape == (10, 20, 3)
    assert np.abs(pixels(path) - [255, 0, 0]).max() <= 2


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_grey(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x", encoded(Image.fromarray(GREY), kind))
    assert np.array_equal(pixels(path), np.repeat(GREY[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_one_bit(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x", encoded(Image.fromarray(GREY > 100), kind))
    assert np.array_equal(pixels(path)[..., 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette(kind: str, tmp_path: Path) -> None:
    image = picture().quantize(32)
    path = written(tmp_path / "x", encoded(image, kind))
    assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    path = written(tmp_path / "x", encoded(image, kind, transparency=1))
    assert pixels(path).tolist() == [[[200, 0, 0], [255, 255, 255]], [[0, 0, 200], [255, 255, 255]]]


def test_a_palette_with_an_opacity_for_each_entry(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    path = written(tmp_path / "x.png", encoded(image, "PNG", transparency=bytes([255, 128, 0])))
    over_white = [[200, 0, 0], [127, 227, 127], [255, 255, 255]]
    assert np.abs(pixels(path)[0] - over_white).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(kind: str, mode: str, tmp_path: Path) -> None:
    alpha = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    colours = [GREY, GREY[::-1], GREY.T] if mode == "RGBA" else [GREY]
    image = Image.fromarray(np.stack([*colours, alpha], -1), mode)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = written(tmp_path / "x", encoded(image, kind, **options))
    cover = alpha[..., None] / 255
    expected = np.stack([*colours] * (1 if mode == "RGBA" else 3), -1) * cover + 255 * (1 - cover)
    assert np.abs(pixels(path) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (255, 0, 0)), ("L", 7)])
def test_a_colour_declared_transparent_becomes_white(mode: str, clear: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 2), clear)
    path = written(tmp_path / "x.png", encoded(image, "PNG", transparency=clear))
    assert (pixels(path) == 255).all()


def test_cmyk_tiff(tmp_path: Path) -> None:
    ink = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    path = written(tmp_path / "x.tif", encoded(Image.fromarray(ink, "CMYK"), "TIFF"))
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    assert np.abs(pixels(path) - expected).max() <= 1


@pytest.mark.parametrize("min_side", [0, 16])
def test_cmyk_jpeg(min_side: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", encoded(picture(64, 64).convert("CMYK"), "JPEG", quality=95))
    expected = np.asarray(picture(64, 64).resize(decode(path, min_side).size, Image.Resampling.BOX))
    assert np.abs(pixels(path, min_side) - expected).mean() < 3


# More than 8 bits a channel: 65535 is white, 32896 = 128 * 257 is 128

DEEP = np.array([[0, 257, 32896], [65535, 300, 12345]], dtype=np.uint16)
DEEP_IN_8_BITS = [[0, 1, 128], [255, 1, 48]]


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("I;16", "PNG", {}),
        ("I;16", "TIFF", {}),
        ("I;16", "TIFF", {"compression": "tiff_lzw"}),
        ("I;16B", "TIFF", {}),
        ("I;16B", "TIFF", {"compression": "tiff_lzw"}),
        ("I", "TIFF", {}),
        ("I;16", "JPEG2000", {"irreversible": False}),
    ],
    ids=str,
)
def test_16_bit_grey_is_scaled(mode: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    stored = DEEP.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    image = Image.frombytes(mode, (3, 2), stored.tobytes())
    path = written(tmp_path / "x", encoded(image, kind, **options))
    assert pixels(path).tolist() == [[[v] * 3 for v in row] for row in DEEP_IN_8_BITS]


def test_a_dark_16_bit_image_stays_dark(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", encoded(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)), "PNG"))
    assert (pixels(path) == 1).all()


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_16_bit_png_of_several_channels_is_scaled(colour: int, channels: int, tmp_path: Path) -> None:
    values = np.repeat(DEEP[..., None], channels, -1).astype(">u2")
    if channels % 2 == 0:
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path = written(tmp_path / "x.png", png(3, 2, 16, colour, rows))
    assert np.abs(pixels(path) - np.array(DEEP_IN_8_BITS)[..., None]).max() <= 1  # Pillow drops the low byte here


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 0.5, 1.04], [0, 128, 255]),  # resampling overshoots
        ([0, 0, 0], [0, 0, 0]),
        ([0, 128, 255], [0, 128, 255]),
        ([0, 32896, 65535], [0, 128, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 1e6, 2e6], [0, 128, 255]),
        ([-7, -7, -7], [0, 0, 0]),
        ([-3e38, 0, 3e38], [0, 128, 255]),
        ([0, 0.5, np.inf], [0, 128, 255]),
        ([-np.inf, 0.5, 1], [0, 128, 255]),
        ([np.nan, 0.5, 0], [0, 128, 0]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
    ids=str,
)
def test_float_tiff(values: list[float], expected: list[int], tmp_path: Path) -> None:
    path = written(tmp_path / "x.tif", encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert pixels(path)[0, :, 0].tolist() == expected


def test_32_bit_integers_are_stretched(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    path = written(tmp_path / "x.tif", encoded(image, "TIFF"))
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]


# Orientation


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores so that ``orientation`` shows them upright (EXIF 2.32, tag 274)."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options", "mode"),
    [
        *[("PNG", {}, mode) for mode in ("L", "RGB", "RGBA", "P", "I;16")],
        *[("WEBP", {"lossless": True}, mode) for mode in ("RGB", "RGBA")],
        *[("TIFF", {}, mode) for mode in ("L", "RGB", "RGBA", "P", "CMYK", "I;16", "F")],
        *[("TIFF", {"compression": "tiff_lzw"}, mode) for mode in ("L", "RGB", "RGBA", "P", "CMYK", "I;16", "F")],
    ],
    ids=str,
)
def test_all_orientations_are_shown_upright(
    orientation: int, kind: str, options: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    stored = as_stored(grey, orientation)
    image = Image.fromarray(stored.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    path = written(tmp_path / "x", encoded(image, kind, exif=oriented(orientation), **options))
    assert np.array_equal(pixels(path)[..., 0], grey)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("min_side", [0, 100, 50], ids=["full", "half", "quarter"])
def test_all_orientations_of_jpeg_also_at_reduced_scale(orientation: int, min_side: int, tmp_path: Path) -> None:
    upright = picture(320, 200)
    stored = Image.fromarray(np.ascontiguousarray(as_stored(np.asarray(upright), orientation)))
    path = written(tmp_path / "x.jpg", encoded(stored, "JPEG", quality=95, exif=oriented(orientation)))
    found = decode(path, min_side)
    scale = {0: 1, 100: 2, 50: 4}[min_side]
    assert found.size == (320 // scale, 200 // scale)
    expected = np.asarray(upright.resize(found.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(found) - expected).mean() < 2


def exif_junk() -> list[bytes]:
    """Tags as broken as they are found in the wild: bad header, bad types, counts beyond the end, cut short."""
    exif = oriented(6)
    exif[271], exif[306] = "Maker", "2020:01:01 00:00:00"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0hello"
    sound, rng = exif.tobytes()[6:], random.Random(0)
    junk = [b"", b"junk" * 5, sound[:10], sound[:30], b"II*\0\x08\0\0\0\xff\xff"]
    for _ in range(100):
        broken = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice([0, 255, rng.randrange(256)])
        junk.append(bytes(broken))
    return junk


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_broken_exif_does_not_cost_a_sound_photo(kind: str, tmp_path: Path) -> None:
    for junk in exif_junk():
        content = encoded(picture(), kind, exif=b"Exif\0\0" + junk)
        assert sorted(decode(written(tmp_path / "x.jpg", content)).size) == [32, 48]


def test_odd_exif_prints_no_warning_that_names_no_file(tmp_path: Path) -> None:
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    path = written(tmp_path / "x.jpg", content)
    code = "import sys, pathlib; from tlkit.data.decode import decode; decode(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# Reduced scale


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize("min_side", [1, 50, 100, 101, 150, 224, 399, 400, 401, 800, 801, 5000])
def test_neither_side_gets_shorter_than_asked(kind: str, min_side: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", encoded(Image.new("RGB", (1203, 801)), kind))
    size = decode(path, min_side).size
    scale = next(scale for scale in (8, 4, 2, 1) if scale == 1 or 801 // scale >= min_side)
    assert size == (-(-1203 // scale), -(-801 // scale))
    assert min(size) >= min(min_side, 801)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("side", [100, 256])
def test_reduced_decoding_looks_the_same_after_resizing(options: dict[str, Any], side: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", encoded(photo(2000, 1500), "JPEG", quality=90, **options))
    reduced = decode(path, side)
    assert reduced.size == {100: (250, 188), 256: (500, 375)}[side]
    target = (side * 4 // 3, side)
    full = np.asarray(decode(path).resize(target, Image.Resampling.BICUBIC)).astype(int)
    assert full.std() > 30
    assert np.abs(np.asarray(reduced.resize(target, Image.Resampling.BICUBIC)) - full).mean() < 2


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_reduced_decoding_of_real_photos(name: str) -> None:
    path = Path(sklearn.datasets.__file__).parent / "images" / name
    target, reduced = (225, 150), decode(path, 150)
    assert decode(path).size == (640, 427) and reduced.size == (320, 214)
    full = np.asarray(decode(path).resize(target, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(reduced.resize(target, Image.Resampling.BICUBIC)) - full).mean() < 4


def test_other_formats_are_read_at_full_size(tmp_path: Path) -> None:
    assert decode(written(tmp_path / "x.jpg", encoded(picture(640, 480), "PNG")), min_side=8).size == (640, 480)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_odd_sizes(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    assert decode(written(tmp_path / "x", encoded(Image.new("RGB", size), kind)), min_side=224).size == size


# Names

NAMES = [
    "größe 图片.jpg",
    "🐱.jpg",
    "a\nb\tc.jpg",
    " spaces  .jpg",
    "'\"%s{}.jpg",
    "-rf.jpg",
    "x" * 251 + ".jpg",
    "none",
]
UNDECODABLE = os.fsdecode(b"caf\xe9\xff.jpg")


@pytest.mark.parametrize("name", [*NAMES, UNDECODABLE], ids=ascii)
def test_any_name(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, encoded(picture(), "JPEG"))
    assert decode(path).size == (48, 32)
    written(path, encoded(picture(), "JPEG")[:300])
    assert reason(path)
    written(path, b"text")
    assert reason(path) == "not an image that can be read"
    path.unlink()
    assert reason(path) == "no such file"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("suffix", [".jpg", ".heic", ".txt", ""])
def test_content_decides_not_the_name(kind: str, suffix: str, tmp_path: Path) -> None:
    assert decode(written(tmp_path / f"x{suffix}", encoded(picture(), kind))).size == (48, 32)


# Bad files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"just text, called a photo\n" * 20, "not an image that can be read"),
        (b"\0" * 5000, "not an image that can be read"),
        (b"\xff\xd8\xff", "not an image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "not an image that can be read"),
        (b"GIF89a", "not an image that can be read"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "EPS images are not read"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(50), "not an image that can be read"),
    ],
    ids=["zero bytes", "text", "zeros", "JPEG start", "PNG start", "GIF start", "HTML", "PostScript", "video"],
)
def test_files_that_are_no_images(content: bytes, expected: str, tmp_path: Path) -> None:
    assert reason(written(tmp_path / "x.jpg", content)) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_truncated_files(kind: str, share: float, tmp_path: Path) -> None:
    content = encoded(photo(96, 64), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    path = written(tmp_path / "x", content[: int(share * len(content))])
    assert reason(path)


@pytest.mark.parametrize("side", [40_000, 100_000, 2**31 - 1])
def test_pixel_bombs_are_refused_by_their_header(side: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", png(side, side, 8, 2, bytes(100)))
    assert path.stat().st_size < 200
    assert reason(path) == "claims too many pixels"  # not "truncated": no pixel was asked for


def test_the_limit_is_ours_where_pillow_is_more_patient(tmp_path: Path) -> None:
    width = 13_350
    assert MAX_PIXELS < width * width < 2 * (Image.MAX_IMAGE_PIXELS or 0)
    assert reason(written(tmp_path / "x.png", png(width, width, 8, 2, bytes(100)))) == "claims 13350 x 13350 pixels"


def test_folders_links_pipes_and_devices(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "a folder, not a file"
    assert reason(tmp_path / "missing.jpg") == "no such file"
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    assert reason(tmp_path / "dangling.jpg") == "no such file"
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    assert reason(tmp_path / "circle.jpg") == "too many levels of symbolic links"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    assert reason(tmp_path / "endless.jpg") == "not a regular file"
    assert reason(tmp_path / ("y" * 300)) == "file name too long"
    assert reason(tmp_path / "folder.jpg" / "x" / "y.jpg") == "no such file"
    assert "null" in reason(tmp_path / "a\0b.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", encoded(picture(), "JPEG"))
    path.chmod(0)
    assert reason(path) == "no permission to read it"


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), OSError(5, "no", "p"), KeyError("k")], ids=repr
)
def test_whatever_a_decoder_raises_becomes_a_reason(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = written(tmp_path / "x.png", encoded(picture().convert("L"), "PNG"))
    monkeypatch.setattr(Image.Image, "convert", fail)
    assert reason(path)


# HEIC


def heic(orientation: int = 1) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    stored = Image.fromarray(np.ascontiguousarray(as_stored(np.asarray(picture()), orientation)))
    return encoded(stored, "HEIF", quality=95, exif=oriented(orientation).tobytes())


@pytest.mark.parametrize("name", ["x.heic", "x.HEIF", "x.jpg", "x"])
def test_heic_by_its_content(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, heic())
    assert np.abs(pixels(path) - np.asarray(picture())).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.heic", heic(orientation))
    assert np.abs(pixels(path) - np.asarray(picture())).mean() < 4


@pytest.mark.parametrize("name", ["x.heic", "x.jpg"])
def test_heic_without_the_extra_names_the_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / name, heic())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not heic_available()
    assert reason(path) == "HEIC needs the extra 'heic' (pip install 'tlkit[heic]')"
    assert decode(written(tmp_path / "y.heic", encoded(picture(), "JPEG"))).size == (48, 32), "a JPEG by another name"


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert decode(written(tmp_path / "x.avif", encoded(picture(), "AVIF"))).size == (48, 32)


# The user's files, and bytes that nobody foresaw


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "broken"])
def test_files_are_never_modified(kind: str, tmp_path: Path) -> None:
    content = b"\xff\xd8\xffbroken" if kind == "broken" else encoded(picture(), kind)
    path = written(tmp_path / "x.jpg", content)
    path.chmod(0o444)
    before = path.stat()
    try:
        decode(path, min_side=8)
    except UnreadableImage:
        assert kind == "broken"
    after = path.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (before.st_mtime_ns, before.st_mode, before.st_size)
    assert path.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["x.jpg"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    broken = bytearray(content)
    match rng.choice(["flip", "flip", "cut", "insert", "zero", "header"]):
        case "flip":
            for _ in range(rng.randint(1, 20)):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        case "cut":
            start = rng.randrange(len(broken))
            del broken[start : start + rng.randint(1, len(broken))]
        case "insert":
            at = rng.randrange(len(broken))
            broken[at:at] = rng.randbytes(rng.randint(1, 50))
        case "zero":
            at = rng.randrange(len(broken))
            broken[at : at + 30] = bytes(len(broken[at : at + 30]))
        case "header":
            broken[rng.randrange(min(64, len(broken)))] = rng.randrange(256)
    return bytes(broken)


SEEDS: dict[str, dict[str, Any]] = {
    "JPEG": {"exif": oriented(6).tobytes()},
    "PNG": {"exif": oriented(8).tobytes()},
    "GIF": {"save_all": True, "append_images": [picture(20, 20)]},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {},
    "BMP": {},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_files_give_an_image_or_a_reason(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, rng = encoded(picture(), kind, **SEEDS[kind]), random.Random(kind)
    read = refused = 0
    for _ in range(60):
        path = written(tmp_path / "x.jpg", mutated(content, rng))
        try:
            image = decode(path, min_side=16)
        except UnreadableImage as error:
            refused += 1
            assert 0 < len(str(error)) < 140 and "\n" not in str(error) and str(tmp_path) not in str(error)
        else:
            read += 1
            assert image.mode == "RGB" and image.getpixel((0, 0))
    assert read + refused == 60 and refused
    printed = capfd.readouterr()
    assert printed.out == ""
    assert kind == "TIFF" or printed.err == "", "only libtiff complains elsewhere than in the reason"
