"""Which images lie where in which shard, in few bytes an image; and the file beside shards that holds it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from tlkit import run_folder
from tlkit.errors import TlkitError

FILE = "index.parquet"
FORMAT = 1
AT_ONCE = 4096
SPLITS = ("", "train", "val", "test")
DIGEST = 16  # bytes


class Names(Sequence[str]):
    """Paths of images, each the name of its shard and its own there, in about the bytes that the names have.

    Args:
        shards: Names of the shards.
        shard: Which of them each image lies in (N).
        members: Names there, as bytes: an array of pyarrow's (N).
    """

    def __init__(self, shards: Sequence[str], shard: np.ndarray, members: Any) -> None:
        self.shards, self.shard, self.members = shards, shard, members

    def __len__(self) -> int:
        return len(self.shard)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Names: ...

    def __getitem__(self, place: int | slice) -> str | Names:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        place = range(len(self))[place]
        return f"{self.shards[self.shard[place]]}/{os.fsdecode(self.members[place].as_py())}"

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            for shard, member in zip(self.shard[part].tolist(), self.members[part].to_pylist(), strict=True):
                yield f"{self.shards[shard]}/{os.fsdecode(member)}"

    def take(self, rows: np.ndarray) -> Names:
        """The names in the given rows."""
        return Names(self.shards, self.shard[rows], self.members.take(_arrow(rows)))


@dataclass(frozen=True)
class Table:
    """Images in shards, in the order in which they lie there.

    Args:
        sizes: Bytes of each shard, by its name, in order (M).
        names: Paths of the images (N).
        offsets: Of each image's first byte in its shard (N).
        lengths: Of each image in bytes, -1 where its place in the shard is broken (N).
        labels: Index into ``classes``, -1 where nothing is said (N).
        splits: Index into `SPLITS` (N).
        classes: Sorted names of the classes.
        groups: What each image belongs to; empty where nothing is said of any (N or 0).
        digests: Of each image's bytes as they were when they were written (N, 16); empty where nobody knows (0, 16).
    """

    sizes: dict[str, int]
    names: Names
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def of_shards(self, wanted: Sequence[str]) -> Table:
        """The images in some of the shards, in the order of these."""
        number = {name: place for place, name in enumerate(wanted)}
        place = np.array([number.get(name, -1) for name in self.names.shards], dtype=np.int32)
        shard = place[self.names.shard]
        rows = np.argsort(shard, kind="stable")[np.count_nonzero(shard < 0) :]
        return replace(
            self,
            sizes={name: self.sizes[name] for name in wanted},
            names=Names(list(wanted), shard[rows], self.names.members.take(_arrow(rows))),
            offsets=self.offsets[rows],
            lengths=self.lengths[rows],
            labels=self.labels[rows],
            splits=self.splits[rows],
            groups=self.groups[rows] if len(self.groups) else self.groups,
            digests=self.digests[rows] if len(self.digests) else self.digests,
        )


def joined(tables: Sequence[Table]) -> Table:
    """What several shards hold, as one; digests where they are known of all."""
    import pyarrow

    classes = tuple(sorted({label for table in tables for label in table.classes}))
    number = {label: place for place, label in enumerate(classes)}
    labels = []
    for table in tables:
        to = np.array([number[label] for label in table.classes] + [-1], dtype=np.int64)
        labels.append(to[table.labels])  # -1 is the last
    known = all(len(table.digests) == len(table) for table in tables)
    grouped = any(len(table.groups) for table in tables)
    groups = [table.groups if len(table.groups) else np.full(len(table), "") for table in tables] if grouped else []
    shard = [np.full(len(table), place, dtype=np.int32) for place, table in enumerate(tables)]
    return Table(
        sizes={name: size for table in tables for name, size in table.sizes.items()},
        names=Names(
            [name for table in tables for name in table.sizes],
            np.concatenate(shard),
            pyarrow.concat_arrays([table.names.members for table in tables]),
        ),
        offsets=np.concatenate([table.offsets for table in tables]),
        lengths=np.concatenate([table.lengths for table in tables]),
        labels=np.concatenate(labels),
        splits=np.concatenate([table.splits for table in tables]),
        classes=classes,
        groups=np.concatenate(groups) if groups else np.empty(0, dtype=str),
        digests=np.concatenate([table.digests for table in tables]) if known else np.empty((0, DIGEST), np.uint8),
    )


def _arrow(rows: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.array(rows)


class Rows:
    """Finds an image's row by its path: 16 bytes an image, where a dictionary would take two hundred."""

    def __init__(self, names: Names) -> None:
        self.names = names
        keys = np.fromiter(map(_key, names), dtype=np.uint64, count=len(names))
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]

    def __call__(self, path: str) -> int | None:
        """The row of a path; None where there is no such image."""
        key = _key(path)
        place = int(np.searchsorted(self.keys, key))
        while place < len(self.keys) and self.keys[place] == key:
            row = int(self.order[place])
            if self.names[row] == path:
                return row
            place += 1
        return None


def _key(path: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest()))


def write_table(path: Path, table: Table) -> None:
    """Write the index file: one row an image, and the sizes of the shards, by which others of their names are told."""
    import pyarrow
    import pyarrow.parquet

    def words(numbers: np.ndarray, names: Sequence[str]) -> Any:
        known = pyarrow.array(numbers, mask=numbers < 0)
        return pyarrow.DictionaryArray.from_arrays(known, pyarrow.array(names, pyarrow.string()))

    columns = {
        "shard": words(table.names.shard, table.names.shards),
        "name": table.names.members,
        "offset": pyarrow.array(table.offsets),
        "size": pyarrow.array(table.lengths),
        "label": words(table.labels.astype(np.int32), table.classes),
        "split": words(table.splits.astype(np.int8), SPLITS),
    }
    if len(table.groups):
        columns["group"] = pyarrow.array(table.groups.tolist(), pyarrow.string())
    if len(table.digests):
        columns["digest"] = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(DIGEST), len(table), [None, pyarrow.py_buffer(table.digests.tobytes())]
        )
    told = json.dumps({"format": FORMAT, "shards": table.sizes, "classes": table.classes})
    whole = pyarrow.table(columns).replace_schema_metadata({"tlkit shards": told})
    with run_folder.atomically(path) as part, part.open("wb") as file:
        pyarrow.parquet.write_table(whole, file)


def is_table(path: Path) -> bool:
    """Whether a file is one that `write_table` wrote."""
    return _told(path) is not None


def _told(path: Path) -> dict[str, Any] | None:
    """What stands beside the rows of an index: its form, shards and classes; None where a file is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # a name need not be Unicode, which pyarrow would have it be
            told = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"tlkit shards")
    except (OSError, pyarrow.ArrowException):
        return None
    return None if told is None else json.loads(told)


def read_table(path: Path) -> Table | None:
    """What `write_table` wrote; None where a file is none of its.

    Raises:
        TlkitError: It is broken, or of another version.
    """
    import pyarrow
    import pyarrow.parquet

    known = _told(path)
    if known is None:
        return None
    if known["format"] != FORMAT:
        raise TlkitError("an index of another version", where=path, remedy="use the version of tlkit that wrote it")
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file).combine_chunks()
    except (OSError, pyarrow.ArrowException) as error:
        raise TlkitError(f"cannot be read ({error})", where=path, remedy="write it anew, or remove it") from error
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    shards, classes = list(known["shards"]), tuple(known["classes"])
    digests = np.empty((0, DIGEST), dtype=np.uint8)
    if "digest" in columns:
        joined = b"".join(columns["digest"].to_pylist())
        digests = np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST)
    return Table(
        sizes=known["shards"],
        names=Names(shards, _numbers(columns["shard"], shards, np.int32), columns["name"]),
        offsets=columns["offset"].to_numpy(),
        lengths=columns["size"].to_numpy(),
        labels=_numbers(columns["label"], classes, np.int64),
        splits=_numbers(columns["split"], SPLITS, np.int8),
        classes=classes,
        groups=np.array(columns["group"].to_pylist() if "group" in columns else [], dtype=str),
        digests=digests,
    )


def _numbers(words: Any, names: Sequence[str], kind: Any) -> np.ndarray:
    """For each word its place among the names (N), -1 for none."""
    import pyarrow

    words = words if isinstance(words, pyarrow.DictionaryArray) else words.dictionary_encode()
    number = {name: place for place, name in enumerate(names)}
    places = np.array([number[name] for name in words.dictionary.to_pylist()] or [0], dtype=kind)
    found = words.indices.fill_null(-1).to_numpy()
    return np.where(found >= 0, places[found], -1).astype(kind)
