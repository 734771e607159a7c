"""Digests of what files hold: two files of one digest are the same, whatever they are called."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tlkit import processes
from tlkit.progress import Progress, silent
from tlkit.shards.folder import File, Folder, Member
from tlkit.shards.table import DIGEST

MANY = 1000  # files
AT_ONCE = 2**20
"""Bytes of a file up to which it is read whole: a buffer for larger ones takes longer to make than a photo to hash."""


_KNOWN: dict[tuple[str, int, int], str] = {}


def digest(path: File) -> str | None:
    """32 hex digits of a file's content; None where it cannot be read.

    A process reads a file once, unless its size or time changes; one in a shard not at all, where the shard's index
    has its digest.
    """
    try:
        if isinstance(path, Member) and (kept := path.digest) is not None:
            return kept
        status = path.stat()
        file = str(path), status.st_size, status.st_mtime_ns
        if file not in _KNOWN:
            _KNOWN[file] = _read(path, status.st_size)
        return _KNOWN[file]
    except (OSError, ValueError):
        return None


def _read(path: File, size: int) -> str:
    made = functools.partial(hashlib.blake2b, digest_size=DIGEST)
    if size <= AT_ONCE:
        return made(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, made).hexdigest()


def digests(root: Folder, paths: Sequence[str], progress: Progress = silent) -> list[str | None]:
    """`digest` of many files; of few, which takes no time, no progress is told."""
    found: list[str | None] = []
    with ThreadPoolExecutor(4) as pool:
        for one in pool.map(lambda path: digest(root / path), paths):
            found.append(one)
            if len(paths) > MANY and (len(found) % 64 == 0 or len(found) == len(paths)):
                progress("hashing", len(found), len(paths))
    return found


def learn_digests(root: Folder, paths: Sequence[str], progress: Progress = silent) -> None:
    """Know the `digests` of many files from now on; several processes read a part each, and tell the others."""
    digests(root, processes.share(paths), progress)
    for known in processes.gathered(_KNOWN):
        _KNOWN.update(known)


def copies(digests: Sequence[str | None]) -> np.ndarray:
    """For each file the first that holds the same (N, int64): itself where no earlier one does, or it is unreadable."""
    first: dict[str, int] = {}
    return np.array(
        [row if one is None else first.setdefault(one, row) for row, one in enumerate(digests)], dtype=np.int64
    )
