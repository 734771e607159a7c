"""List, show and copy the recipes that come with tlkit, and the scripts beside them."""

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


SCRIPTS = ("nightly.sh", "nightly.cron", "solar_cells.py")
"""Files beside the recipes: a shell script, how cron starts it, and what makes a folder of a data set."""


@dataclass(frozen=True)
class Recipe:
    """A file of option values, or a script that stands beside them.

    Args:
        name: ``COMMAND/NAME``, of a script its file's name.
        path: The file.
    """

    name: str
    path: Path

    @property
    def command(self) -> str | None:
        """The command that takes it; None for a script."""
        return self.name.partition("/")[0] if "/" in self.name else None

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """The first sentence of its header."""
        lines = []
        for line in self.text.splitlines():
            words = line.strip('#" ')  # of a comment, or of a Python file's docstring
            if not words:
                break
            if not line.startswith("#!"):
                lines.append(words)
        return " ".join(lines).partition(". ")[0].rstrip(".")


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
    options = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.glob("*/*.yaml")}
    scripts = {name: folder / name for name in SCRIPTS if (folder / name).is_file()}
    return {name: Recipe(name, path) for name, path in [*sorted(options.items()), *scripts.items()]}


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


def _told(recipe: Recipe) -> dict[str, str | None]:
    return {"name": recipe.name, "command": recipe.command, "title": recipe.title, "path": str(recipe.path)}


def _copy(chosen: list[Recipe], out: Path, *, single: bool) -> None:
    """One recipe to a file, several to a new folder."""
    try:
        if single:
            _copy_file(chosen[0].path, out)
            return
        for recipe in chosen:
            target = out / (f"{recipe.name}.yaml" if recipe.command else recipe.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(recipe.path, target)
    except OSError as error:
        raise TlkitError(f"cannot be written ({error.strerror})", where=out, remedy="choose another --out") from error


def _copy_file(path: Path, target: Path) -> None:
    """A copy that can be written, whatever the package's files are, and run where the file says by what."""
    shutil.copyfile(path, target)
    if path.read_bytes().startswith(b"#!"):
        target.chmod(target.stat().st_mode | 0o111)
