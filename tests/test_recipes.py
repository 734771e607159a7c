"""Recipes can be used as they are: each key and value fits its command, the header says what to expect."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from PIL import Image

from tlkit.cli import app
from tlkit.cli.options import read_recipe
from tlkit.commands.recipes import SCRIPTS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*/*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "run"]  # those of run are pipelines, not options
HEADER = ("# command", "# expected", "# time", "# source")
NEED_NONE = {
    "cache": "has nothing to set but what to clear",
    "demo": "is a recipe itself: nothing of it can be chosen",
    "doctor": "has no options",
    "models": "lists names; what is chosen is a pattern",
    "recipes": "lists these files",
    "shard": "needs a folder to read and one to write; its defaults serve",
}
"""Commands without a recipe, and why."""


def stored_options(command: str) -> dict[str, Any]:
    """Name to annotated type of the options that a recipe of this command may set."""
    function = getattr(app, command.replace("-", "_")).__wrapped__
    hints: dict[str, Any] = {}
    for config in get_type_hints(function).values():
        if isinstance(config, type) and hasattr(config, "__dataclass_fields__"):
            hints |= get_type_hints(config, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_args(hint)[1].stored}


def test_each_command_has_a_recipe_or_needs_none() -> None:
    commands = set(typer.main.get_command(app.app).commands)
    assert commands - {path.parent.name for path in FILES} <= set(NEED_NONE)
    assert set(NEED_NONE) <= commands


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_fits_its_command(path: Path) -> None:
    command = path.parent.name
    assert read_recipe(path, command, stored_options(command))
    header = path.read_text(encoding="utf-8").split("\ncommand:")[0]
    for word in HEADER:
        assert word in header
    for line in header.splitlines():
        assert line.startswith("#"), "options begin after the header"
    assert f"tlkit {command} " in header
    assert " on " in header.split("# time")[1].split("# source")[0], "the time is that of a machine"


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_what_to_expect(name: str) -> None:
    header = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    for word in HEADER:
        assert f"\n{word.removeprefix('# ')} " in header.replace("# ", "")


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
    quick = ("--epochs", 1, "--batch-size", 8)
    words: dict[str, tuple[Any, ...]] = {
        "adapt": ("--source", source, "--target", target, *quick, "--seeds", 1, "--out", run),
        "adapt/solar-cells": ("--source", source, "--target", target, *small, *quick, "--seeds", 1, "--out", run),
        "check-data": (source,),
        "compare": (trained, shutil.copytree(trained, tmp_path / "same"), "--data", source, "--device", "cpu"),
        "count-params": ("test_resnet", "alexnet"),
        "evaluate": (trained, source, "--device", "cpu"),
        "export": (trained, "--out", tmp_path / "exported.onnx"),
        "extract-features": (source, *small, "--out", tmp_path / "features.npz"),
        "finetune": (source, *small, "--out", run),
        "finetune/own-photos": (source, *small, "--folds", 2, "--out", run),
        "finetune/solar-cells": (source, *small, "--folds", 2, "--out", run),
        "predict": (trained, source, "--device", "cpu", "--out", tmp_path / "labels.csv"),
        "pretrain": (source, *quick, "--device", "cpu", "--out", run),
        "unfreeze": (source, *small, "--epochs-per-stage", 1, "--out", run),
        "update-bn": (trained, source, "--device", "cpu", "--out", run),
    }
    given = words.get(f"{command}/{path.stem}", words[command])
    done = tlkit(command, *given, "--recipe", path, "--quiet")
    assert done.code == 0, done.err


@pytest.fixture
def solar_package(tmp_path: Path) -> Path:
    """A package as elpv-dataset is, with an image of each kind and probability."""
    data = tmp_path / "packages" / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    rows = []
    for number, probability in enumerate((0.0, 0.3333333333333333, 0.6666666666666666, 1.0)):
        for kind in ("mono", "poly"):
            name = f"images/cell{number}{kind}.png"
            Image.new("L", (30, 30), 60 * number).save(data / name)
            rows.append(f"{name}  {probability}   {kind}\n")
    (data / "labels.csv").write_text("".join(rows))
    return data.parents[1]


def solar_cells(*words: object, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "solar_cells.py"), *map(str, words)]
    env = os.environ | {"PYTHONPATH": str(packages or "")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("unsure", "defective", "functional"), [("judged", "23", "01"), ("defective", "123", "0"), ("leave-out", "3", "0")]
)
def test_solar_cells_become_class_folders(
    solar_package: Path, tmp_path: Path, unsure: str, defective: str, functional: str
) -> None:
    out = tmp_path / "solar"
    done = solar_cells(out, "--unsure", unsure, packages=solar_package)
    assert done.returncode == 0, done.stderr
    assert "CC BY-NC-SA 4.0" in done.stdout
    with (out / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    for label, numbers in (("defective", defective), ("functional", functional)):
        names = {f"{kind}/{label}/cell{number}{kind}.png" for number in numbers for kind in ("mono", "poly")}
        assert {row["path"] for row in rows if row["label"] == label} == names


def test_solar_cells_refuses_in_one_line(solar_package: Path, tmp_path: Path) -> None:
    missing = solar_cells(tmp_path / "solar")
    if importlib.util.find_spec("elpv_dataset") is None:
        assert missing.stderr == "solar_cells.py: error: elpv_dataset: not installed; pip install elpv-dataset\n"
        assert missing.returncode == 1
    there = solar_cells(tmp_path, packages=solar_package)
    assert there.returncode == 1
    assert "never overwritten" in there.stderr


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("a wheel without network is built by setuptools, which is not installed")
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("tlkit", "recipes"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        project,
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tlkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("tlkit/recipes/")}
        mode = archive.getinfo("tlkit/recipes/nightly.sh").external_attr >> 16
    paths = (path for path in (project / "recipes").rglob("*") if path.is_file())
    assert names == {f"tlkit/recipes/{path.relative_to(project / 'recipes').as_posix()}" for path in paths}
    assert mode & 0o111, "pip keeps a script's executable bit"
