"""Writes images into shards, each with its label beside it, as webdataset reads them; and their index."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from tlkit import run_folder
from tlkit.shards.folder import digest_of
from tlkit.shards.table import DIGEST, SPLITS, Names, Table

BLOCK = tarfile.BLOCKSIZE
BESIDE = 3 * BLOCK + 2 * BLOCK
"""Bytes beside an image's own: headers of the image, its label and its description, and these two."""


@dataclass(frozen=True)
class Entry:
    """An image that goes into a shard.

    Args:
        path: What it is called where it comes from.
        content: Its file, as it is.
        label: What it shows; None where nobody says.
        number: Of that class.
        split: ``train``, ``val``, ``test`` or nothing.
        group: What it belongs to, or nothing.
    """

    path: str
    content: bytes
    label: str | None
    number: int
    split: str
    group: str


def write_shard(path: Path, entries: Iterable[Entry], classes: tuple[str, ...]) -> Table:
    """Write one shard whole or not at all; returns what is in it.

    Its bytes depend on the images alone: no times, no owners.

    Args:
        path: The tar file.
        entries: The images, taken one at a time.
        classes: Names of all classes.
    """
    import pyarrow

    names, offsets, lengths, written, digests = [], [], [], [], []
    with run_folder.atomically(path) as part:
        with part.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            used: set[str] = set()
            for entry in entries:
                key = _key(entry.path, used)
                name = f"{key}{_ending(entry)}"
                _add(archive, name, entry.content)
                names.append(os.fsencode(name))
                offsets.append(file.tell() - _whole_blocks(len(entry.content)))
                lengths.append(len(entry.content))
                digests.append(digest_of(entry.content))
                written.append((entry.number if entry.label is not None else -1, entry.split, entry.group))
                for ending, text in _beside(entry):
                    _add(archive, f"{key}.{ending}", text)
        size = part.stat().st_size
    labels, splits, groups = zip(*written, strict=True) if written else ((), (), ())
    return Table(
        sizes={path.name: size},
        names=Names([path.name], np.zeros(len(names), np.int32), pyarrow.array(names, pyarrow.binary())),
        offsets=np.array(offsets, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        splits=np.array([SPLITS.index(split) for split in splits], dtype=np.int8),
        classes=classes,
        groups=np.array(groups if any(groups) else [], dtype=str),
        digests=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST),
    )


def size_in_shard(content: int) -> int:
    """About the bytes that an image of so many bytes takes in a shard."""
    return _whole_blocks(content) + BESIDE


def size_of_shard(images: int) -> int:
    """Bytes of a shard whose images take so many: it ends with two blocks of zeros, and is filled up to a record."""
    return -(-(images + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _key(path: str, used: set[str]) -> str:
    """The image's path without its ending: no dot in its last part, where webdataset would cut it, and each once."""
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    folder, stem = parts[:-1], PurePosixPath(parts[-1]).stem.replace(".", "_") if parts else "image"
    key, number = "/".join([*folder, stem]), 1
    while key in used:
        number += 1
        key = "/".join([*folder, f"{stem}-{number}"])
    used.add(key)
    return key


def _ending(entry: Entry) -> str:
    """As its file has it; what has none, as a manifest may name it, is called by its content."""
    if ending := PurePosixPath(entry.path).suffix:
        return ending
    return ".png" if entry.content.startswith(b"\x89PNG") else ".jpg"


def _beside(entry: Entry) -> Iterator[tuple[str, bytes]]:
    """The class's number, which webdataset makes an integer; and all that is known, in words."""
    if entry.label is not None:
        yield "cls", str(entry.number).encode()
    said = {"path": entry.path, "label": entry.label, "split": entry.split, "group": entry.group}
    yield "json", json.dumps({key: value for key, value in said.items() if value}).encode()
