"""Stratified, seeded splits, and cross-validation folds; images of one group are never torn apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from tlkit.data.folders import Samples, find_torn_groups
from tlkit.errors import TlkitError


def with_groups(samples: Samples, pattern: str) -> Samples:
    """Samples whose groups are what ``pattern`` finds in their paths (its first group, else the whole match).

    Raises:
        TlkitError: The pattern is not a regular expression, some path does not match, or a group stands in two splits.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise TlkitError(f"not a regular expression ({error})", where="--group-regex", remedy="correct it") from error
    groups = []
    for path in samples.paths:
        match = expression.search(path)
        group = match[min(1, expression.groups)] if match else None
        if group is None:
            what = f"'{pattern}' does not match {path}"
            raise TlkitError(what, where="--group-regex", remedy="make it match each path")
        groups.append(group)
    samples = replace(samples, groups=np.array(groups, dtype=str))
    find_torn_groups(samples, "--group-regex")
    return samples


def split_with_copies(samples: Samples, copies: np.ndarray, *, val: float, test: float, seed: int) -> Samples:
    """`split`, with copies of an image in the split of the first of them: no file stands on both sides.

    Args:
        samples: Without groups, which decide by themselves what belongs together.
        copies: For each sample the first that is the same (N).
        val: As for `split`.
        test: Likewise.
        seed: Likewise.

    Raises:
        TlkitError: The shares leave nothing to train on.
    """
    originals, original = np.unique(copies, return_inverse=True)
    parted = split(samples.take(originals), val=val, test=test, seed=seed)
    return replace(samples, splits=parted.splits[original])


def split(samples: Samples, *, val: float, test: float, seed: int) -> Samples:
    """Give each sample a split, the same share of each class, chosen by ``seed``.

    Every class keeps at least two training images. Without groups, it gives at least one to ``val`` (and to ``test`` if
    asked for) as soon as it has enough; with groups, whole groups move, so shares are approximate.

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
    choose = _choose_groups if len(samples.groups) else _choose
    for name, share in (("test", test), ("val", val)):
        if share > 0:
            left = np.flatnonzero(names == "train")
            of_left, keep = (share / (1 - test), 2) if name == "val" else (share, 3 if val > 0 else 2)
            names[choose(samples, left, of_left, keep, np.random.default_rng([seed, len(name)]))] = name
    return replace(samples, splits=names)


def _choose(samples: Samples, rows: np.ndarray, share: float, keep: int, random: np.random.Generator) -> np.ndarray:
    labels, chosen = samples.labels[rows], []
    ends = np.cumsum(np.bincount(labels, minlength=len(samples.classes)))
    for of_class in np.split(rows[np.argsort(labels, kind="stable")], ends[:-1]):
        count = min(max(1, round(len(of_class) * share)), max(0, len(of_class) - keep))
        chosen.append(random.permutation(of_class)[:count])
    return np.concatenate(chosen)


def _choose_groups(
    samples: Samples, rows: np.ndarray, share: float, keep: int, random: np.random.Generator
) -> np.ndarray:
    """Take groups in random order: each that brings the share of each class closer and leaves enough behind."""
    labels = samples.labels[rows]
    names, group_of = np.unique(samples.groups[rows], return_inverse=True)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))[:-1])
    total = np.bincount(labels, minlength=len(samples.classes))
    left, lacking = total.copy(), np.full(len(total), share)
    chosen = []
    for group in random.permutation(len(names)).tolist():
        touched, counts = np.unique(labels[members[group]], return_counts=True)
        part = counts / total[touched]
        closer = part @ part < 2 * (part @ lacking[touched])  # |lacking - part|^2 < |lacking|^2
        if closer and (left[touched] - counts >= keep).all():
            chosen.append(rows[members[group]])
            left[touched] -= counts
            lacking[touched] -= part
    if not chosen:
        raise TlkitError(
            f"{len(names)} groups cannot be split so that a share of {share:.2f} is set apart",
            where=samples.root,
            remedy="ask for another share, or name smaller groups",
        )
    return np.concatenate(chosen)


def choosing_part(samples: Samples, *, on_val: bool, seed: int, share: float = 0.2) -> tuple[str, np.ndarray]:
    """The images on which epochs, phases and the like are chosen, so that nothing that is reported was used to choose.

    That is val where there is a test split to report, or where it is asked for; else a stratified part of train.

    Args:
        samples: With splits.
        on_val: Choose on val in any case.
        seed: Of the part of train.
        share: Of each class in train; each keeps two images to be trained on.

    Returns:
        Where they are from (``val`` or ``train``), and their mask (N); ``""`` where there are too few images.
    """
    val = samples.splits == "val"
    if val.any() and (on_val or "test" in samples.splits):
        return "val", val
    train = np.flatnonzero(samples.splits == "train")
    mask = np.zeros(len(samples), dtype=bool)
    part = replace(samples.take(train), splits=np.full(len(train), "", dtype="<U5"))
    with suppress(TlkitError):  # groups that cannot be divided
        mask[train[split(part, val=share, test=0, seed=seed).splits == "val"]] = True
    return ("train", mask) if mask.any() else ("", mask)


def folds(labels: np.ndarray, groups: Sequence[str] | np.ndarray, seed: int, count: int = 5) -> list[np.ndarray]:
    """Cross-validation folds: for each, the rows held out.

    Without groups, each class is dealt out to the folds in turn: one of two or more rows is never held out whole.

    Args:
        labels: Class of each row (N).
        groups: Group of each row (N), or empty.
        seed: Of the shuffle.
        count: How many folds; fewer where there are fewer rows or groups.

    Returns:
        Disjoint index arrays that cover all rows together; empty where no two folds can be made.
    """
    if len(groups):
        return _group_folds(labels, np.asarray(groups), seed, count)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = min(count, len(labels))
    return [np.sort(dealt[first::count]) for first in range(count)] if count > 1 else []


def folds_of_copies(labels: np.ndarray, copies: np.ndarray, seed: int, count: int = 5) -> list[np.ndarray]:
    """`folds` in which copies of an image are held out with it, and everything else is as if they were not there.

    Args:
        labels: Class of each row (N).
        copies: For each row the first one that is the same (N); copies may be of several classes.
        seed: Of the shuffle.
        count: How many folds.
    """
    originals, original = np.unique(copies, return_inverse=True)
    fold = np.empty(len(originals), dtype=np.int64)
    parts = folds(labels[originals], (), seed, count)
    for number, part in enumerate(parts):
        fold[part] = number
    return [np.flatnonzero(fold[original] == number) for number in range(len(parts))]


def _group_folds(labels: np.ndarray, groups: np.ndarray, seed: int, count: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    count = min(count, smallest, len(np.unique(groups)))
    if count < 2:
        return []
    made = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    parts = made.split(np.zeros(len(labels)), labels, groups)
    return [held_out for _, held_out in parts if len(held_out)]
