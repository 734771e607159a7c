"""``--folds``: cross-validation, for data too small to set a part of it apart; the network is then trained on all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import config, processes, run_folder
from tlkit.commands.console import Console
from tlkit.commands.keeping import begin_run, kept_when_stopped, new_run
from tlkit.commands.labelled import stored_split
from tlkit.commands.reading import labelled, parted, refuse_too_few
from tlkit.commands.results import CrossValidation
from tlkit.commands.training import build_network, train
from tlkit.data.content import copies, digests, learn_digests
from tlkit.data.folders import Samples
from tlkit.data.splits import folds, folds_of_copies
from tlkit.errors import TlkitError
from tlkit.networks.build import weight_bytes
from tlkit.progress import Progress
from tlkit.training.checkpoint import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from tlkit.commands.learning import Options

FOLDS = "folds"
"""Folder of the folds' runs; in the state that a resumed run goes on from, of what finished ones say."""


@dataclass
class Inside:
    """A console for what is done inside a command: the person is told, but no result is written.

    Args:
        console: The command's.
        json: As every console has it.
    """

    console: Console
    json: bool = True

    def say(self, line: str) -> None:
        self.console.say(line)

    def warn(self, line: str) -> None:
        self.console.warn(line)

    def progress(self, label: str, done: int, total: int) -> None:
        self.console.progress(label, done, total)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def line(self, text: str = "") -> None:
        pass

    def text(self, text: str) -> None:
        pass


def read_parted(options: Options, progress: Progress) -> tuple[Samples, list[np.ndarray]]:
    """The images to be trained on or tested on in the end, and for each fold the rows of those that it holds out.

    A test split stays out of the folds; a val split is part of them.

    Raises:
        TlkitError: There are too few images or groups for so many folds.
    """
    count, seed, samples = options.data.folds, options.compute.seed, labelled(options, progress)
    assert count is not None
    learn_digests(samples.root, samples.paths, progress)
    files = digests(samples.root, samples.paths)
    if not samples.splits.any() and options.data.test_fraction:
        samples = parted(samples, val=0, test=options.data.test_fraction, seed=seed)
    samples = replace(samples, splits=np.where(samples.splits == "test", "test", "train").astype("<U5"))
    rows = np.flatnonzero(samples.splits == "train")
    labels, groups = samples.labels[rows], samples.groups
    if len(groups):
        held_out = folds(labels, groups[rows], seed, count)
    else:
        same = copies([files[row] for row in rows.tolist()])
        held_out = folds_of_copies(labels, same, seed, count)
    parts = [rows[held] for held in held_out]
    if len(parts) < count:
        what = f"{count} folds cannot be made of these images{' and groups' if len(groups) else ''}"
        raise TlkitError(
            what, where=samples.root, remedy=f"give --folds {len(parts)}" if len(parts) > 1 else "add some"
        )
    for held in parts:
        refuse_too_few(_of_fold(samples, held), options, f" outside of one of {count} folds")
    return samples, parts


def _of_fold(samples: Samples, held: np.ndarray) -> Samples:
    """The images of a fold: those that it holds out are its val split, those of test are no part of it."""
    splits = samples.splits.copy()
    splits[held] = "val"
    return replace(samples, splits=splits).take(splits != "test")


def cross_validate(
    options: Options,
    samples: Samples,
    parts: Sequence[np.ndarray],
    run: Path,
    resume: config.Resume,
    console: Console,
    started: float,
    *,
    fresh: bool,
) -> dict[str, Any]:
    """Train a network for each fold, each a run inside the run, and then the run's own on all images.

    Args:
        options: What was asked for.
        samples: All images.
        parts: Rows of those that each fold holds out.
        run: The run's folder; what finished before a stop is not done again.
        resume: How often the state is saved.
        console: Who is told.
        started: When the command was.
        fresh: Whether the run has just been made.
    """
    with kept_when_stopped(run, options.command, console, fresh=fresh, keep_state=resume.keep_state):
        if fresh:
            processes.on_first(lambda: begin_run(run, options.recipe, samples))
        plain = replace(options.data, folds=None)
        groups = tuple(plain if group is options.data else group for group in options.groups)
        one = replace(options, data=plain, groups=groups)
        found = []
        for number, held in enumerate(parts, start=1):
            console.say(f"fold {number} of {len(parts)}")
            found.append(_fold(one, samples, held, run, number, resume, console))
        told, rows, probabilities = (list(column) for column in zip(*found, strict=True))
        crossed = _joined(samples, np.concatenate(rows), np.concatenate(probabilities), told)
        console.say("all images")
        stored = processes.on_first(lambda: read_checkpoint(run))
        if stored is None and processes.is_first():
            (run / run_folder.METRICS).unlink(missing_ok=True)
        loaded = build_network(one, Inside(console))
        return train(one, samples, loaded, run, resume, stored, console, started, crossed, alone=False).summary


def _fold(
    options: Options,
    samples: Samples,
    held: np.ndarray,
    run: Path,
    number: int,
    resume: config.Resume,
    console: Console,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A fold's figures, the rows that it held out and their probabilities; at once where it is finished."""
    folder, kept = run / FOLDS / str(number), run / run_folder.STATE / FOLDS / f"{number}.npz"

    def begin() -> Checkpoint | None:
        stored = read_checkpoint(folder)
        if stored is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begin_run(folder, options.recipe, part)
        (folder / run_folder.STATE).mkdir(exist_ok=True)
        return stored

    def finish() -> None:
        mask, place = done.samples.splits == "val", {path: row for row, path in enumerate(samples.paths)}
        rows = np.array([place[path] for path in done.samples.take(mask).paths])
        kept.parent.mkdir(parents=True, exist_ok=True)
        with run_folder.atomically(kept) as file, file.open("wb") as stream:
            np.savez(stream, rows=rows, probabilities=done.probabilities[mask])
        if not resume.keep_state:
            shutil.rmtree(folder / run_folder.STATE)

    def told() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        figures = run_folder.read_json(folder / run_folder.SUMMARY)["metrics"]["val"]
        with np.load(kept) as found:
            return {"fold": number, "run": str(folder), "metrics": figures}, found["rows"], found["probabilities"]

    if not processes.on_first(kept.is_file):
        part = _of_fold(samples, held)
        stored = processes.on_first(begin)
        loaded = build_network(options, Inside(console))
        inside, began = Inside(console), time.monotonic()
        done = train(options, part, loaded, folder, resume, stored, inside, began, alone=number == 1)
        processes.on_first(finish)
    return processes.on_first(told)


def _joined(
    samples: Samples, rows: np.ndarray, probabilities: np.ndarray, told: list[dict[str, Any]]
) -> CrossValidation:
    """What all folds say together, in the order of the images."""
    order = np.argsort(rows)
    held = samples.take(rows[order])
    names = [name for name, value in told[0]["metrics"].items() if isinstance(value, float)]
    names = [name for name in names if all(name in fold["metrics"] for fold in told)]
    values = {name: np.array([fold["metrics"][name] for fold in told]) for name in names}
    return CrossValidation(
        samples=replace(held, splits=np.full(len(held), "val", dtype="<U5")),
        probabilities=probabilities[order],
        used_for_selection=any(fold["metrics"]["used_for_selection"] for fold in told),
        told={
            "folds": told,
            "mean": {name: float(found.mean()) for name, found in values.items()},
            "sd": {name: float(found.std(ddof=1)) for name, found in values.items()},
        },
    )


def begin(
    options: Options, output: config.Output, resume: config.Resume, console: Console, started: float
) -> dict[str, Any]:
    """Cross-validate in a new run."""
    samples, parts = read_parted(options, console.progress)
    for remark in samples.remarks():
        console.warn(remark)
    sizes = [len(held) for held in parts]
    if output.plan:
        loaded = build_network(options, console)
        tested = int((samples.splits == "test").sum())
        line = (
            f"{len(parts)} folds of {min(sizes)} to {max(sizes)} images, then one training on all {sum(sizes)} of them"
        )
        console.line(line + (f"; {tested} of test are measured on in the end" if tested else ""))
        plan = {"folds": sizes, "images": {"train": sum(sizes), "test": tested}}
        return {"model": loaded.name, "weights": loaded.weights, "strategy": options.name, "plan": plan}
    copies = (len(parts) + 1) * (1 if options.strategy == "probe" else 2) + 4
    needed = copies * weight_bytes(build_network(options, Inside(console)).network)
    run = processes.on_first(lambda: new_run(output.out, options.command, needed))
    return cross_validate(options, samples, parts, run, resume, console, started, fresh=True)


def go_on(options: Options, run: Path, resume: config.Resume, console: Console, started: float) -> dict[str, Any]:
    """Go on with cross-validation in a run that was stopped."""
    samples, parts = read_parted(options, console.progress)
    stored = stored_split(replace(samples, splits=np.full(len(samples), "", dtype="<U5")), run)
    if stored.splits.tolist() != samples.splits.tolist():
        what = "the images are not those that the run was begun with"
        raise TlkitError(what, where=samples.root, remedy="put them back, or start a new run")
    if processes.is_first():
        run_folder.remove_half_written(run)
    return cross_validate(options, samples, parts, run, resume, console, started, fresh=False)
