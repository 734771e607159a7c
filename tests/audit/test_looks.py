"""One look at each image: sharpness in closed form, blurs of real photos, blanks, hashes by hand, odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from tlkit.audit.looks import Look, hashes, look_at, sharpness, thumbnails
from tlkit.audit.oddities import BLURRED, is_blank, is_blurred
from tlkit.data.content import digest
from tlkit.data.decode import Stored
from tlkit.data.loading import BadFile

LookOf = Callable[..., Look]
Photo = Callable[..., Image.Image]


# Sharpness


def surface(height: Callable[[np.ndarray, np.ndarray], np.ndarray], rows: int, columns: int) -> np.ndarray:
    """8-bit values of a function of the place."""
    y, x = np.mgrid[:rows, :columns]
    return height(x, y).astype(np.uint8)


@pytest.mark.parametrize(
    ("grey", "laplacian"),
    [
        (surface(lambda x, y: 0 * x + 77, 20, 20), 0),
        (surface(lambda x, y: 5 * x + 7 * y, 20, 20), 0),  # a slope has none
        (surface(lambda x, y: x**2, 16, 16), 2),
        (surface(lambda x, y: x**2 + y**2, 12, 12), 4),  # second derivatives of 2 along either axis
        (surface(lambda x, y: 200 * ((x + y) % 2), 20, 20), 800),  # each pixel differs from all four neighbours
        (surface(lambda x, y: 255 * (x % 2), 20, 20), 510),
        (surface(lambda x, y: 255 * (y % 2), 3, 3), 510),
    ],
    ids=["flat", "slope", "parabola", "bowl", "checkerboard", "stripes", "3 x 3"],
)
def test_sharpness_is_a_laplacian(grey: np.ndarray, laplacian: int) -> None:
    assert sharpness(grey) == laplacian
    assert sharpness(255 - grey) == laplacian, "whatever is dark and what is bright"


@pytest.mark.parametrize(("inner", "expected"), [(150, 100), (600, 0)])
def test_sharpness_is_of_the_most_detailed_hundredth(inner: int, expected: int) -> None:
    """One spot of 100 gives 400 at itself and 100 beside it: 3 of 150 pixels are 2 %, 3 of 600 half a per cent."""
    grey = np.zeros((3, inner + 2), dtype=np.uint8)
    grey[1, inner // 2] = 100
    assert sharpness(grey) == expected


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 10_000), (2, 500), (500, 2)])
def test_what_has_no_inside_is_not_called_blurred(shape: tuple[int, int]) -> None:
    assert sharpness(np.zeros(shape, dtype=np.uint8)) == 255


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """A palace, a flower, and squares of 256 pixels of each: as scikit-learn carries them, 640 x 427."""
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    return [*whole, *(image.crop((left, 100, left + 256, 356)) for image in whole for left in (0, 160, 320))]


def test_photos_as_taken_are_sharp(photos: list[Image.Image], look_of: LookOf) -> None:
    assert all(look_of(image).sharpness > 0.14 and not is_blurred(look_of(image)) for image in photos)


@pytest.mark.parametrize("radius", [2, 3, 6])
def test_a_blur_of_two_pixels_and_more_is_seen(photos: list[Image.Image], look_of: LookOf, radius: int) -> None:
    """Pixels of the size at which a network sees the image."""
    for image in photos:
        shrink = 256 / min(image.size)
        small = image.resize([round(side * shrink) for side in image.size], Image.Resampling.LANCZOS)
        assert is_blurred(look_of(small.filter(ImageFilter.GaussianBlur(radius))))
        assert not is_blurred(look_of(small))
        blurred = look_of(image.filter(ImageFilter.GaussianBlur(1.25 * radius / shrink)))
        assert blurred.sharpness < BLURRED, "the same at full size"


@pytest.mark.parametrize("size", [(500, 400), (1200, 900), (3000, 2000)])
def test_enlarging_makes_nothing_sharper(photo: Photo, look_of: LookOf, size: tuple[int, int]) -> None:
    assert is_blurred(look_of(photo(0, 60, 45).resize(size, Image.Resampling.BICUBIC)))


def test_faint_images_are_judged_as_bold_ones(photo: Photo, look_of: LookOf) -> None:
    """Sharpness is a share of the contrast."""
    image = photo(1)
    faint = image.point(lambda value: 100 + value // 4)
    assert look_of(faint).contrast == pytest.approx(look_of(image).contrast / 4, abs=3)
    assert look_of(faint).sharpness == pytest.approx(look_of(image).sharpness, rel=0.1)


# Contrast, blanks


@pytest.mark.parametrize(("low", "high"), [(0, 255), (50, 200), (100, 130)])
def test_contrast_is_from_dark_to_bright(look_of: LookOf, low: int, high: int) -> None:
    slope = np.broadcast_to(np.linspace(low, high, 256).astype(np.uint8), (256, 256))
    assert look_of(Image.fromarray(slope)).contrast == pytest.approx(high - low, abs=4)


def plain(value: int, size: tuple[int, int] = (256, 200)) -> np.ndarray:
    return np.full(size, value, dtype=np.uint8)


def speck(value: int, size: tuple[int, int]) -> np.ndarray:
    """One stray pixel in a plain image."""
    image = plain(0, size)
    image[size[0] // 2, size[1] // 3] = value
    return image


BLANK = {
    "black": plain(0),
    "white": plain(255),
    "grey": plain(97, (64, 64)),
    "1 x 1": plain(50, (1, 1)),
    "1 x 10000": plain(50, (1, 10_000)),
    "a faint noise": np.random.default_rng(0).integers(120, 127, (256, 256)).astype(np.uint8),
    "a faint slope": np.broadcast_to(np.linspace(200, 209, 300).astype(np.uint8), (200, 300)),
    "one stray pixel": speck(255, (256, 256)),
    "one stray pixel of few": speck(255, (64, 64)),
}


@pytest.mark.parametrize("name", BLANK)
def test_blank(name: str, look_of: LookOf) -> None:
    found = look_of(Image.fromarray(BLANK[name]))
    assert is_blank(found) and not is_blurred(found), "blank is said once, not again as blurred"


def test_not_blank(photo: Photo, shapes: Path, look_of: LookOf) -> None:
    line = plain(255)
    line[100:104] = 0  # four rows of 256: 1.6 %
    images = [photo(3), Image.fromarray(line), Image.fromarray(np.linspace(100, 130, 64**2).reshape(64, 64))]
    assert not any(is_blank(look_of(image)) for image in images)
    assert not any(isinstance(found, BadFile) or is_blank(found) for found in look_at(shapes, names_in(shapes)))


# Hashes and thumbnails


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_hashes_are_the_signs_of_low_frequencies(photo: Photo, look_of: LookOf) -> None:
    """The perceptual hash: which of the 16 x 16 lowest cosine coefficients at 64 x 64 pixels exceed their median."""
    images = [photo(seed, 64, 64).convert("L") for seed in range(5)]
    found = hashes([look_of(image) for image in images])
    assert found.shape == (5, 256) and found.dtype == bool
    for image, bits in zip(images, found, strict=True):
        low = dctn(np.asarray(image, dtype=np.float64))[:16, :16]
        assert (bits == (low > np.median(low)).ravel()).mean() > 0.99, "but for rounding"
    apart = [(one != other).sum() for row, one in enumerate(found) for other in found[:row]]
    assert min(apart) > 80 and max(apart) < 176, "unrelated pictures differ in about half of 256 bits"


def test_thumbnails_are_the_image_made_small(photo: Photo, look_of: LookOf) -> None:
    images = [photo(seed, 320, 256).convert("L") for seed in range(3)]
    found = thumbnails([look_of(image) for image in images])
    assert found.shape == (3, 32, 32) and found.dtype == np.uint8
    for image, small in zip(images, found, strict=True):
        blocks = np.asarray(image, dtype=np.float64).reshape(32, 8, 32, 10).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.97
        assert abs(blocks - small).mean() < 6


def test_of_no_images_there_are_none() -> None:
    assert hashes([]).shape == (0, 256) and thumbnails([]).shape == (0, 32, 32)
    assert look_at(Path(), []) == []


# Files


SIZES = [(1, 1), (2, 2), (1, 10_000), (10_000, 1), (3, 3), (64, 64), (1000, 30)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "odd.png")
    (found,) = look_at(tmp_path, ["odd.png"])
    assert isinstance(found, Look)
    assert found.stored == Stored("PNG", "RGB", *size) and found.digest == digest(tmp_path / "odd.png")
    assert len(found.hash) == 32 and len(found.thumbnail) == 32 * 32
    assert 0 <= found.contrast <= 255 and np.isfinite(found.sharpness)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_how_a_file_stores_its_pixels_is_told(mode: str, photo: Photo, tmp_path: Path) -> None:
    image, name = photo(2, 90, 70), "image.tif"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.convert(mode).save(tmp_path / name)
    (found,) = look_at(tmp_path, [name])
    assert isinstance(found, Look) and found.stored == Stored("TIFF", mode, 90, 70) and not is_blank(found)


def test_a_turn_that_exif_says_is_made(photo: Photo, tmp_path: Path) -> None:
    """A photo stored on its side shows the same as one that was turned; the size told is that of the file."""
    image, exif = photo(4, 120, 90), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    turned, upright = look_at(tmp_path, ["turned.png", "upright.png"])
    assert isinstance(turned, Look) and isinstance(upright, Look)
    assert (turned.hash, turned.thumbnail, turned.sharpness) == (upright.hash, upright.thumbnail, upright.sharpness)
    assert (turned.stored.width, upright.stored.width) == (90, 120) and turned.digest != upright.digest


def test_a_photo_from_a_camera_is_looked_at_as_the_same_one_made_small(photo: Photo, tmp_path: Path) -> None:
    """A large JPEG is decoded at a part of its size: what is seen is the same all the same."""
    image = photo(5, 1024, 768)
    image.save(tmp_path / "large.jpg", quality=95)
    image.resize((512, 384), Image.Resampling.LANCZOS).save(tmp_path / "small.png")
    large, small = look_at(tmp_path, ["large.jpg", "small.png"])
    assert isinstance(large, Look) and isinstance(small, Look)
    one, other = hashes([large, small])
    assert (one != other).sum() <= 6 and large.stored.width == 1024
    assert large.sharpness == pytest.approx(small.sharpness, rel=0.35)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_and_broken_files_are_named(workers: int, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    names = []
    for name in names_in(shapes):
        names.append(f"a/{name.replace('/', '-')}")
        (tmp_path / names[-1]).write_bytes((shapes / name).read_bytes())
    (tmp_path / "a/cut.jpg").write_bytes((shapes / "disc/01.jpg").read_bytes()[:-100])
    (tmp_path / "a/page.jpg").write_text("<html>")
    (tmp_path / "a/empty.png").touch()
    bad = ["a/cut.jpg", "a/page.jpg", "a/empty.png", "a/gone.png"]
    mixed = [*names[:10], bad[0], bad[1], *names[10:], bad[2], bad[3]]
    told: list[tuple[str, int, int]] = []
    found = look_at(tmp_path, mixed, workers=workers, progress=lambda *now: told.append(now))
    assert [one.path for one in found if isinstance(one, BadFile)] == bad
    assert all(one.reason for one in found if isinstance(one, BadFile))
    assert [one for one in found if isinstance(one, Look)] == look_at(shapes, names_in(shapes), workers=0)
    assert told[-1] == ("looking", 40, 40)
