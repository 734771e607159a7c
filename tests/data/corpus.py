"""Image files of every format and mode that is read, ways to break them, and what each should be decoded to.

    python tests/data/corpus.py SEED COUNT FOLDER     decodes COUNT broken files, the current one kept in FOLDER

ends with 0 where each file gave the image that Pillow's own full decode gives, or a reason where Pillow gives none.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from tlkit.data import decode as decoding
from tlkit.data.decode import FORMATS, UnreadableImage, decode, decode_stored, heic_available

ORIENTATION = 0x0112
PIXELS = 2_000_000
SECONDS = 20.0
"""A file that takes longer than this to decode ends the process, with a traceback."""


def picture(width: int = 24, height: int = 18) -> Image.Image:
    """Smooth, and different in each corner."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [60 + 180 * x, 40 + 200 * y, 128 + 100 * np.sin(6 * x + 4 * y)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # of which Pillow remembers what it was last saved as
    return file.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, interlace: int = 0, extra: bytes = b"") -> bytes:
    """A PNG file of kinds that Pillow reads but does not write; ``extra`` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and the steps, of each pass of an interlaced PNG (PNG specification, 8.2)."""


def interlaced(image: Image.Image) -> bytes:
    """An interlaced PNG of 8-bit colours."""
    values = np.asarray(image)
    parts = [values[top::down, left::across] for left, top, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png(image.width, image.height, 8, 2, rows, interlace=1)


def frames() -> dict[str, Any]:
    """Options that add two more pictures to a file."""
    return {"save_all": True, "append_images": [picture().rotate(180), picture().rotate(90)]}


def members() -> dict[str, bytes]:
    """A small file of each kind, by name."""
    colour, grey = picture(), picture().convert("L")
    alpha = colour.copy()
    alpha.putalpha(grey)
    palette = colour.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    whole = Image.fromarray(np.asarray(grey).astype(np.int32) * 1000 - 3000)
    two_bytes = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(colour).astype(int) * 257)
    found = {
        "JPEG": encoded(colour, "JPEG"),
        "JPEG progressive": encoded(colour, "JPEG", progressive=True),
        "JPEG 4:4:4 optimised": encoded(colour, "JPEG", subsampling=0, optimize=True),
        "JPEG restart markers": encoded(colour, "JPEG", restart_marker_blocks=2),
        "JPEG grey": encoded(grey, "JPEG"),
        "JPEG grey progressive": encoded(grey, "JPEG", progressive=True),
        "JPEG CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "JPEG profile and comment": encoded(colour, "JPEG", icc_profile=bytes(range(256)) * 9, comment=b"a comment"),
        "MPO": encoded(colour, "MPO", **frames()),
        "PNG 1": encoded(grey.convert("1"), "PNG"),
        "PNG L": encoded(grey, "PNG"),
        "PNG LA": encoded(alpha.convert("LA"), "PNG"),
        "PNG P": encoded(palette, "PNG"),
        "PNG P transparent": encoded(palette, "PNG", transparency=bytes([0, 128, 255])),
        "PNG RGB": encoded(colour, "PNG"),
        "PNG RGB transparent": encoded(colour, "PNG", transparency=colour.getpixel((3, 3))),
        "PNG RGBA": encoded(alpha, "PNG"),
        "PNG 16": encoded(deep, "PNG"),
        "PNG 16 RGB": png(*colour.size, 16, 2, two_bytes),
        "PNG interlaced": interlaced(colour),
        "PNG animated": encoded(colour, "PNG", **frames()),
        "PNG text": png(1, 1, 8, 0, b"\0\7", extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"words " * 99))),
        "WebP": encoded(colour, "WEBP"),
        "WebP lossless": encoded(colour, "WEBP", lossless=True),
        "WebP alpha": encoded(alpha, "WEBP"),
        "WebP animated": encoded(colour, "WEBP", **frames()),
        "TIFF": encoded(colour, "TIFF"),
        "TIFF LZW": encoded(colour, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encoded(alpha, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": encoded(colour, "TIFF", compression="jpeg"),
        "TIFF packed bits": encoded(grey, "TIFF", compression="packbits"),
        "TIFF fax": encoded(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF big": encoded(colour, "TIFF", big_tiff=True),
        "TIFF P": encoded(palette, "TIFF"),
        "TIFF CMYK": encoded(colour.convert("CMYK"), "TIFF"),
        "TIFF 16": encoded(deep, "TIFF"),
        "TIFF 32": encoded(whole, "TIFF"),
        "TIFF float": encoded(real, "TIFF"),
        "TIFF float LZW": encoded(real, "TIFF", compression="tiff_lzw"),
        "TIFF pages": encoded(colour, "TIFF", **frames()),
        "GIF": encoded(palette, "GIF"),
        "GIF transparent": encoded(palette, "GIF", transparency=2),
        "GIF animated": encoded(palette, "GIF", **frames()),
        "BMP": encoded(colour, "BMP"),
        "BMP P": encoded(palette, "BMP"),
        "BMP 1": encoded(grey.convert("1"), "BMP"),
        "DIB": encoded(colour, "DIB"),
        "PPM": encoded(colour, "PPM"),
        "PGM": encoded(grey, "PPM"),
        "PBM": encoded(grey.convert("1"), "PPM"),
        "JPEG2000": encoded(colour, "JPEG2000"),
        "JPEG2000 lossless 16": encoded(deep, "JPEG2000", irreversible=False),
    }
    for orientation in range(1, 9):
        found[f"JPEG turned {orientation}"] = encoded(colour, "JPEG", exif=oriented(orientation))
    for kind in ("PNG", "WEBP", "TIFF"):
        found[f"{kind} turned"] = encoded(colour, kind, exif=oriented(6))
    if features.check("avif"):
        found["AVIF"] = encoded(colour, "AVIF")
    if heic_available():
        found["HEIC"] = encoded(colour, "HEIF", exif=oriented(8))
    return found


def reference(content: bytes) -> np.ndarray:
    """What a file is to be decoded to, by Pillow's own full decode: (H, W, 3), 8 bits, upright, over white.

    Raises whatever Pillow raises, and `UnreadableImage` for what is not to be read at all.
    """
    with Image.open(io.BytesIO(content)) as image:
        if image.format not in FORMATS or image.width * image.height > decoding.MAX_PIXELS:
            raise UnreadableImage
        image.load()
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
        except Exception:  # broken metadata do not cost a sound picture
            orientation = 1
        if image.mode[0] in "IF":
            values = _to_8_bits(np.asarray(image).astype(np.float64), image.mode)
            values = np.repeat(values[..., None], 3, -1)
        elif image.has_transparency_data:
            layers = np.asarray(image.convert("RGBA")).astype(np.float64)
            cover = layers[..., 3:] / 255
            values = (layers[..., :3] * cover + 255 * (1 - cover)).round()
        else:
            values = np.asarray(image.convert("RGB"))
    return _upright(values, orientation)


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.where(np.isnan(values), low, values)
    if mode.startswith("I;16"):
        values = values / 257
    elif low >= 0 and mode == "F" and high <= 1.05:
        values = values * 255
    elif low >= 0 and high <= 65535:
        values = values if high <= 255 else values / 257
    else:
        values = (values - low) * (255 / ((high - low) or 1))
    return values.round().clip(0, 255)


def _upright(values: np.ndarray, orientation: Any) -> np.ndarray:
    """The pixels as EXIF says that they are to be seen (EXIF 2.32, tag 274)."""
    turns: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda stored: stored[:, ::-1],
        3: lambda stored: stored[::-1, ::-1],
        4: lambda stored: stored[::-1],
        5: lambda stored: stored.swapaxes(0, 1),
        6: lambda stored: np.rot90(stored, -1),
        7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
        8: lambda stored: np.rot90(stored, 1),
    }
    return turns[orientation](values) if orientation in turns else values


EXTREMES = (0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def broken(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with some of its bytes changed, lost, repeated, or taken from another one."""
    made = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, length = rng.randrange(len(made)), rng.randint(1, 40)
        match rng.choice(
            ["flip", "flip", "number", "number", "cut", "end", "insert", "zero", "repeat", "head", "splice"]
        ):
            case "flip":
                for _ in range(rng.randint(1, 8)):
                    made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
            case "number":
                size, order = rng.choice([1, 2, 4]), rng.choice(["big", "little"])
                value = rng.choice(EXTREMES) % 256**size
                made[at : at + size] = value.to_bytes(size, order)
            case "cut":
                del made[at : at + length]
            case "end":
                del made[at:]
            case "insert":
                made[at:at] = rng.randbytes(length)
            case "zero":
                made[at : at + length] = bytes(len(made[at : at + length]))
            case "repeat":
                made[at:at] = made[at : at + length] * rng.randint(1, 20)
            case "head":
                made[rng.randrange(min(64, len(made)))] = rng.randrange(256)
            case "splice":
                other = rng.choice(others)
                made[at:] = other[rng.randrange(len(other)) :]
        if not made:
            return b""
    return with_checksums(bytes(made)) if made.startswith(b"\x89PNG") and rng.random() < 0.5 else bytes(made)


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums that belong to them, so that more than these is looked at."""
    parts, place = [content[:8]], 8
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4])
        body = content[place + 4 : place + 8 + length]
        parts += [content[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join(parts)


def disagreement(path: Path, content: bytes) -> str | None:
    """What is wrong with how a file is decoded; None where nothing is, `read` or `refused`."""
    try:
        wanted = reference(content)
    except Exception:
        wanted = None
    found: list[Any] = []
    for ask in (lambda: decode(path), lambda: decode(path, min_side=4), lambda: decode_stored(path, grey=True)[0]):
        try:
            found.append(ask())
        except UnreadableImage as error:
            reason = str(error)
            if not 0 < len(reason) < 140 or "\n" in reason or str(path) in reason:
                return f"a reason that is not one: {reason!r}"
            found.append(None)
    if len({image is None for image in found}) > 1:
        return f"at full scale, reduced and grey: {found}"
    if (found[0] is None) != (wanted is None):
        return (
            f"Pillow {'raises' if wanted is None else 'reads it'}, tlkit {'refuses' if found[0] is None else 'reads'}"
        )
    if wanted is None:
        return None
    if [image.mode for image in found] != ["RGB", "RGB", "L"]:
        return f"modes {[image.mode for image in found]}"
    full = np.asarray(found[0]).astype(float)
    if full.shape != wanted.shape or np.abs(full - wanted).max() > 1:
        return "another image than Pillow's"
    luminance = np.asarray(Image.fromarray(np.asarray(found[0])).convert("L")).astype(float)
    if np.asarray(found[2]).shape != luminance.shape:
        return "a grey image of another size"
    return None


def broken_files(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Name of the kind, and the bytes, of each of ``count`` broken files."""
    kinds = members()
    names, others = list(kinds), list(kinds.values())
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(names)
        yield name, broken(kinds[name], others, rng)


def fuzz(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Decode broken files, and say how many were read and refused, and what went wrong.

    The limit on pixels is lowered: 600 bytes that claim 75 million of them are read as Pillow reads them, in 6 s.
    """
    decoding.MAX_PIXELS = PIXELS
    path, kept = folder / "current", folder / "kept"
    tally: Counter[str] = Counter()
    wrong, slowest = [], (0.0, "")
    for number, (name, content) in enumerate(broken_files(seed, count)):
        path.write_bytes(content)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        began = time.monotonic()
        problem = disagreement(path, content)
        slowest = max(slowest, (round(time.monotonic() - began, 3), f"{name}, file {number}"))
        if problem is not None:
            kept.mkdir(exist_ok=True)
            (kept / str(number)).write_bytes(content)
            wrong.append(f"{name}, file {number}: {problem}")
        try:
            decode(path)
            tally[f"{name.split()[0]} read"] += 1
        except UnreadableImage:
            tally[f"{name.split()[0]} refused"] += 1
        faulthandler.cancel_dump_traceback_later()
    return {"seed": seed, "files": count, "slowest": slowest, "tally": dict(sorted(tally.items())), "wrong": wrong}


if __name__ == "__main__":
    told = fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(told))
    sys.exit(1 if told["wrong"] else 0)
