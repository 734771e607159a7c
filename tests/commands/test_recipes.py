"""``recipes``: lists, shows and copies what comes with the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlkit.commands import recipes as recipes_module
from tlkit.commands.recipes import SCRIPTS

Tlkit = Callable[..., Any]
ROOT = Path(__file__).parents[2]
YAML = sorted(path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/*/*.yaml"))
NAMES = [*YAML, *SCRIPTS]


def test_all_are_listed_with_what_they_do(tlkit: Tlkit) -> None:
    done = tlkit("recipes")
    assert done.code == 0
    for name in NAMES:
        assert name in done.out
    told = tlkit("recipes", "--json").json["recipes"]
    assert [recipe["name"] for recipe in told] == NAMES
    for recipe in told:
        assert recipe["command"] == (None if recipe["name"] in SCRIPTS else recipe["name"].split("/")[0])
        assert len(recipe["title"]) > 20
        assert Path(recipe["path"]).is_file()


@pytest.mark.parametrize("name", ["finetune/digits-probe", "digits-probe", "digits-probe.yaml"])
def test_one_is_shown_as_it_is(tlkit: Tlkit, name: str) -> None:
    text = (ROOT / "recipes" / "finetune" / "digits-probe.yaml").read_text(encoding="utf-8")
    assert tlkit("recipes", name).out == text


def test_one_is_copied_to_a_file_that_its_command_takes(tlkit: Tlkit, tmp_path: Path, shapes: Path) -> None:
    copy = tmp_path / "mine.yaml"
    assert tlkit("recipes", "nightly", "--out", copy).code == 0
    assert tlkit("check-data", shapes, "--recipe", copy, "--quiet").code == 0
    again = tlkit("recipes", "nightly", "--out", copy)
    assert again.code == 1
    assert "never overwritten" in again.error


def test_several_are_copied_to_a_folder(tlkit: Tlkit, tmp_path: Path) -> None:
    assert tlkit("recipes", "--out", tmp_path / "all").code == 0
    found = (path.relative_to(tmp_path / "all") for path in (tmp_path / "all").rglob("*") if path.is_file())
    assert sorted(path.as_posix() for path in found) == sorted([*(f"{name}.yaml" for name in YAML), *SCRIPTS])


def test_a_script_is_shown_by_its_whole_name_and_copied_so_that_it_can_be_run(tlkit: Tlkit, tmp_path: Path) -> None:
    script = ROOT / "recipes" / "nightly.sh"
    assert tlkit("recipes", "nightly.sh").out == script.read_text(encoding="utf-8")
    for copied, name in ((tmp_path / "mine", "nightly.sh"), (tmp_path / "all" / "nightly.sh", None)):
        words = (name, "--out", copied) if name else ("--out", copied.parent)
        assert tlkit("recipes", *words).code == 0
        assert copied.read_bytes() == script.read_bytes()
        assert os.access(copied, os.X_OK)
    assert not os.access(tmp_path / "all" / "nightly.cron", os.X_OK)


def test_a_plan_writes_nothing(tlkit: Tlkit, tmp_path: Path) -> None:
    told = tlkit("recipes", "--out", tmp_path / "all", "--plan", "--json").json
    assert told["plan"]["recipes"] == NAMES
    assert not (tmp_path / "all").exists()


def test_what_cannot_be_is_one_line(tlkit: Tlkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'finetune/digits-probe'" in tlkit("recipes", "digit-probe").error
    assert "cannot be written" in tlkit("recipes", "nightly", "--out", tmp_path / "no" / "such" / "file.yaml").error
    monkeypatch.setattr(recipes_module, "FOLDERS", (tmp_path / "nowhere",))
    assert "missing from the installation" in tlkit("recipes").error
    made = tmp_path / "made"
    for command in ("finetune", "pretrain"):
        (made / command).mkdir(parents=True)
        (made / command / "same.yaml").write_text("# A recipe. And more.\ncommand: finetune\n")
    monkeypatch.setattr(recipes_module, "FOLDERS", (tmp_path / "nowhere", made))
    assert "give finetune/same or pretrain/same" in tlkit("recipes", "same").error
    assert [recipe.title for recipe in recipes_module.shipped().values()] == ["A recipe", "A recipe"]


def test_the_package_carries_them() -> None:
    """What setup.py maps is where the command looks."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'package_dir={"tlkit.recipes": "recipes"}' in text
    assert recipes_module.FOLDERS[0].parts[-2:] == ("tlkit", "recipes")
