"""The cells of a pipeline: each step once for every combination of the values that it, and what it refers to, is varied
over."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tlkit import __version__
from tlkit.config import key
from tlkit.pipelines.inputs import fingerprint
from tlkit.pipelines.reading import Axis, Step
from tlkit.pipelines.references import Reference, references, replaced

LONGEST_NAME = 60
HARMLESS = ("workers",)
"""Options that change nothing but time."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A step with one value of everything that it is varied over.

    Args:
        step: The step.
        settings: The value of each axis, those of the cells that it refers to included.
        values: Options by field name, with references.
        needs: By step, and whether it is wanted whole: the cells that it refers to.
        digest: Of all that its result depends on.
    """

    step: Step
    settings: dict[Axis, Any]
    values: dict[str, Any]
    needs: dict[tuple[str, bool], tuple[Cell, ...]]
    digest: str

    @property
    def setting(self) -> dict[str, Any]:
        """The settings by name; where two steps vary the same option, with the step's."""
        often = Counter(axis.option for axis in self.settings)
        return {
            f"{axis.owner}.{key(axis.option)}" if often[axis.option] > 1 and axis.owner else key(axis.option): value
            for axis, value in self.settings.items()
        }

    @property
    def label(self) -> str:
        """``finetune lr=0.001 seed=2``."""
        return " ".join([self.step.name, *(f"{name}={in_words(value)}" for name, value in self.setting.items())])

    @property
    def folder(self) -> str:
        """The name of its folder: readable, and never that of another recipe or other inputs."""
        words = re.sub(r"[^\w.=+-]+", "-", self.label)[:LONGEST_NAME].strip(".-")
        return f"{words}-{self.digest}"

    def needed(self, reference: Reference) -> tuple[Cell, ...]:
        """The cells that a reference is about."""
        return self.needs[reference.step, reference.every]


def cells_of(steps: Sequence[Step], folder: Path) -> list[Cell]:
    """All cells, in order.

    Args:
        steps: In order.
        folder: The pipeline's.

    Raises:
        TlkitError: A value that does not fit its option.
    """
    prints: dict[str, str] = {}
    cells: dict[str, list[Cell]] = {}
    for step in steps:
        cells[step.name] = [
            Cell(step, settings, values, needs, _digest(step, values, needs, folder, prints))
            for settings, values, needs in _combinations(step, cells)
        ]
    return [cell for of_step in cells.values() for cell in of_step]


def in_words(value: Any) -> str:
    """A value of a matrix in a few words."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(in_words, value))
    return re.sub(r"\$\{([^}]*)\}", r"\1", str(value))


def _combinations(
    step: Step, cells: dict[str, list[Cell]]
) -> Iterator[tuple[dict[Axis, Any], dict[str, Any], dict[tuple[str, bool], tuple[Cell, ...]]]]:
    for raw in product(*(axis.values for axis in step.axes)):
        settings = dict(zip(step.axes, raw, strict=True))
        values = step.values | {axis.option: step.checked(axis.option, value) for axis, value in settings.items()}
        values = {option: value for option, value in values.items() if value is not None}
        found = [reference for value in values.values() for reference in references(value)]
        wholes = {(one.step, True): tuple(cells[one.step]) for one in found if one.every}
        joined: list[tuple[dict[Axis, Any], dict[tuple[str, bool], tuple[Cell, ...]]]] = [(settings, wholes)]
        for name in dict.fromkeys(one.step for one in found if not one.every):
            joined = [
                (cell.settings | before, needs | {(name, False): (cell,)})
                for before, needs in joined
                for cell in cells[name]
                if all(before.get(axis, value) == value for axis, value in cell.settings.items())
            ]
        for whole, needs in joined:
            yield whole, values, needs


def _digest(
    step: Step,
    values: dict[str, Any],
    needs: dict[tuple[str, bool], tuple[Cell, ...]],
    folder: Path,
    prints: dict[str, str],
) -> str:
    """Of what the result depends on. What it takes from another cell stands in it as that cell's own digest."""

    def of_cells(reference: Reference) -> str:
        digests = " ".join(cell.digest for cell in needs[reference.step, reference.every])
        return f"{digests}.{'.'.join(reference.field)}"

    known: dict[str, Any] = {}
    for option, value in values.items():
        if option in HARMLESS or (step.command.is_flag(option) and not step.command.names_place(option)):
            continue
        known[option] = replaced(value, of_cells)
        if any(references(value)) or step.command.is_flag(option) or not step.command.names_place(option):
            continue
        places = known[option] if isinstance(known[option], list) else [known[option]]
        prints |= {place: fingerprint(place, folder) for place in places if place not in prints}
        known[option] = [[str(Path(place).resolve()), prints[place]] if prints[place] else place for place in places]
    text = json.dumps([__version__, step.command.name, known], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
