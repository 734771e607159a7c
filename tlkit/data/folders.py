"""What images there are, with which labels: folders of class folders, manifests, and plain folders of new images."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tlkit.data.decode import HEIC_SUFFIXES, IMAGE_SUFFIXES, heic_available
from tlkit.errors import TlkitError, did_you_mean

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Samples:
    """Images with their labels, sorted by class and name.

    Args:
        root: Folder that ``paths`` are relative to.
        paths: One a sample, with forward slashes (N).
        labels: Index into ``classes`` of each sample (N).
        splits: ``train``, ``val`` or ``test`` of each sample, ``""`` where the data has no splits (N).
        classes: Sorted class names.
        groups: What a sample belongs to, such as a patient or a video; empty where nothing is said of it (N or 0).
        ignored: Files that are not images, counted by what they end in.
        heic: HEIC photos that were left out because the extra is not installed.
    """

    root: Path
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
        paths = [self.paths[row] for row in rows]
        return replace(self, paths=paths, labels=self.labels[rows], splits=self.splits[rows], groups=groups)

    def remarks(self) -> list[str]:
        """What a person should know about files that were passed over."""
        lines = []
        if self.ignored:
            kinds = ", ".join(f"{count} {suffix or 'without ending'}" for suffix, count in self.ignored.most_common(4))
            lines.append(f"{self.ignored.total()} files in {self.root} are not images and were ignored ({kinds})")
        if self.heic:
            lines.append(f"{self.heic} HEIC photos were left out: pip install 'tlkit[heic]' to read them")
        return lines


def read_samples(data: Path) -> Samples:
    """Find the labelled images of ``data``.

    Args:
        data: A folder with ``train/ val/ test/`` (also ``valid``, ``validation``) of class folders, a folder of class
            folders, or a CSV or Parquet manifest with columns ``path,label[,split][,group]``.

    Raises:
        TlkitError: Nothing is there, it has no images or no classes, or class folders differ between splits.
    """
    if data.is_file():
        return _read_manifest(data)
    if not data.is_dir():
        raise TlkitError("no such folder", where=data, remedy="check the path")
    try:
        return _read_folders(data)
    except PermissionError as error:
        raise TlkitError("no permission to read it", where=error.filename, remedy="check the rights") from error


def _read_folders(data: Path) -> Samples:
    folders = sorted(entry.name for entry in os.scandir(data) if entry.is_dir() and not entry.name.startswith("."))
    split_folders = [name for name in folders if name.lower() in SPLIT_FOLDERS and _has_folders(data / name)]
    if "train" in map(str.lower, split_folders) or (split_folders and len(split_folders) == len(folders)):
        return _read_split_folders(data, split_folders, [name for name in folders if name not in split_folders])
    found, ignored = _read_class_folders(data, folders)
    ignored += Counter(_suffix(e.name) for e in os.scandir(data) if e.is_file() and not _is_image(e.name))
    loose = sum(entry.is_file() and _is_image(entry.name) for entry in os.scandir(data))
    if not found or not any(found.values()):
        what = f"{loose} images, but no class folders" if loose else "no images"
        raise TlkitError(what, where=data, remedy="put the images of each class into a folder of its own, named after it")
    return _assemble(data, {"": found}, ignored)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def _read_split_folders(data: Path, names: list[str], others: list[str]) -> Samples:
    found: dict[str, dict[str, list[str]]] = {}
    ignored: Counter[str] = Counter({f"in folder {name}/": sum(1 for _ in _walk(data / name)) for name in others})
    for name in names:
        split = SPLIT_FOLDERS[name.lower()]
        if split in found:
            twice = [other for other in names if SPLIT_FOLDERS[other.lower()] == split]
            raise TlkitError(f"{' and '.join(twice)} both mean {split}", where=data, remedy="keep one of them")
        classes = sorted(e.name for e in os.scandir(data / name) if e.is_dir() and not e.name.startswith("."))
        in_classes, not_images = _read_class_folders(data / name, classes)
        found[split] = {label: [f"{name}/{path}" for path in paths] for label, paths in in_classes.items()}
        ignored += not_images
    if not any(any(classes.values()) for classes in found.values()):
        raise TlkitError("no images", where=data, remedy="put images into the class folders of train/")
    for split, classes in found.items():
        _refuse_other_classes(data, split, set(classes), set(found.get("train", classes)))
    return _assemble(data, found, ignored)


def _refuse_other_classes(data: Path, split: str, classes: set[str], trained: set[str]) -> None:
    if extra := sorted(classes - trained):
        guess = did_you_mean(extra[0], trained - classes)
        raise TlkitError(
            f"{split} has class folders that train has not: {_few(extra)}",
            where=data,
            remedy=guess or "rename or remove them: what was never trained cannot be recognised",
        )
    if missing := sorted(trained - classes):
        raise TlkitError(
            f"{split} lacks class folders that train has: {_few(missing)}",
            where=data,
            remedy=f"add them; an empty folder, such as {split}/{missing[0]}, says that none is meant",
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_class_folders(root: Path, classes: Sequence[str]) -> tuple[dict[str, list[str]], Counter[str]]:
    found: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    for name in classes:
        found[name] = []
        for path in _walk(root / name):
            if _is_image(path.name):
                found[name].append(path.relative_to(root).as_posix())
            else:
                ignored[_suffix(path.name)] += 1
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
    return Samples(
        root=root,
        paths=[row[0] for row in rows],
        labels=np.array([index[row[1]] for row in rows], dtype=np.int64),
        splits=np.array([row[2] for row in rows], dtype="<U5"),
        classes=classes,
        ignored=ignored,
        heic=heic,
    )


def _read_manifest(path: Path) -> Samples:
    if path.suffix.lower() not in MANIFEST_SUFFIXES:
        raise TlkitError(
            "neither a folder nor a manifest", where=path, remedy=f"give a folder or a file in {', '.join(MANIFEST_SUFFIXES)}"
        )
    columns = _read_columns(path)
    for needed in ("path", "label"):
        if needed not in columns:
            guess = did_you_mean(needed, columns) or f"it has: {', '.join(columns) or 'none'}"
            raise TlkitError(f"the manifest has no column '{needed}'", where=path, remedy=guess)
    if not columns["path"]:
        raise TlkitError("the manifest has no rows", where=path, remedy="add a line for each image: path,label")
    for number, (name, label) in enumerate(zip(columns["path"], columns["label"], strict=True), start=2):
        if not name or not label:
            raise TlkitError(f"line {number} lacks a path or a label", where=path, remedy="fill it in or remove the line")
    splits = [SPLIT_FOLDERS.get(value.lower(), value) for value in columns.get("split", [""] * len(columns["path"]))]
    if unknown := sorted(set(splits) - {"", *SPLITS}):
        raise TlkitError(f"unknown split '{unknown[0]}'", where=path, remedy="use train, val or test")
    if "" in splits and len(set(splits)) > 1:
        raise TlkitError("some rows have a split and some have none", where=path, remedy="fill in the column 'split'")
    classes = tuple(sorted(set(columns["label"])))
    trained = {label for label, split in zip(columns["label"], splits, strict=True) if split in ("train", "")}
    if extra := sorted(set(classes) - trained if trained else set()):
        raise TlkitError(f"labels that no row of train has: {_few(extra)}", where=path, remedy="correct them")
    index = {name: number for number, name in enumerate(classes)}
    return Samples(
        root=path.parent,
        paths=[name.replace("\\", "/") if os.name == "nt" else name for name in columns["path"]],
        labels=np.array([index[label] for label in columns["label"]], dtype=np.int64),
        splits=np.array(splits, dtype="<U5"),
        classes=classes,
        groups=np.array(columns.get("group", []), dtype=str),
    )


def _read_columns(path: Path) -> dict[str, list[str]]:
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise TlkitError(f"not a Parquet file ({error})", where=path, remedy="check the file") from error
        return {name: ["" if v is None else str(v) for v in table[name].to_pylist()] for name in table.column_names}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise TlkitError(f"not a CSV file in UTF-8 ({error})", where=path, remedy="save it again as UTF-8") from error
    header, body = [name.strip().lower() for name in rows[0]] if rows else [], [row for row in rows[1:] if any(row)]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            what = f"line {number} has {len(row)} values where the header has {len(header)}"
            raise TlkitError(what, where=path, remedy="quote values that hold commas")
    return {name: [row[column].strip() for row in body] for column, name in enumerate(header)}


def find_images(paths: Sequence[Path]) -> tuple[list[Path], Counter[str]]:
    """The image files among ``paths`` and in the folders among them, searched through; and what was ignored.

    Raises:
        TlkitError: A path does not exist.
    """
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for file in _walk(path):
                if _is_image(file.name):
                    found.append(file)
                else:
                    ignored[_suffix(file.name)] += 1
        elif path.exists():
            found.append(path)  # named by the user: tried, whatever it is called
        else:
            raise TlkitError("no such file or folder", where=path, remedy="check the path")
    return found, ignored


def _walk(folder: Path) -> Iterator[Path]:
    """Files below ``folder`` in sorted order; links to folders are followed, but never in a circle."""
    seen: set[tuple[int, int]] = set()
    for parent, names, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files))


def _is_image(name: str) -> bool:
    # "._photo.jpg" beside "photo.jpg" is what macOS leaves on foreign disks: not an image in spite of its name
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | HEIC_SUFFIXES and not name.startswith(".")


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
