"""The labelled images that a command trains on: read, split, checked for what training needs."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tlkit import processes, run_folder
from tlkit.data.content import copies, digests, learn_digests
from tlkit.data.folders import Samples, is_same, read_samples
from tlkit.data.splits import split, split_with_copies, with_groups
from tlkit.errors import TlkitError, UsageError
from tlkit.networks.build import Loaded
from tlkit.networks.weights import fingerprint
from tlkit.progress import Progress
from tlkit.shards.folder import File

if TYPE_CHECKING:
    from tlkit.commands.learning import Options


def read(options: Options, progress: Progress) -> Samples:
    """The images with labels and splits, checked for what training needs; ``progress`` is told of hashing."""
    data, samples = options.data, labelled(options, progress)
    learn_digests(samples.root, samples.paths, progress)  # of use to several of the next steps
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


def labelled(options: Options, progress: Progress) -> Samples:
    """The images with labels, groups, and the splits that the data brings; ``progress`` is told of shards."""
    data = options.data
    if data.data is None:
        raise UsageError("missing argument DATA", where=f"tlkit {options.command}", remedy="give the folder of images")
    samples = same_for_all(lambda: read_samples(data.data, progress=progress))  # type: ignore[arg-type]
    if len(samples.classes) < 2:
        what = f"only one class ({samples.classes[0]})" if samples.classes else "no classes"
        raise TlkitError(what, where=data.data, remedy="a classifier needs at least two class folders")
    return with_groups(samples, data.group_regex) if data.group_regex is not None else samples


def same_for_all(read: Callable[[], Samples]) -> Samples:
    """What ``read`` finds here, once several processes have found the same.

    Raises:
        TlkitError: They have not: names a process, its machine, and the first image in which they differ.
    """
    samples = processes.each(read)
    if processes.count() == 1:
        return samples
    digest = hashlib.sha256("\n".join(_listed(samples)).encode(errors="surrogateescape")).hexdigest()
    found = processes.gathered((socket.gethostname(), len(samples), digest))
    other = next((number for number, one in enumerate(found) if one[2] != found[0][2]), None)
    if other is None:
        return samples
    lists = processes.gathered(_listed(samples))  # only now: they may be long
    first, second = lists[0], lists[other]
    differing = next(iter(sorted(set(first) ^ set(second))), "their order").split("\t")[0]
    what = f"process {other} ({found[other][0]}) sees other images than process 0 ({found[0][0]}): {found[other][1]}"
    what += f" and {found[0][1]}, the first that differs is {differing}"
    raise TlkitError(what, where=samples.root, remedy="give all processes the same folder")


def same_network(build: Callable[[], Loaded]) -> Loaded:
    """What ``build`` builds here, once several processes have built the same.

    Raises:
        TlkitError: They have not: names a process and its machine.
    """
    loaded = processes.each(build)
    if processes.count() > 1:
        found = processes.gathered((socket.gethostname(), fingerprint(loaded.network)))
        other = next((number for number, one in enumerate(found) if one[1] != found[0][1]), None)
        if other is not None:
            what = f"process {other} ({found[other][0]}) has other weights than process 0 ({found[0][0]})"
            raise TlkitError(what, where=loaded.weights, remedy="give all processes the same file")
    return loaded


def _listed(samples: Samples) -> list[str]:
    """One line an image: what a process must not see otherwise than the others."""
    names = (samples.classes[label] for label in samples.labels.tolist())
    groups = samples.groups.tolist() or [""] * len(samples)
    told = zip(samples.paths, names, samples.splits.tolist(), groups, strict=True)
    return ["\t".join((*line, _size(samples.root / line[0]))) for line in told]


def _size(path: File) -> str:
    """Bytes of a file, as text; empty where there is none."""
    try:
        return str(path.stat().st_size)
    except (OSError, ValueError):
        return ""


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
        if not data or not is_same(Path(data), options.data.data or run):
            continue
        held_out = [path for path, part in zip(samples.paths, samples.splits, strict=True) if part != "train"]
        if seen := sum(stored.get(path, ("", ""))[1] == "train" for path in held_out):
            return [
                f"{run} was trained on {seen} of the {len(held_out)} images measured on here: their figures flatter"
            ]
    return []
