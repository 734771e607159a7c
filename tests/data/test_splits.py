"""Splits and folds: shares, seeds, groups, and what can never be set apart."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from tlkit.data.folders import Samples
from tlkit.data.splits import choosing_part, folds, folds_of_copies, split, split_with_copies, with_groups
from tlkit.errors import TlkitError


def samples(counts: list[int], groups: list[str] | None = None, splits: list[str] | None = None) -> Samples:
    """As many images of each class as asked for."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return Samples(
        root=Path("data"),
        paths=[f"c{label}/p{row // 3:03d}_{row}.jpg" for row, label in enumerate(labels)],
        labels=labels,
        splits=np.array(splits or [""] * len(labels), dtype="<U5"),
        classes=tuple(f"c{label}" for label in range(len(counts))),
        groups=np.array(groups or [], dtype=str),
    )


def grouped(groups: int, classes: int, images: int, seed: int = 0) -> Samples:
    """Images whose groups and classes have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    made = samples(np.bincount(rng.integers(0, classes, images), minlength=classes).tolist())
    names = np.array([f"g{number}" for number in rng.integers(0, groups, images)])
    return Samples(made.root, made.paths, made.labels, made.splits, made.classes, names)


def per_class(made: Samples, name: str) -> list[int]:
    return np.bincount(made.labels[made.splits == name], minlength=len(made.classes)).tolist()


SHARES = [(0.2, 0.0), (0.2, 0.2), (0.1, 0.3), (0.0, 0.25), (0.45, 0.45), (0.9, 0.0)]


@pytest.mark.parametrize(("val", "test"), SHARES)
def test_each_class_gives_the_share_asked_for(val: float, test: float) -> None:
    counts = [40, 100, 1000]
    made = split(samples(counts), val=val, test=test, seed=0)
    for name, share in (("val", val), ("test", test), ("train", 1 - val - test)):
        assert per_class(made, name) == pytest.approx([count * share for count in counts], abs=1)


@pytest.mark.parametrize(("val", "test"), SHARES)
@pytest.mark.parametrize("count", range(1, 12))
def test_small_classes_keep_two_training_images(count: int, val: float, test: float) -> None:
    made = split(samples([count, 50]), val=val, test=test, seed=0)
    assert per_class(made, "train")[0] >= min(2, count)
    if count >= 4:  # with three, val goes before test
        assert all(per_class(made, name)[0] >= 1 for name, share in (("val", val), ("test", test)) if share)
    assert sum(per_class(made, name)[0] for name in ("train", "val", "test")) == count


def test_the_seed_decides() -> None:
    data = samples([50, 50])
    first, same, other = (split(data, val=0.2, test=0.2, seed=seed).splits for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert not data.splits.any(), "the samples given are left as they are"


def test_a_split_is_no_run_of_neighbours() -> None:
    chosen = np.flatnonzero(split(samples([200]), val=0.5, test=0, seed=0).splits == "val")
    assert 60 < chosen.mean() < 140 and np.diff(chosen).max() > 1 and chosen.min() < 20 and chosen.max() > 180


def test_classes_without_images_are_no_trouble() -> None:
    made = split(samples([10, 0, 10, 0]), val=0.2, test=0.2, seed=0)
    assert per_class(made, "val") == [2, 0, 2, 0]


def test_nothing_asked_for_leaves_all_to_train() -> None:
    assert set(split(samples([5, 5]), val=0, test=0, seed=0).splits) == {"train"}
    assert set(split(grouped(3, 2, 20), val=0, test=0, seed=0).splits) == {"train"}


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.9, 0.9), (0.1, 0.9)])
def test_shares_that_leave_nothing(val: float, test: float) -> None:
    with pytest.raises(TlkitError, match="leave nothing to train on; let them add up to less than 1"):
        split(samples([10, 10]), val=val, test=test, seed=0)


# Groups


def sides(made: Samples) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group, name in zip(made.groups.tolist(), made.splits.tolist(), strict=True):
        found.setdefault(group, set()).add(name)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("val", "test"), [(0.2, 0.0), (0.2, 0.2), (0.4, 0.1), (0.7, 0.1), (0.05, 0.05)])
@pytest.mark.parametrize("groups", [40, 200])
def test_groups_stay_whole_and_shares_near(groups: int, val: float, test: float, seed: int) -> None:
    made = split(grouped(groups, 3, 2000, seed), val=val, test=test, seed=seed)
    assert all(len(names) == 1 for names in sides(made).values())
    for name, share in (("val", val), ("test", test)):
        found = np.array(per_class(made, name)) / np.bincount(made.labels)
        assert found.mean() == pytest.approx(share, abs=1.5 / groups + 0.01), "about a group from what is asked"
        assert found == pytest.approx([share] * 3, abs=0.06), "of each class"


def test_groups_of_one_class_each() -> None:
    patients = [f"{'ab'[row // 60]}{row % 60 // 6}" for row in range(120)]  # ten patients of six images in each class
    made = split(samples([60, 60], patients), val=0.2, test=0.2, seed=3)
    assert per_class(made, "val") == per_class(made, "test") == [12, 12]
    assert all(len(names) == 1 for names in sides(made).values())


@pytest.mark.parametrize("seed", range(10))
def test_no_class_loses_its_only_group(seed: int) -> None:
    groups = [f"a{row % 10}" for row in range(50)] + ["rare"] * 5
    made = split(samples([50, 5], groups), val=0.3, test=0.3, seed=seed)
    assert per_class(made, "train")[1] == 5


@pytest.mark.parametrize("seed", range(10))
def test_grouped_classes_keep_two_training_images(seed: int) -> None:
    groups = [f"a{row % 10}" for row in range(50)] + ["r0", "r1", "r2"]
    made = split(samples([50, 3], groups), val=0.4, test=0.4, seed=seed)
    assert per_class(made, "train")[1] >= 2


def test_the_seed_decides_with_groups() -> None:
    data = grouped(30, 2, 300)
    first, same, other = (split(data, val=0.2, test=0.2, seed=seed).splits for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


@pytest.mark.parametrize("groups", [["g"] * 20, ["g"] * 9 + ["h"] * 11, [f"g{row // 10}" for row in range(20)]])
def test_too_few_groups(groups: list[str]) -> None:
    with pytest.raises(TlkitError, match=r"cannot be split so that a share of 0\.15") as caught:
        split(samples([10, 10], groups), val=0.15, test=0, seed=0)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_groups_by_pattern() -> None:
    data = samples([6, 3])
    assert with_groups(data, r"p\d+").groups.tolist() == ["p000"] * 3 + ["p001"] * 3 + ["p002"] * 3
    assert with_groups(data, r"/p(\d+)_").groups.tolist() == ["000"] * 3 + ["001"] * 3 + ["002"] * 3
    assert with_groups(data, r"^(?:c\d)").groups.tolist() == ["c0"] * 6 + ["c1"] * 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("p(", "not a regular expression .*; correct it"),
        ("[", "not a regular expression"),
        ("p999", "'p999' does not match c0/p000_0.jpg; make it match each path"),
        (r"c\d(x)?", "does not match"),  # the group takes no part in the match: no image has a name for it
    ],
)
def test_refused_patterns(pattern: str, message: str) -> None:
    with pytest.raises(TlkitError, match=message) as caught:
        with_groups(samples([3, 3]), pattern)
    assert caught.value.where == "--group-regex"


def test_groups_that_the_data_s_own_splits_tear_apart() -> None:
    data = samples([3, 3], splits=["train", "train", "val", "train", "val", "val"])
    with pytest.raises(TlkitError, match="group 'p000' stand in train and in val"):
        with_groups(data, r"p\d+")
    assert len(with_groups(data, r"_\d+").groups) == 6


# Folds


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_folds_are_disjoint_complete_and_stratified(count: int) -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 20])
    held_out = folds(labels, [], seed=0, count=count)
    assert len(held_out) == count
    assert np.array_equal(np.sort(np.concatenate(held_out)), np.arange(170))
    for rows in held_out:
        assert np.bincount(labels[rows]) == pytest.approx([100 / count, 50 / count, 20 / count], abs=1)


@pytest.mark.parametrize(("smallest", "expected"), [(1, 0), (2, 2), (3, 3), (4, 4), (5, 5), (9, 5)])
def test_few_groups_of_a_class_allow_fewer_folds(smallest: int, expected: int) -> None:
    labels = np.repeat([0, 1], [40, smallest])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folds(labels, [f"g{row}" for row in range(len(labels))], seed=0)) == expected


@pytest.mark.parametrize("smallest", [2, 3, 4, 5, 9])
def test_a_small_class_is_spread_over_as_many_folds_as_it_can_be(smallest: int) -> None:
    labels = np.repeat([0, 1], [40, smallest])
    held_out = folds(labels, [], seed=0)
    assert len(held_out) == 5
    assert sum((labels[rows] == 1).any() for rows in held_out) == min(5, smallest)


def test_labels_with_gaps() -> None:
    assert len(folds(np.array([0, 0, 7, 7]), [], seed=0)) == 4


def test_one_row_makes_no_folds() -> None:
    assert folds(np.array([0]), [], seed=0) == []


@pytest.mark.parametrize("groups", [2, 3, 4, 12])
def test_folds_keep_groups_whole(groups: int) -> None:
    data = grouped(groups, 3, 120)
    held_out = folds(data.labels, data.groups, seed=0)
    assert 2 <= len(held_out) <= min(5, groups)
    assert np.array_equal(np.sort(np.concatenate(held_out)), np.arange(120))
    homes = [set(data.groups[rows]) for rows in held_out]
    assert sum(map(len, homes)) == len(set(data.groups))


def test_one_group_makes_no_folds() -> None:
    assert folds(np.array([0, 0, 1, 1]), ["g"] * 4, seed=0) == []


def test_folds_follow_the_seed() -> None:
    labels = np.repeat([0, 1], 50)
    first, same, other = (np.concatenate(folds(labels, [], seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


# Copies


def copied(count: int, share: float, seed: int) -> np.ndarray:
    """For each of so many rows the first that is the same; that share of them are copies, of any earlier row."""
    rng = np.random.default_rng(seed)
    first = np.arange(count)
    for row in np.sort(rng.choice(np.arange(1, count), round(share * count), replace=False)).tolist():
        first[row] = first[rng.integers(row)]
    return first


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("val", "test"), SHARES)
def test_without_copies_a_split_is_the_same_as_ever(val: float, test: float, seed: int) -> None:
    data = samples([1, 7, 40, 0, 13])
    found = split_with_copies(data, np.arange(len(data)), val=val, test=test, seed=seed)
    assert found.splits.tolist() == split(data, val=val, test=test, seed=seed).splits.tolist()
    assert found.paths == data.paths and not data.splits.any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize(("val", "test"), [(0.2, 0.0), (0.2, 0.2), (0.45, 0.45)])
def test_no_copy_stands_on_the_other_side(val: float, test: float, share: float, seed: int) -> None:
    """Copies across classes, too."""
    data, first = samples([60, 40, 100]), copied(200, share, seed)
    found = split_with_copies(data, first, val=val, test=test, seed=seed)
    assert found.splits.tolist() == found.splits[first].tolist()
    originals = np.unique(first)
    alone = split(data.take(originals), val=val, test=test, seed=seed)
    assert found.splits[originals].tolist() == alone.splits.tolist(), "as if the copies were not there"
    if share < 0.5:
        assert (found.splits[originals] == "val").mean() == pytest.approx(val, abs=0.05)


def test_images_that_are_all_the_same_are_trained_on() -> None:
    found = split_with_copies(samples([5, 5]), np.zeros(10, dtype=np.int64), val=0.5, test=0.2, seed=0)
    assert set(found.splits) == {"train"}


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_without_copies_folds_are_the_same_as_ever(seed: int, count: int) -> None:
    labels = np.repeat([0, 1, 5], [50, 3, 20])
    found = folds_of_copies(labels, np.arange(73), seed, count)
    expected = folds(labels, [], seed, count)
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in expected]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_folds_hold_copies_out_together(share: float, seed: int) -> None:
    labels, first = np.repeat([0, 1, 2], [60, 40, 100]), copied(200, share, seed)
    found = folds_of_copies(labels, first, seed)
    assert len(found) == 5
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(200)), "each row once"
    fold = np.empty(200, dtype=np.int64)
    for number, rows in enumerate(found):
        fold[rows] = number
    assert np.array_equal(fold, fold[first])
    originals = np.unique(first)
    alone = folds(labels[originals], [], seed)
    assert [np.isin(originals[rows], found[number]).all() for number, rows in enumerate(alone)] == [True] * 5


@pytest.mark.parametrize(("first", "expected"), [([], 0), ([0], 0), ([0, 0, 0], 0), ([0, 0, 2], 2), ([0, 1, 0, 1], 2)])
def test_folds_of_few_originals(first: list[int], expected: int) -> None:
    found = folds_of_copies(np.zeros(len(first), dtype=np.int64), np.array(first, dtype=np.int64), 0)
    assert len(found) == expected and all(len(rows) for rows in found)


# The part to choose on


def with_splits(counts: list[int], val: float, test: float) -> Samples:
    return split(samples(counts), val=val, test=test, seed=0)


@pytest.mark.parametrize("on_val", [False, True])
def test_val_is_chosen_on_where_test_is_reported(on_val: bool) -> None:
    made = with_splits([20, 30], 0.2, 0.2)
    where, mask = choosing_part(made, on_val=on_val, seed=1)
    assert where == "val"
    assert mask.dtype == bool and np.array_equal(mask, made.splits == "val")


def test_val_is_chosen_on_where_asked_for() -> None:
    made = with_splits([20, 30], 0.2, 0.0)
    where, mask = choosing_part(made, on_val=True, seed=1)
    assert where == "val" and np.array_equal(mask, made.splits == "val")


@pytest.mark.parametrize(("val", "test", "on_val"), [(0.2, 0.0, False), (0.0, 0.2, True), (0.0, 0.0, True)])
def test_else_a_stratified_part_of_train_is_chosen_on(val: float, test: float, on_val: bool) -> None:
    made = with_splits([20, 45, 10], val, test)
    where, mask = choosing_part(made, on_val=on_val, seed=1)
    assert where == "train"
    assert (made.splits[mask] == "train").all()
    in_train, chosen = (np.bincount(made.labels[rows]) for rows in (made.splits == "train", mask))
    assert chosen.tolist() == [round(0.2 * count) for count in in_train.tolist()]
    _, other = choosing_part(made, on_val=on_val, seed=2)
    _, again = choosing_part(made, on_val=on_val, seed=1)
    assert np.array_equal(mask, again) and not np.array_equal(mask, other)
    _, half = choosing_part(made, on_val=on_val, seed=1, share=0.5)
    assert half.sum() == sum(round(0.5 * count) for count in in_train.tolist())


@pytest.mark.parametrize("counts", [[1, 2, 3, 50], [2, 2, 3], [3, 0, 3]])
def test_no_class_is_left_without_two_images_to_train_on(counts: list[int]) -> None:
    made = with_splits(counts, 0.0, 0.0)
    where, mask = choosing_part(made, on_val=False, seed=0)
    assert where == "train"
    left = np.bincount(made.labels[~mask], minlength=len(counts))
    assert (left >= np.minimum(counts, 2)).all()
    chosen = np.bincount(made.labels[mask], minlength=len(counts))
    assert ((chosen > 0) == (np.array(counts) > 2)).all()


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 1], [2]])
def test_too_few_images_to_choose_on(counts: list[int]) -> None:
    where, mask = choosing_part(with_splits(counts, 0.0, 0.0), on_val=False, seed=0)
    assert where == "" and mask.shape == (sum(counts),) and not mask.any()


@pytest.mark.parametrize("seed", range(5))
def test_choosing_tears_no_group(seed: int) -> None:
    made = split(grouped(40, 3, 300, seed), val=0.2, test=0.0, seed=seed)
    where, mask = choosing_part(made, on_val=False, seed=seed)
    assert where == "train" and (made.splits[mask] == "train").all()
    assert not set(made.groups[mask].tolist()) & set(made.groups[~mask].tolist())
    assert mask.sum() == pytest.approx(0.2 * (made.splits == "train").sum(), rel=0.35)


def test_groups_that_cannot_be_divided_leave_nothing_to_choose_on() -> None:
    made = samples([10, 10], groups=["one"] * 20, splits=["train"] * 20)
    where, mask = choosing_part(made, on_val=False, seed=0)
    assert where == "" and not mask.any()
