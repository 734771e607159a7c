"""A pipeline's folder: the folder of each cell, its log beside it, and how far it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tlkit import run_folder
from tlkit.config import key, option_name
from tlkit.errors import TlkitError
from tlkit.option_values import option_values
from tlkit.pipelines.cells import Cell
from tlkit.pipelines.references import Reference, field_of, references, replaced

LOGS = "logs"
PIPELINE = "pipeline.yaml"
"""A copy of the file, as it was last run."""


@dataclass(frozen=True)
class Place:
    """Where a cell's result is.

    Args:
        root: The pipeline's folder.
        cell: The cell.
    """

    root: Path
    cell: Cell

    @property
    def folder(self) -> Path:
        """Of the cell alone: its run, or what holds its file."""
        return self.root / self.cell.folder

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.root / LOGS / f"{self.cell.folder}.log"

    @property
    def out(self) -> Path | None:
        """What ``--out`` is."""
        if self.cell.step.command.makes_run:
            return self.folder
        name = self.cell.step.command.file(self.cell.values)
        return self.folder / name if name else None

    @property
    def told(self) -> dict[str, str]:
        """``run`` or ``out``, as results have them."""
        if self.out is None:
            return {}
        return {"run" if self.cell.step.command.makes_run else "out": str(self.out)}

    def result(self) -> dict[str, Any] | None:
        """The JSON object of the step; None where it is not done, or the object is not whole."""
        try:
            told = run_folder.read_json(self.folder / run_folder.SUMMARY)
        except TlkitError:
            return None
        return told | self.told  # the pipeline's folder may have been moved since

    def was_cut(self) -> bool:
        """Whether a run has been begun that can be gone on with."""
        unfinished = not (self.folder / run_folder.SUMMARY).exists()
        return self.cell.step.command.resumes and unfinished and (self.folder / run_folder.RECIPE).is_file()

    def words(self, find: Callable[[Cell], dict[str, Any]], *, quiet: bool) -> list[str]:
        """What follows ``tlkit`` to do this cell, or to go on with it; its folder is made ready.

        Args:
            find: Gives the results of the cells that this one refers to.
            quiet: Whether no progress is wanted.

        Raises:
            TlkitError: A result has no such field, or does not fit the option.
        """
        step = self.cell.step
        always = ["--json", *(["--quiet"] if quiet else [])]
        values = self._values(find)
        flags = [word for option in values if step.command.is_flag(option) for word in self._flag(option, values)]
        if self.was_cut():
            return [step.command.name, "--resume", str(self.folder), *flags, *always]
        continues = step.command.name == "extract-features"  # which knows what it has done
        if self.folder.exists() and not (continues and self.out is not None and not self.out.exists()):
            shutil.rmtree(self.folder)
        if not step.command.makes_run:
            self.folder.mkdir(exist_ok=True)
        recipe = {key(option): value for option, value in values.items() if not step.command.is_flag(option)}
        path = self.log.with_suffix(".yaml")
        run_folder.write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        out = ["--out", str(self.out)] if self.out else []
        return [step.command.name, "--recipe", str(path), *out, *flags, *always]

    def _values(self, find: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        """The options with what they refer to."""
        step = self.cell.step

        def resolve(reference: Reference) -> Any:
            found = [field_of(find(cell), reference) for cell in self.cell.needed(reference)]
            return found if reference.every else found[0]

        values = {}
        for option, raw in self.cell.values.items():
            value = replaced(raw, resolve)
            if any(references(raw)):
                value = option_values({key(option): value}, step.command.options, step.where).get(option)
            if value is not None:
                values[option] = value
        return values

    def _flag(self, option: str, values: dict[str, Any]) -> list[str]:
        value, flag = values[option], option_name(option)
        if isinstance(value, bool):
            return [flag] if value else []
        # what a command writes beside its result, such as a manifest, goes with it
        return [flag, str(self.folder / value) if self.cell.step.command.names_place(option) else str(value)]


def check_folder(root: Path, pipeline: Path) -> None:
    """Raise where a pipeline's folder is there and is not that of this pipeline.

    Raises:
        TlkitError: It is something else's.
    """
    if not os.path.lexists(root):
        return
    remedy = "choose another --out, or remove it"
    summary = root / run_folder.SUMMARY
    told = run_folder.read_json(summary) if summary.is_file() else {}
    empty = root.is_dir() and all(path.name.startswith(".") for path in root.iterdir())
    if not empty and told.get("command") != "run":
        raise TlkitError("exists already, and is not the folder of a pipeline", where=root, remedy=remedy)
    other = Path(str(told.get("pipeline", pipeline)))
    if other.is_file() and not other.samefile(pipeline):
        raise TlkitError(f"belongs to another pipeline, {other}", where=root, remedy=remedy)
