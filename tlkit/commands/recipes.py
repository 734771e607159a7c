"""List, show and copy the recipes that come with tlkit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.errors import TlkitError, did_you_mean

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
"""Where they are: in the package once it is installed, else at the top of the project."""


@dataclass(frozen=True)
class Recipe:
    """A file of option values.

    Args:
        name: ``COMMAND/NAME``.
        path: The file.
    """

    name: str
    path: Path

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """The first sentence of its header."""
        lines = []
        for line in self.text.splitlines():
            if not line.startswith("# "):
                break
            lines.append(line.removeprefix("# ").strip())
        return f"{' '.join(lines).partition('. ')[0].rstrip('.')}"


def recipes(recipes: config.Recipes, output: config.Output, console: Console) -> dict[str, Any]:
    """List, show or copy recipes; see ``tlkit recipes --help``."""
    run_folder.refuse_existing(output.out)
    known = shipped()
    chosen = [recipe_named(name, known) for name in recipes.names or []] or list(known.values())
    told: dict[str, Any] = {"recipes": [_told(recipe) for recipe in chosen]}
    if output.plan:
        console.line(f"{len(chosen)} recipes would be {'copied' if output.out else 'shown'}")
        return {"plan": {"recipes": [recipe.name for recipe in chosen]}}
    if output.out is not None:
        _copy(chosen, output.out, single=len(recipes.names or []) == 1)
        count = "1 recipe" if len(chosen) == 1 else f"{len(chosen)} recipes"
        console.line(f"{count} copied to {output.out}")
        return told | {"out": str(output.out)}
    if recipes.names:
        for recipe in chosen:
            console.text(recipe.text)
        return told
    console.table("", ["recipe", "what it does"], [[recipe.name, recipe.title] for recipe in chosen])
    console.line("tlkit recipes NAME shows one, with the command to run and what to expect; --out FILE copies it")
    return told


def shipped() -> dict[str, Recipe]:
    """All recipes by name.

    Raises:
        TlkitError: The installation lacks them.
    """
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if folder is None:
        what = "the recipes are missing from the installation"
        raise TlkitError(what, where=FOLDERS[0], remedy="install tlkit again")
    paths = sorted(folder.glob("*/*.yaml"))
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in paths)
    return {name: Recipe(name, path) for name, path in zip(names, paths, strict=True)}


def recipe_named(name: str, known: dict[str, Recipe] | None = None) -> Recipe:
    """By its whole name, or by the last part of it where only one is called so.

    Raises:
        TlkitError: There is none, or more than one.
    """
    known = shipped() if known is None else known
    whole = name.removesuffix(".yaml")
    same = [recipe for other, recipe in known.items() if whole in (other, other.rpartition("/")[2])]
    if len(same) == 1:
        return same[0]
    if same:
        remedy = f"give {' or '.join(recipe.name for recipe in same)}"
        raise TlkitError("several recipes are called so", where=name, remedy=remedy)
    remedy = did_you_mean(whole, known) or "'tlkit recipes' lists them"
    raise TlkitError("unknown recipe", where=name, remedy=remedy)


def _told(recipe: Recipe) -> dict[str, str]:
    command = recipe.name.partition("/")[0]
    return {"name": recipe.name, "command": command, "title": recipe.title, "path": str(recipe.path)}


def _copy(chosen: list[Recipe], out: Path, *, single: bool) -> None:
    """One recipe to a file, several to a new folder."""
    try:
        if single:
            shutil.copyfile(chosen[0].path, out)
            return
        for recipe in chosen:
            target = out / f"{recipe.name}.yaml"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe.path, target)
    except OSError as error:
        raise TlkitError(f"cannot be written ({error.strerror})", where=out, remedy="choose another --out") from error
