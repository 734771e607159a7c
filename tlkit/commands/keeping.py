"""A run's folder: begun, and what becomes of it when its command is stopped or fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlkit import config, processes, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import write_splits
from tlkit.data.folders import Samples
from tlkit.errors import InputLost, TlkitError
from tlkit.training.fit import held_signals


def new_run(out: Path | None, command: str, needed: int) -> Path:
    """The folder of a new run, on a disk that has room for so many bytes."""
    run_folder.require_space(out, needed)
    return run_folder.new_run(out, command)


def begin_run(run: Path, recipe: Mapping[str, Any], samples: Samples) -> None:
    """Store what a run is resumed from; the recipe comes last: who finds it can resume."""
    write_splits(run, samples)
    run_folder.write_recipe(run, recipe)


def begun(resume: config.Resume, output: config.Output, command: str, console: Console) -> config.Resume:
    """What is asked for; where torchrun has started a job again, to go on with the run that it had begun."""
    if resume.resume is not None:
        return resume
    run = processes.on_first(lambda: run_folder.begun_by_this_job(output.out, command))
    if run is not None:
        console.say(f"this job was started again: going on with {run}")
    return replace(resume, resume=run)


@contextmanager
def kept_when_stopped(
    run: Path, command: str, console: Console, *, fresh: bool = True, keep_state: bool = False
) -> Iterator[None]:
    """A run that is stopped can be resumed, once its splits and recipe are stored.

    A fresh one that is stopped before, or fails for a mistake in its input, leaves nothing behind; one that has stored
    a state is always kept. Of several processes the first sees to it.
    """
    if not processes.is_first():
        yield
        return
    state, finished = run / run_folder.STATE, run / run_folder.SUMMARY
    state.mkdir(exist_ok=True)
    try:
        yield
    except BaseException as error:
        if finished.is_file():  # stopped when all was done, but for trackers
            raise
        mistaken = isinstance(error, TlkitError) and not isinstance(error, InputLost | processes.PeerLost)
        unusable = mistaken or not (run / run_folder.RECIPE).is_file()
        if fresh and unusable and {path.name for path in state.iterdir()} <= {run_folder.JOB}:
            shutil.rmtree(run, ignore_errors=True)  # the same command can be given again
        elif not mistaken:
            console.warn(f"go on with: tlkit {command} --resume {run}")
        if _is_full_disk(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run)) from error
        raise
    finally:
        if finished.is_file() and not keep_state:
            with held_signals():
                shutil.rmtree(state)


def _is_full_disk(error: BaseException) -> bool:
    """The system's own error, which does not say where, or that of safetensors, which has it in words alone."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"(os error {errno.ENOSPC})" in str(error)
