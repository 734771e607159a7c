"""What a run leaves behind, and how it is read back; every file is written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tlkit import processes
from tlkit.errors import TlkitError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RECIPE, SUMMARY, METRICS = "recipe.yaml", "summary.json", "metrics.jsonl"
SPLITS, PREDICTIONS, SKIPPED, REPORT = "splits.csv", "predictions.csv", "skipped_files.csv", "report.html"
STATE, TRACKING, JOB = "state", "tracking", "job"
PART = ".tlkit-"
"""How the name of a file begins that is being written."""

SPARE_BYTES = 32 * 2**20  # for predictions, report and the like, beside the weights


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a finished run: one that holds a network."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def new_run(out: Path | None, command: str) -> Path:
    """Make the folder of a new run.

    Args:
        out: The folder asked for; by default ``runs/COMMAND-DATE-TIME``.
        command: The command that makes the run.

    Raises:
        TlkitError: The folder exists (a run never writes into another), or cannot be made.
    """
    stem = out or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    run, number = stem, 1
    while True:
        try:
            run.mkdir(parents=True)
            if job := processes.job():  # torchrun may start it again
                (run / STATE).mkdir()
                write_text(run / STATE / JOB, job)
            return run
        except OSError as error:
            refuse_existing(out)
            if not os.path.lexists(run):
                what = f"cannot be made ({error.strerror})"
                raise TlkitError(what, where=run, remedy="choose another --out") from error
        number += 1  # two runs in one second
        run = stem.with_name(f"{stem.name}-{number}")


def begun_by_this_job(out: Path | None, command: str) -> Path | None:
    """The unfinished run that this job had begun, before torchrun started it again; None where there is none.

    What was killed before it could be gone on with is removed.
    """
    if not processes.restarted():
        return None
    for run in [out] if out is not None else sorted(Path("runs").glob(f"{command}-*")):
        mark = run / STATE / JOB
        if mark.is_file() and mark.read_text(encoding="utf-8") == processes.job():
            if (run / RECIPE).is_file():
                return run
            shutil.rmtree(run)
    return None


def refuse_existing(out: Path | None) -> None:
    """Raise where ``--out`` names something that is there already.

    Raises:
        TlkitError: It exists.
    """
    if out is not None and os.path.lexists(out):
        remedy = "choose another --out, or remove it"
        raise TlkitError("exists already, and is never overwritten", where=out, remedy=remedy)


def require_space(folder: Path | None, needed: int) -> None:
    """Raise where the disk that is to hold ``folder`` has fewer than ``needed`` bytes and some to spare.

    Raises:
        TlkitError: Not enough disk.
    """
    target = (folder or Path("runs")).absolute()
    place = next((parent for parent in (target, *target.parents) if parent.is_dir()), target)
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise TlkitError(
            f"not enough disk: {free / 2**20:.0f} MiB free, about {(needed + SPARE_BYTES) / 2**20:.0f} MiB needed",
            where=place,
            remedy="free some space, or give --out on another disk",
        )


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place once written; nothing half-written is ever seen.

    Raises:
        TlkitError: The folder is missing, or nothing may be written there.
    """
    part = path.with_name(f"{PART}{secrets.token_hex(8)}")
    try:
        part.touch(exist_ok=False)
        rights = part.stat().st_mode
    except OSError as error:
        raise TlkitError(f"cannot be written ({error.strerror})", where=path, remedy="check its folder") from error
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(rights)  # safetensors puts a file of its own there, for the owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into, which takes its place once all is written.

    Raises:
        TlkitError: The folder that is to hold it is missing, or nothing may be written there.
    """
    part = path.with_name(f"{PART}{secrets.token_hex(8)}")
    try:
        part.mkdir()
    except OSError as error:
        raise TlkitError(f"cannot be written ({error.strerror})", where=path, remedy="check its folder") from error
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_half_written(run: Path) -> None:
    """Remove what a process that was killed was about to write."""
    for part in run.rglob(f"{PART}*"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole; what is not valid Unicode (a file name from another system) is kept as it was."""
    with atomically(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object; what is not valid Unicode becomes the escape by which JSON spells it."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text.encode(errors="backslashreplace").decode() + "\n")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file with a header."""
    with atomically(path) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_recipe(run: Path, recipe: Mapping[str, Any]) -> str:
    """Write the effective recipe; returns its text."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    write_text(run / RECIPE, f"# tlkit {recipe['command']} --recipe FILE repeats this run\n{text}")
    return text


def read_recipe(run: Path) -> dict[str, Any]:
    """The recipe that a run was started with.

    Raises:
        TlkitError: The folder is not a run.
    """
    try:
        return dict(yaml.safe_load((run / RECIPE).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        what = "not the folder of a run: no readable recipe.yaml"
        raise TlkitError(what, where=run, remedy="check the path") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        TlkitError: The file is missing or broken.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        remedy = "check that it belongs to a whole run"
        raise TlkitError(f"cannot be read ({reason})", where=path, remedy=remedy) from error


def append_metrics(run: Path, row: Mapping[str, Any]) -> None:
    """Add one line (an epoch) to ``metrics.jsonl``."""
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_splits(run: Path) -> dict[str, tuple[str, str]] | None:
    """Path to (label, split) of the images that a run was made from; None where the run stored none.

    Raises:
        TlkitError: The file is broken.
    """
    rows = _stored_images(run)
    return None if rows is None else {row[0]: (row[1], row[2]) for row in rows}


def trained_on(run: Path) -> dict[str, str]:
    """Content digest to path of the images that a run was trained on; empty where the run stored none.

    Raises:
        TlkitError: The file is broken.
    """
    return {row[3]: row[0] for row in _stored_images(run) or [] if row[2] == "train" and row[3:] > [""]}


def _stored_images(run: Path) -> list[list[str]] | None:
    path = run / SPLITS
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            rows = list(csv.reader(file))[1:]
        except csv.Error as error:
            raise TlkitError(f"cannot be read ({error})", where=path, remedy="check that it is whole") from error
    for row in rows:
        if len(row) not in (3, 4):  # runs of old have no digests
            what = f"cannot be read (a line of {len(row)} values where 4 are expected)"
            raise TlkitError(what, where=path, remedy="check that it is whole")
    return rows
