"""What a cleaned manifest leaves out, why, and what it keeps together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tlkit.audit.cleaning import clean
from tlkit.audit.duplicates import Group
from tlkit.data.folders import Samples, find_torn_groups


def samples(rows: str, groups: Sequence[str] = ()) -> Samples:
    """``"a:train a:val b:"``: the class and the split of each image."""
    labels, splits = zip(*(row.split(":") for row in rows.split()), strict=True)
    classes = tuple(sorted(set(labels)))
    return Samples(
        root=Path("data"),
        paths=[f"{row}.jpg" for row in range(len(labels))],
        labels=np.array([classes.index(label) for label in labels]),
        splits=np.array(splits, dtype="<U5"),
        classes=classes,
        groups=np.array(groups, dtype=str),
    )


def exact(*rows: int) -> Group:
    return Group(rows, "content")


def near(*rows: int) -> Group:
    return Group(rows, "hash")


@pytest.mark.parametrize(
    ("rows", "found", "dropped"),
    [
        ("a: a: b:", [], []),
        # copies within a class: one stays, that of test before that of val before that of train
        ("a: a: a: b:", [exact(0, 2)], [2]),
        ("a: a: a: b:", [exact(0, 1, 2)], [1, 2]),
        ("a:train a:val a:test", [exact(0, 1, 2)], [0, 1]),
        ("a:train a:val", [exact(0, 1)], [0]),
        ("a:val a:train a:val", [exact(0, 1, 2)], [1, 2]),
        ("a:test a:train a:test", [exact(0, 1, 2)], [1, 2]),
        ("a:train a:train b:val b:val", [exact(0, 1), exact(2, 3)], [1, 3]),
        # copies across classes: nobody knows which label is right
        ("a: b: a: b:", [exact(0, 1)], [0, 1]),
        ("a: a: b: b:", [exact(0, 1, 2)], [0, 1, 2]),
        ("a:train b:test a:train", [exact(0, 1)], [0, 1]),
        # near copies stay within a split; across splits those that are trained on go
        ("a: a: b:", [near(0, 1)], []),
        ("a:train a:train a:val", [near(0, 1)], []),
        ("a:train a:val a:val", [near(0, 1)], [0]),
        ("a:train a:train a:val a:val", [near(0, 1, 2, 3)], [0, 1]),
        ("a:train a:val a:test", [near(0, 1, 2)], [0, 1]),
        ("a:val a:test a:test", [near(0, 1, 2)], [0]),
        ("a:train b:val", [near(0, 1)], [0]),  # of two classes too: they need not be the same
        ("a:train b:train", [near(0, 1)], []),
        # both
        ("a:train a:train a:val a:train", [exact(0, 1), near(0, 1, 3)], [1]),
        ("a:train a:train a:val a:train", [exact(0, 2), near(0, 1, 2)], [0, 1]),
        ("a:train b:val a:train", [exact(0, 1), near(0, 1, 2)], [0, 1]),  # what it was near to has gone
        ("a:train b:val a:train", [exact(0, 1), near(0, 2)], [0, 1]),
    ],
)
def test_what_is_left_out(rows: str, found: list[Group], dropped: list[int]) -> None:
    data = samples(rows)
    cleaned = clean(data, {}, found)
    assert sorted(cleaned.dropped) == dropped
    assert cleaned.rows.tolist() == [row for row in range(len(data)) if row not in dropped]
    assert all(cleaned.dropped.values())
    again = [Group(tuple(left), group.found_by) for group in found if len(left := kept(group, cleaned.rows)) > 1]
    assert not clean(data, {}, [one for one in again if one.exact or torn(data, one)]).dropped


def kept(group: Group, rows: np.ndarray) -> list[int]:
    return [row for row in group.rows if row in rows]


def torn(data: Samples, group: Group) -> bool:
    return len(set(data.splits[list(group.rows)])) > 1


def test_reasons() -> None:
    data = samples("a:train a:train a:val b:train a:train b:val")
    cleaned = clean(data, {"4.jpg": "the file is empty"}, [exact(0, 2), exact(3, 5), near(1, 2)])
    assert cleaned.dropped == {
        0: "the same file as 2.jpg",
        1: "nearly the same as 2.jpg of val",
        3: "the same file as 5.jpg",
        4: "the file is empty",
    }
    both = clean(samples("ant: bee: cat:"), {}, [exact(0, 1, 2)])
    assert set(both.dropped.values()) == {"the same file is labelled ant and bee and cat"}


def test_unreadable_files_go_first() -> None:
    """They cannot be copies of anything, but what is read of a file may change while it is looked at."""
    data = samples("a:train a:val a:train")
    cleaned = clean(data, {"1.jpg": "gone"}, [near(0, 2)])
    assert cleaned.dropped == {1: "gone"} and cleaned.groups == ["0.jpg", "0.jpg"]


def test_nothing_may_be_left() -> None:
    cleaned = clean(samples("a: b:"), {}, [exact(0, 1)])
    assert cleaned.rows.shape == (0,) and cleaned.groups == [] and len(cleaned.dropped) == 2


def test_names_that_a_manifest_cannot_hold() -> None:
    data = samples("a: a: a:")
    paths = [os.fsdecode(b"caf\xe9.jpg"), "größe 🐱\n.jpg", os.fsdecode(b"\xff/1.jpg")]
    data = Samples(data.root, paths, data.labels, data.splits, data.classes)
    cleaned = clean(data, {}, [])
    assert cleaned.rows.tolist() == [1]
    assert all("not valid UTF-8" in cleaned.dropped[row] for row in (0, 2))


def test_a_copy_whose_name_a_manifest_can_hold_is_kept() -> None:
    """Else the picture would be lost, though there is a file of it that can be named."""
    data = samples("a: a: b:")
    data = Samples(data.root, [os.fsdecode(b"\xff.jpg"), "1.jpg", "2.jpg"], data.labels, data.splits, data.classes)
    assert clean(data, {}, [exact(0, 1)]).rows.tolist() == [1, 2]


# Groups


@pytest.mark.parametrize(
    ("rows", "given", "found", "groups"),
    [
        ("a: a: a:", (), [], []),
        ("a: a: a:", (), [exact(0, 1)], []),  # one of each is left: nothing is to be kept together
        ("a: a: a: a:", (), [near(0, 2)], "0 1 0 3"),
        ("a: a: a: a:", (), [near(0, 2), near(1, 3)], "0 1 0 1"),
        ("a: a: a: a: a:", (), [exact(0, 1), near(0, 1, 4)], "0 2 3 0"),
        ("a: b: a:", (), [near(0, 1)], "0 0 2"),  # of two classes too
        ("a:train a:train a:val", (), [near(0, 1)], "0 0 2"),
        ("a:train a:val a:val", (), [near(0, 1, 2)], "1 1"),
        # what the data says of groups stays, and near copies unite them
        ("a: a: a: a:", "x x y z", [], "x x y z"),
        ("a: a: a: a:", "x x y z", [near(1, 2)], "x x x z"),
        ("a: a: a: a: a: a:", "x y x y z z", [near(1, 2), near(3, 5)], "x x x x x x"),
        ("a: a: a: a:", "x x y z", [exact(0, 3)], "x x y"),
        ("a: a: a: a:", "x y y x", [exact(0, 1)], "x y x"),
    ],
)
def test_groups(rows: str, given: str, found: list[Group], groups: str) -> None:
    data = samples(rows, given.split() if given else ())
    cleaned = clean(data, {}, found)
    expected = groups.split() if groups else []
    numbered = [f"{name}.jpg" if name.isdigit() else name for name in expected]
    assert partition(cleaned.groups) == partition(numbered)
    assert set(cleaned.groups) <= set(numbered) | set(data.paths)


def partition(names: Sequence[str]) -> list[int]:
    """For each the first of the same name: what belongs together, whatever it is called."""
    return [names.index(name) for name in names]


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_torn_and_no_leak_is_left(seed: int) -> None:
    """Whatever is found: of what is left, no group of copies stands in two splits or two classes."""
    random = np.random.default_rng(seed)
    count = 40
    data = samples(
        " ".join(f"{'abc'[random.integers(3)]}:{('train', 'val')[random.integers(2)]}" for _ in range(count))
    )
    order, near_order = random.permutation(count), random.permutation(count)
    found = [exact(*sorted(order[start : start + 3].tolist())) for start in range(0, 18, 3)]
    found += [near(*sorted(near_order[start : start + 4].tolist())) for start in range(0, 20, 4)]
    cleaned = clean(data, {data.paths[row]: "bad" for row in random.choice(count, 3).tolist()}, found)
    left = data.take(cleaned.rows)
    for group in found:
        rows = kept(group, cleaned.rows)
        assert len(rows) <= 1 or not group.exact
        assert len(set(data.splits[rows].tolist())) <= 1
        if cleaned.groups:
            assert len({cleaned.groups[cleaned.rows.tolist().index(row)] for row in rows}) <= 1
    if cleaned.groups:
        find_torn_groups(
            Samples(left.root, left.paths, left.labels, left.splits, left.classes, np.array(cleaned.groups)), ""
        )
