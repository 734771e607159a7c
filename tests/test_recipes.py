"""Recipes can be used as they are: every key and value fits its command, and the header says what to expect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tlkit.cli import app
from tlkit.cli.options import read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "run")  # see test_run.py


def stored_options(command: str) -> dict[str, Any]:
    """Name to annotated type of the options that a recipe of this command may set."""
    function = getattr(app, command.replace("-", "_")).__wrapped__
    hints: dict[str, Any] = {}
    for config in get_type_hints(function).values():
        if isinstance(config, type) and hasattr(config, "__dataclass_fields__"):
            hints |= get_type_hints(config, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_args(hint)[1].stored}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_fits_its_command(path: Path) -> None:
    command = path.parent.name
    assert read_recipe(path, command, stored_options(command))
    header = path.read_text(encoding="utf-8").split("command:")[0]
    for word in ("# command", "# expected", "# time", "# source"):
        assert word in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_runs_on_made_images(
    path: Path,
    tlkit: Callable[..., Any],
    make_shapes: Callable[..., Path],
    trained: Path,
    small: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """A step or two of each: what its options say is accepted together."""
    source, target = (make_shapes(tmp_path / name, images=6, seed=seed) for seed, name in enumerate(("a", "b")))
    command, run = path.parent.name, tmp_path / "run"
    words: dict[str, tuple[Any, ...]] = {
        "adapt": ("--source", source, "--target", target, "--epochs", 1, "--batch-size", 8, "--seeds", 1, "--out", run),
        "check-data": (source,),
        "compare": (trained, "test_vit", "--data", source, "--plan"),
        "count-params": ("test_resnet", "alexnet"),
        "evaluate": (trained, source, "--device", "cpu"),
        "extract-features": (source, *small, "--out", tmp_path / "features.npz"),
        "finetune": (source, *small, "--out", run),
        "predict": (trained, source, "--device", "cpu", "--out", tmp_path / "labels.csv"),
        "pretrain": (source, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--out", run),
        "unfreeze": (source, *small, "--epochs-per-stage", 1, "--out", run),
    }
    done = tlkit(command, *words[command], "--recipe", path, "--quiet")
    assert done.code == 0, done.err
