"""Run the steps of a pipeline, and go on with those that were stopped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlkit import __version__, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.recipes import recipe_named
from tlkit.errors import TlkitError
from tlkit.pipelines.cells import Cell, cells_of, in_words
from tlkit.pipelines.child import command_line, run_child
from tlkit.pipelines.command import command_of
from tlkit.pipelines.figures import called, in_short, table
from tlkit.pipelines.locks import locked
from tlkit.pipelines.place import LOGS, PIPELINE, Place, check_folder
from tlkit.pipelines.reading import read_pipeline


@dataclass
class Progress:
    """How far a pipeline is.

    Args:
        pipeline: Its file.
        root: Its folder.
        places: Where each cell's result is, in order.
        started: When it was begun, on the monotonic clock.
        results: Of the cells that are done.
        state: Of each cell: waiting, running, skipped (it was done before), done, failed, blocked (it needs one that
            failed) or stopped.
        seconds: That a cell took in this start.
        errors: Why it failed.
    """

    pipeline: Path
    root: Path
    places: dict[Cell, Place]
    started: float
    results: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    state: dict[Cell, str] = field(default_factory=dict)
    seconds: dict[Cell, float] = field(default_factory=dict)
    errors: dict[Cell, str] = field(default_factory=dict)

    def told(self, exit_code: int | None = None) -> dict[str, Any]:
        """What ``--json`` prints and ``summary.json`` holds."""
        return {
            "pipeline": str(self.pipeline.absolute()),
            "out": str(self.root),
            "seconds": round(time.monotonic() - self.started, 3),
            "steps": [self._step(cell, place) for cell, place in self.places.items()],
            "table": table(self.results.items()),
            **({} if exit_code is None else {"exit_code": exit_code}),
        }

    def _step(self, cell: Cell, place: Place) -> dict[str, Any]:
        result = self.results.get(cell, {})
        return {
            "step": cell.step.name,
            "command": cell.step.command.name,
            "cell": cell.setting,
            "state": self.state.get(cell, "waiting"),
            "seconds": round(self.seconds.get(cell, 0.0), 3),
            **place.told,
            **{name: result[name] for name in ("metrics", "findings") if name in result},
            **({"error": self.errors[cell]} if cell in self.errors else {}),
            "log": str(place.log),
        }

    def write(self, exit_code: int | None = None) -> None:
        """Write the summary; it has no exit code while the pipeline runs."""
        told = {"command": "run", "version": __version__} | self.told(exit_code)
        run_folder.write_json(self.root / run_folder.SUMMARY, told)

    def stop(self, exit_code: int) -> None:
        """Write that the step that runs was stopped."""
        self.state |= {cell: "stopped" for cell, state in self.state.items() if state == "running"}
        self.write(exit_code)


def run(
    pipeline: config.Pipeline,
    output: config.Output,
    console: Console,
    commands: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Run a pipeline; see ``tlkit run --help``.

    Args:
        pipeline: The file.
        output: Where to.
        console: Who is told.
        commands: The option groups of each command that a step can be.
    """
    path = pipeline.pipeline
    known = {name: command_of(name, groups) for name, groups in commands.items()}
    steps = read_pipeline(path, known, _recipe_file)
    root = output.out or Path("runs") / path.stem
    check_folder(root, path)
    places = {cell: Place(root, cell) for cell in cells_of(steps, root)}
    if output.plan:
        return _plan(places, root, console)
    _make(root)
    with locked(root, console.say) as descriptors:
        progress = Progress(path, root, places, time.monotonic())
        progress.write()
        (root / LOGS).mkdir(exist_ok=True)
        run_folder.write_text(root / PIPELINE, path.read_text(encoding="utf-8"))
        try:
            _carry_out(progress, pipeline.keep_going, output.quiet, descriptors, console)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
                progress.stop(130 if isinstance(error, KeyboardInterrupt) else 143)
                flags = [
                    *(["--keep-going"] if pipeline.keep_going else []),
                    *(["--out", str(root)] if output.out else []),
                ]
                console.warn(f"go on with: {shlex.join(['tlkit', 'run', str(path), *flags])}")
            raise
        progress.write(1 if progress.errors else 0)
    _show(progress, console)
    if progress.errors:
        raise _failure(progress)
    return progress.told()


def _recipe_file(name: str) -> Path:
    return Path(name) if Path(name).is_file() else recipe_named(name).path


def _make(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made ({error.strerror})"
        raise TlkitError(what, where=root, remedy="choose another --out") from error


def _carry_out(progress: Progress, keep_going: bool, quiet: bool, descriptors: Sequence[int], console: Console) -> None:
    for cell, place in progress.places.items():
        if progress.errors and not keep_going:
            return
        if any(needed not in progress.results for cells in cell.needs.values() for needed in cells):
            progress.state[cell] = "blocked"
            continue
        say = _teller(cell, quiet, console)
        result = place.result()
        if result is not None:
            progress.results[cell], progress.state[cell] = result, "skipped"
            say(f"done before: {in_short(result)}")
            continue
        began = time.monotonic()
        progress.state[cell] = "running"
        progress.write()
        try:
            progress.results[cell] = _do(place, progress.results.__getitem__, quiet, descriptors, say)
            progress.state[cell] = "done"
        except TlkitError as error:
            progress.errors[cell], progress.state[cell] = str(error), "failed"
        progress.seconds[cell] = time.monotonic() - began
        done = in_short(progress.results[cell]) if cell in progress.results else f"failed: {progress.errors[cell]}"
        say(f"{done}, {progress.seconds[cell]:.0f} s")


def _do(
    place: Place,
    find: Callable[[Cell], dict[str, Any]],
    quiet: bool,
    descriptors: Sequence[int],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run a step to its end; its result.

    Raises:
        TlkitError: It failed.
    """
    cut, step = place.was_cut(), place.cell.step
    words = place.words(find, quiet=quiet)
    say("going on with what was stopped" if cut else "begins")
    ended = run_child(command_line(words, step.processes), place.log, say, descriptors)
    if ended.code:
        raise TlkitError(f"exit code {ended.code}: {ended.error}", remedy=f"its log is {place.log}")
    if not step.command.makes_run:  # a run holds its own; labels are in the file
        told = {name: value for name, value in ended.told.items() if name != "predictions"}
        run_folder.write_json(place.folder / run_folder.SUMMARY, told)
    result = place.result()
    if result is None:
        raise TlkitError("it ended without a result", remedy=f"its log is {place.log}")
    return result


def _teller(cell: Cell, quiet: bool, console: Console) -> Callable[[str], None]:
    """Prints lines of a step with the time and its name before them, for a log that several steps write into."""

    def say(line: str) -> None:
        whole = f"{time.strftime('%H:%M:%S')} {cell.label} | {line}"
        if quiet and line.startswith("note:"):
            console.warn(f"{cell.label} | {line.removeprefix('note:').strip()}")
        elif not line.startswith("tlkit: error:"):  # which is told at the end
            console.say(whole)

    return say


def _failure(progress: Progress) -> TlkitError:
    lines = {cell: f"step '{cell.label}': {error}" for cell, error in progress.errors.items()}
    if len(lines) == 1:
        return TlkitError(*lines.values(), told=progress.told())
    blocked = list(progress.state.values()).count("blocked")
    what = f"{len(lines)} of {len(progress.places)} steps failed" + (f", {blocked} could not be run" if blocked else "")
    remedy = "mend what their logs say; the same command goes on"
    return TlkitError(what, where=progress.root, remedy=remedy, details=lines.values(), told=progress.told())


def _plan(places: Mapping[Cell, Place], root: Path, console: Console) -> dict[str, Any]:
    told, rows = [], []
    for cell, place in places.items():
        state = "done" if place.result() is not None else "to go on with" if place.was_cut() else "to do"
        step = {"step": cell.step.name, "command": cell.step.command.name, "cell": cell.setting, "state": state}
        told.append(step | place.told)
        rows.append([cell.label, state, cell.folder])
    console.table(f"steps in {root}", ["step", "state", "folder"], rows)
    return {"out": str(root), "plan": told}


def _show(progress: Progress, console: Console) -> None:
    rows = []
    for cell in progress.places:
        seconds = f"{progress.seconds[cell]:.0f}" if cell in progress.seconds else "-"
        result = in_short(progress.results[cell]) if cell in progress.results else "-"
        rows.append([cell.label, progress.state.get(cell, "waiting"), seconds, result, cell.digest])
    console.table("", ["step", "state", "seconds", "result", "digest"], rows)
    found = [row for row in table(progress.results.items()) if row["main"]]
    if any(row["setting"] or row["n"] > 1 for row in found):
        cells = [
            [
                " ".join([row["step"], *(f"{name}={in_words(value)}" for name, value in row["setting"].items())]),
                called(row["main"]),
                _mean(row),
                row["n"],
            ]
            for row in found
        ]
        console.table("", ["step, whatever its seed", "", "mean ± sd", "n"], cells)
    console.line(f"folders  {progress.root}/STEP-DIGEST")
    console.line(f"summary  {progress.root / run_folder.SUMMARY}")


def _mean(row: Mapping[str, Any]) -> str:
    mean, spread = row["mean"][row["main"]], row["sd"][row["main"]]
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"
