"""Images in shards, reached as files in a folder are: what stands in the place of a `Path` where images are read."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tlkit.shards import remote
from tlkit.shards.remote import Remote
from tlkit.shards.table import DIGEST, Rows, Table


@dataclass(frozen=True)
class Status:
    """What is told of a file, under the names that `os.stat_result` has."""

    st_size: int
    st_mtime_ns: int = 0
    st_mode: int = stat.S_IFREG | 0o444


class Shards:
    """A folder whose files are images in shards: ``shards / path`` is one of them.

    Args:
        place: What holds the shards: a folder or a URL.
        shards: Where each shard is, by its name.
        table: What is in them.
    """

    def __init__(self, place: str, shards: dict[str, Path | Remote], table: Table) -> None:
        self.place, self.shards, self.table = place, shards, table
        self.row_of = Rows(table.names)

    def __str__(self) -> str:
        return self.place

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.place.rstrip("/").rpartition("/")[2]

    def absolute(self) -> Shards:
        """The folder itself, which is never relative."""
        return self

    resolve = absolute

    def __truediv__(self, path: str) -> Member:
        return Member(self, path, self.row_of(path))


@dataclass(frozen=True)
class Member:
    """One image in a shard, with as much of a `Path` as readers of images use.

    Args:
        folder: What it lies in.
        path: The name of its shard, and its own there.
        row: Of the table; None where there is no such image.
    """

    folder: Shards
    path: str
    row: int | None

    def __str__(self) -> str:
        return f"{self.folder.place.rstrip('/')}/{self.path}"

    def _there(self) -> int:
        """The row of what can be read."""
        if self.row is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        if self.folder.table.lengths[self.row] < 0:
            raise OSError(errno.EIO, "a broken place in the shard")
        return self.row

    def stat(self) -> Status:
        """Size and kind, without a look into the shard."""
        return Status(int(self.folder.table.lengths[self._there()]))

    @property
    def digest(self) -> str | None:
        """Of its bytes when they were written, as `tlkit.data.content` makes it; None where nobody has kept it."""
        table = self.folder.table
        return table.digests[self._there()].tobytes().hex() if len(table.digests) else None

    def read_bytes(self) -> bytes:
        """Its content.

        Raises:
            InputLost: Its shard is elsewhere, and does not come.
            OSError: Its shard has gone or ends too early, or its bytes are not those that were written.
        """
        row, table = self._there(), self.folder.table
        names, length = table.names, int(table.lengths[row])
        for last in (False, True):
            path = self._shard(names.shards[names.shard[row]])
            try:
                with path.open("rb") as file:
                    file.seek(int(table.offsets[row]))
                    content = file.read(length)
                break
            except FileNotFoundError:  # a copy that went in between, to make room
                if last:
                    raise
        if len(content) < length:
            raise OSError(errno.EIO, "its shard ends too early")
        if len(table.digests) and digest_of(content) != table.digests[row].tobytes():
            raise OSError(errno.EIO, "its bytes are not those that were written into the shard")
        return content

    def _shard(self, name: str) -> Path:
        at = self.folder.shards[name]
        return at if isinstance(at, Path) else remote.local_copy(at, self.folder.place)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its content as a file to read from."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())


Folder = Path | Shards
"""What images lie in."""
File = Path | Member
"""An image, or what should be one."""


def digest_of(content: bytes) -> bytes:
    """What tells whether bytes are the same, as `tlkit.data.content` has it."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def common_place(locations: Sequence[str]) -> str:
    """The folder, or the start of the URL, that all locations begin with, with a slash at its end; or nothing."""
    folders = [location.split("/")[:-1] for location in locations]
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{parts[0]}/" for parts in alike)
