"""Features kept on the disk in the order in which they come: the numbers in one file, a line a batch in another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tlkit import run_folder
from tlkit.data.feature_file import bytes_of
from tlkit.data.loading import BadFile
from tlkit.errors import TlkitError

VALUES, ROWS, IDENTITY = "features.f32", "rows.jsonl", "identity.json"


@dataclass(frozen=True)
class Line:
    """What one batch has brought.

    Args:
        images: Names of the images, in the order of their features.
        shape: Of one image's features; empty while none are there.
        bad: Unreadable files by the names of their images.
        end: Bytes of the lines up to here.
    """

    images: list[str]
    shape: tuple[int, ...]
    bad: list[tuple[str, BadFile]]
    end: int


class Log:
    """Features that one process appends to, and others may read.

    Args:
        folder: Its own; made by `open`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        """Images whose features are there, once it is open."""
        self._values: BinaryIO | None = None

    def open(self, identity: Mapping[str, Any], where: Path) -> None:
        """Make it, or take up what is there: what was not written whole is cut off.

        Args:
            identity: What the features depend on, as JSON.
            where: What an error names.

        Raises:
            TlkitError: It is of another identity, or somebody else is writing it.
        """
        self.folder.mkdir(exist_ok=True)
        self._values = open(self.folder / VALUES, "ab")  # noqa: SIM115 - as long as the lock
        try:
            _lock(self._values, where)
            stored = self.folder / IDENTITY
            if stored.is_file():
                _refuse_other(run_folder.read_json(stored), identity, where)
                self._cut()
            else:  # whatever else is there, nobody knows of which network
                (self.folder / ROWS).unlink(missing_ok=True)
                self._cut()
                run_folder.write_json(stored, identity)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write it; all that was added is on the disk."""
        if self._values is not None:
            self._values.close()
            self._values = None

    @property
    def begun(self) -> bool:
        """Whether it holds anything, be it a file that could not be read."""
        rows = self.folder / ROWS
        return rows.is_file() and rows.stat().st_size > 0

    def lines(self) -> Iterator[Line]:
        """What was written whole."""
        if not self.begun:
            return
        size, count, end = (self.folder / VALUES).stat().st_size, 0, 0
        shape: tuple[int, ...] = ()
        with (self.folder / ROWS).open("rb") as file:
            for text in file:
                try:
                    told = json.loads(text)
                except ValueError:
                    return
                shape = tuple(told["shape"]) or shape
                count, end = count + len(told["images"]), end + len(text)
                if count * bytes_of(shape) > size:
                    return  # the system went down before all of it was on the disk
                yield Line(told["images"], shape, [(name, BadFile(*file)) for name, *file in told["bad"]], end)

    def _cut(self) -> None:
        assert self._values is not None
        shape: tuple[int, ...] = ()
        end = self.count = 0
        for line in self.lines():
            self.count, shape, end = self.count + len(line.images), line.shape, line.end
        self._values.truncate(self.count * bytes_of(shape))
        self._values.seek(0, os.SEEK_END)
        if self.begun:
            with (self.folder / ROWS).open("rb+") as file:
                file.truncate(end)
                file.seek(max(end - 1, 0))
                if file.read() not in (b"", b"\n"):  # else the next line would be a part of this one
                    file.write(b"\n")

    def add(self, images: Sequence[str], values: np.ndarray, bad: Sequence[tuple[str, BadFile]]) -> None:
        """Append the features (B, ...) of images, and what could not be read."""
        assert self._values is not None
        if len(images):
            self._values.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
            self._values.flush()
        shape = values.shape[1:] if len(images) else ()
        unread = [(name, file.path, file.reason) for name, file in bad]
        line = json.dumps({"shape": shape, "images": list(images), "bad": unread})
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.count += len(images)

    def sync(self) -> None:
        """Bring what was added to where processes on other machines see it."""
        if self._values is not None:
            os.fsync(self._values.fileno())

    def read(self, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Features (B, ...) at some places (B) of the order in which they came.

        They are read, not mapped: pages of a file that is mapped count as memory.

        Raises:
            TlkitError: They are not there.
        """
        size, found = bytes_of(shape), np.empty((len(places), *shape), dtype="<f4")
        memory = found.reshape(-1).view(np.uint8).data
        breaks = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
        with (self.folder / VALUES).open("rb") as file:
            for first, last in pairwise([0, *breaks, len(places)]):
                file.seek(int(places[first]) * size)
                if file.readinto(memory[first * size : last * size]) != (last - first) * size:
                    what = "lacks features that another process has written"
                    raise TlkitError(what, where=self.folder / VALUES, remedy="give --out on a disk that all share")
        return found


def _lock(file: BinaryIO, where: Path) -> None:
    """Held until the file is closed, or its process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        remedy = "wait for it, or choose another --out"
        raise TlkitError("another process is writing these features", where=where, remedy=remedy) from error


def _refuse_other(stored: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    wanted = json.loads(json.dumps(identity))
    differing = [name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)]
    if differing:
        first = next(name for name in wanted if name in differing) if set(differing) & wanted.keys() else differing[0]
        what = f"features begun with another {first}: {_short(stored.get(first))}, not {_short(wanted.get(first))}"
        raise TlkitError(what, where=where, remedy="choose another --out, or remove that folder")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
