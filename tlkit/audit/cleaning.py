"""Which images a cleaned manifest leaves out, and which it keeps together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tlkit.audit.duplicates import Group
from tlkit.data.folders import Samples

ORDER = {"test": 0, "val": 1, "train": 2, "": 3}
"""Of copies, that in the part to be reported on is kept: then figures stay comparable, and honest."""


UNSPEAKABLE = "its name is not valid UTF-8, which a manifest has to be: rename it"


@dataclass(frozen=True)
class Cleaned:
    """What is left of the images.

    Args:
        rows: The images that are kept, ascending.
        dropped: Why each other one is not, by row.
        groups: Of each kept image (rows): near duplicates share one, which a later split will not tear apart. Empty
            where nothing is to be kept together.
    """

    rows: np.ndarray
    dropped: dict[int, str]
    groups: list[str]


def clean(samples: Samples, unreadable: Mapping[str, str], found: Sequence[Group]) -> Cleaned:
    """Leave out what cannot be read, all but one of each set of copies, and what leaks from one split into another.

    Copies of several classes are all left out, since nobody knows which label is right. Near duplicates stay, but for
    those of train that also stand in val or test, and those of val that also stand in test.

    Args:
        samples: All images.
        unreadable: Reasons, by path.
        found: Groups of copies; rows are those of ``samples``.
    """
    dropped = {row: unreadable[path] for row, path in enumerate(samples.paths) if path in unreadable}
    dropped |= {row: UNSPEAKABLE for row, path in enumerate(samples.paths) if not _is_text(path)}
    splits = samples.splits.tolist()
    for group in found:
        if group.exact:
            _drop_copies(samples, splits, group, dropped)
    for group in found:
        if not group.exact:
            _drop_leaks(samples, splits, group, dropped)
    rows = np.array([row for row in range(len(samples)) if row not in dropped], dtype=np.int64)
    return Cleaned(rows, dropped, _groups(samples, found, rows))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _drop_copies(samples: Samples, splits: Sequence[str], group: Group, dropped: dict[int, str]) -> None:
    names = sorted({samples.classes[label] for label in samples.labels[list(group.rows)]})
    if len(names) > 1:
        dropped |= dict.fromkeys(group.rows, f"the same file is labelled {' and '.join(names)}")
        return
    if left := [row for row in group.rows if row not in dropped]:
        kept = min(left, key=lambda row: (ORDER[splits[row]], row))
        dropped |= {row: f"the same file as {samples.paths[kept]}" for row in left if row != kept}


def _drop_leaks(samples: Samples, splits: Sequence[str], group: Group, dropped: dict[int, str]) -> None:
    left = [row for row in group.rows if row not in dropped]
    if len({splits[row] for row in left}) > 1:
        kept = min(left, key=lambda row: (ORDER[splits[row]], row))
        of = splits[kept]
        reason = f"nearly the same as {samples.paths[kept]} of {of}"
        dropped |= {row: reason for row in left if splits[row] != of}


def _groups(samples: Samples, found: Sequence[Group], rows: np.ndarray) -> list[str]:
    given = samples.groups.tolist() if len(samples.groups) else list(samples.paths)
    joined = {row: row for row in range(len(samples))}  # each image's way to the first of its group

    def first(row: int) -> int:
        while joined[row] != row:
            row = joined[row]
        return row

    together: dict[str, int] = {}
    sets = [group.rows for group in found] + [(row, together.setdefault(one, row)) for row, one in enumerate(given)]
    kept = set(rows.tolist())
    for one in sets:
        left = [row for row in one if row in kept]
        for row in left[1:]:
            low, high = sorted((first(left[0]), first(row)))
            joined[high] = low
    if not len(samples.groups) and all(row == first(row) for row in kept):
        return []
    return [given[first(row)] for row in rows.tolist()]
