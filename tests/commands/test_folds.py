"""``--folds``: each image is measured on once, by a network that has not seen it; the run's own has seen all."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlkit.errors import TlkitError

Tlkit = Callable[..., Any]
FAST = ("--precision", "fp32", "--quiet")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folded(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path_factory: Any) -> Path:
    run = Path(tmp_path_factory.mktemp("folded")) / "run"
    assert tlkit("finetune", shapes, *small, *FAST, "--strategy", "probe", "--folds", 3, "--out", run).code == 0
    return run


def test_each_image_is_held_out_once_and_by_class(folded: Path, shapes: Path) -> None:
    held: Counter[str] = Counter()
    for number in (1, 2, 3):
        rows = rows_of(folded / "folds" / str(number) / "splits.csv")
        assert len(rows) == 36 and {row["split"] for row in rows} == {"train", "val"}
        here = [row for row in rows if row["split"] == "val"]
        assert Counter(row["label"] for row in here) == {"disc": 4, "square": 4, "triangle": 4}
        held.update(row["path"] for row in here)
    assert len(held) == 36 and set(held.values()) == {1}
    assert {row["split"] for row in rows_of(folded / "splits.csv")} == {"train"}, "the last training is on all"


def test_predictions_are_those_of_the_folds(folded: Path) -> None:
    of_folds = {}
    for number in (1, 2, 3):
        for row in rows_of(folded / "folds" / str(number) / "predictions.csv"):
            if row["split"] == "val":
                of_folds[row["path"]] = row
    own = {row["path"]: row for row in rows_of(folded / "predictions.csv")}
    assert own == of_folds


def test_figures(folded: Path) -> None:
    told = json.loads((folded / "summary.json").read_text())
    folds = told["cross_validation"]["folds"]
    assert [fold["fold"] for fold in folds] == [1, 2, 3]
    for name in ("top1", "loss", "macro_f1"):
        values = [fold["metrics"][name] for fold in folds]
        assert told["cross_validation"]["mean"][name] == pytest.approx(np.mean(values))
        assert told["cross_validation"]["sd"][name] == pytest.approx(np.std(values, ddof=1))
    rows = rows_of(folded / "predictions.csv")
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    val = told["metrics"]["val"]
    assert val["images"] == 36 and val["top1"] == pytest.approx(right)
    assert val["cross_validated"] is True and val["used_for_selection"] is False
    assert [fold["metrics"]["images"] for fold in folds] == [12, 12, 12]
    assert (folded / "report.html").is_file() and not (folded / "state").exists()


def test_the_network_is_the_one_that_training_on_all_images_gives(
    tlkit: Tlkit, folded: Path, shapes: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("--strategy", "probe", "--val-fraction", 0, "--out", tmp_path / "run")
    assert tlkit("finetune", shapes, *small, *FAST, *options).code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (folded / "model.safetensors").read_bytes()


def test_a_test_split_stays_out(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    for split, images in (("train", 5), ("val", 3), ("test", 4)):
        make_shapes(tmp_path / "data" / split, images=images, seed=images)
    run = tmp_path / "run"
    options = ("--strategy", "probe", "--folds", 2, "--out", run, "--json")
    told = tlkit("finetune", tmp_path / "data", *small, *FAST, *options).json
    assert told["metrics"]["val"]["images"] == 24 and told["metrics"]["test"]["images"] == 12
    for number in (1, 2):
        assert not any(row["path"].startswith("test/") for row in rows_of(run / "folds" / str(number) / "splits.csv"))
    assert Counter(row["split"] for row in rows_of(run / "predictions.csv")) == {"val": 24, "test": 12}


def test_a_test_fraction_is_set_apart_first(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--strategy", "probe", "--folds", 2, "--test-fraction", 0.25, "--out", tmp_path / "run", "--json")
    told = tlkit("finetune", shapes, *small, *FAST, *options).json
    assert (told["metrics"]["val"]["images"], told["metrics"]["test"]["images"]) == (27, 9)


def test_images_of_a_group_are_held_out_together(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    groups = ("--group-regex", r"(\d)\.", "--strategy", "probe", "--folds", 2)
    assert tlkit("finetune", shapes, *small, *FAST, *groups, "--out", tmp_path / "run").code == 0
    seen: dict[str, set[str]] = {}
    for number in (1, 2):
        for row in rows_of(tmp_path / "run" / "folds" / str(number) / "splits.csv"):
            if row["split"] == "val":
                seen.setdefault(Path(row["path"]).stem[-1], set()).add(str(number))
    assert len(seen) > 2 and all(len(folds) == 1 for folds in seen.values())


@pytest.mark.parametrize("stopped_in", [2, 4], ids=["the second fold", "the last training"])
@pytest.mark.parametrize("strategy", ["probe", "full"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    stopped_in: int,
) -> None:
    epochs = ("--epochs", 2) if strategy == "full" else ()
    command = ("finetune", shapes, *small, *FAST, "--strategy", strategy, *epochs, "--folds", 3)
    assert tlkit(*command, "--out", tmp_path / "whole").code == 0
    from tlkit.commands import training

    begun, write = [], training.write_results

    def stop(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == stopped_in:
            raise KeyboardInterrupt
        return write(*arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "write_results", stop)
        done = tlkit(*command, "--out", run)
    assert done.code == 130 and f"--resume {run}" in done.err
    finished = [run / "folds" / str(number) / "model.safetensors" for number in range(1, min(stopped_in, 4))]
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == kept, "what was finished is not done again"
    for name in ("model.safetensors", "predictions.csv", "folds/2/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (run / "state").exists()


def test_a_file_that_breaks_later_leaves_what_was_done(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlkit.commands import training

    begun, extract = [], training.extract

    def fail(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            raise TlkitError("gone", where="somewhere")
        return extract(*arguments)

    monkeypatch.setattr(training, "extract", fail)
    run = tmp_path / "run"
    command = ("finetune", shapes, *small, *FAST, "--strategy", "probe", "--folds", 3, "--out", run)
    assert tlkit(*command).code == 1
    assert (run / "folds" / "1" / "model.safetensors").is_file()
    monkeypatch.undo()
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0


def test_images_that_changed_meanwhile_are_said(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tlkit.commands import training

    data, run = make_shapes(tmp_path / "data", images=6), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        tlkit("finetune", data, *small, *FAST, "--strategy", "probe", "--folds", 2, "--out", run)
    shutil.copy(data / "disc" / "00.png", data / "disc" / "more.png")
    done = tlkit("finetune", "--resume", run)
    assert done.code == 1 and "not those that the run was begun with" in done.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--folds", 1), "too small"),
        (("--folds", 40), "cannot be made"),
        (("--folds", 3, "--val-fraction", 0.3), "--val-fraction"),
        (("--folds", 3, "--group-regex", "(disc|square|triangle)"), "outside of one of 3 folds"),
    ],
)
def test_what_cannot_be_is_one_line(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, options: tuple[Any, ...], said: str
) -> None:
    done = tlkit("finetune", shapes, *small, *options, "--out", tmp_path / "run")
    assert done.code == 1 and said in done.error
    assert not (tmp_path / "run").exists()


def test_a_class_of_two_images_is_too_small_for_folds(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("disc", "square"), (6, 2))
    done = tlkit("finetune", data, *small, "--folds", 2, "--out", tmp_path / "run")
    assert done.code == 1 and "'square'" in done.error and not (tmp_path / "run").exists()


def test_bad_files_are_left_out_of_every_fold(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    data, run = make_shapes(tmp_path / "data", images=6), tmp_path / "run"
    (data / "disc" / "bad.png").write_bytes(b"nothing")
    options = ("--strategy", "probe", "--folds", 2, "--on-error", "skip", "--json")
    told = tlkit("finetune", data, *small, *FAST, *options, "--out", run).json
    assert told["metrics"]["val"]["images"] == 18
    assert [file["path"] for file in told["skipped_files"]] == ["disc/bad.png"]


@pytest.mark.parametrize("command", ["unfreeze", "pretrain"])
def test_other_commands_that_train_have_folds_too(tlkit: Tlkit, shapes: Path, tmp_path: Path, command: str) -> None:
    length = (
        ("--epochs-per-stage", 1, "--stages", 2, "--weights", "random") if command == "unfreeze" else ("--epochs", 1)
    )
    options = ("--model", "test_resnet", "--image-size", 64, *length, "--folds", 2, "--out", tmp_path / "run", "--json")
    told = tlkit(command, shapes, *FAST, *options).json
    assert told["metrics"]["val"]["images"] == 36 and len(told["cross_validation"]["folds"]) == 2


def test_a_plan_trains_nothing(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    told = tlkit("finetune", shapes, *small, "--folds", 5, "--plan", "--out", tmp_path / "run", "--json").json
    assert told["plan"]["folds"] == [8, 7, 7, 7, 7] and not (tmp_path / "run").exists()
