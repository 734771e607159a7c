"""Copies: the same bytes, and what resizing, compression and cropping leave; unrelated pictures are left alone."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tlkit.audit import duplicates
from tlkit.audit.duplicates import CROWD, FEATURES, HASHES, Closeness, Group, alike, close_pairs, find_groups
from tlkit.audit.looks import Look, hashes, thumbnails
from tlkit.audit.oddities import is_blank

LookOf = Callable[..., Look]
Photo = Callable[..., Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, factor: float = 0.7) -> Image.Image:
    return image.resize([round(factor * side) for side in image.size], Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float = 0.02) -> Image.Image:
    """Without that share of each side."""
    (width, height), cut = image.size, [round(share * side) for side in image.size]
    return image.crop((cut[0], cut[1], width - cut[0], height - cut[1]))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized to 0.7": resized,
    "resized to 1.5": lambda image: resized(image, 1.5),
    "JPEG of quality 50": lambda image: jpeg(image, 50),
    "2 % cropped": cropped,
    "3 % cropped": lambda image: cropped(image, 0.03),
    "brighter": lambda image: image.point(lambda value: min(255, round(value * 1.1 + 5))),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "all of it": lambda image: jpeg(resized(cropped(image)), 50),
}


def groups_of(looks: Sequence[Look], features: np.ndarray | None = None) -> list[Group]:
    plain = np.array([is_blank(one) for one in looks], dtype=bool)
    return find_groups([one.digest for one in looks], hashes(looks), thumbnails(looks), plain, features)


def rows(groups: Iterable[Group]) -> list[tuple[int, ...]]:
    return [group.rows for group in groups]


@pytest.fixture(scope="module")
def photos(photo: Photo) -> list[Image.Image]:
    """60 pictures, no two of which are alike."""
    return [photo(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def looks(photos: list[Image.Image], look_of: LookOf) -> list[Look]:
    return [look_of(image) for image in photos]


# The same bytes


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        ([], []),
        (["a"], []),
        (["a", "b", "c"], []),
        (["a", "a"], [(0, 1)]),
        (["a", "b", "a", "a", "b", "c"], [(0, 2, 3), (1, 4)]),
        ([None, None, "a", None], []),  # files that have gone are copies of nothing
        (["a"] * 50, [tuple(range(50))]),
    ],
)
def test_exact_groups(digests: list[str | None], expected: list[tuple[int, ...]], looks: list[Look]) -> None:
    """Whatever the pictures show: here each is another one."""
    some = looks[: len(digests)]
    blank = np.zeros(len(some), dtype=bool)
    found = find_groups(digests, hashes(some), thumbnails(some), blank)
    assert rows(found) == expected
    assert all(group.exact and group.found_by == "content" for group in found)


def test_blank_images_are_copies_if_their_bytes_are(look_of: LookOf) -> None:
    white, grey = (Image.new("RGB", (80, 80), (value,) * 3) for value in (255, 128))
    found = groups_of([look_of(white, "w"), look_of(white, "other"), look_of(white, "w"), look_of(grey, "g")])
    assert found == [Group((0, 2), "content")], "and never near each other: there is nothing to see"


# Near copies


def test_unrelated_pictures_are_no_copies(looks: list[Look]) -> None:
    for count in (0, 1, 2, 5, CROWD, CROWD + 1, CROWD + 2, 60):
        assert groups_of(looks[:count]) == [], count


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("others", [0, 1, 10, 59], ids=lambda count: f"among {count} others")
def test_a_near_copy_is_found(
    how: str, others: int, photos: list[Image.Image], looks: list[Look], look_of: LookOf
) -> None:
    for row in range(min(others + 1, 10)):
        found = groups_of([*looks[: others + 1], look_of(COPIES[how](photos[row]))])
        assert found == [Group((row, others + 1), "hash")]


def test_planted_copies_among_many(photos: list[Image.Image], looks: list[Look], look_of: LookOf) -> None:
    """Three near copies of each of 20 of the 60 pictures: all of them are found, and nothing else."""
    ways = ("resized to 0.7", "JPEG of quality 50", "2 % cropped")
    made = [look_of(COPIES[way](photos[row])) for row in range(20) for way in ways]
    found = groups_of([*looks, *made])
    assert rows(found) == [(row, *range(60 + 3 * row, 63 + 3 * row)) for row in range(20)]


def test_more_copies_than_a_crowd_are_one_group(photos: list[Image.Image], looks: list[Look], look_of: LookOf) -> None:
    """Each has more copies than the others it is compared with, so that there is no crowd of other pictures."""
    width, height = photos[0].size
    copies = [jpeg(photos[0].resize((width - 2 * step, height - step)), 60 + step) for step in range(30)]
    assert len(copies) > CROWD
    found = groups_of([*looks[1:30], *map(look_of, copies)])
    assert rows(found) == [tuple(range(29, 59))]


def test_a_near_group_includes_exact_copies(photos: list[Image.Image], looks: list[Look], look_of: LookOf) -> None:
    original, copy = look_of(photos[0], "a"), look_of(resized(photos[0]), "b")
    others = [look_of(image, f"other {row}") for row, image in enumerate(photos[1:4])]
    found = groups_of([others[0], original, copy, others[1], original, copy, others[2]])
    assert found == [Group((1, 4), "content"), Group((2, 5), "content"), Group((1, 2, 4, 5), "hash")]


def test_a_chain_of_copies_is_one_group(photos: list[Image.Image], looks: list[Look], look_of: LookOf) -> None:
    chain = [cropped(photos[0], 0.02 * step) for step in range(4)]
    assert rows(groups_of([*map(look_of, chain), *looks[1:]])) == [(0, 1, 2, 3)]


def test_things_of_one_kind_are_no_copies(look_of: LookOf) -> None:
    """Of handwritten digits, none of which was copied, hundreds of pairs are close: but no closer than to a crowd."""
    images = (np.uint8(15 * image) for image in load_digits().images[:400])
    digits = [look_of(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in images]
    signs = np.where(hashes(digits), 1.0, -1.0) / 16
    close = (1 - (signs @ signs.T)[np.triu_indices(400, 1)] <= HASHES.limit).sum()
    assert close > 500
    assert len(close_pairs(signs, HASHES)) < close / 5
    assert len(groups_of(digits)) <= 2


# A network's features


def directions(count: int, width: int = 512) -> np.ndarray:
    """Rows of any length and of random direction: at about right angles."""
    random = np.random.default_rng(0)
    return random.standard_normal((count, width)) * random.uniform(0.1, 10, (count, 1))


@pytest.mark.parametrize("count", [2, 3, 10, 60])
def test_close_features_are_copies(count: int, looks: list[Look]) -> None:
    features = directions(count)
    features[1] = 7 * (features[0] + 0.1 * np.linalg.norm(features[0]) / np.sqrt(512) * directions(1)[0])
    assert groups_of(looks[:count], features) == [Group((0, 1), "features")]
    assert groups_of(looks[:count]) == []


def test_what_both_find_is_one_group(photos: list[Image.Image], looks: list[Look], look_of: LookOf) -> None:
    features = directions(8)
    features[5] = features[3]
    features[6] = features[3]
    found = groups_of([*looks[:4], look_of(resized(photos[3])), *looks[5:8]], features)
    assert found == [Group((3, 4, 5, 6), "hash")], "3 and 4 by the hash, 3, 5 and 6 by features"


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_features_that_say_nothing(value: float, looks: list[Look]) -> None:
    assert groups_of(looks[:10], np.full((10, 16), value)) in ([], [Group(tuple(range(10)), "features")])
    assert groups_of(looks[:10], np.zeros((10, 16))) == []


def test_features_of_a_blank_image_are_not_looked_at(looks: list[Look], look_of: LookOf) -> None:
    features = directions(4)
    features[:] = features[0]
    blank = look_of(Image.new("RGB", (99, 99), "white"))
    found = groups_of([looks[0], blank, looks[1], blank], features)
    assert rows(found) == [(0, 2)]


# Pairs


def brute(vectors: np.ndarray, closeness: Closeness) -> set[tuple[int, int]]:
    """The definition, one pair at a time, in double precision."""
    distance = 1 - vectors @ vectors.T
    count, found = len(vectors), set()
    others = [sorted(row for row in range(count) if row != one) for one in range(count)]
    nearest = [sorted(others[one], key=lambda row, one=one: distance[one, row])[:CROWD] for one in range(count)]
    crowd = [distance[one, near[-1]] if len(near) == CROWD else closeness.unrelated for one, near in enumerate(nearest)]
    for one, other in itertools.combinations(range(count), 2):
        bound = max(closeness.share * min(crowd[one], crowd[other], closeness.unrelated), closeness.sure)
        seen = other in nearest[one] or one in nearest[other]
        if seen and distance[one, other] <= min(closeness.limit, bound):
            found.add((one, other))
    return found


def clustered(seed: int, count: int, width: int) -> np.ndarray:
    """Unit vectors around a few others, from next to these to far off."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(count // 6, 1), width))
    vectors = centres[random.integers(0, len(centres), count)]
    vectors = vectors + random.uniform(0, 1.2, (count, 1)) * random.standard_normal((count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("closeness", [HASHES, FEATURES, Closeness(0.9, 0.8, 0.3, 0.7), Closeness(0.5, 1.0, 0.5, 1.0)])
@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("count", [0, 1, 2, 3, CROWD - 1, CROWD, CROWD + 1, CROWD + 2, 100, 250])
def test_pairs_are_those_of_the_definition(
    count: int, block: int, closeness: Closeness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    vectors = clustered(count, count, 24)
    found = close_pairs(vectors, closeness)
    assert found.shape == (len(found), 2) and (found[:, 0] < found[:, 1]).all()
    assert [tuple(pair) for pair in found.tolist()] == sorted(brute(vectors, closeness))


@pytest.mark.parametrize("closeness", [HASHES, FEATURES])
def test_there_are_pairs_to_compare_with_the_definition(closeness: Closeness) -> None:
    counts = [len(brute(clustered(count, count, 24), closeness)) for count in (100, 250)]
    assert min(counts) > 3 and max(counts) < 2000


@pytest.mark.parametrize("count", [2, CROWD, CROWD + 1, 300])
def test_copies_without_end_are_joined_and_fit_into_memory(count: int) -> None:
    """Of 300 copies there would be 44,850 pairs; each names its nearest alone."""
    found = close_pairs(np.tile([[0.6, 0.8]], (count, 1)), HASHES)
    assert count - 1 <= len(found) <= CROWD * count


# Thumbnails laid over each other


def greys(images: Sequence[Image.Image], look_of: LookOf) -> np.ndarray:
    return thumbnails([look_of(image) for image in images]).copy()  # PyTorch wants to be able to write


def test_a_picture_is_like_itself(photos: list[Image.Image], look_of: LookOf) -> None:
    small = greys(photos, look_of)
    assert alike(small, small) == pytest.approx(np.ones(60), abs=1e-5)
    assert alike(small, 255 - small) == pytest.approx(np.ones(60), abs=1e-4), "a negative differs by gain and offset"


@pytest.mark.parametrize("share", [0.01, 0.02, 0.03])
def test_shifts_and_scales_are_undone(share: float, photos: list[Image.Image], look_of: LookOf) -> None:
    """Cut off one side alone, a crop is a shift and a scale along one axis."""
    width, height = photos[0].size
    cuts = [
        (0, 0, round(width * (1 - share)), height),
        (0, round(height * share), width, height),
        (round(width * share), round(height * share), width, height),
    ]
    small = greys(photos, look_of)
    for cut in cuts:
        found = alike(small, greys([image.crop(cut) for image in photos], look_of))
        assert found.min() >= duplicates.ALIKE


def test_other_pictures_are_not_alike(photos: list[Image.Image], look_of: LookOf) -> None:
    small = greys(photos, look_of)
    one, other = (list(column) for column in zip(*itertools.combinations(range(46), 2), strict=True))
    found = alike(small[one], small[other])
    assert found.shape == (1035,), "more than are computed at once"
    assert found.min() >= 0 and found.max() < 0.9
    turned = alike(small[other[:99]], small[one[:99]])
    assert found[:99] == pytest.approx(turned, abs=1e-4), "whichever is laid over the other"


def test_constant_thumbnails_are_like_nothing() -> None:
    flat, noise = np.full((1, 32, 32), 7), np.random.default_rng(0).integers(0, 255, (1, 32, 32))
    step = np.where(np.arange(32) < 16, 0, 255) * np.ones((1, 32, 1))
    for one, other in itertools.product((flat, noise, step, flat + 1), repeat=2):
        (found,) = alike(one.astype(np.uint8), other.astype(np.uint8))
        assert 0 <= found <= 1 + 1e-6
        assert found < 0.5 or (one is other and one is not flat)
    assert alike(np.empty((0, 32, 32), np.uint8), np.empty((0, 32, 32), np.uint8)).shape == (0,)
