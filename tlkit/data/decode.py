"""One image file as an upright 8-bit colour image, or the reason why it cannot be one."""

from __future__ import annotations

import io
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from tlkit.errors import InputLost
from tlkit.shards.folder import File

# A header that claims more pixels than this is refused before a byte of it is decoded. Pillow refuses such files too,
# but only above its own limit doubled, and warns (once, without the file's name) below that.
MAX_PIXELS = 178_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd EXIF, likewise without the file's name

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"}
)
HEIC_SUFFIXES = frozenset({".heic", ".heif"})

# Pillow's names. It knows many more formats, and is not to try them: some, such as TGA, it takes almost any bytes for;
# EPS it would run; and of a text it reads every line (20 MB took 3 s) in search of yet another one.
OPENED = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "HEIF")
FORMATS = frozenset({*OPENED, "MPO"})  # which is opened as JPEG
OTHERS = {b"%!PS": "EPS", b"%PDF": "PDF", b"8BPS": "PSD", b"\0\0\1\0": "ICO", b"<svg": "SVG"}
"""How files start that are taken for images elsewhere."""
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})

IN_MEMORY = 2**28
"""Bytes of a file that is read at once; a larger one is read in parts, as its decoder asks for them."""
MAX_SCANS = 100
"""Of a JPEG, each of which is a pass over all of its pixels: encoders write about ten. Unchecked, 300 KB took 21 s."""
SCANNED = 20
"""Times that a JPEG's scans may pass over `MAX_PIXELS`: of the largest images, fewer than `MAX_SCANS` take seconds."""
MAX_SEGMENTS = 1000
"""Of a JPEG before its pixels."""
MAX_EXIF_SEGMENTS = 250
"""Of these. Pillow joins them one by one, in quadratic time: 900 took 14 s."""
MAX_COMMENTS = 1000
"""Of a PPM written as text. Pillow removes each by copying what is left: 1 MB took 11 s."""
MAX_TILE = 2**24
"""Pixels in a tile of a TIFF that is larger than its image: it is unpacked whole, 900 KB to 2 GB."""

ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Stored:
    """How a file stores an image, as far as its pixels do not tell.

    Args:
        format: One of `FORMATS`.
        mode: Pillow's name of what a pixel holds, such as ``RGB``, ``CMYK``, ``I;16``.
        width: In pixels, before EXIF turns the image.
        height: Likewise.
    """

    format: str
    mode: str
    width: int
    height: int


def heic_available() -> bool:
    """Whether HEIC photos can be read (the extra ``heic``); registers the decoder with Pillow when so."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def decode(path: File, min_side: int = 0) -> Image.Image:
    """The image alone; see `decode_stored`."""
    return decode_stored(path, min_side)[0]


def decode_stored(path: File, min_side: int = 0, *, grey: bool = False) -> tuple[Image.Image, Stored]:
    """Read an image file.

    The first frame, turned as EXIF says; transparency is laid over white; grey, palette and CMYK become RGB; more than
    8 bits a channel are scaled to 8, never clipped.

    Args:
        path: The file; its content decides the format, not its name.
        min_side: If positive, a JPEG may be decoded at a half, quarter or eighth of its size, as long as neither side
            of the result is shorter than this many pixels. That skips most of the work for photos from a camera.
        grey: Give the luminance alone; of a JPEG its colours are then not computed at all.

    Returns:
        An image of mode ``RGB``, or ``L`` if ``grey``, and how it is stored.

    Raises:
        UnreadableImage: The file is missing, empty, cut short, not an image, or claims more than `MAX_PIXELS`.
        InputLost: It lies in a shard elsewhere that does not come.
    """
    try:
        size = _refuse_other_than_file(path)
        # Opened here, not by Pillow: an uncompressed TIFF that Pillow maps into memory by its name comes out scrambled
        # where its orientation swaps the sides.
        with path.open("rb") as file:
            content = file.read() if size <= IN_MEMORY else file.read(64)
            _refuse_unknown_content(content[:64])
            if size <= IN_MEMORY:
                _refuse_endless(content)
            Image.init()
            openers = [name for name in OPENED if name in Image.OPEN]
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # for all of the process; some library may have thought otherwise
            # from memory: asked for the 2 GB that a broken length claims, a file would have them set aside first
            with Image.open(io.BytesIO(content) if size <= IN_MEMORY else file, formats=openers) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"claims {image.width} x {image.height} pixels")
                _refuse_vast_tiles(image)
                stored = Stored(image.format or "", image.mode, image.width, image.height)
                if image.format in ("JPEG", "MPO") and (min_side or grey):
                    mode = "L" if grey and image.mode == "RGB" else image.mode
                    image.draft(mode, (min_side, min_side) if min_side else image.size)
                image.load()
                found = _upright(image)
                if grey and found.mode == "L" and not found.has_transparency_data:
                    return found, stored
                found = _to_rgb(found)
                return found.convert("L") if grey else found, stored
    except (UnreadableImage, InputLost):
        raise
    except Exception as error:  # decoders raise whatever broken bytes lead them to: struct.error, KeyError, MemoryError
        raise UnreadableImage(_reason(error)) from error


def _refuse_other_than_file(path: File) -> int:
    """The size of a file in bytes; raises where it is something else."""
    status = path.stat()
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise UnreadableImage("a folder, not a file")
    if not stat.S_ISREG(mode):  # reading from a pipe or a device might never end
        raise UnreadableImage("not a regular file")
    return status.st_size


def _refuse_unknown_content(head: bytes) -> None:
    if not head:
        raise UnreadableImage("the file is empty")
    for start, name in OTHERS.items():
        if head.startswith(start):
            raise UnreadableImage(f"{name} images are not read")
    is_heic = head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and b"avif" not in head
    if is_heic and not heic_available():
        raise UnreadableImage("HEIC needs the extra 'heic' (pip install 'tlkit[heic]')")


JPEG_START = b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # what stands alone, or is a byte of the pixels, is passed over
SCAN, END = 0xDA, 0xD9


def _refuse_endless(content: bytes) -> None:
    """Raise where reading a file would take minutes: it has more of something than any encoder writes.

    Raises:
        UnreadableImage: So it is.
    """
    if content.startswith(JPEG_START):
        _refuse_endless_jpeg(content)
    elif content.startswith((b"P1", b"P2", b"P3")) and content.count(b"#") > MAX_COMMENTS:
        raise UnreadableImage(f"a PPM of more than {MAX_COMMENTS} comments")


def _refuse_endless_jpeg(content: bytes) -> None:
    place, scans, segments, exif, components, most = len(JPEG_START) - 1, 0, 0, 0, None, MAX_SCANS
    while found := MARKER.search(content, place):
        marker, at = content[found.start() + 1], found.end()
        if marker == END:
            break
        if marker == SCAN:
            scans += 1
            if content[at + 2 : at + 3] == components:  # all of its components at once: there is no other scan
                break
        elif not scans:
            segments += 1
            exif += content[at + 2 : at + 6] == b"Exif"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            components = None if marker % 4 == 2 else content[at + 7 : at + 8]  # a progressive one has further scans
            height, width = int.from_bytes(content[at + 3 : at + 5]), int.from_bytes(content[at + 5 : at + 7])
            most = min(MAX_SCANS, SCANNED * MAX_PIXELS // max(1, width * height))
        if scans > most:
            raise UnreadableImage(f"a JPEG of more than {most} scans")
        if segments > MAX_SEGMENTS or exif > MAX_EXIF_SEGMENTS:
            kind = f"{MAX_SEGMENTS} segments" if segments > MAX_SEGMENTS else f"{MAX_EXIF_SEGMENTS} segments of EXIF"
            raise UnreadableImage(f"a JPEG of more than {kind}")
        place = at + int.from_bytes(content[at : at + 2])


TILE_WIDTH, TILE_HEIGHT = 322, 323  # TIFF tags


def _refuse_vast_tiles(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TILE_WIDTH), tags.get(TILE_HEIGHT)
    if not (isinstance(width, int) and isinstance(height, int)):  # none, or nonsense that Pillow refuses
        return
    if width * height > max(MAX_TILE, 4 * image.width * image.height):
        raise UnreadableImage(f"claims tiles of {width} x {height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF beside sound pixels: the image stays as it is stored, as in any viewer
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scale_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


STRIP = 2**20
"""Pixels that are scaled at once: in 64 bits, several times, all of a large image would take gigabytes."""


def _scale_to_8_bits(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey values of more than 8 bits (H, W) mapped to 0..255 by the full range of their type, or of what they hold.

    16 bits are divided by 257. 32-bit integers and floats have no agreed white: values within [0, 1] (floats that were
    resampled may overshoot a little), 8 or 16 bits are read as such, anything else is stretched from its smallest to
    its largest value.
    """
    stored = np.asarray(image)
    strips = np.array_split(stored.reshape(-1), max(1, stored.size // STRIP))
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(strips)
    black = 0.0
    if low >= 0 and image.mode == "F" and high <= 1.05:
        white = 1.0
    elif low >= 0 and high <= 65535:
        white = 255.0 if high <= 255 else 65535.0
    else:
        black, white = low, high if high > low else low + 1.0
    scaled = np.empty(stored.size, dtype=np.uint8)
    for part, strip in zip(np.array_split(scaled, len(strips)), strips, strict=True):
        values = strip.astype(np.float64)
        values[np.isnan(values)] = low  # infinities are clipped at the end
        part[:] = ((values - black) * (255.0 / (white - black))).round().clip(0, 255)
    return scaled.reshape(stored.shape)


def _range(strips: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest finite value."""
    finite = (strip[np.isfinite(strip)] for strip in strips)
    ends = [(float(some.min()), float(some.max())) for some in finite if some.size]
    return (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (0.0, 0.0)


def _reason(error: Exception) -> str:
    """A few words, without the path: Pillow and the system would quote it as Python or C writes it."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "no permission to read it"
        case UnidentifiedImageError():
            return "not an image that can be read"
        case Image.DecompressionBombError():
            return "claims too many pixels"
        case OSError(strerror=str(strerror)):
            return strerror.lower()
    message = " ".join(str(error).split()) or type(error).__name__
    return f"broken: {message}" if len(message) < 120 else f"broken: {message[:117]}..."
