"""Recipes can be used as they are: every key and value fits its command, and the header says what to expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tlkit.cli import app
from tlkit.cli.options import read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


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
