"""Every format and mode, whole and broken: decoded as by Pillow's own full decode, or refused with a reason."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from tlkit.data.decode import FORMATS, UnreadableImage, decode, decode_stored
from tlkit.data.transforms import View
from tlkit.evaluation.views import VIEWS
from tlkit.preprocessing import Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_each_kind_is_decoded_as_by_pillow(corpus: ModuleType, tmp_path: Path) -> None:
    kinds = corpus.members()
    assert len(kinds) > 60
    seen = set()
    for name, content in kinds.items():
        path = written(tmp_path / "x", content)
        assert corpus.disagreement(path, content) is None, name
        stored = decode_stored(path)[1]
        seen.add(stored.format)
        with Image.open(path) as image:
            assert (stored.format, stored.mode, stored.width, stored.height) == (image.format, image.mode, *image.size)
    missing = FORMATS - seen
    assert missing <= {"AVIF", "HEIF"}, "only what is not installed"


def test_the_reference_is_the_picture_itself(corpus: ModuleType) -> None:
    """What all is compared with does what it says: upright, in colours, over white."""
    picture = np.asarray(corpus.picture()).astype(int)
    kinds = corpus.members()
    for name in ("PNG RGB", "PNG interlaced", "PNG 16 RGB", "TIFF LZW", "TIFF big", "WebP lossless", "BMP", "PPM"):
        assert np.array_equal(corpus.reference(kinds[name]), picture), name
    assert np.abs(corpus.reference(kinds["JPEG"]) - picture).mean() < 6
    assert np.array_equal(corpus.reference(kinds["PNG turned"]), np.rot90(picture, -1))
    grey = np.asarray(corpus.picture().convert("L"))
    for name in ("PNG L", "PNG 16", "TIFF 16", "TIFF float", "PGM"):
        assert np.abs(corpus.reference(kinds[name])[..., 0] - grey).max() <= 1, name


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_each_kind_cut_short(corpus: ModuleType, share: float, tmp_path: Path) -> None:
    for name, content in corpus.members().items():
        short = content[: int(share * len(content))]
        assert corpus.disagreement(written(tmp_path / "x", short), short) is None, name


def test_each_kind_under_the_name_of_another(corpus: ModuleType, tmp_path: Path) -> None:
    for content in corpus.members().values():
        sizes = {decode(written(tmp_path / name, content)).size for name in ("x.jpg", "x.png", "x.tiff", "x.heic", "x")}
        assert len(sizes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_ten_thousand_broken_files(corpus: ModuleType, seed: int, tmp_path: Path) -> None:
    """In a process of its own, with 4 GiB: what crashes, or takes more than seconds, ends it."""
    done = subprocess.run(
        [sys.executable, corpus.__file__, str(seed), "10000", str(tmp_path)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=500,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}; the file is {tmp_path / 'current'}"
    told = corpus.json.loads(done.stdout)
    assert not told["wrong"] and told["slowest"][0] < 5
    for kind in ("JPEG", "PNG", "TIFF", "WebP", "GIF", "BMP"):
        assert min(told["tally"][f"{kind} read"], told["tally"][f"{kind} refused"]) > 20, "both are tried"


def test_a_seed_gives_the_same_files(corpus: ModuleType) -> None:
    one, two = (list(corpus.broken_files(3, 40)) for _ in range(2))
    assert one == two != list(corpus.broken_files(4, 40))


def test_a_wrong_picture_is_noticed(corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: by a decoder that forgets to turn, one that reads all, one that raises."""
    kinds = corpus.members()

    def problem(name: str, content: bytes | None = None) -> str | None:
        path = written(tmp_path / "x", kinds[name] if content is None else content)
        return corpus.disagreement(path, path.read_bytes())

    monkeypatch.setattr("tlkit.data.decode._upright", lambda image: image)
    assert problem("JPEG") is None and "another image" in problem("JPEG turned 3")
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(corpus, "reference", lambda content: 1 / 0)
    assert "Pillow raises" in problem("JPEG")


# Files made to take long, or much memory


def test_a_jpeg_of_thousands_of_scans(corpus: ModuleType, tmp_path: Path) -> None:
    content = corpus.encoded(Image.new("L", (400, 400), 128), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    many = content[:-2] + last * 3000 + content[-2:]
    with pytest.raises(UnreadableImage, match="a JPEG of more than 100 scans"):
        decode(written(tmp_path / "x.jpg", many))
    few = content[:-2] + last * 5 + content[-2:]
    assert corpus.disagreement(written(tmp_path / "x.jpg", few), few) is None


def test_what_follows_a_jpeg_does_not_count_as_scans(corpus: ModuleType, tmp_path: Path) -> None:
    """Phones append a film, whose bytes look like any marker somewhere; so do makers' notes before the pixels."""
    for options in ({}, {"progressive": True}):
        content = corpus.encoded(corpus.picture(64, 48), "JPEG", **options)
        noise = random.Random(0).randbytes(3_000_000) + b"\xff\xda" * 200
        note = b"".join(b"\xff\xe3" + struct.pack(">H", 2002) + b"\xff\xda" * 1000 for _ in range(20))
        whole = content[:2] + note + content[2:] + noise
        assert corpus.disagreement(written(tmp_path / "x.jpg", whole), whole) is None
        assert decode(tmp_path / "x.jpg").size == (64, 48)


def test_a_jpeg_of_thousands_of_segments(corpus: ModuleType, tmp_path: Path) -> None:
    content = corpus.members()["JPEG"]
    segment = b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0xx"
    sound = content[:2] + segment * 200 + content[2:]
    assert decode(written(tmp_path / "x.jpg", sound)).size == (24, 18)
    with pytest.raises(UnreadableImage, match="more than 250 segments of EXIF"):
        decode(written(tmp_path / "x.jpg", content[:2] + segment * 5000 + content[2:]))
    note = b"\xff\xe3" + struct.pack(">H", 10) + b"anything"
    assert decode(written(tmp_path / "x.jpg", content[:2] + note * 900 + content[2:])).size == (24, 18)
    with pytest.raises(UnreadableImage, match="more than 1000 segments"):
        decode(written(tmp_path / "x.jpg", content[:2] + note * 5000 + content[2:]))


def test_a_marker_without_a_length_does_not_hide_what_follows(corpus: ModuleType, tmp_path: Path) -> None:
    content = corpus.encoded(Image.new("L", (400, 400), 128), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    alone = b"\xff\x01\xff\xff"  # were it a segment, its length would lead behind all the scans
    with pytest.raises(UnreadableImage, match="more than 100 scans"):
        decode(written(tmp_path / "x.jpg", content[:2] + alone + content[2:-2] + last * 3000 + content[-2:]))


def test_a_ppm_of_comments(corpus: ModuleType, tmp_path: Path) -> None:
    few = b"P2 2 1 255\n" + b"# made by hand\n" * 100 + b"0 255\n"
    assert decode(written(tmp_path / "x.pgm", few)).getpixel((1, 0)) == (255, 255, 255)
    with pytest.raises(UnreadableImage, match="a PPM of more than 1000 comments"):
        decode(written(tmp_path / "x.pgm", b"P2 2 1 255\n" + b"#\n" * 500_000 + b"0 255\n"))


def test_a_tiff_of_one_vast_tile(tmp_path: Path) -> None:
    """A tile is unpacked whole, however small the image is of which it is the only one."""
    entries = [(256, 3, 8), (257, 3, 8), (258, 3, 8), (259, 3, 5), (262, 3, 1), (277, 3, 1), (322, 3, 48_000)]
    entries += [(323, 3, 48_000), (324, 4, 200), (325, 4, 8)]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in entries
    )
    content = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    with pytest.raises(UnreadableImage, match="claims tiles of 48000 x 48000 pixels"):
        decode(written(tmp_path / "x.tif", content.ljust(200, b"\0") + b"\x80\0\1\1\1\1\1\1"))


def test_a_library_that_lets_truncated_images_pass(corpus: ModuleType, tmp_path: Path) -> None:
    content = corpus.encoded(corpus.picture(64, 48), "JPEG")
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with pytest.raises(UnreadableImage, match=r"(?i)truncated"):
            decode(written(tmp_path / "x.jpg", content[: len(content) // 2]))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def test_no_other_format_of_pillow_is_tried(tmp_path: Path) -> None:
    """FLI, TGA, SPIDER and others take nearly any bytes for an image."""
    path = tmp_path / "x.jpg"
    Image.new("RGB", (4, 3), "red").save(path, format="TGA")
    with pytest.raises(UnreadableImage, match="not an image that can be read"):
        decode(path)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_a_gigabyte(name: bytes, corpus: ModuleType, tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**24)) for _ in range(16)) + packer.flush()
    start = b"k\0\1\0\0\0" if name == b"iTXt" else b"k\0\0"
    content = corpus.png(2, 1, 8, 2, bytes(7), extra=corpus.chunk(name, start + packed))
    with pytest.raises(UnreadableImage, match="too large"):
        decode(written(tmp_path / "x.png", content))


def test_megabytes_of_metadata_do_not_cost_a_picture(corpus: ModuleType, tmp_path: Path) -> None:
    junk = b"II*\0\x08\0\0\0" + b"\xff" * 5_000_000
    extra = corpus.chunk(b"eXIf", junk) + corpus.chunk(b"tEXt", b"k\0" + b"a" * 5_000_000)
    assert decode(written(tmp_path / "x.png", corpus.png(2, 1, 8, 2, bytes(7), extra=extra))).size == (2, 1)
    content = corpus.members()["JPEG"]
    profile = b"\xff\xe2" + struct.pack(">H", 65533) + b"ICC_PROFILE\0\1\1" + bytes(65517)
    assert decode(written(tmp_path / "x.jpg", content[:2] + profile * 100 + content[2:])).size == (24, 18)


PEAK = """
import re, sys
from pathlib import Path
from tlkit.data.decode import decode
def peak():  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
decode(Path(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(("depth", "colour", "most"), [(16, 0, 9), (8, 2, 6), (8, 6, 14)], ids=["16", "RGB", "RGBA"])
def test_memory_for_each_pixel(depth: int, colour: int, most: int, corpus: ModuleType, tmp_path: Path) -> None:
    """Bytes a pixel at the peak: what Pillow takes for the image and its RGB copy, and no float64 of all of it."""
    side, sample = 5000, {0: 1, 2: 3, 6: 4}[colour] * depth // 8
    content = corpus.png(side, side, depth, colour, (b"\0" + bytes(side * sample)) * side)
    path = written(tmp_path / "x.png", content)
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert 0.5 * most * side * side < int(done.stdout) < most * side * side


# Shapes that nobody foresaw, through everything that is done to an image


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (2, 100_000), (3, 2)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_odd_shapes_through_every_view(size: tuple[int, int], crop_mode: Any, tmp_path: Path) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    preprocessing = Preprocessing(32, 0.875, crop_mode, "bicubic", (0.5,) * 3, (0.5,) * 3)
    for view in [*VIEWS.values(), View()]:
        image = decode(tmp_path / "x.png", view.least_side(preprocessing))
        views = view(image, preprocessing)
        assert views.shape == (view.count(preprocessing), 3, 32, 32)
        if crop_mode != "border":
            assert views[:, 0].min() == 255


# Files that are not what they were


def unreadable(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "a folder, not a file"),
        (lambda path: os.truncate(path, 0), "the file is empty"),
        (lambda path: os.truncate(path, 3), "not an image that can be read"),
    ],
    ids=["gone", "a folder", "emptied", "cut"],
)
def test_a_file_that_changes_between_two_looks(
    change: Callable[[Path], object], reason: str, corpus: ModuleType, tmp_path: Path
) -> None:
    path = written(tmp_path / "x.jpg", corpus.members()["JPEG"])
    assert decode(path).size == (24, 18)
    change(path)
    assert unreadable(path) == reason


def test_no_file_is_left_open(corpus: ModuleType, tmp_path: Path) -> None:
    for content in corpus.members().values():
        for part in (content, content[: len(content) // 2]):
            path = written(tmp_path / "x", part)
            with contextlib.suppress(UnreadableImage):
                decode(path)
            path.unlink()
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in held if str(tmp_path) in name]
