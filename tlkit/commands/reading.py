"""The labelled images that a command trains on: read, split, checked for what training needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlkit import run_folder
from tlkit.data.content import copies, digests
from tlkit.data.folders import Samples, read_samples
from tlkit.data.loading import Progress
from tlkit.data.splits import split, split_with_copies, with_groups
from tlkit.errors import TlkitError, UsageError

if TYPE_CHECKING:
    from tlkit.commands.learning import Options


def read(options: Options, progress: Progress) -> Samples:
    """The images with labels and splits, checked for what training needs; ``progress`` is told of hashing."""
    data, samples = options.data, labelled(options)
    digests(samples.root, samples.paths, progress)  # of use to several of the next steps, and known from now on
    if not samples.splits.any():
        seed = options.compute.seed
        samples = parted(samples, val=data.val_fraction, test=data.test_fraction, seed=seed)
    refuse_too_few(samples, options)
    return samples


def parted(samples: Samples, *, val: float, test: float, seed: int) -> Samples:
    """The images with splits that no group, or else no file, stands on both sides of."""
    if len(samples.groups):
        return split(samples, val=val, test=test, seed=seed)
    same = copies(digests(samples.root, samples.paths))
    return split_with_copies(samples, same, val=val, test=test, seed=seed)


def labelled(options: Options) -> Samples:
    """The images with labels, groups, and the splits that the data brings."""
    data = options.data
    if data.data is None:
        raise UsageError("missing argument DATA", where=f"tlkit {options.command}", remedy="give the folder of images")
    samples = read_samples(data.data)
    if len(samples.classes) < 2:
        what = f"only one class ({samples.classes[0]})" if samples.classes else "no classes"
        raise TlkitError(what, where=data.data, remedy="a classifier needs at least two class folders")
    return with_groups(samples, data.group_regex) if data.group_regex is not None else samples


def refuse_too_few(samples: Samples, options: Options, which: str = "") -> None:
    of_train = np.bincount(samples.labels[samples.splits == "train"], minlength=len(samples.classes))
    if (of_train < 2).any():
        few = int(of_train.argmin())
        images = {0: "no training image", 1: "a single training image"}[int(of_train[few])]
        remedy = "each class needs at least two: add images, or remove the class"
        raise TlkitError(f"class '{samples.classes[few]}' has {images}{which}", where=options.data.data, remedy=remedy)
    if options.data.select_on == "val" and "val" not in samples.splits:
        raise TlkitError("there is no val split to choose on", where="--select-on", remedy="leave it out")


def seen_before(options: Options, samples: Samples) -> list[str]:
    """What to say where a run that is started from was trained on images that are now to be measured on."""
    for run in (Path(options.model), Path(options.weights)):
        if not run_folder.is_run(run) or not (run / run_folder.RECIPE).is_file():
            continue
        stored, data = run_folder.read_splits(run) or {}, run_folder.read_recipe(run).get("data")
        if not data or not Path(data).exists() or not Path(data).samefile(options.data.data or run):
            continue
        held_out = [path for path, part in zip(samples.paths, samples.splits, strict=True) if part != "train"]
        if seen := sum(stored.get(path, ("", ""))[1] == "train" for path in held_out):
            return [
                f"{run} was trained on {seen} of the {len(held_out)} images measured on here: their figures flatter"
            ]
    return []
