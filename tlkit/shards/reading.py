"""Finds the shards that DATA names, and what is in them: from the index beside them, or else from the shards."""

from __future__ import annotations

import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import config
from tlkit.errors import TlkitError
from tlkit.progress import Progress
from tlkit.shards import remote
from tlkit.shards.folder import Shards, common_place
from tlkit.shards.remote import Remote, is_url
from tlkit.shards.table import DIGEST, FILE, SPLITS, Names, Table, is_table, joined, read_table, write_table
from tlkit.shards.tar import members

ENDING = ".tar"
WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What in a shard's name says the split of its images."""
LABELS = ("label", "class", "cls")
"""Keys of a ``.json`` beside an image that say what it shows."""
LONGEST_TEXT = 2**20  # bytes of what stands beside an image


def shards_at(data: Path, is_image: Callable[[str], bool], progress: Progress) -> Shards | None:
    """The shards that DATA names; None where it names something else.

    Args:
        data: ``name-{000000..000099}.tar`` or a single one, here or at a URL; a folder that holds shards, or their
            index; an index.
        is_image: Whether a file is called like an image.
        progress: Told how many shards have been gone through, where there is no index.

    Raises:
        TlkitError: Shards are missing, cannot be read, or are not those of their index; a server does not answer.
    """
    typed = config.spelled(data)
    found = _locations(typed, is_image)
    if found is None:
        return None
    locations, index = found
    table = None if index is None else _index(index)
    if not locations:
        if table is None:
            raise TlkitError("not an index of shards", where=typed, remedy="name the shards: 'name-{000..099}.tar'")
        place = typed if typed.endswith(FILE) else f"{typed.rstrip('/')}/{FILE}"
        locations = [f"{place.removesuffix(FILE)}{name}" for name in table.sizes]
    place = common_place(locations)
    shards = dict(zip((one.removeprefix(place) for one in locations), _sources(locations), strict=True))
    if len(shards) < len(locations):
        raise TlkitError("a shard is named twice", where=typed, remedy="name each once")
    if table is None or not _covers(table, shards, index):
        table = _scanned(shards, is_image, place or ".", progress)
    else:
        table = table.of_shards(list(shards))
    return Shards(place or ".", shards, table)


def _locations(typed: str, is_image: Callable[[str], bool]) -> tuple[list[str], str | None] | None:
    """Where the shards are, none where their index says it, and where that would be; None for other kinds of data."""
    path = typed.partition("?")[0] if is_url(typed) else typed
    if path.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise TlkitError("compressed shards cannot be read in parts", where=typed, remedy="unpack them to .tar")
    if is_url(typed):
        if path.endswith(ENDING):
            return _named(typed)
        return [], typed if path.endswith(FILE) else f"{typed.rstrip('/')}/{FILE}"
    try:
        mode = Path(typed).stat().st_mode
    except (OSError, ValueError):
        return _named(typed) if path.endswith(ENDING) and "{" in path else None
    if stat.S_ISDIR(mode):
        return _in_folder(Path(typed), is_image)
    if path.endswith(ENDING):
        return [typed], posixpath.join(posixpath.dirname(typed), FILE)
    if path.endswith(".parquet") and is_table(Path(typed)):
        return [], typed
    return None


def expanded(typed: str) -> list[str]:
    """All names that one with braces stands for: ``a-{00..03}.tar``, ``{a,b}.tar``.

    Raises:
        TlkitError: A brace is not closed.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        return list(braceexpand(typed, escape=False))
    except UnbalancedBracesError as error:
        raise TlkitError("a brace is not closed", where=typed, remedy="write 'name-{000000..000099}.tar'") from error


def _named(typed: str) -> tuple[list[str], str | None]:
    locations = expanded(typed)
    return locations, common_place(locations) + FILE


def _in_folder(folder: Path, is_image: Callable[[str], bool]) -> tuple[list[str], str | None] | None:
    """A folder of shards, with their index or without, and neither folders nor images beside them."""
    index = folder / FILE
    if index.is_file() and is_table(index):
        return [], str(index)
    try:
        seen = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:  # whoever looks for class folders in it says why
        return None
    shards = sorted(str(path) for path in seen if path.name.endswith(ENDING))
    if not shards or any(path.is_dir() or is_image(path.name) for path in seen):
        return None
    return shards, None


def _index(location: str) -> Table | None:
    if not is_url(location):
        return read_table(Path(location)) if Path(location).is_file() else None
    there = remote.find(location)
    return None if there is None else read_table(remote.local_copy(there, location))


def _sources(locations: Sequence[str]) -> list[Path | Remote]:
    if is_url(locations[0]):
        return list(remote.describe(locations))
    missing = [one for one in locations if not Path(one).is_file()]
    if missing:
        what = f"{len(missing)} of {len(locations)} shards are missing" if len(locations) > 1 else "no such file"
        details = missing if len(missing) > 1 else []
        raise TlkitError(what, where=missing[0], remedy="check the path", details=details)
    return [Path(one).absolute() for one in locations]


def _covers(table: Table, shards: dict[str, Path | Remote], index: str | None) -> bool:
    """Whether an index is of these shards.

    Raises:
        TlkitError: It is of others, which have their names.
    """
    if not shards.keys() <= table.sizes.keys():
        return False
    for name, at in shards.items():
        size = at.size if isinstance(at, Remote) else at.stat().st_size
        if size != table.sizes[name]:
            what = f"{name} has {size} bytes, {table.sizes[name]} when its index was written"
            remedy = "fetch or write the shard again; or remove the index, and what is there is read"
            raise TlkitError(what, where=index or "", remedy=remedy)
    return True


# Without an index


@dataclass(frozen=True)
class _Listed:
    """An image of a shard that has no index."""

    name: str
    offset: int
    length: int
    label: str
    split: str
    group: str


def _scanned(shards: dict[str, Path | Remote], is_image: Callable[[str], bool], where: str, tell: Progress) -> Table:
    """What is in shards, from their headers; of those elsewhere it is kept, for each has to come for that."""
    tell("reading shards", 0, len(shards))
    tables = []
    with ThreadPoolExecutor(4) as pool:
        splits = _splits(list(shards))
        jobs = [
            pool.submit(_one_shard, name, split, at, is_image, where)
            for split, (name, at) in zip(splits, shards.items(), strict=True)
        ]
        for job in jobs:
            tables.append(job.result())
            tell("reading shards", len(tables), len(shards))
    return joined(tables)


def _one_shard(name: str, split: str, at: Path | Remote, is_image: Callable[[str], bool], where: str) -> Table:
    if isinstance(at, Path):
        return _table(name, split, at, is_image)
    copy = remote.local_copy(at, where)
    kept = copy.with_name(f"{copy.stem}.{split or 'all'}.{FILE}")
    table = read_table(kept) if kept.is_file() else None
    if table is None or list(table.sizes) != [name]:
        table = _table(name, split, copy, is_image)
        write_table(kept, table)
    return table


def _table(name: str, split: str, path: Path, is_image: Callable[[str], bool]) -> Table:
    import pyarrow

    try:
        of_name = {one.name: one for one in _images(split, path, is_image)}  # the last of several, as tar has it
    except (OSError, tarfile.TarError) as error:
        raise TlkitError(f"cannot be read ({error})", where=path, remedy="check the file") from error
    listed = list(of_name.values())
    classes = tuple(sorted({one.label for one in listed if one.label}))
    number = {label: place for place, label in enumerate(classes)} | {"": -1}
    names = pyarrow.array([os.fsencode(one.name) for one in listed], pyarrow.binary())
    return Table(
        sizes={name: path.stat().st_size},
        names=Names([name], np.zeros(len(listed), np.int32), names),
        offsets=np.array([one.offset for one in listed], dtype=np.int64),
        lengths=np.array([one.length for one in listed], dtype=np.int64),
        labels=np.array([number[one.label] for one in listed], dtype=np.int64),
        splits=np.array([SPLITS.index(one.split) for one in listed], dtype=np.int8),
        classes=classes,
        groups=np.array([one.group for one in listed] if any(one.group for one in listed) else [], dtype=str),
        digests=np.empty((0, DIGEST), dtype=np.uint8),
    )


def _images(of_shard: str, path: Path, is_image: Callable[[str], bool]) -> Iterator[_Listed]:
    """The images of one shard, with what stands beside them: ``a/b.jpg``, ``a/b.cls`` and ``a/b.json`` are one sample.

    As webdataset has it, all files of a sample stand together, and their names agree up to the first dot. An image
    without either is of the class that its folder is named after; of the shard's split, unless it says another.
    """
    images: list[tuple[str, int, int]] = []
    beside: dict[str, Any] = {}
    sample, size = "", path.stat().st_size
    with path.open("rb") as file:

        def done() -> Iterator[_Listed]:
            for name, offset, length in images:
                label = str(beside.get("label", "")) or posixpath.basename(posixpath.dirname(name))
                split = str(beside.get("split", "")) or of_shard
                whole = offset + length <= size  # of one that is not, what stood beside it is lost as well
                group = str(beside.get("group", ""))
                yield _Listed(name, offset, length if whole else -1, label, WORDS.get(split, ""), group)

        for one in members(path):
            folder, base = posixpath.split(one.name)
            key, _, ending = base.partition(".")
            if one.size < 0 or posixpath.join(folder, key) != sample:
                yield from done()
                images, beside, sample = [], {}, posixpath.join(folder, key)
            if one.size < 0:  # nobody knows what was there: like an image that cannot be read
                yield _Listed(f"broken place at byte {one.offset}", one.offset, -1, "", of_shard, "")
            elif is_image(base):
                images.append((one.name, one.offset, one.size))
            elif ending in ("cls", "json") and one.size <= LONGEST_TEXT:
                file.seek(one.offset)
                said = _said(ending, file.read(one.size))
                beside = beside | said if ending == "json" else said | beside  # a name says more than a number
        yield from done()


def _said(ending: str, content: bytes) -> dict[str, Any]:
    """Label, split and group from what stands beside an image; empty where it says nothing of them."""
    text = content.decode(errors="replace").strip()
    if ending == "cls":
        return {"label": text}
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(told, dict):
        return {}
    plain = {key: value for key, value in told.items() if isinstance(value, str | int) and not isinstance(value, bool)}
    label = next(({"label": plain[key]} for key in LABELS if key in plain), {})
    return label | {key: plain[key] for key in ("split", "group") if key in plain}


def _splits(shards: Sequence[str]) -> list[str]:
    """The splits that names of shards have a word for: ``val-01.tar``, ``imagenet-train-0000.tar``, ``test/00.tar``.

    Where none says train the words may mean anything, and say nothing.
    """
    words = [next((word for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS), "") for name in shards]
    return words if "train" in words else [""] * len(shards)
