"""Features on their way into a file: kept on disk as they come, gone on with after a stop, then written as one file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tlkit import run_folder
from tlkit.data.loading import BadFile
from tlkit.errors import TlkitError

VALUES, ROWS, IDENTITY = "features.f32", "rows.jsonl", "identity.json"
LONGEST_NAME = 255  # bytes, on nearly all file systems
CHUNK = 16 * 2**20  # bytes that are copied at once


@dataclass(frozen=True)
class Columns:
    """What stands beside each row of features (N)."""

    path: Sequence[str]
    label: Sequence[str]
    split: Sequence[str]


def working_folder(out: Path) -> Path:
    """Where features for ``out`` are kept until it is written."""
    name = f"{run_folder.PART}{out.name}"
    if len(os.fsencode(name)) > LONGEST_NAME:  # the name of the file leaves no room for more
        name = f"{run_folder.PART}{hashlib.sha256(os.fsencode(out.name)).hexdigest()}"
    return out.with_name(name)


@dataclass
class Unfinished:
    """Features of some of the images, in a folder beside the file that is to hold them.

    Args:
        folder: `working_folder` of the file.
        identity: What the features depend on, as JSON; features of another identity are never added.
        paths: All images; what is kept is found again by these names, also where some came or went since.
        shape: Of one image's features; empty until the first ones are there.
        rows: Of the images in the order in which their features came; -1 for those that are gone.
        bad: Unreadable files by row.
    """

    folder: Path
    identity: Mapping[str, Any]
    paths: Sequence[str]
    shape: tuple[int, ...] = ()
    rows: list[int] = field(default_factory=list)
    bad: dict[int, BadFile] = field(default_factory=dict)
    _values: BinaryIO | None = None

    def __enter__(self) -> Unfinished:
        """Take up what is there.

        Raises:
            TlkitError: It is of another identity, or somebody else is writing it.
        """
        self.folder.mkdir(exist_ok=True)
        self._values = open(self.folder / VALUES, "ab")
        _lock(self._values, self.folder)
        stored = self.folder / IDENTITY
        if stored.is_file():
            _refuse_other(run_folder.read_json(stored), self.identity, self.folder)
            self._read()
        else:  # whatever else is there, nobody knows of which network
            (self.folder / ROWS).unlink(missing_ok=True)
            self._cut(0)
            run_folder.write_json(stored, self.identity)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._values is not None
        self._values.close()

    def _read(self) -> None:
        """What was written whole; the rest is cut off."""
        path, size = self.folder / ROWS, (self.folder / VALUES).stat().st_size
        if not path.is_file():
            self._cut(0)
            return
        places: dict[str, list[int]] = {}
        for row in reversed(range(len(self.paths))):  # a list may name an image several times
            places.setdefault(self.paths[row], []).append(row)
        with path.open("rb+") as file:
            whole = 0
            for line in file:
                try:
                    told = json.loads(line)
                except ValueError:
                    break
                shape = tuple(told["shape"]) or self.shape
                if (len(self.rows) + len(told["images"])) * _bytes(shape) > size:
                    break  # the system went down before all of it was on the disk
                self.shape = shape
                self.rows += [places[name].pop() if places.get(name) else -1 for name in told["images"]]
                unread = [(name, BadFile(path, why)) for name, path, why in told["bad"]]
                self.bad |= {places[name][-1]: file for name, file in unread if places.get(name)}
                whole += len(line)
            file.truncate(whole)
        self._cut(len(self.rows) * _bytes(self.shape))

    def _cut(self, size: int) -> None:
        assert self._values is not None
        self._values.truncate(size)
        self._values.seek(size)

    def missing(self) -> np.ndarray:
        """Rows that have no features yet, unreadable ones included."""
        there = np.zeros(len(self.paths), dtype=bool)
        there[[row for row in self.rows if row >= 0]] = True
        return np.flatnonzero(~there)

    def add(self, rows: Sequence[int], values: np.ndarray, bad: Mapping[int, BadFile]) -> None:
        """Append the features (B, ...) of some rows, and what could not be read."""
        assert self._values is not None
        if len(rows):
            self.shape = values.shape[1:]
            self._values.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
            self._values.flush()
        unread = [(self.paths[row], file.path, file.reason) for row, file in bad.items()]
        names = [self.paths[row] for row in rows]
        line = json.dumps({"shape": self.shape if len(rows) else (), "images": names, "bad": unread})
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.rows += rows
        self.bad |= bad

    def write(self, out: Path, columns: Columns) -> None:
        """Write the file, in the order of the rows, and remove the folder. ``columns`` are of all images.

        It is made inside the folder: what a kill leaves of it goes with the rest.
        """
        order = np.argsort(self.rows, kind="stable")
        order = order[int((np.array(self.rows) < 0).sum()) :]  # images that are gone come first
        kept = [self.rows[place] for place in order]
        beside = Columns(
            [columns.path[row] for row in kept],
            [columns.label[row] for row in kept],
            [columns.split[row] for row in kept],
        )
        kept_shape, several = (len(self.rows), *self.shape), max(1, CHUNK // max(_bytes(self.shape), 1))

        def chunks() -> Iterator[np.ndarray]:
            for first in range(0, len(order), several):  # mapped anew each time: pages that were read stay in memory
                yield np.memmap(self.folder / VALUES, dtype="<f4", mode="r", shape=kept_shape)[
                    order[first : first + several]
                ]

        whole = self.folder / f"whole{out.suffix}"
        with run_folder.atomically(whole) as part:
            WRITERS[out.suffix.lower()](part, chunks(), (len(order), *self.shape), beside, self.identity)
        whole.replace(out)
        shutil.rmtree(self.folder)


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape)) if shape else 0


def _lock(file: BinaryIO, folder: Path) -> None:
    """Held until the file is closed, or its process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        remedy = "wait for it, or choose another --out"
        raise TlkitError("another process is writing these features", where=folder, remedy=remedy) from error


def _refuse_other(stored: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    wanted = json.loads(json.dumps(identity))
    differing = [name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)]
    if differing:
        first = next(name for name in wanted if name in differing) if set(differing) & wanted.keys() else differing[0]
        what = f"features begun with another {first}: {_short(stored.get(first))}, not {_short(wanted.get(first))}"
        remedy = "choose another --out, or remove that folder"
        raise TlkitError(what, where=folder, remedy=remedy)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


Chunks = Iterator[np.ndarray]


def _write_parquet(
    path: Path, chunks: Chunks, shape: tuple[int, ...], columns: Columns, identity: Mapping[str, Any]
) -> None:
    """One row an image; ``features`` is a list of fixed length, flattened where an image has more than one axis."""
    import pyarrow
    import pyarrow.parquet

    length = int(np.prod(shape[1:]))
    text = pyarrow.string()
    schema = pyarrow.schema(
        [("path", text), ("label", text), ("split", text), ("features", pyarrow.list_(pyarrow.float32(), length))],
        metadata={"tlkit": json.dumps({**identity, "shape": shape[1:]})},
    )
    with path.open("wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        first = 0
        for chunk in chunks:
            last = first + len(chunk)
            beside = [_unicode(part[first:last]) for part in (columns.path, columns.label, columns.split)]
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.reshape(-1)), length)
            writer.write_table(pyarrow.table([*beside, values], schema=schema))
            first = last


def _write_npz(
    path: Path, chunks: Chunks, shape: tuple[int, ...], columns: Columns, identity: Mapping[str, Any]
) -> None:
    """Arrays ``features`` (N, ...), ``path``, ``label`` and ``split`` (N), and ``identity`` (JSON)."""
    beside = {name: np.array(getattr(columns, name), dtype=str) for name in ("path", "label", "split")}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.tobytes())
        for name, array in (beside | {"identity": np.array(json.dumps(identity))}).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_safetensors(
    path: Path, chunks: Chunks, shape: tuple[int, ...], columns: Columns, identity: Mapping[str, Any]
) -> None:
    """Tensors ``features`` (N, ...) and ``label`` (N, numbers of ``classes``); all text is metadata, as JSON."""
    classes = sorted(set(columns.label))
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[name] for name in columns.label], dtype="<i8").tobytes()
    size = 4 * int(np.prod(shape))
    texts = {"identity": identity, "classes": classes, "path": list(columns.path), "split": list(columns.split)}
    header = {
        "__metadata__": {name: json.dumps(value) for name, value in texts.items()},
        "label": {"dtype": "I64", "shape": [shape[0]], "data_offsets": [0, len(labels)]},
        "features": {"dtype": "F32", "shape": list(shape), "data_offsets": [len(labels), len(labels) + size]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + labels)
        for chunk in chunks:
            file.write(chunk.tobytes())


def _unicode(names: Sequence[str]) -> list[str]:
    """Names of files need not be valid Unicode, text in Parquet must be."""
    return [name.encode(errors="backslashreplace").decode() for name in names]


WRITERS: dict[str, Callable[[Path, Chunks, tuple[int, ...], Columns, Mapping[str, Any]], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}


def refuse_unwritable(out: Path) -> None:
    """Raise where ``out`` cannot be written: before the work, not after it.

    Raises:
        TlkitError: Unknown format, no such folder, or nothing may be written there.
    """
    if out.suffix.lower() not in WRITERS:
        raise TlkitError(f"cannot write '{out.suffix}' files", where=out, remedy=f"use {', '.join(WRITERS)}")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise TlkitError("there is no such folder", where=out.parent, remedy="make it first")
    if not os.access(folder, os.W_OK):
        raise TlkitError("nothing may be written there", where=folder, remedy="choose another --out")
