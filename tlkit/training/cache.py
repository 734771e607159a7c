"""What frozen layers put out, kept on disk for all runs: found by what it depends on, and never above a budget.

    FOLDER/<digest of the key>/about.json      the key, for people
    FOLDER/<digest of the key>/<shard>-<bytes of a row>.rows    rows of bytes, one an image
    FOLDER/<digest of the key>/<shard>-<bytes of a row>.index   content digest of each row's image, and a line break

A shard is whole once its index is there. Who reads one holds a shared lock on its index, who writes one an exclusive
lock on its rows: a lock ends with its process, so that what a killed one left behind is known, and removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from tlkit.cache_folder import SHARDS

try:
    import fcntl
except ImportError:  # Windows: nothing is shared between processes there, and open files cannot be removed
    fcntl = None  # type: ignore[assignment]

LINE = 33  # bytes of an index for each row
ABOUT_BYTES = 4096  # at most, for about.json and the names of files
SPARE_BYTES = 256 * 2**20
"""Of the disk that are never taken."""


class NoRoom(Exception):
    """What is to be kept does not fit; says why."""


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=True)


@dataclass(frozen=True)
class Stored:
    """What is kept under one key."""

    key: dict[str, Any]
    rows: int
    bytes: int
    last_used: float
    in_use: bool


@dataclass(frozen=True)
class Cleared:
    """What `FeatureCache.clear` did."""

    bytes: int
    removed: int
    in_use: int


class Entry:
    """What is there under a key, to be read; nobody removes it before `close`."""

    def __init__(self, folder: Path) -> None:
        self._held: list[IO[bytes]] = []
        self._rows: list[np.ndarray] = []
        self._place: dict[str, tuple[int, int]] = {}
        for index in sorted(folder.glob("*.index")) if folder.is_dir() else []:
            self._open(index)

    def _open(self, index: Path) -> None:
        name, _, each = index.stem.rpartition("-")
        if not (name and each.isdigit()):
            return  # somebody else's
        try:
            held = index.open("rb")
        except OSError:
            return  # removed meanwhile
        if not _locked(held, shared=True) or not index.exists():
            held.close()
            return
        files = held.read().decode("ascii", errors="replace").split()
        data = index.with_suffix(".rows")
        sizes = [path.stat().st_size if path.is_file() else 0 for path in (data, index)]
        if not files or sizes != [int(each) * len(files), LINE * len(files)]:
            held.close()
            _remove(index)  # broken: never served
            return
        with suppress(OSError):
            os.utime(index)  # last used now; not where the cache may only be read
        rows = np.memmap(data, dtype=np.uint8, mode="r", shape=(len(files), int(each)))
        self._held.append(held)
        self._rows.append(rows)
        self._place |= {file: (len(self._rows) - 1, row) for row, file in enumerate(files)}

    def find(self, files: Sequence[str]) -> np.ndarray:
        """Position (N, int64) of each image by the digest of its content; -1 where it is not there."""
        starts = np.cumsum([0, *(len(rows) for rows in self._rows)])
        places = (self._place.get(file) for file in files)
        return np.array([-1 if place is None else starts[place[0]] + place[1] for place in places], dtype=np.int64)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Rows (M, n) in bytes."""
        ends = np.cumsum([len(rows) for rows in self._rows])
        shards = np.searchsorted(ends, positions, side="right")
        found = np.empty((len(positions), self._rows[0].shape[1]), dtype=np.uint8)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._rows[shard][positions[here] - (ends[shard] - len(self._rows[shard]))]
        return found

    def close(self) -> None:
        """What was read may be removed from now on."""
        for held in self._held:
            _unlock(held)
            held.close()
        self._held, self._rows, self._place = [], [], {}

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """Rows on their way into the cache; those added are kept also where the work ends early, each is whole."""

    def __init__(self, data: Path, row_bytes: int, held: IO[bytes]) -> None:
        self._data, self._row_bytes, self._held = data, row_bytes, held
        self._files: list[str] = []

    def add(self, files: Sequence[str], rows: np.ndarray) -> None:
        """Append rows (M, n) of bytes, of images with these content digests."""
        assert rows.shape == (len(files), self._row_bytes)
        self._held.write(np.ascontiguousarray(rows).tobytes())
        self._files += files

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if not self._files:
                return
            self._held.truncate(len(self._files) * self._row_bytes)
            self._held.flush()
            os.fsync(self._held.fileno())
            part = self._data.with_suffix(".part")
            part.write_text("".join(f"{file}\n" for file in self._files), encoding="ascii")
            part.replace(self._data.with_suffix(".index"))
        finally:
            _unlock(self._held)
            self._held.close()
            if not self._data.with_suffix(".index").is_file():
                _remove(self._data)


class FeatureCache:
    """The cache in a folder.

    Args:
        folder: Made when something is written.
        budget: Bytes that all that is in it may take together.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget

    def _of(self, key: Mapping[str, Any]) -> Path:
        return self.folder / hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]

    def open(self, key: Mapping[str, Any]) -> Entry:
        """What is there under a key, which may be nothing."""
        return Entry(self._of(key))

    def write(self, key: Mapping[str, Any], count: int, row_bytes: int) -> Writer:
        """Room for rows under a key, taken at once: two processes together never pass the budget.

        Raises:
            NoRoom: They do not fit even without what nobody is using, or the folder cannot be written.
        """
        needed = count * (row_bytes + 2 * LINE) + ABOUT_BYTES
        try:
            with self._alone():
                entry = self._of(key)
                self._make_room(needed, spared=entry)
                entry.mkdir(exist_ok=True)
                about = entry / "about.json"
                if not about.is_file():
                    about.write_text(_canonical(key), encoding="ascii")
                data = entry / f"{secrets.token_hex(8)}-{row_bytes}.rows"
                held = data.open("wb")
                _locked(held, shared=False)
                _take(held, count * (row_bytes + LINE))
                return Writer(data, row_bytes, held)
        except OSError as error:
            raise NoRoom(f"{self.folder} cannot be written ({error.strerror})") from error

    def _make_room(self, needed: int, spared: Path) -> None:
        """Remove what was used longest ago, but nothing in ``spared``, as far as that is necessary and enough."""
        self._remove_left_behind()
        left = self.budget - self.used()
        disk = shutil.disk_usage(self.folder).free - SPARE_BYTES
        unused = sorted((index.stat().st_mtime, index) for index in self.folder.glob("*/*.index"))
        with ExitStack() as stack:
            going: list[Path] = []
            gained = 0
            for _, index in unused:
                if needed <= min(left, disk) + gained:
                    break
                if index.parent != spared and stack.enter_context(_unused(index)):
                    going.append(index)
                    gained += sum(path.stat().st_size for path in (index, index.with_suffix(".rows")) if path.is_file())
            if needed > left + gained:
                of = f"{max(0, left + gained) / 1e6:.0f} MB of --cache-budget are left"
                raise NoRoom(f"{needed / 1e6:.0f} MB are needed, {of}")
            if needed > disk + gained:
                raise NoRoom(f"{needed / 1e6:.0f} MB are needed, {max(0, disk + gained) / 1e6:.0f} MB of disk are left")
            for index in going:
                _remove(index)

    def _remove_left_behind(self) -> None:
        """Rows of processes that were killed, and empty folders."""
        for data in self.folder.glob("*/*.rows"):
            if not data.with_suffix(".index").is_file():
                with _unused(data) as free:
                    if free:
                        _remove(data)
        for about in self.folder.glob("*/about.json"):
            if sum(1 for _ in about.parent.iterdir()) == 1:
                about.unlink(missing_ok=True)
                with suppress(OSError):
                    about.parent.rmdir()

    def used(self) -> int:
        """Bytes of all that is in the folder, but for copies of shards."""
        total = 0
        for parent, folders, names in os.walk(self.folder):
            if SHARDS in folders and Path(parent) == self.folder:
                folders.remove(SHARDS)
            for name in names:
                with suppress(OSError):
                    total += Path(parent, name).stat().st_size
        return total

    def entries(self) -> list[Stored]:
        """All that is kept, what was used last first."""
        found = []
        for about in self.folder.glob("*/about.json"):
            shards = list(about.parent.glob("*.index"))
            with suppress(OSError, ValueError):
                found.append(
                    Stored(
                        json.loads(about.read_text(encoding="ascii")),
                        sum(index.stat().st_size // LINE for index in shards),
                        sum(path.stat().st_size for path in about.parent.iterdir()),
                        max((index.stat().st_mtime for index in shards), default=about.stat().st_mtime),
                        any(_in_use(path) for path in about.parent.glob("*.*") if path.suffix in (".index", ".rows")),
                    )
                )
        return sorted(found, key=lambda one: -one.last_used)

    def clear(self, older_than: float | None = None) -> Cleared:
        """Remove what nobody is using, or of it what was not used for so many seconds."""
        if not self.folder.is_dir():
            return Cleared(0, 0, 0)
        removed = kept = freed = 0
        with self._alone():
            before = self.used()
            for index in list(self.folder.glob("*/*.index")):
                if older_than is not None and time.time() - index.stat().st_mtime < older_than:
                    continue
                with _unused(index) as free:
                    if free:
                        _remove(index)
                        removed += 1
                    else:
                        kept += 1
            self._remove_left_behind()
            freed = before - self.used()
        return Cleared(freed, removed, kept)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process makes or removes anything meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _locked(file: IO[bytes], *, shared: bool) -> bool:
    """Lock an open file until it is closed; False where another process holds one that is to be ours alone."""
    if fcntl is None:
        return True
    try:
        # who looks whether a file is in use holds it for a moment alone: a reader waits for that
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unlock(file: IO[bytes]) -> None:
    """Closing alone would not do where a decoding process, forked meanwhile, has the file open too."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)


def _take(file: IO[bytes], size: int) -> None:
    """Make a file of that size, of which the disk has all: what is taken is there when it is written to."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    file.truncate(size)


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file, which nobody can take hold of meanwhile."""
    try:
        file = path.open("rb")
    except OSError:
        yield False
        return
    with file:
        try:
            yield _locked(file, shared=False)
        finally:
            _unlock(file)


def _in_use(path: Path) -> bool:
    with _unused(path) as free:
        return not free and path.exists()


def _remove(shard: Path) -> int:
    """Remove a shard; returns its bytes. The index goes first: rows alone are nothing to anybody."""
    gained = 0
    for path in (shard.with_suffix(".index"), shard.with_suffix(".part"), shard.with_suffix(".rows")):
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            gained += size
    return gained
