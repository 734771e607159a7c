"""A table of images (CSV, TSV or Parquet) as columns of text, each row with the place where it stands; written, too."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlkit import run_folder
from tlkit.errors import TlkitError, did_you_mean

SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "label", "split", "group")


@dataclass(frozen=True)
class Manifest:
    """The columns that concern tlkit; all others are left unread.

    Args:
        columns: Values (N) of each of `COLUMNS` that is there, without spaces around them.
        unit: What ``numbers`` count: lines of a text file, or rows.
        numbers: Where each row stands (N).
    """

    columns: dict[str, list[str]]
    unit: str
    numbers: Sequence[int]

    def place(self, row: int) -> str:
        """Where a row stands, in words."""
        return f"{self.unit} {self.numbers[row]}"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; columns ``path`` and ``label`` are there, and each row has a value in both.

    Raises:
        TlkitError: The file cannot be read, has no rows, or lacks a column or a value.
    """
    if path.suffix.lower() not in SUFFIXES:
        remedy = f"give a folder or a file in {', '.join(SUFFIXES)}"
        raise TlkitError("neither a folder nor a manifest", where=path, remedy=remedy)
    try:
        manifest = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except OSError as error:
        raise TlkitError(f"cannot be read ({error.strerror or error})", where=path, remedy="check the file") from error
    columns = manifest.columns
    if not columns["path"]:
        raise TlkitError("the manifest has no rows", where=path, remedy="add a line for each image: path,label")
    for row, (name, label) in enumerate(zip(columns["path"], columns["label"], strict=True)):
        if not name or not label:
            remedy = "fill it in or remove the row"
            raise TlkitError(f"{manifest.place(row)} lacks a path or a label", where=path, remedy=remedy)
    return manifest


def _read_csv(path: Path) -> Manifest:
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # strict, for else a quote that is never closed would swallow all lines that follow it
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for row in reader:
                values = [value.strip() for value in row]
                if any(values):
                    rows.append(values)
                    lines.append(start)
                start = reader.line_num + 1  # a quoted value may span lines
    except UnicodeDecodeError as error:
        raise TlkitError("not a text file in UTF-8", where=path, remedy="save it again as CSV in UTF-8") from error
    except csv.Error as error:
        raise TlkitError(f"line {start} is not sound CSV ({error})", where=path, remedy="check the quotes") from error
    header = rows[0] if rows else []
    kept = _kept_columns(path, header)
    for line, values in zip(lines[1:], rows[1:], strict=True):
        if len(values) != len(header):
            what = f"line {line} has {len(values)} values where the header has {len(header)}"
            raise TlkitError(what, where=path, remedy="quote values that hold commas, and fill in what lacks")
    columns = {name: [values[position] for values in rows[1:]] for name, position in kept.items()}
    return Manifest(columns, "line", lines[1:])


def _read_parquet(path: Path) -> Manifest:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # pyarrow takes no name that is not valid UTF-8
            source = pyarrow.parquet.ParquetFile(file)
            header = source.schema_arrow.names
            kept = _kept_columns(path, header)
            table = source.read(columns=[header[position] for position in kept.values()])
            values = {name: table[header[position]].to_pylist() for name, position in kept.items()}
    except (pyarrow.ArrowException, ValueError) as error:
        raise TlkitError(f"not a sound Parquet file ({error})", where=path, remedy="check the file") from error
    columns = {name: ["" if value is None else str(value).strip() for value in values[name]] for name in values}
    return Manifest(columns, "row", range(1, table.num_rows + 1))


def _kept_columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """Where in the header each of `COLUMNS` stands that is there; upper and lower case are the same."""
    names = [name.strip().lower() for name in header]
    for needed in ("path", "label"):
        if needed not in names:
            guess = did_you_mean(needed, names) or f"it has: {', '.join(names) or 'none'}"
            raise TlkitError(f"the manifest has no column '{needed}'", where=path, remedy=guess)
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise TlkitError(f"two columns are called '{twice[0]}'", where=path, remedy="keep one of them")
    return {name: names.index(name) for name in COLUMNS if name in names}


def write_manifest(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write columns of text (N) as CSV or Parquet, by the ending of the name."""
    if path.suffix.lower() != ".parquet":
        run_folder.write_rows(path, tuple(columns), zip(*columns.values(), strict=True))
        return
    import pyarrow
    import pyarrow.parquet

    with run_folder.atomically(path) as part:
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), part)
