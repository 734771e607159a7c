"""What a tar file holds, and where in it: found from its headers, also behind a broken one."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK = tarfile.BLOCKSIZE
AT_ONCE = 2**20
KEPT = 1000
"""Members that are parsed before `tarfile` is made to forget them: it would keep each, about a kilobyte."""


@dataclass(frozen=True)
class Found:
    """A file in a tar file, or a place where there is none that can be made out.

    Args:
        name: As the tar file has it; empty for a broken place.
        offset: Of its first byte.
        size: In bytes, -1 for a broken place.
    """

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Found]:
    """The files in a tar file, in their order; broken places in between and at the end.

    What follows a broken header is found again at the next whole one, as POSIX pax headers have checksums. A file that
    the tar file ends in is listed: it cannot be read whole.

    Raises:
        OSError: The tar file cannot be read.
    """
    with path.open("rb") as file, path.open("rb") as headers:
        size, end = file.seek(0, 2), 0
        if not size:
            yield Found("", 0, -1)
        for one in _headers(headers):
            if _holds_something(file, end, one.offset):
                yield Found("", end, -1)
            if one.isreg():
                yield Found(one.name, one.offset_data, one.size)
            end = one.offset_data + -(-(one.size if one.isreg() else 0) // BLOCK) * BLOCK
        if _holds_something(file, end, size):
            yield Found("", end, -1)


def _headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    start, passed = 0, 0
    while True:
        file.seek(start)
        try:
            # zeros, and whatever is no header, are passed over block by block
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, errors="surrogateescape") as archive:
                while (one := archive.next()) is not None:
                    yield one
                    if (passed := passed + 1) % KEPT == 0:
                        archive.members = []  # type: ignore[attr-defined]
            return
        except tarfile.ReadError:  # a long name without the header that it belongs to, or nothing more
            end = file.tell()
            if end <= start or not file.read(1):
                return
            start = end


def _holds_something(file: IO[bytes], first: int, last: int) -> bool:
    """Whether there is a byte other than zero between two places."""
    file.seek(first)
    while (left := last - file.tell()) > 0:
        block = file.read(min(left, AT_ONCE))
        if not block:
            return False
        if block.count(0) != len(block):
            return True
    return False
