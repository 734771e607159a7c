"""The files that features are written to, a row an image: in parts, so that memory does not grow with their number."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tlkit.errors import TlkitError

CHUNK = 16 * 2**20  # bytes of features that are copied at once
AT_ONCE = 10_000  # names that are
NAMES = ("path", "label", "split")


class Picked(Sequence[str]):
    """Some of several texts, without a list of them.

    Args:
        texts: What there is to pick from.
        numbers: Which of them stands in each place (N).
    """

    def __init__(self, texts: Sequence[str], numbers: np.ndarray) -> None:
        self.texts, self.numbers = texts, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        picked = self.numbers[place]
        return Picked(self.texts, picked) if isinstance(place, slice) else self.texts[int(picked)]


@dataclass(frozen=True)
class Columns:
    """What stands beside each row of features (N)."""

    path: Sequence[str]
    label: Sequence[str]
    split: Sequence[str]

    def take(self, rows: np.ndarray) -> Columns:
        """What stands beside some of them."""
        return Columns(Picked(self.path, rows), Picked(self.label, rows), Picked(self.split, rows))


def bytes_of(shape: tuple[int, ...]) -> int:
    """What the features of one image take on the disk; none where no shape is known."""
    return 4 * int(np.prod(shape)) if shape else 0


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Images whose features are copied at once."""
    return max(1, CHUNK // max(bytes_of(shape), 1))


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
        [*((name, text) for name in NAMES), ("features", pyarrow.list_(pyarrow.float32(), length))],
        metadata={"tlkit": json.dumps({**identity, "shape": shape[1:]})},
    )
    with path.open("wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        first = 0
        for chunk in chunks:
            last = first + len(chunk)
            beside = [_unicode(getattr(columns, name)[first:last]) for name in NAMES]
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.reshape(-1)), length)
            writer.write_table(pyarrow.table([*beside, values], schema=schema))
            first = last


def _write_npz(
    path: Path, chunks: Chunks, shape: tuple[int, ...], columns: Columns, identity: Mapping[str, Any]
) -> None:
    """Arrays ``features`` (N, ...), ``path``, ``label`` and ``split`` (N), and ``identity`` (JSON)."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.tobytes())
        for name in NAMES:
            texts = getattr(columns, name)
            kind = f"<U{max((len(text) for text in texts), default=1) or 1}"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": kind, "fortran_order": False, "shape": (len(texts),)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in _parts(texts):
                    file.write(np.array(list(part), dtype=kind).tobytes())
        with archive.open("identity.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.array(json.dumps(identity)), allow_pickle=False)


def _write_safetensors(
    path: Path, chunks: Chunks, shape: tuple[int, ...], columns: Columns, identity: Mapping[str, Any]
) -> None:
    """Tensors ``features`` (N, ...) and ``label`` (N, numbers of ``classes``); all text is metadata, as JSON."""
    classes = sorted(set(columns.label))
    number = {name: place for place, name in enumerate(classes)}
    labels = np.fromiter((number[name] for name in columns.label), dtype="<i8", count=len(columns.label)).tobytes()
    size = 4 * int(np.prod(shape))
    tensors = {
        "label": {"dtype": "I64", "shape": [shape[0]], "data_offsets": [0, len(labels)]},
        "features": {"dtype": "F32", "shape": list(shape), "data_offsets": [len(labels), len(labels) + size]},
    }
    with path.open("wb") as file:
        file.write(bytes(8))
        for text in ('{"__metadata__": {"identity": ', _quoted(json.dumps(identity)), ', "classes": '):
            file.write(text.encode())
        file.write(_quoted(json.dumps(classes)).encode())
        for name in ("path", "split"):
            file.write(f', "{name}": '.encode())
            _write_quoted_list(file, getattr(columns, name))
        file.write(f"}}, {json.dumps(tensors)[1:]}".encode())
        file.write(b" " * (-file.tell() % 8))
        length = file.tell() - 8
        file.write(labels)
        for chunk in chunks:
            file.write(chunk.tobytes())
        file.seek(0)
        file.write(length.to_bytes(8, "little"))


def _quoted(text: str) -> str:
    """A text as JSON."""
    return json.dumps(text)


def _write_quoted_list(file: BinaryIO, texts: Sequence[str]) -> None:
    """What ``json.dumps(json.dumps(list(texts)))`` is, in parts."""
    file.write(b'"[')
    for number, part in enumerate(_parts(texts)):
        listed = json.dumps(list(part))[1:-1]
        file.write(f"{', ' if number else ''}{_quoted(listed)[1:-1]}".encode())
    file.write(b']"')


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), AT_ONCE):
        yield texts[first : first + AT_ONCE]


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
