"""What the steps' results say in figures, and their mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tlkit.pipelines.cells import Cell

SEED = "seed"
MAIN = ("test.top1", "target.top1", "top1", "val.top1", "source_val.top1")
"""What a result is known by: the first of these that it has."""


def figures(told: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result's metrics: ``{"test.top1": 0.97, ...}``."""
    found: dict[str, float] = {}
    for name, value in (told.get("metrics") or {}).items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {key: one for key, one in inner.items() if _is_number(one)}
    return found


def main_figure(told: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of what a result is known by; None where it has no accuracy."""
    found = figures(told)
    return next(((name, found[name]) for name in MAIN if name in found), None)


def in_short(told: Mapping[str, Any]) -> str:
    """A result in a few words."""
    main = main_figure(told)
    if main is not None:
        return f"{main[1]:.3f} {called(main[0])}"
    if isinstance(told.get("findings"), Mapping):
        return f"{sum(told['findings'].values())} findings"
    images = told.get("images", len(told.get("predictions") or ()))
    return f"{images} images" if isinstance(images, int) and images else "-"


def called(name: str) -> str:
    """``"test.top1"`` for people."""
    part, _, figure = name.rpartition(".")
    return " ".join(filter(None, (part.replace("_", " "), figure.replace("top1", "top-1").replace("_", " "))))


def table(results: Iterable[tuple[Cell, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each step and setting, whatever its seed: number of results, mean and standard deviation of each figure."""
    groups: dict[str, tuple[Cell, dict[str, Any], list[dict[str, float]]]] = {}
    for cell, told in results:
        setting = {name: value for name, value in cell.setting.items() if name.rpartition(".")[2] != SEED}
        group = groups.setdefault(json.dumps([cell.step.name, setting], default=str), (cell, setting, []))
        group[2].append(figures(told))
    return [_row(*group) for group in groups.values() if any(group[2])]


def _row(cell: Cell, setting: dict[str, Any], found: list[dict[str, float]]) -> dict[str, Any]:
    names = [name for name in found[0] if all(name in one for one in found)]
    values = {name: [one[name] for one in found] for name in names}
    return {
        "step": cell.step.name,
        "setting": setting,
        "n": len(found),
        "main": next((name for name in MAIN if name in names), None),
        "mean": {name: statistics.fmean(of_name) for name, of_name in values.items()},
        "sd": {name: statistics.stdev(of_name) if len(found) > 1 else None for name, of_name in values.items()},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
