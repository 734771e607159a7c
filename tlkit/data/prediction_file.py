"""Labels of new images as a CSV, JSON lines or Parquet file, written as they come."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tlkit import run_folder
from tlkit.data.loading import BadFile
from tlkit.errors import TlkitError

Row = dict[str, Any]
"""``path``, ``label``, ``probability`` and ``top``, a list of ``[label, probability]``."""

Write = Callable[[Sequence[Row]], None]

CELLS = 2**18
"""Values of a Parquet row group, which is held in memory until it is whole."""


def refuse(out: Path | None) -> None:
    """Raise, before the work, where ``out`` or its list of skipped files could not be written.

    Raises:
        TlkitError: There is something already, no such folder, or no such format.
    """
    run_folder.refuse_existing(out)
    if out is None:
        return
    run_folder.refuse_existing(skipped_file(out))
    if out.suffix.lower() not in WRITERS:
        raise TlkitError(f"cannot write '{out.suffix}' files", where=out, remedy=f"use {', '.join(WRITERS)}")
    if not out.absolute().parent.is_dir():
        raise TlkitError("there is no such folder", where=out.parent, remedy="make it first")


def skipped_file(out: Path) -> Path:
    """Where the files that could not be read are listed: beside the labels of the others."""
    return out.with_name(f"{out.name}.skipped.csv")


@contextmanager
def writing(out: Path, top: int) -> Iterator[Write]:
    """What writes rows of ``top`` labels each to ``out``, which is there once all of them are.

    Raises:
        TlkitError: The file cannot be made, or has come into being meanwhile.
    """
    try:
        with run_folder.atomically(out) as part:
            with WRITERS[out.suffix.lower()](part, top) as write:
                yield write
            run_folder.refuse_existing(out)
    except BaseException:
        skipped_file(out).unlink(missing_ok=True)  # was not there before, and lists what is left out of nothing
        raise


def write_skipped(out: Path, bad: Sequence[BadFile]) -> None:
    """List the files that could not be read, with the reasons, in `skipped_file`; no file where there are none."""
    if bad:
        rows = ((file.path, file.reason) for file in bad)
        run_folder.write_rows(skipped_file(out), ("path", "reason"), rows)


def _columns(top: int) -> list[str]:
    """One column for each of the further labels and one for its probability: ``label2``, ``probability2``, ..."""
    further = [f"{name}{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    return ["path", "label", "probability", *further]


def _flat(row: Row) -> list[Any]:
    return [row["path"], row["label"], row["probability"], *(value for pair in row["top"][1:] for value in pair)]


@contextmanager
def _csv(path: Path, top: int) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(_columns(top))
        yield lambda rows: writer.writerows(map(_flat, rows))


@contextmanager
def _jsonl(path: Path, top: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda rows: file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def _parquet(path: Path, top: int) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    columns = _columns(top)
    kinds = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    several = max(1, CELLS // len(columns))
    waiting: list[list[Any]] = []

    # opened here, not by pyarrow, which wants the names of folders to be Unicode
    with path.open("wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def write_group() -> None:
            arrays = [
                pyarrow.array(values, kind) for values, kind in zip(zip(*waiting, strict=True), kinds, strict=True)
            ]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            waiting.clear()

        def write(rows: Sequence[Row]) -> None:
            for row in rows:
                waiting.append([_unicode(value) for value in _flat(row)])
                if len(waiting) == several:
                    write_group()

        yield write
        if waiting:
            write_group()


def _unicode(value: Any) -> Any:
    """Text as Parquet can hold it: a byte that is not UTF-8 becomes an escape."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


WRITERS: dict[str, Callable[[Path, int], AbstractContextManager[Write]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
