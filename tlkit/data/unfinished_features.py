"""Features that are being made: kept as they come, by each process in a log of its own, gone on with after a stop, and
written in the end as one file or as one part a process."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import processes, run_folder
from tlkit.data.feature_file import WRITERS, Columns, rows_at_once
from tlkit.data.feature_log import Log
from tlkit.data.loading import BadFile
from tlkit.errors import TlkitError

LONGEST_NAME = 255  # bytes, on nearly all file systems
LOG, SEEN = "log-", "seen-"
"""How the names begin of a process's log, and of a mark that finds out who sees the folder."""


def working_folder(out: Path) -> Path:
    """Where features for ``out`` are kept until it is written."""
    name = f"{run_folder.PART}{out.name}"
    if len(os.fsencode(name)) > LONGEST_NAME:  # the name of the file leaves no room for more
        name = f"{run_folder.PART}{hashlib.sha256(os.fsencode(out.name)).hexdigest()}"
    return out.with_name(name)


class Unfinished:
    """Features of some of the images, in a folder beside what is to hold them.

    Each process adds to its own log, and reads those of all: of the processes there are now, and of those there were.

    Args:
        folder: `working_folder` of the file.
        identity: What the features depend on, as JSON; features of another identity are never added.
        paths: All images; what is kept is found again by these names, also where some came or went since.
        number: Which process this is; by default `processes.rank`.
        several: How many there are; by default `processes.count`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        paths: Sequence[str],
        number: int | None = None,
        several: int | None = None,
    ) -> None:
        self.folder, self.identity, self.paths = folder, identity, paths
        self.number = processes.rank() if number is None else number
        self.several = processes.count() if several is None else several
        self.shape: tuple[int, ...] = ()
        """Of one image's features; empty until the first ones are there."""
        self.bad: dict[int, BadFile] = {}
        """Unreadable files by row."""
        self._own = Log(folder / f"{LOG}{self.number}")
        self._open: list[Log] = []
        self._log = np.full(len(paths), -1, dtype=np.int32)  # which log holds a row's features
        self._place = np.zeros(len(paths), dtype=np.int64)  # and where

    def __enter__(self) -> Unfinished:
        """Take up what is there, all processes together.

        Raises:
            TlkitError: It is of another identity, somebody else is writing it, or a process does not see the folder.
        """
        try:
            first = processes.on_first(self._open_first)  # refused, before the others have made anything
            processes.each(lambda: self._open_own(*first))
            processes.each(self._read)  # nobody adds anything while others still read
            self._unmark()
        except BaseException:
            self._leave_nothing()
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if error and error[0] is not None:
            self._leave_nothing()
        self._close()

    def _open_first(self) -> tuple[str, str]:
        """Open the first process's log, and those of processes there are no more."""
        self.folder.mkdir(exist_ok=True)
        self._add_open(self._own)
        for number, log in self._logs().items():
            if number >= self.several:
                self._add_open(log)
        token = secrets.token_hex(8)
        if processes.count() > 1:
            _mark(self.folder, token).touch()
        return token, socket.gethostname()

    def _open_own(self, token: str, host: str) -> None:
        if processes.is_first():
            return
        if not _mark(self.folder, token).is_file():
            what = f"process {processes.rank()} ({socket.gethostname()}) does not see this folder of process 0 ({host})"
            raise TlkitError(what, where=self.folder, remedy="give --out on a disk that all machines share")
        self._add_open(self._own)

    def _add_open(self, log: Log) -> None:
        log.open(self.identity, self.folder)
        self._open.append(log)

    def _close(self) -> None:
        while self._open:
            self._open.pop().close()

    def _unmark(self) -> None:
        if processes.is_first():
            for mark in self.folder.glob(f"{SEEN}*"):
                mark.unlink(missing_ok=True)

    def _leave_nothing(self) -> None:
        """Remove what holds nothing: where a mistake is found before any work, all of it."""
        if not self._open:  # it is somebody else's
            return
        self._unmark()
        for log in self._open:
            if not log.begun:
                shutil.rmtree(log.folder, ignore_errors=True)
        if not self._logs():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _logs(self) -> dict[int, Log]:
        """All logs, by the numbers of their processes."""
        found = [path.name.removeprefix(LOG) for path in self.folder.glob(f"{LOG}*")]
        return {number: self._log_of(number) for number in sorted(int(name) for name in found if name.isdecimal())}

    def _read(self) -> None:
        """Find the rows of what the logs hold."""
        rows: _Rows | None = None
        for number, log in self._logs().items():
            place = 0
            for line in log.lines():
                rows = rows or _Rows(self.paths)
                self.shape = line.shape or self.shape
                for name in line.images:
                    row = rows.take(name)
                    if row >= 0:  # else the image is gone
                        self._log[row], self._place[row] = number, place
                    place += 1
                unread = [(rows.next(name), file) for name, file in line.bad]
                self.bad |= {row: file for row, file in unread if row >= 0}

    @property
    def begun(self) -> bool:
        """Whether any process has done anything."""
        return any(log.begun for log in self._logs().values())

    @property
    def count(self) -> int:
        """Images that have features, as far as this process knows."""
        return int((self._log >= 0).sum())

    def missing(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Those of some rows that have no features yet, unreadable ones included."""
        return np.flatnonzero(self._log[first:last] < 0) + first

    def add(self, rows: np.ndarray | Sequence[int], values: np.ndarray, bad: Mapping[int, BadFile]) -> None:
        """Append the features (B, ...) of some rows (B), and what could not be read."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows):
            self.shape = values.shape[1:]
        self._log[rows], self._place[rows] = self.number, np.arange(len(rows)) + self._own.count
        images = [self.paths[row] for row in rows.tolist()]
        self._own.add(images, values, [(self.paths[row], file) for row, file in bad.items()])
        self.bad |= bad

    def write(self, out: Path, columns: Columns, first: int = 0, last: int | None = None) -> None:
        """Write the features in the order of the rows, all processes together, and remove the folder.

        Several processes write a folder of Parquet, each what its share has come to. All else is one file, which the
        first process writes. It is made inside the folder: what a kill leaves of it goes with the rest.

        Args:
            out: What to write.
            columns: Of all images.
            first: Where this process's share begins.
            last: Where it ends.
        """
        shapes = processes.gathered(self.shape)
        self.shape = next((shape for shape in shapes if shape), ())  # a share may have no images
        parted = self.several > 1 and out.suffix.lower() == ".parquet"
        whole = self.folder / (f"parts{out.suffix}" if parted else f"whole{out.suffix}")
        processes.on_first(lambda: _prepare(out, whole, parted))
        if parted:
            part = whole / f"part-{self.number:05}-of-{self.several:05}{out.suffix}"
            processes.each(lambda: self._write(part, columns, self._done(first, last)))
        else:
            self._learn()
            processes.on_first(lambda: self._write(whole, columns, self._done()))
        processes.on_first(lambda: _put(whole, out))
        processes.each(self._close)  # a network file system keeps what is open
        processes.on_first(lambda: shutil.rmtree(self.folder))

    def _done(self, first: int = 0, last: int | None = None) -> np.ndarray:
        return np.flatnonzero(self._log[first:last] >= 0) + first

    def _learn(self) -> None:
        """Learn what the other processes have added."""
        processes.each(self._own.sync)
        own = np.flatnonzero(self._log == self.number)
        for number, (rows, places) in enumerate(processes.gathered((own, self._place[own]))):
            if number != self.number:
                self._log[rows], self._place[rows] = number, places

    def _write(self, path: Path, columns: Columns, rows: np.ndarray) -> None:
        shape, several = (len(rows), *self.shape), rows_at_once(self.shape)
        chunks = (self._values(rows[first : first + several]) for first in range(0, len(rows), several))
        with run_folder.atomically(path) as part:
            WRITERS[path.suffix.lower()](part, chunks, shape, columns.take(rows), self.identity)

    def _values(self, rows: np.ndarray) -> np.ndarray:
        """Features (B, ...) of some rows (B), from whichever logs hold them."""
        logs, places = self._log[rows], self._place[rows]
        numbers = np.unique(logs).tolist()
        if len(numbers) == 1:
            return self._log_of(numbers[0]).read(places, self.shape)
        found = np.empty((len(rows), *self.shape), dtype="<f4")
        for number in numbers:
            found[logs == number] = self._log_of(number).read(places[logs == number], self.shape)
        return found

    def _log_of(self, number: int) -> Log:
        return Log(self.folder / f"{LOG}{number}")


class _Rows:
    """Rows by the names of their images; a list may name an image several times."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._first: dict[str, int] = {}
        self._after = np.full(len(paths), -1, dtype=np.int64)  # the next row of the same name
        for row in reversed(range(len(paths))):
            name = paths[row]
            self._after[row] = self._first.get(name, -1)
            self._first[name] = row

    def next(self, name: str) -> int:
        """The first row of this name that was not taken; -1 where there is none."""
        return self._first.get(name, -1)

    def take(self, name: str) -> int:
        """That row, from now on taken."""
        row = self.next(name)
        if row >= 0:
            self._first[name] = int(self._after[row])
        return row


def _mark(folder: Path, token: str) -> Path:
    """A file of a name that nobody has looked for before: no file system remembers that it was not there."""
    return folder / f"{SEEN}{token}"


def _prepare(out: Path, whole: Path, parted: bool) -> None:
    run_folder.refuse_existing(out)  # it may have come while this worked
    if parted:
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()


def _put(whole: Path, out: Path) -> None:
    if whole.is_dir():
        run_folder.refuse_existing(out)  # a folder would take the place of an empty one
    whole.replace(out)
