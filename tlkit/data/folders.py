"""What images there are, with which labels: folders of class folders, manifests, and shards."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tlkit import config
from tlkit.data.decode import HEIC_SUFFIXES, IMAGE_SUFFIXES, heic_available
from tlkit.data.manifest import read_manifest
from tlkit.errors import TlkitError, did_you_mean
from tlkit.progress import Progress, silent
from tlkit.shards.folder import Folder, Shards
from tlkit.shards.reading import ENDING, shards_at
from tlkit.shards.remote import is_url
from tlkit.shards.table import SPLITS as SPLIT_NAMES
from tlkit.shards.table import Names

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Complain = Callable[[TlkitError], None]
"""Told what is wrong with data that can be read all the same: raises, or takes note."""


def refuse(error: TlkitError) -> None:
    """A `Complain` that raises."""
    raise error


@dataclass(frozen=True)
class Samples:
    """Images with their labels: sorted by class and name, or as they lie in their shards.

    Args:
        root: Folder that ``paths`` are relative to, or the shards that they lie in.
        paths: One a sample, with forward slashes (N).
        labels: Index into ``classes`` of each sample (N).
        splits: ``train``, ``val`` or ``test`` of each sample, ``""`` where the data has no splits (N).
        classes: Sorted class names.
        groups: What a sample belongs to, such as a patient or a video; empty where nothing is said of it (N or 0).
        ignored: Files passed over, counted by what they end in or by where they lie.
        heic: HEIC photos that were left out because the extra is not installed.
    """

    root: Folder
    paths: Sequence[str]
    labels: np.ndarray
    splits: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=str))
    ignored: Counter[str] = field(default_factory=Counter)
    heic: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray) -> Samples:
        """The samples in the given rows (indices, or a mask of N)."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        groups = self.groups[rows] if len(self.groups) else self.groups
        names = self.paths
        paths = names.take(rows) if isinstance(names, Names) else [names[row] for row in rows.tolist()]
        return replace(self, paths=paths, labels=self.labels[rows], splits=self.splits[rows], groups=groups)

    def shards(self) -> np.ndarray:
        """Number of the shard that each sample lies in; empty where each is a file of its own (N or 0)."""
        return self.paths.shard if isinstance(self.paths, Names) else np.empty(0, dtype=np.int32)

    def remarks(self) -> list[str]:
        """What a person should know about files that were passed over."""
        lines = []
        if self.ignored:
            kinds = ", ".join(f"{count} {suffix or 'without ending'}" for suffix, count in self.ignored.most_common(4))
            lines.append(f"{self.ignored.total()} files in {self.root} were ignored ({kinds})")
        if self.heic:
            lines.append(f"{self.heic} HEIC photos were left out: pip install 'tlkit[heic]' to read them")
        return lines


def read_samples(data: Path, complain: Complain = refuse, progress: Progress = silent) -> Samples:
    """Find the labelled images of ``data``.

    Args:
        data: A folder with ``train/ val/ test/`` (also ``valid``, ``validation``) of class folders, a folder of class
            folders, a CSV or Parquet manifest with columns ``path,label[,split][,group]``, or shards.
        complain: Told of classes that differ between splits, groups that stand in two, folders that cannot be read.
        progress: Told of shards that are gone through.

    Raises:
        TlkitError: Nothing is there, or it has no images or no classes.
    """
    if (shards := shards_at(data, is_image, progress)) is not None:
        samples = in_shards(shards)
        if samples.classes == ("",):
            what, remedy = "images without labels", "put name.cls or name.json beside each name.jpg"
            raise TlkitError(what, where=shards, remedy=remedy)
        find_torn_groups(samples, data, complain)
        return samples
    return _read_folders(data, complain) if is_folder(data) else _read_manifest(data, complain)


def in_shards(shards: Shards) -> Samples:
    """The images in shards, in the order in which they lie there, so that each shard is read from one end to the other.

    Where nothing is said of any image's class there is one class without a name.

    Raises:
        TlkitError: There are none, or of some no class or no split is known.
    """
    table, readable = shards.table, shards.table.lengths >= 0
    if not readable.any():
        raise TlkitError("no images", where=shards, remedy="check what is in the shards: name.jpg beside name.cls")
    labels, splits = (_like_the_one_before(values, readable) for values in (table.labels, table.splits))
    classes = table.classes or ("",)
    if (labels < 0).all():
        labels = np.zeros(len(labels), dtype=np.int64)
    else:
        _refuse_some(table.names, labels < 0, "no label", shards)
    if splits.any():
        _refuse_some(table.names, splits == 0, "no split", shards)
    groups = table.groups  # an image of which no group is said stands alone
    groups = np.where(groups == "", np.array(list(table.names)), groups) if (groups != "").any() else groups[:0]
    empty = len(shards.shards) - len(np.unique(table.names.shard))
    return Samples(
        root=shards,
        paths=table.names,
        labels=labels,
        splits=np.array(SPLIT_NAMES, dtype="<U5")[splits],
        classes=classes,
        groups=groups,
        ignored=Counter({"shards without images": empty} if empty else {}),
    )


def _like_the_one_before(values: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Values (N) of which those of broken places in a shard are as those of the image before, or else of the first.

    Nobody knows what was there: it is named, or left out, like any image that cannot be read.
    """
    last = np.maximum.accumulate(np.where(readable, np.arange(len(readable)), -1))
    return values[np.where(last < 0, int(readable.argmax()), last)]


def _refuse_some(names: Sequence[str], lacking: np.ndarray, what: str, shards: Shards) -> None:
    if lacking.any():
        which = f"{int(lacking.sum())} of {len(lacking)} images have {what} (first {names[int(lacking.argmax())]})"
        raise TlkitError(which, where=shards, remedy="say it of all, in name.json beside each name.jpg, or of none")


def _read_folders(data: Path, complain: Complain) -> Samples:
    folders, files = names_in(data)
    splits = [name for name in folders if name.lower() in SPLIT_FOLDERS and names_in(data / name)[0]]
    others = [name for name in folders if name not in splits]
    if "train" in map(str.lower, splits) or (splits and not others):
        return _read_split_folders(data, splits, others, _count_loose(files), complain)
    if splits:
        _refuse_train_by_another_name(data, splits[0], others)
    found, ignored = _read_class_folders(data, folders, complain)
    if not any(found.values()):
        loose = sum(map(is_image, files))
        what = f"{loose} images, but no class folders" if loose else "no images"
        remedy = "put the images of each class into a folder of its own, named after it"
        raise TlkitError(what, where=data, remedy=remedy)
    return _assemble(data, {"": found}, ignored + _count_loose(files))


def _refuse_train_by_another_name(data: Path, split: str, others: Sequence[str]) -> None:
    # "training/" and "validation/" are no classes where both hold cat/ and dog/
    classes = set(names_in(data / split)[0])
    if alike := [name for name in others if classes & set(names_in(data / name)[0])]:
        what = f"{alike[0]}/ and {split}/ hold folders of the same names, but there is no train/"
        raise TlkitError(what, where=data, remedy="call the folder to learn from 'train'")


def _read_split_folders(
    data: Path, names: Sequence[str], others: Sequence[str], ignored: Counter[str], complain: Complain
) -> Samples:
    found: dict[str, dict[str, list[str]]] = {}
    ignored = ignored + Counter({f"in folder {name}/": sum(1 for _ in walk(data / name, complain)) for name in others})
    for name in names:
        split = SPLIT_FOLDERS[name.lower()]
        if split in found:
            twice = [other for other in names if SPLIT_FOLDERS[other.lower()] == split]
            raise TlkitError(f"{' and '.join(twice)} both mean {split}", where=data, remedy="keep one of them")
        classes, files = names_in(data / name)
        in_classes, not_images = _read_class_folders(data / name, classes, complain)
        found[split] = {label: [f"{name}/{path}" for path in paths] for label, paths in in_classes.items()}
        ignored += not_images + _count_loose(files)
    needed = [found["train"]] if "train" in found else list(found.values())
    if not any(paths for in_split in needed for paths in in_split.values()):
        what = "no images in train" if "train" in found else "no images"
        raise TlkitError(what, where=data, remedy="put images into the class folders")
    for split, in_split in found.items():
        _compare_classes(data, split, set(in_split), set(found.get("train", in_split)), complain)
    return _assemble(data, found, ignored)


def _compare_classes(data: Path, split: str, classes: set[str], trained: set[str], complain: Complain) -> None:
    if extra := sorted(classes - trained):
        guess = did_you_mean(extra[0], trained - classes)
        remedy = guess or "rename or remove them: what was never trained cannot be recognised"
        complain(TlkitError(f"{split} has class folders that train has not: {_few(extra)}", where=data, remedy=remedy))
    if missing := sorted(trained - classes):
        remedy = f"add them; an empty folder, such as {split}/{missing[0]}, says that none is meant"
        complain(TlkitError(f"{split} lacks class folders that train has: {_few(missing)}", where=data, remedy=remedy))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_class_folders(
    root: Path, classes: Sequence[str], complain: Complain
) -> tuple[dict[str, list[str]], Counter[str]]:
    found: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    for name in classes:
        found[name] = []
        for path in walk(root / name, complain):
            if is_image(path.name):
                found[name].append(path.relative_to(root).as_posix())
            else:
                ignored[kind(path.name)] += 1
    return found, ignored


def _assemble(root: Path, found: dict[str, dict[str, list[str]]], ignored: Counter[str]) -> Samples:
    classes = tuple(sorted({name for in_split in found.values() for name in in_split}))
    rows = [
        (path, name, split)
        for split, in_split in found.items()
        for name, paths in sorted(in_split.items())
        for path in sorted(paths)
    ]
    index = {name: number for number, name in enumerate(classes)}
    heic = 0
    if any(Path(row[0]).suffix.lower() in HEIC_SUFFIXES for row in rows) and not heic_available():
        kept = [row for row in rows if Path(row[0]).suffix.lower() not in HEIC_SUFFIXES]
        heic, rows = len(rows) - len(kept), kept
        if not rows:
            remedy = "pip install 'tlkit[heic]' to read them"
            raise TlkitError(f"all {heic} images are HEIC photos", where=root, remedy=remedy)
    return Samples(
        root=root,
        paths=[row[0] for row in rows],
        labels=np.array([index[row[1]] for row in rows], dtype=np.int64),
        splits=np.array([row[2] for row in rows], dtype="<U5"),
        classes=classes,
        ignored=ignored,
        heic=heic,
    )


def _read_manifest(path: Path, complain: Complain) -> Samples:
    manifest = read_manifest(path)
    columns = manifest.columns
    paths, labels = columns["path"], columns["label"]
    splits = [SPLIT_FOLDERS.get(value.lower(), value) for value in columns.get("split", [""] * len(paths))]
    for row, split in enumerate(splits):
        if split not in ("", *SPLITS):
            what = f"unknown split '{split}' ({manifest.place(row)})"
            raise TlkitError(what, where=path, remedy="use train, val or test")
    if "" in splits and any(splits):
        what = f"some rows have a split and some have none ({manifest.place(splits.index(''))})"
        raise TlkitError(what, where=path, remedy="fill in the column 'split'")
    classes = tuple(sorted(set(labels)))
    trained = {label for label, split in zip(labels, splits, strict=True) if split in ("train", "")}
    if trained and (extra := sorted(set(classes) - trained)):
        complain(TlkitError(f"labels that no row of train has: {_few(extra)}", where=path, remedy="correct them"))
    groups = columns.get("group", [])
    if any(groups):  # an image of which no group is said stands alone
        groups = [group or name for group, name in zip(groups, paths, strict=True)]
    index = {name: number for number, name in enumerate(classes)}
    samples = Samples(
        root=path.parent,
        paths=[name.replace("\\", "/") if os.name == "nt" else name for name in paths],
        labels=np.array([index[label] for label in labels], dtype=np.int64),
        splits=np.array(splits, dtype="<U5"),
        classes=classes,
        groups=np.array(groups if any(groups) else [], dtype=str),
    )
    find_torn_groups(samples, path, complain)
    return samples


def is_there(data: Path) -> bool:
    """Whether there may be images: shards are looked for when they are read."""
    typed = config.spelled(data)
    return is_url(typed) or typed.endswith(ENDING) or data.exists()


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name the same images."""
    there = [path.exists() for path in (one, other)]
    return one.samefile(other) if all(there) else not any(there) and config.plain(one) == config.plain(other)


def find_torn_groups(samples: Samples, where: object, complain: Complain = refuse) -> None:
    """Complain of each group that the splits which the data came with tear apart."""
    home: dict[str, str] = {}
    torn: set[str] = set()
    for group, split in zip(samples.groups.tolist(), samples.splits.tolist(), strict=False):
        if home.setdefault(group, split) != split and group not in torn:
            torn.add(group)
            what = f"images of group '{group}' stand in {home[group]} and in {split}"
            complain(TlkitError(what, where=where, remedy="move them into one split, or name no groups"))


def is_folder(path: Path) -> bool:
    """Whether a path is a folder.

    Raises:
        TlkitError: Nothing is there, or it cannot be reached.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as error:
        raise TlkitError("no such file or folder", where=path, remedy="check the path") from error
    except (OSError, ValueError) as error:  # too long, no permission, a link to itself; a zero byte
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise TlkitError(f"cannot be read ({reason})", where=path, remedy="check the path") from error


def names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, sorted and without hidden ones, and of its files."""
    _, names, files = next(os.walk(folder, onerror=lambda error: refuse(_unreadable(error))))
    return sorted(name for name in names if not name.startswith(".")), files


def walk(folder: Path, complain: Complain = refuse) -> Iterator[Path]:
    """Files below ``folder`` in sorted order; links to folders are followed, but never in a circle or back up."""
    seen = {_identity(parent) for parent in folder.absolute().parents}
    for parent, names, files in os.walk(folder, onerror=lambda error: complain(_unreadable(error)), followlinks=True):
        here = _identity(Path(parent))
        if here in seen:
            names.clear()
            continue
        seen.add(here)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> TlkitError:
    return TlkitError(f"cannot be read ({error.strerror})", where=error.filename, remedy="check the rights")


def is_image(name: str) -> bool:
    """Whether a file is called like an image."""
    # "._photo.jpg" beside "photo.jpg" is what macOS leaves on foreign disks: not an image in spite of its name
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | HEIC_SUFFIXES and not name.startswith(".")


def _count_loose(files: Sequence[str]) -> Counter[str]:
    """Files beside class folders."""
    return Counter("outside class folders" if is_image(name) else kind(name) for name in files)


def kind(name: str) -> str:
    """What a file that is ignored is counted as."""
    return "hidden" if name.startswith(".") else Path(name).suffix.lower()
