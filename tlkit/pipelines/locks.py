"""One pipeline at a time in a folder, and no step beside one that has outlived its pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tlkit.errors import TlkitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PIPELINE_LOCK, STEP_LOCK = ".pipeline.lock", ".step.lock"
PATIENCE = 60.0
"""Seconds that a step that has outlived its pipeline is waited for: it has been told to end."""


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """Hold a pipeline's folder; gives the descriptors that a step's process is to inherit.

    The folder's lock is this process's alone. That of the steps is shared with the step that runs: where this process
    is killed and the step is not, the step still holds it.

    Raises:
        TlkitError: Another process is at work there.
    """
    if fcntl is None:
        yield ()
        return
    own, shared = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (PIPELINE_LOCK, STEP_LOCK))
    try:
        if not _taken(own):
            what, remedy = (
                "another 'tlkit run' is at work in this folder",
                "wait for it to end, or choose another --out",
            )
            raise TlkitError(what, where=folder, remedy=remedy)
        if not _taken(shared):
            say("waiting for a step to end that has outlived its pipeline")
            ends = time.monotonic() + PATIENCE
            while not _taken(shared):
                if time.monotonic() > ends:
                    what = "a step that has outlived its pipeline is at work in this folder"
                    raise TlkitError(what, where=folder, remedy="wait for it to end, or end it")
                time.sleep(0.1)
        yield (shared,)
    finally:
        os.close(own)
        os.close(shared)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
