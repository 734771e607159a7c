"""The two domains of `adapt`: read, matched by class names, the source split."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import config, processes, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import stored_split, write_splits
from tlkit.commands.reading import parted, same_for_all
from tlkit.data.content import digests, learn_digests
from tlkit.data.folders import Samples, read_samples
from tlkit.data.new_images import read_images
from tlkit.data.splits import with_groups
from tlkit.errors import TlkitError, did_you_mean

TARGET = "target.csv"


@dataclass(frozen=True)
class Pair:
    """Source and target.

    Args:
        source: Labelled images; with the splits ``train`` and ``val`` once they are split.
        target: Images, whose own classes, if any, serve to report alone.
        labels: Class of each target image among the source's (N); -1 where it has none of them.
        labelled: Whether the target has classes at all.
    """

    source: Samples
    target: Samples
    labels: np.ndarray
    labelled: bool

    @property
    def shared(self) -> tuple[str, ...]:
        """Classes of both."""
        return tuple(name for name in self.source.classes if self.labelled and name in self.target.classes)

    @property
    def only_in_source(self) -> tuple[str, ...]:
        """Classes of the source that the target has not; none where it has no classes at all."""
        return tuple(name for name in self.source.classes if self.labelled and name not in self.target.classes)

    @property
    def only_in_target(self) -> tuple[str, ...]:
        """Classes of the target that the source has not."""
        return tuple(name for name in self.target.classes if self.labelled and name not in self.source.classes)

    def images(self) -> dict[str, Any]:
        """How many there are."""
        splits = self.source.splits
        source = {name: int((splits == name).sum()) for name in ("train", "val")}
        return {"source": source, "target": len(self.target), "reported": int((self.labels >= 0).sum())}

    def told(self) -> str:
        """One line for a person."""
        source = self.images()["source"]
        counts = f"{source['train']} train, {source['val']} val"
        known = "labels to report on" if self.labelled else "no labels"
        return f"source: {len(self.source.classes)} classes, {counts}; target: {len(self.target)} images, {known}"

    def readable(self, of_source: np.ndarray, of_target: np.ndarray) -> Pair:
        """Without the images that cannot be read: masks of those that can."""
        source, target = self.source.take(of_source), self.target.take(of_target)
        return replace(self, source=source, target=target, labels=self.labels[of_target])


def read_domains(domains: config.Domains, console: Console) -> Pair:
    """Read both, and say which classes only one of them has.

    Raises:
        TlkitError: The source has no labels or a single class, or the classes of both have no name in common.
    """
    from_, to = domains.source, domains.target
    assert from_ is not None and to is not None
    source = same_for_all(lambda: read_samples(from_, progress=console.progress))
    if len(source.classes) < 2:
        raise TlkitError(
            "only one class", where=domains.source, remedy="a classifier needs at least two class folders of the source"
        )
    if domains.group_regex is not None:
        source = with_groups(source, domains.group_regex)
    target = same_for_all(lambda: read_images(to, progress=console.progress))
    for samples in (source, target):
        for remark in samples.remarks():
            console.warn(remark)
    labelled = target.classes != ("",)
    place = {name: number for number, name in enumerate(source.classes)}
    names = np.array([place.get(name, -1) for name in target.classes], dtype=np.int64)
    pair = Pair(source, target, names[target.labels], labelled)
    if labelled and not pair.shared:
        guess = did_you_mean(target.classes[0], source.classes)
        remedy = guess or "name its class folders as the source's, or give one folder of images without classes"
        some = ", ".join(target.classes[:3]) + (" ..." if len(target.classes) > 3 else "")
        raise TlkitError(f"shares no class with the source ({some})", where=domains.target, remedy=remedy)
    for which, only in (("source", pair.only_in_source), ("target", pair.only_in_target)):
        if only:
            told = ", ".join(only[:5]) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            console.warn(f"only in the {which}: {told}; what is reported is of the {len(pair.shared)} shared classes")
    for samples in (source, target):
        learn_digests(samples.root, samples.paths, console.progress)
    same = {file for file in digests(source.root, source.paths) if file}
    shared = sum(file in same for file in digests(target.root, target.paths))
    if shared:
        console.warn(f"{shared} of the target's images are files of the source, too: their figures flatter")
    return pair


def split_source(pair: Pair, domains: config.Domains, seed: int, console: Console, run: Path | None = None) -> Pair:
    """Set a part of the source apart as val, or take up the split that a run stored; its test split is left out.

    Raises:
        TlkitError: A class has no training image, or there is nothing to set apart.
    """
    source = pair.source
    if run is not None:
        kept = processes.on_first(lambda: _stored(run / TARGET))
        if kept != _listed(pair.target):
            what = "the target's images are not those that the run was begun with"
            raise TlkitError(what, where=pair.target.root, remedy="put them back, or start a new run")
        source = stored_split(source, run)
        return replace(pair, source=source.take(source.splits != ""))
    if not source.splits.any():
        source = parted(source, val=domains.val_fraction, test=0, seed=seed)
    elif "val" not in source.splits:
        of_train = source.take(source.splits == "train")
        bare = replace(of_train, splits=np.full(len(of_train), "", dtype="<U5"))
        source = parted(bare, val=domains.val_fraction, test=0, seed=seed)
    if left_out := int((source.splits == "test").sum()):
        console.say(f"{left_out} images of the source's test split are left out")
    source = source.take(source.splits != "test")
    refuse_unusable(source)
    return replace(pair, source=source)


def refuse_unusable(source: Samples) -> None:
    """Raise where the source cannot be learnt from, or not be measured on.

    Raises:
        TlkitError: A class has no training image, or no image is set apart.
    """
    of_class = np.bincount(source.labels[source.splits == "train"], minlength=len(source.classes))
    if not of_class.all():
        name = source.classes[int(of_class.argmin())]
        raise TlkitError(f"class '{name}' has no training image", where=source.root, remedy="add some, or remove it")
    if "val" not in source.splits:
        remedy = "give more images, or a larger --val-fraction"
        raise TlkitError("there are too few images to set some apart as val", where=source.root, remedy=remedy)


def write_domains(run: Path, pair: Pair) -> None:
    """Store the source's split, and which images of the target were adapted to."""
    write_splits(run, pair.source)
    run_folder.write_rows(run / TARGET, ("path", "digest"), _listed(pair.target))


def _stored(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def _listed(target: Samples) -> list[tuple[str, str]]:
    """Path and digest of each image."""
    files = digests(target.root, target.paths)
    return [(path, file or "") for path, file in zip(target.paths, files, strict=True)]
