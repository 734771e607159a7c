"""What becomes of a run's folder when its command is stopped or fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlkit import run_folder
from tlkit.commands.console import Console
from tlkit.errors import InputLost, TlkitError


@contextmanager
def kept_when_stopped(
    run: Path, command: str, console: Console, *, fresh: bool = True, keep_state: bool = False
) -> Iterator[None]:
    """A run that is stopped can be resumed, once its splits and recipe are stored.

    A fresh one that is stopped before, or fails for a mistake in its input, leaves nothing behind; one that has stored
    a state is always kept.
    """
    state = run / run_folder.STATE
    state.mkdir(exist_ok=True)
    try:
        yield
        if not keep_state:
            shutil.rmtree(state)
    except BaseException as error:
        mistaken = isinstance(error, TlkitError) and not isinstance(error, InputLost)
        unusable = mistaken or not (run / run_folder.RECIPE).is_file()
        if fresh and unusable and not any(state.iterdir()):
            shutil.rmtree(run, ignore_errors=True)  # the same command can be given again
        elif not mistaken:
            console.warn(f"go on with: tlkit {command} --resume {run}")
        if _is_full_disk(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run)) from error
        raise


def _is_full_disk(error: BaseException) -> bool:
    """The system's own error, which does not say where, or that of safetensors, which has it in words alone."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"(os error {errno.ENOSPC})" in str(error)
