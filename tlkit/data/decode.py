"""One image file as an upright 8-bit colour image, or the reason why it cannot be one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# A header that claims more pixels than this is refused before a byte of it is decoded. Pillow refuses such files too,
# but only above its own limit doubled, and warns (once, without the file's name) below that.
MAX_PIXELS = 178_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .avif .jp2".split()
)
HEIC_SUFFIXES = frozenset({".heic", ".heif"})


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message is the reason, in a few words."""


def heic_available() -> bool:
    """Whether HEIC photos can be read (the extra ``heic``); registers the decoder with Pillow when so."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def decode(path: Path, min_side: int = 0) -> Image.Image:
    """Read an image file.

    The first frame, turned as EXIF says; transparency is laid over white; grey, palette and CMYK become RGB; more than
    8 bits a channel are scaled to 8, never clipped.

    Args:
        path: The file; its content decides the format, not its name.
        min_side: If positive, a JPEG may be decoded at a half, quarter or eighth of its size, as long as neither side
            of the result is shorter than this many pixels. That skips most of the work for photos from a camera.

    Returns:
        An image of mode ``RGB``.

    Raises:
        UnreadableImage: The file is missing, empty, cut short, not an image, or claims more than `MAX_PIXELS`.
    """
    if path.suffix.lower() in HEIC_SUFFIXES and not heic_available():
        raise UnreadableImage("HEIC needs the extra 'heic' (pip install 'tlkit[heic]')")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"claims {image.width} x {image.height} pixels")
            if min_side and image.format == "JPEG":
                image.draft(image.mode, (min_side, min_side))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise whatever broken bytes lead them to: struct.error, KeyError, MemoryError
        raise UnreadableImage(_reason(path, error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey values of more than 8 bits (H, W) mapped to 0..255 by the full range of their type, or of what they hold.

    16 bits are divided by 257. 32-bit integers and floats have no agreed white: values within [0, 1], 8 or 16 bits are
    read as such, anything else is stretched from its smallest to its largest value.
    """
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=np.finfo(np.float32).max, neginf=np.finfo(np.float32).min)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif low >= 0 and image.mode == "F" and high <= 1:
        white = 1.0
    elif low >= 0 and high <= 65535:
        white = 255.0 if high <= 255 else 65535.0
    else:
        values, white = values - low, (high - low) or 1.0
    return (values * (255.0 / white)).round().clip(0, 255).astype(np.uint8)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
    except OSError:
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return "claims too many pixels"
    message = str(error).replace(str(path), "").strip() or type(error).__name__
    return f"broken: {message}" if len(message) < 120 else f"broken: {message[:117]}..."
