"""Whole commands on folders as they are found in the wild: no file stops or bends them, and none is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tlkit import run_folder

Tlkit = Callable[..., Any]

NAMES = [
    "größe 图片.png",
    "🐱.png",
    "a\nb\tc.png",
    " spaces  .png",
    "'\"%s{}<b>&,;.png",
    "-rf.png",
    "[red]*?.png",
    "x" * 251 + ".png",
    os.fsdecode(b"caf\xe9\xff.png"),
]
CLASSES = ("disc", "square", "triangle")


@dataclass(frozen=True)
class Wild:
    """A folder of class folders in which each odd name and each bad file stands.

    Args:
        folder: The folder.
        labels: Class of each image that can be read, by path.
        bad: Files that cannot be read, with what their reason says.
    """

    folder: Path
    labels: Mapping[str, str]
    bad: Mapping[str, str]


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory, make_shapes: Callable[..., Path]) -> Wild:
    folder = make_shapes(tmp_path_factory.mktemp("wild") / "data", CLASSES, 12)
    for place, name in enumerate(NAMES):
        shutil.copy(folder / CLASSES[place % 3] / "02.png", folder / CLASSES[place % 3] / name)
    for name in CLASSES:
        (folder / name / "back").symlink_to("..", target_is_directory=True)  # a link that loops
        (folder / name / "notes.txt").write_text("not an image")
        (folder / name / "._00.jpg").write_bytes(b"left by another system")
    Image.new("RGB", (1, 1), "red").save(folder / "disc" / "one.png")
    Image.new("RGB", (1, 10_000), "red").save(folder / "disc" / "long.png")
    shutil.copy(folder / "square" / "02.png", folder / "square" / "is-a-png.jpg")
    labels = {
        path.relative_to(folder).as_posix(): name
        for name in CLASSES
        for path in (folder / name).iterdir()
        if path.suffix in (".png", ".jpg") and not path.name.startswith(".")
    }
    sound = (folder / "disc" / "01.jpg").read_bytes()
    bad = {
        "disc/cut.jpg": ("Truncated", sound[: len(sound) // 2]),
        "disc/empty.png": ("empty", b""),
        "square/text.jpg": ("not an image", b"<html>404</html>"),
        "triangle/zeros.tif": ("not an image", bytes(500)),
        "triangle/a\nb.webp": ("not an image", b"RIFF"),
    }
    for path, (_, content) in bad.items():
        (folder / path).write_bytes(content)
    (folder / "square" / "gone.jpg").symlink_to("nowhere")
    (folder / "square" / "round.jpg").symlink_to("round.jpg")
    (folder / "triangle" / "folder.jpg").mkdir()
    reasons = {path: reason for path, (reason, _) in bad.items()}
    return Wild(folder, labels, reasons | {"square/gone.jpg": "no such file", "square/round.jpg": "symbolic links"})


def test_training_names_every_bad_file_before_it_starts(
    wild: Wild, tlkit: Tlkit, small: tuple[str, ...], tmp_path: Path, contents: Callable[[Path], Any]
) -> None:
    before = contents(wild.folder)
    done = tlkit("finetune", wild.folder, *small, "--strategy", "probe", "--out", tmp_path / "run", "--quiet")
    assert done.code == 1 and f"{len(wild.bad)} of {len(wild.bad) + len(wild.labels)} images cannot be read" in done.err
    for path, reason in wild.bad.items():
        line = next(line for line in done.err.splitlines() if " ".join(path.split()) in line)
        assert reason in line
    assert contents(wild.folder) == before


@pytest.mark.parametrize(
    "arguments", [("--strategy", "probe"), ("--strategy", "full", "--epochs", 1)], ids=["probe", "full"]
)
def test_training_leaves_out_the_bad_files_alone(
    arguments: tuple[object, ...],
    wild: Wild,
    tlkit: Tlkit,
    small: tuple[str, ...],
    tmp_path: Path,
    contents: Callable[[Path], Any],
    read_csv: Callable[[Path], list[dict[str, str]]],
) -> None:
    before, run = contents(wild.folder), tmp_path / "run"
    found = tlkit("finetune", wild.folder, *small, *arguments, "--on-error", "skip", "--out", run, "--json").json
    assert {file["path"] for file in found["skipped_files"]} == set(wild.bad)
    assert {row["path"]: row["label"] for row in read_csv(run / "predictions.csv")} == wild.labels
    assert {row["path"] for row in read_csv(run / "skipped_files.csv")} == set(wild.bad)
    assert contents(wild.folder) == before
    report = (run / run_folder.REPORT).read_bytes().decode()
    assert "<b>&,;.png" not in report


@pytest.fixture(scope="module")
def run(wild: Wild, tlkit: Tlkit, small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the good files of the wild folder, in whose data the bad ones stand."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ("--strategy", "probe", "--on-error", "skip", "--quiet", "--out", out)
    assert tlkit("finetune", wild.folder, *small, *arguments).code == 0
    return out


def test_measuring_and_labelling(
    wild: Wild, run: Path, tlkit: Tlkit, tmp_path: Path, contents: Callable[[Path], Any]
) -> None:
    before = contents(wild.folder)
    other = tmp_path / "other"  # without the run's splits
    shutil.copytree(wild.folder, other, symlinks=True)
    measured = tlkit("evaluate", run, other, "--on-error", "skip", "--json", "--quiet").json
    assert measured["metrics"]["images"] == len(wild.labels)
    assert {file["path"] for file in measured["skipped_files"]} == set(wild.bad)
    told = tlkit("predict", run, wild.folder / "square", wild.folder / "disc", "--json", "--quiet").json
    wanted = {path for path in wild.labels if not path.startswith("triangle")}
    paths = [Path(row["path"]).relative_to(wild.folder).as_posix() for row in told["predictions"]]
    assert {os.fsencode(path).decode(errors="backslashreplace") for path in wanted} >= set(paths) - wanted
    assert len(paths) == len(wanted) and wanted & set(paths) >= wanted - {path for path in wanted if not _is_text(path)}
    assert {Path(file["path"]).name for file in told["skipped_files"]} == {
        Path(path).name for path in wild.bad if not path.startswith("triangle")
    }
    assert contents(wild.folder) == before


def _is_text(path: str) -> bool:
    return path.isprintable() or "\n" in path


def test_features(wild: Wild, tlkit: Tlkit, small: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    arguments = ("--out", out, "--on-error", "skip", "--json", "--quiet")
    found = tlkit("extract-features", wild.folder, *small, *arguments).json
    assert found["images"] == len(wild.labels)
    assert {file["path"] for file in found["skipped_files"]} == set(wild.bad)


# Files that change while a command runs


@pytest.mark.parametrize("change", ["vanishes", "is cut", "becomes a folder"])
@pytest.mark.parametrize("arguments", [("--workers", 0), ("--workers", 1)], ids=["here", "elsewhere"])
def test_a_training_image_that_changes_between_epochs(
    change: str,
    arguments: tuple[object, ...],
    tlkit: Tlkit,
    small: tuple[str, ...],
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named, what was reached is kept, and once it is put back the run goes on to its end."""
    data, run = make_shapes(tmp_path / "data", CLASSES[:2], 8), tmp_path / "run"
    path = data / "disc" / "00.png"
    content, append = path.read_bytes(), run_folder.append_metrics

    def changing(where: Path, row: Mapping[str, Any]) -> None:
        append(where, row)
        if row["epoch"] > 1:
            return
        path.unlink()
        if change == "is cut":
            path.write_bytes(content[: len(content) // 2])
        elif change == "becomes a folder":
            path.mkdir()

    monkeypatch.setattr(run_folder, "append_metrics", changing)
    options = ("--strategy", "full", "--epochs", 40, "--val-fraction", 0, "--out", run, "--quiet")
    done = tlkit("finetune", data, *small, *options, *arguments)
    assert done.code == 1 and "00.png cannot be read any more" in done.error and f"--resume {run}" in done.err
    monkeypatch.undo()
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(content)
    assert tlkit("finetune", "--resume", run, "--json", "--quiet").json["phases"][-1]["epochs"] == 40


def test_a_reported_image_that_vanishes_before_the_report(
    tlkit: Tlkit,
    small: tuple[str, ...],
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_shapes(tmp_path / "data" / "train", CLASSES[:2], 8).parent
    make_shapes(data / "val", CLASSES[:2], 4, 1)
    append = run_folder.append_metrics

    def vanishing(where: Path, row: Mapping[str, Any]) -> None:
        append(where, row)
        (data / "val" / "disc" / "00.png").unlink(missing_ok=True)

    monkeypatch.setattr(run_folder, "append_metrics", vanishing)
    options = ("--strategy", "full", "--epochs", 1, "--out", tmp_path / "run", "--quiet", "--json")
    done = tlkit("finetune", data, *small, *options)
    assert done.code == 1 and "val/disc/00.png" in json.loads(done.out)["error"]["what"]
