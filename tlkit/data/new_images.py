"""Images without labels, as people name them: files, folders, patterns, lists."""

from __future__ import annotations

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from tlkit.data.folders import (
    Complain,
    Samples,
    in_shards,
    is_folder,
    is_image,
    kind,
    names_in,
    read_samples,
    refuse,
    walk,
)
from tlkit.errors import TlkitError
from tlkit.progress import Progress, silent
from tlkit.shards.reading import shards_at

WILD = frozenset("*?[")


def read_images(data: Path, complain: Complain = refuse, progress: Progress = silent) -> Samples:
    """Images whose labels are known, as `read_samples` finds them, or else those of a folder without class folders.

    Args:
        data: As for `read_samples`, or a folder of images, or shards that say nothing of labels.
        complain: As for `read_samples`.
        progress: As for `read_samples`.

    Raises:
        TlkitError: Nothing is there, or it has no images.
    """
    if (shards := shards_at(data, is_image, progress)) is not None:
        return in_shards(shards)
    if not is_folder(data) or names_in(data)[0]:
        return read_samples(data, complain)
    found, ignored = find_images([data])
    paths = [path.relative_to(data).as_posix() for path in found]
    none = np.zeros(len(paths), dtype=np.int64)
    return Samples(data, paths, none, np.array([""] * len(paths), dtype="<U5"), ("",), ignored=ignored)


def in_shards_named(paths: Sequence[Path], progress: Progress = silent) -> Samples | None:
    """The images of the shards that a single path names; None where paths name files and folders."""
    shards = shards_at(paths[0], is_image, progress) if len(paths) == 1 else None
    return None if shards is None else in_shards(shards)


def find_images(paths: Sequence[Path]) -> tuple[list[Path], Counter[str]]:
    """The image files that ``paths`` stand for, in their order, and what was ignored; see `images_at`.

    Raises:
        TlkitError: A path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        images, others = images_at(path)
        found += images
        ignored += others
    refuse_no_images(found, paths)
    return found, ignored


def refuse_no_images(found: Sequence[object], paths: Sequence[object]) -> None:
    """Raise where ``paths`` stand for no image.

    Raises:
        TlkitError: ``found`` is empty.
    """
    if not found:
        raise TlkitError("no images", where=paths[0], remedy="give image files, or folders that hold some")


def images_at(path: Path) -> tuple[list[Path], Counter[str]]:
    """The image files that a path stands for, and what was ignored.

    A file stands for itself, whatever it is called; a folder for the images in it, searched through; and a pattern
    (``photos/**/*.jpg``), where nothing has that very name, for the files and folders that match it.

    Raises:
        TlkitError: Nothing is there.
    """
    if WILD & set(str(path)) and not os.path.lexists(path):
        files = list(_matches(path))
        if not files:
            remedy = "check it; 'photos/**/*.jpg' looks into the folders below, too"
            raise TlkitError("nothing matches this pattern", where=path, remedy=remedy)
    elif is_folder(path):
        files = [(file, is_image(file.name)) for file in walk(path)]
    else:
        return [path], Counter()  # named by the user: tried, whatever it is called
    return [file for file, wanted in files if wanted], Counter(kind(file.name) for file, wanted in files if not wanted)


def images_listed(text: bytes) -> tuple[list[str], Counter[str]]:
    """The image files that a list of paths names, spelled as there, and what was ignored in folders among them.

    What is not there, or cannot be reached, stays in the list: it is reported like any file that cannot be read.

    Args:
        text: One path a line, or each ended by a zero byte; in any encoding.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    lines = [line for line in text.split(b"\0" if b"\0" in text else b"\n") if line.strip()]
    if all(line.endswith(b"\r") for line in lines):  # Windows
        lines = [line[:-1] for line in lines]
    found: list[str] = []
    ignored: Counter[str] = Counter()
    for name in map(os.fsdecode, lines):
        try:
            folder = is_folder(Path(name))
        except TlkitError:
            folder = False
        if folder:
            images, others = images_at(Path(name))
            found += map(str, images)
            ignored += others
        else:
            found.append(name)
    return found, ignored


def _matches(pattern: Path) -> Iterator[tuple[Path, bool]]:
    """Files that a pattern matches, or that lie in a folder that it matches; and whether they are wanted as images.

    Wanted is what is called like an image, and everything where the pattern itself says the ending (``*.dat``). As in a
    shell, hidden files are matched only by a pattern that says their dot. ``**`` stands for any number of folders; what
    it stands for is searched as folders are, for `glob` goes round in circles of links.
    """
    there = next(folder for folder in pattern.parents if os.path.lexists(folder))  # perhaps called "photos [2024]"
    parts = pattern.relative_to(there).parts
    cut = parts.index("**") if "**" in parts else len(parts)
    rest = parts[cut:]
    any_name = pattern.suffix != "" and not WILD & set(pattern.suffix)
    places = sorted(glob.glob(str(Path(*parts[:cut])), root_dir=there))  # noqa: PTH207 - that one takes hidden files
    for place in map(there.joinpath, places):
        if not place.is_dir():
            if not rest:
                yield place, any_name or is_image(place.name)
            continue
        for file in walk(place):
            names = file.relative_to(place).parts
            if rest and _fits(names, rest):
                yield file, any_name or is_image(file.name)
            elif any(_fits(names[:depth], rest) for depth in range(len(names))):  # a folder above it
                yield file, is_image(file.name)


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the folders and the name of a path fit a pattern, part by part."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch(names[0], pattern[0]) and _fits(names[1:], pattern[1:])
