"""Write images into shards: a few large files in the place of many small ones."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.data.folders import SPLITS, Samples
from tlkit.data.loading import BadFile, refuse_bad_files
from tlkit.data.new_images import read_images
from tlkit.errors import TlkitError, UsageError
from tlkit.shards.table import FILE, joined, read_table, write_table
from tlkit.shards.writing import Entry, size_in_shard, size_of_shard, write_shard

WORKING = f"{run_folder.PART}shards"
"""What stands in the folder until all shards are there: what they are made of, and what is in those that are."""
PLAN = "plan.json"
AT_ONCE = 64
THREADS = 8


@dataclass(frozen=True)
class Planned:
    """A shard that is to be written.

    Args:
        name: Of the file.
        rows: Of the images, in their order.
    """

    name: str
    rows: np.ndarray


def shard(sharding: config.Sharding, output: config.Output, console: Console) -> dict[str, Any]:
    """Write images into shards; see ``tlkit shard --help``."""
    if sharding.data is None:
        raise UsageError("missing argument DATA", where="tlkit shard", remedy="give the folder of images")
    if sharding.folder is not None and output.out is not None:
        raise UsageError("given twice", where="OUT and --out", remedy="give one of them")
    out = sharding.folder or output.out
    if out is None and not output.plan:
        raise UsageError("missing argument OUT", where="tlkit shard", remedy="give the folder to write")
    if out is not None:
        _refuse(out)
    samples = read_images(sharding.data, progress=console.progress)
    for line in samples.remarks():
        console.warn(line)
    sizes, bad = _sizes(samples, console)
    refuse_bad_files(bad, len(samples), samples.root, sharding.on_error)
    name = (out or sharding.data).absolute().name
    plan = _planned(samples, sizes, name, sharding)
    told: dict[str, Any] = {"images": sum(len(one.rows) for one in plan), "classes": len(_classes(samples))}
    if output.plan or out is None:
        console.line(f"{told['images']} images, {sizes.sum() / 1e6:.1f} MB, in {len(plan)} shards")
        return told | {"plan": {"shards": [one.name for one in plan]}}
    run_folder.require_space(out, int(sizes.sum()))
    try:
        unread = _write(samples, plan, out, sharding, console)
    except BaseException as error:
        if not isinstance(error, TlkitError):
            console.warn("the same command goes on with what is written")
        raise
    refuse_bad_files(bad + unread, len(samples), samples.root, sharding.on_error)
    report_skipped(console, bad + unread)
    table = _finish(plan, out)
    patterns = _patterns(out, [one.name for one in plan])
    size = sum(table.sizes.values())
    console.line(f"{len(table)} images in {len(plan)} shards, {size / 1e6:.1f} MB: {out}")
    console.line("give the folder as DATA, or " + ", ".join(f"'{pattern}'" for pattern in patterns))
    return told | {
        "images": len(table),
        "shards": len(plan),
        "bytes": size,
        "out": str(out),
        "patterns": patterns,
        "skipped_files": skipped(bad + unread),
    }


def _refuse(out: Path) -> None:
    """Raise where ``out`` is something else than what this command has begun."""
    if not (out / WORKING).is_dir():
        run_folder.refuse_existing(out)


def _sizes(samples: Samples, console: Console) -> tuple[np.ndarray, list[BadFile]]:
    """Bytes of each image (N), -1 where there is no such file."""
    sizes, bad = np.empty(len(samples), dtype=np.int64), []

    def size(path: str) -> int | str:
        try:
            return (samples.root / path).stat().st_size
        except (OSError, ValueError) as error:
            return (isinstance(error, OSError) and error.strerror) or str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        for row, (path, found) in enumerate(zip(samples.paths, pool.map(size, samples.paths), strict=True)):
            sizes[row] = found if isinstance(found, int) else -1
            if isinstance(found, str):
                bad.append(BadFile(path, found.lower()))
            if row % 1000 == 999:
                console.progress("listing", row + 1, len(samples))
    return sizes, bad


def _planned(samples: Samples, sizes: np.ndarray, name: str, sharding: config.Sharding) -> list[Planned]:
    """Which images go into which shard: those of a split in random order, so that each shard is like the whole."""
    plan: list[Planned] = []
    most = config.size(sharding.max_size)
    for split in ("", *SPLITS):
        rows = np.flatnonzero((samples.splits == split) & (sizes >= 0))
        rows = np.random.default_rng([sharding.seed, len(split)]).permutation(rows)
        begun, size, parts = 0, 0, []
        for place, row in enumerate(rows.tolist()):
            more = size_in_shard(int(sizes[row]))
            if place > begun and (size_of_shard(size + more) > most or place - begun >= sharding.max_images):
                parts.append(rows[begun:place])
                begun, size = place, 0
            size += more
        parts += [rows[begun:]] if len(rows) else []
        stem = f"{name}-{split}" if split else name
        plan += [Planned(f"{stem}-{number:06d}.tar", part) for number, part in enumerate(parts)]
    return plan


def _classes(samples: Samples) -> tuple[str, ...]:
    return () if samples.classes == ("",) else samples.classes


def _write(
    samples: Samples, plan: Sequence[Planned], out: Path, sharding: config.Sharding, console: Console
) -> list[BadFile]:
    """Write what is not there yet; returns what could not be read."""
    working = out / WORKING
    working.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for one in plan:
        digest.update(f"{one.name}\n".encode(errors="surrogateescape") + one.rows.tobytes())
    for path in samples.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\n")
    identity = {"data": str(samples.root), "plan": digest.hexdigest()}
    if (working / PLAN).is_file():
        if run_folder.read_json(working / PLAN) != identity:
            remedy = "choose another OUT, or remove that folder"
            raise TlkitError("shards were begun here from other images or options", where=out, remedy=remedy)
        console.say("going on with what was begun")
    else:
        run_folder.write_json(working / PLAN, identity)
    unread: list[BadFile] = []
    done = 0
    for one in plan:
        told = working / f"{one.name}.parquet"
        if not told.is_file():
            bad: list[BadFile] = []
            entries = _entries(samples, one.rows, bad, sharding.on_error, done, console)
            table = write_shard(out / one.name, entries, _classes(samples))
            run_folder.write_json(working / f"{one.name}.json", {"bad": [[file.path, file.reason] for file in bad]})
            write_table(told, table)
        unread += [BadFile(*file) for file in run_folder.read_json(working / f"{one.name}.json")["bad"]]
        done += len(one.rows)
    return unread


def _entries(
    samples: Samples, rows: np.ndarray, bad: list[BadFile], on_error: str, done: int, console: Console
) -> Iterator[Entry]:
    def read(path: str) -> bytes | BadFile:
        try:
            return (samples.root / path).read_bytes()
        except OSError as error:
            return BadFile(path, (error.strerror or str(error)).lower())

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(rows), AT_ONCE):
            some = rows[first : first + AT_ONCE].tolist()
            paths = [samples.paths[row] for row in some]
            for row, path, content in zip(some, paths, pool.map(read, paths), strict=True):
                if isinstance(content, BadFile):
                    bad.append(content)
                    refuse_bad_files([content], len(samples), samples.root, on_error)
                    continue
                number = int(samples.labels[row])
                yield Entry(
                    path=path,
                    content=content,
                    label=samples.classes[number] or None,
                    number=number,
                    split=str(samples.splits[row]),
                    group=str(samples.groups[row]) if len(samples.groups) else "",
                )
            console.progress("images", done + first + len(some), len(samples))


def _finish(plan: Sequence[Planned], out: Path) -> Any:
    working = out / WORKING
    tables = [read_table(working / f"{one.name}.parquet") for one in plan]
    table = joined([one for one in tables if one is not None])
    write_table(out / FILE, table)  # last: it says that all shards are there
    shutil.rmtree(working)
    return table


def _patterns(out: Path, names: Sequence[str]) -> list[str]:
    """How to name all shards of each kind in one word."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.removesuffix(".tar").rpartition("-")
        kinds.setdefault(stem, []).append(number)
    return [
        str(out / (f"{stem}-{{{numbers[0]}..{numbers[-1]}}}.tar" if numbers[1:] else f"{stem}-{numbers[0]}.tar"))
        for stem, numbers in kinds.items()
    ]
