"""Stratified, seeded splits, and cross-validation folds; images of one group are never torn apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tlkit.data.folders import Samples
from tlkit.errors import TlkitError


def with_groups(samples: Samples, pattern: str) -> Samples:
    """Samples whose groups are what ``pattern`` finds in their paths (its first group, else the whole match).

    Raises:
        TlkitError: The pattern is not a regular expression, or some path does not match.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise TlkitError(f"not a regular expression ({error})", where="--group-regex", remedy="correct it") from error
    groups = []
    for path in samples.paths:
        match = expression.search(path)
        if match is None:
            raise TlkitError(f"'{pattern}' does not match {path}", where="--group-regex", remedy="make it match each path")
        groups.append(match.group(1) if expression.groups else match.group())
    return replace(samples, groups=np.array(groups, dtype=str))


def split(samples: Samples, *, val: float, test: float, seed: int) -> Samples:
    """Give each sample a split, the same share of each class, chosen by ``seed``.

    Without groups, every class keeps at least two training images, and gives at least one to ``val`` (and to ``test``
    if asked for) as soon as it has enough. With groups, whole groups move, so shares are approximate.

    Args:
        samples: With or without groups.
        val: Share of each class for ``val``, in [0, 1).
        test: Share of each class for ``test``, in [0, 1).
        seed: Of the random choice.

    Raises:
        TlkitError: The shares leave nothing to train on, or there are too few groups.
    """
    if val + test >= 1:
        raise TlkitError(
            f"--val-fraction {val:g} and --test-fraction {test:g} leave nothing to train on",
            where=samples.root,
            remedy="let them add up to less than 1",
        )
    names = np.full(len(samples), "train", dtype="<U5")
    for name, share in (("test", test), ("val", val)):
        if share <= 0:
            continue
        left = np.flatnonzero(names == "train")
        of_left = share / (1 - test) if name == "val" else share
        choose = _choose_groups if len(samples.groups) else _choose
        chosen = choose(samples, left, of_left, np.random.default_rng([seed, len(name)]), seed)
        names[chosen] = name
    return replace(samples, splits=names)


def _choose(samples: Samples, rows: np.ndarray, share: float, random: np.random.Generator, _: int) -> np.ndarray:
    chosen = []
    for label in range(len(samples.classes)):
        of_class = rows[samples.labels[rows] == label]
        count = min(max(1, round(len(of_class) * share)), max(0, len(of_class) - 2))
        chosen.append(random.permutation(of_class)[:count])
    return np.concatenate(chosen)


def _choose_groups(samples: Samples, rows: np.ndarray, share: float, _: np.random.Generator, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    folds = max(2, round(1 / share))
    labels, groups = samples.labels[rows], samples.groups[rows]
    if len(np.unique(groups)) < folds:
        raise TlkitError(
            f"{len(np.unique(groups))} groups cannot be split so that a share of {share:.2f} is set apart",
            where=samples.root,
            remedy="use a larger share, or a finer --group-regex",
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    return rows[next(splitter.split(np.zeros(len(rows)), labels, groups))[1]]


def folds(labels: np.ndarray, groups: Sequence[str] | np.ndarray, seed: int, count: int = 5) -> list[np.ndarray]:
    """Cross-validation folds: for each, the rows held out.

    Args:
        labels: Class of each row (N).
        groups: Group of each row (N), or empty.
        seed: Of the shuffle.
        count: How many folds; fewer where the smallest class has fewer rows (or there are fewer groups), at least 2.

    Returns:
        Disjoint index arrays that cover all rows together; empty where a fold cannot be made.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    count = min(count, len(np.unique(groups)) if len(groups) else smallest)
    if count < 2:
        return []
    splitter = StratifiedGroupKFold if len(groups) else StratifiedKFold
    made = splitter(n_splits=count, shuffle=True, random_state=seed)
    return [held_out for _, held_out in made.split(np.zeros(len(labels)), labels, groups if len(groups) else None)]
