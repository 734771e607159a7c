"""``tlkit finetune`` through the real command line: the run folder, its figures, repeating, resuming, every option."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from timm.data import create_transform, resolve_model_data_config

from tlkit.networks.build import build
from tlkit.networks.stages import stages

Tlkit = Callable[..., Any]
FIELDS = {"command", "version", "seconds", "run", "model", "strategy", "classes", "metrics", "phases", "skipped_files"}
FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "model.safetensors",
    "config.json",
    "predictions.csv",
    "splits.csv",
    "summary.json",
    "report.html",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def splits(run: Path) -> dict[str, str]:
    with (run / "splits.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


# What a run is


def test_json_is_one_object_with_the_contracts_fields(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ("--strategy", "probe", "--test-fraction", 0.25, "--out", tmp_path / "run", "--json")
    done = tlkit("finetune", shapes, *small, *arguments)
    assert done.out.count("\n") == 1
    told = done.json
    assert set(told) >= FIELDS
    assert (told["command"], told["run"], told["model"]) == ("finetune", str(tmp_path / "run"), "test_resnet")
    assert told["strategy"] == "probe"
    assert told["classes"] == ["disc", "square", "triangle"]
    assert told["skipped_files"] == []
    assert set(told["metrics"]) == {"val", "test"}
    for figures in told["metrics"].values():
        assert set(figures) == {
            *("images", "top1", "top1_ci95", "balanced_accuracy", "loss", "ece", "used_for_selection"),
            *("macro_f1", "brier", "balanced_accuracy_ci95", "macro_f1_ci95", "loss_ci95", "brier_ci95", "ece_ci95"),
        }, "no AUROC: fewer than ten images of each class"
        assert figures["used_for_selection"] is False
        assert figures["top1_ci95"][0] <= figures["top1"] <= figures["top1_ci95"][1]
    (phase,) = told["phases"]
    assert set(phase) >= {"stages", "epochs", "trainable_params", "seconds", "val_top1"}
    assert phase["stages"] == ["head"]
    assert phase["trainable_params"] == 3 * (96 + 1), "test_resnet has 96 features"
    assert phase["val_top1"] == told["metrics"]["val"]["top1"]
    stored = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert stored | {"seconds": 0} == told | {"seconds": 0}


def test_the_run_folder_holds_every_file_and_nothing_else(trained: Path) -> None:
    assert names(trained) == FILES
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "triangle" in page and "</html>" in page


def test_predictions_have_a_row_for_each_image(
    trained: Path, shapes: Path, read_csv: Callable[[Path], list[dict[str, str]]]
) -> None:
    rows = read_csv(trained / "predictions.csv")
    assert list(rows[0]) == ["path", "label", "predicted", "probability", "split"]
    there = {path.relative_to(shapes).as_posix() for path in shapes.rglob("*") if path.is_file()}
    assert len(rows) == len(there) == 36
    assert {row["path"] for row in rows} == there
    assert all(row["path"].split("/")[0] == row["label"] for row in rows)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    by_split = Counter((row["split"], row["label"]) for row in rows)
    for label in ("disc", "square", "triangle"):
        assert (by_split["val", label], by_split["test", label]) == (2, 3), "20 % and 25 % of 12"
    assert {row["path"]: row["split"] for row in rows} == splits(trained)


def test_metrics_are_those_of_the_predictions(trained: Path, read_csv: Callable[[Path], list[dict[str, str]]]) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    rows = read_csv(trained / "predictions.csv")
    for split, figures in summary["metrics"].items():
        part = [row for row in rows if row["split"] == split]
        truth, predicted = [row["label"] for row in part], [row["predicted"] for row in part]
        right = [row["label"] == row["predicted"] for row in part]
        assert figures["images"] == len(part)
        assert figures["top1"] == pytest.approx(np.mean(right))
        assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
        if all(right):  # then the probabilities of the predicted classes are those of the true ones
            nll = [-math.log(float(row["probability"])) for row in part]
            assert figures["loss"] == pytest.approx(np.mean(nll), abs=2e-6)


def test_the_shapes_are_learnt(trained: Path) -> None:
    """Colour alone tells the classes: an untrained network's features hold it, shuffled labels would give a third."""
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["metrics"]["test"]["top1"] >= 0.8


@pytest.mark.parametrize(
    ("model", "size"),
    [("test_resnet", 64), ("test_vit", 96), ("tf_efficientnet_lite0", 64)],
    ids=str,
)
def test_timm_alone_gives_the_runs_predictions(
    tlkit: Tlkit,
    shapes: Path,
    tmp_path: Path,
    read_csv: Callable[[Path], list[dict[str, str]]],
    model: str,
    size: int,
) -> None:
    run = tmp_path / "run"
    options = ("--weights", "random", "--image-size", size, "--precision", "fp32", "--out", run, "--quiet")
    assert tlkit("finetune", shapes, "--model", model, *options).code == 0
    network = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    labels = network.pretrained_cfg["label_names"]
    assert labels == ["disc", "square", "triangle"]
    for row in read_csv(run / "predictions.csv")[::3]:
        with Image.open(shapes / row["path"]) as image, torch.inference_mode():
            probabilities = network(transform(image.convert("RGB")).unsqueeze(0)).softmax(-1)[0]
        assert labels[int(probabilities.argmax())] == row["predicted"]
        assert float(probabilities.max()) == pytest.approx(float(row["probability"]), abs=2e-3)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_efficientnet"])
def test_frozen_stages_are_the_start_weights_bit_for_bit(
    tlkit: Tlkit, shapes: Path, tmp_path: Path, model: str
) -> None:
    source = tmp_path / "start.safetensors"
    torch.manual_seed(7)
    start = timm.create_model(model)
    for module in start.modules():  # running statistics that a forward pass in training mode would move
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(17)
    safetensors.torch.save_file(start.state_dict(), source)
    run = tmp_path / "run"
    arguments = ("--strategy", "probe", "--model", model, "--weights", source, "--out", run, "--quiet")
    assert tlkit("finetune", shapes, *arguments).code == 0

    before, after = start.state_dict(), safetensors.torch.load_file(run / "model.safetensors")
    head = next(stage for stage in stages(start) if stage.name == "head")
    assert before.keys() == after.keys()
    frozen = [name for name in before if name not in head.parameters]
    assert len(frozen) == len(before) - 2
    for name in frozen:
        assert before[name].dtype == after[name].dtype
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


def test_packaged_weights_are_used_and_stay(tlkit: Tlkit, shapes: Path, tmp_path: Path, packaged: None) -> None:
    run = tmp_path / "run"
    arguments = ("--strategy", "probe", "--image-size", 96, "--out", run, "--json", "--quiet")
    done = tlkit("finetune", shapes, *arguments)
    assert done.json["model"] == "tf_efficientnet_lite0"
    assert done.json["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert done.json["metrics"]["val"]["top1"] >= 0.8
    before = build("tf_efficientnet_lite0", "default").network.state_dict()
    after = safetensors.torch.load_file(run / "model.safetensors")
    for name in before:
        assert name.startswith("classifier.") or torch.equal(before[name], after[name]), name


# The same again


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["probe", pytest.param("auto", marks=pytest.mark.slow)])
def test_one_recipe_gives_one_model_with_any_number_of_workers(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    workers: int,
    strategy: str,
) -> None:
    small = (*small, "--strategy", strategy)
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)  # as a user's process has several
    for name in ("first", "second"):
        arguments = ("--workers", workers, "--out", tmp_path / name, "--quiet")
        assert tlkit("finetune", shapes, *small, *arguments).code == 0
    assert tlkit("finetune", shapes, *small, "--workers", 0, "--out", tmp_path / "none", "--quiet").code == 0
    for name in ("model.safetensors", "predictions.csv", "splits.csv", "config.json"):
        first, second, none = ((tmp_path / run / name).read_bytes() for run in ("first", "second", "none"))
        assert first == second, name
        assert first == none, f"{name} depends on the number of workers"


def test_its_recipe_repeats_a_run(tlkit: Tlkit, trained: Path, tmp_path: Path) -> None:
    assert tlkit("finetune", "--recipe", trained / "recipe.yaml", "--out", tmp_path / "other").code == 0
    for name in ("model.safetensors", "predictions.csv", "splits.csv", "recipe.yaml"):
        assert (tmp_path / "other" / name).read_bytes() == (trained / name).read_bytes(), name


def test_flags_win_over_the_recipe(tlkit: Tlkit, trained: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", trained / "recipe.yaml", "--test-fraction", 0, "--json", "--out", tmp_path / "other")
    assert set(tlkit("finetune", *arguments).json["metrics"]) == {"val"}


def test_the_recipe_means_the_same_from_any_folder(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shapes.parent)
    assert tlkit("finetune", shapes.name, *small, "--out", tmp_path / "run", "--quiet").code == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"] == str(shapes.resolve())


def test_another_seed_gives_another_split(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    for seed in (0, 1):
        arguments = ("--seed", seed, "--out", tmp_path / str(seed), "--quiet")
        assert tlkit("finetune", shapes, *small, *arguments).code == 0
    assert splits(tmp_path / "0") != splits(tmp_path / "1")


# Plans, and where runs go


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_plan_writes_nothing(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Callable[[Path], dict[str, Any]],
    as_json: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(shapes)
    done = tlkit("finetune", shapes, *small, "--test-fraction", 0.25, "--plan", *(["--json"] if as_json else []))
    assert done.code == 0
    assert list(tmp_path.iterdir()) == []
    assert contents(shapes) == before
    if not as_json:
        assert all(word in done.out for word in ("disc", "stages that train", "estimated time", "test_resnet"))
        return
    plan = done.json["plan"]
    assert plan["images"]["disc"] == {"train": 7, "val": 2, "test": 3}
    assert plan["stages"]["head"] == 3 * (96 + 1)
    assert plan["phases"][0]["stages"] == ["head"]
    assert plan["estimated_seconds"] >= 0


def test_runs_go_into_a_folder_of_their_own(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {tlkit("finetune", shapes, *small, "--json", "--quiet").json["run"] for _ in range(2)}
    assert len(runs) == 2
    assert {Path(run).parent for run in runs} == {Path("runs")}
    assert all(Path(run).name.startswith("finetune-") and names(tmp_path / run) == FILES for run in runs)
    assert names(tmp_path) == {"runs"}


@pytest.mark.parametrize("kind", ["run", "empty folder", "file", "dangling link"])
def test_an_existing_out_is_refused_and_left_alone(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    trained: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, Any]],
    kind: str,
) -> None:
    out = tmp_path / "there"
    match kind:
        case "run":
            shutil.copytree(trained, out)
        case "empty folder":
            out.mkdir()
        case "file":
            out.write_text("mine")
        case "dangling link":
            out.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    done = tlkit("finetune", shapes, *small, "--out", out)
    assert done.code == 1
    assert "exists already" in done.error and str(out) in done.error and "choose another --out" in done.error
    assert contents(tmp_path) == before


def test_the_images_are_left_alone(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    small: tuple[str, ...],
    tmp_path: Path,
    contents: Callable[[Path], dict[str, Any]],
) -> None:
    data = make_shapes(tmp_path / "data", images=4)
    before = contents(data)
    assert tlkit("finetune", data, *small, "--out", tmp_path / "run", "--quiet").code == 0
    assert contents(data) == before


def test_quiet_is_quiet(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    done = tlkit("finetune", shapes, *small, "--out", tmp_path / "run", "--quiet", "--json")
    assert done.code == 0
    assert done.err == ""


def test_a_person_sees_a_table_and_what_comes_next(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))  # nothing was computed before
    done = tlkit("finetune", shapes, *small, "--out", tmp_path / "run")
    assert "top-1" in done.out and f"tlkit predict {tmp_path / 'run'}" in done.out
    assert str(tmp_path / "run" / "report.html") in done.out
    assert "features: 36/36" in done.err


# Going on


def test_resuming_a_finished_run_says_so(
    tlkit: Tlkit, trained: Path, contents: Callable[[Path], dict[str, Any]]
) -> None:
    before = contents(trained)
    done = tlkit("finetune", "--resume", trained)
    assert done.code == 0
    assert "is finished" in done.out
    again = tlkit("finetune", "--resume", trained, "--json").json
    assert again == json.loads((trained / "summary.json").read_text())
    assert contents(trained) == before


def stopped_at(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run end, as by Ctrl-C, when it comes to a step of the command."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tlkit.{step}", stop)


OPTIONS = {
    "plain": (),
    "test split": ("--test-fraction", 0.25),
    "chosen on val": ("--select-on", "val", "--test-fraction", 0.25),
    "other options": (
        "--class-weights",
        "balanced",
        "--train-views",
        "flip",
        "--seed",
        3,
        "--crop",
        0.8,
        "--mean",
        0.4,
        0.5,
        0.6,
    ),
    "groups": ("--group-regex", r"\d(\d)\."),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_interrupted_run_goes_on_to_the_same_model(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[Any, ...],
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit("finetune", shapes, *small, *options, "--out", whole, "--quiet").code == 0
    with monkeypatch.context() as context:
        stopped_at("commands.training.extract", context)
        done = tlkit("finetune", shapes, *small, *options, "--out", run, "--json")
    assert done.code == 130
    assert f"tlkit finetune --resume {run}" in done.err
    assert done.error == "interrupted"
    assert json.loads(done.out)["exit_code"] == 130

    told = tlkit("finetune", "--resume", run, "--json", "--quiet").json
    assert names(run) == FILES
    for name in ("model.safetensors", "predictions.csv", "splits.csv", "recipe.yaml"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert told["metrics"] == json.loads((whole / "summary.json").read_text())["metrics"]


STEPS = {
    "the fit": "training.trainer.fit_closed",
    "the fold": "training.trainer.fold",
    "the predictions": "training.trainer.Trainer.predict_all",
    "the network": "commands.results.save_network",
    "the results": "commands.results.write_predictions",
    "the report": "commands.results.write_report",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_an_interruption_at_any_step_leaves_no_trace(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        stopped_at(step, context)
        done = tlkit("finetune", "--recipe", trained / "recipe.yaml", "--out", run)
    assert done.code == 130
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert names(run) == FILES
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    for name in ("model.safetensors", "predictions.csv"):
        assert (run / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_run_stopped_before_its_split_was_stored_leaves_nothing_behind(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        stopped_at("commands.learning.run_folder.write_rows", context)
        done = tlkit("finetune", shapes, *small, "--out", run)
    assert done.code == 130
    assert not run.exists()
    assert "--resume" not in done.err


@pytest.mark.parametrize("change", ["image gone", "class added", "image added"])
def test_resuming_with_changed_data(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    data, run = make_shapes(tmp_path / "data", ("disc", "square"), 6), tmp_path / "run"
    with monkeypatch.context() as context:
        stopped_at("commands.training.extract", context)
        assert tlkit("finetune", data, *small, "--out", run).code == 130
    stored = splits(run)
    match change:
        case "image gone":
            (data / "disc" / "03.jpg").unlink()
        case "class added":
            shutil.copytree(data / "disc", data / "new")
        case "image added":
            shutil.copy(data / "disc" / "00.png", data / "disc" / "99.png")
    done = tlkit("finetune", "--resume", run, "--quiet")
    if change == "image added":
        assert done.code == 0
        assert splits(run) == stored
    else:
        assert done.code == 1
        assert ("disc/03.jpg" if change == "image gone" else "'new'") in done.error
        assert (run / "splits.csv").is_file(), "nothing of the run is lost"


@pytest.mark.parametrize("kind", ["no folder", "empty folder", "run of evaluate"])
def test_what_cannot_be_resumed_is_said(tlkit: Tlkit, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    if kind != "no folder":
        run.mkdir()
    if kind == "run of evaluate":
        (run / "recipe.yaml").write_text("command: evaluate\n")
    done = tlkit("finetune", "--resume", run)
    assert done.code == 1
    assert str(run) in done.error
    assert ("'evaluate'" if kind == "run of evaluate" else "not the folder of a run") in done.error


SLOWLY = """
import sys, time
from pathlib import Path
from tlkit.cli.app import run
from tlkit.data import loading

def slow(*arguments, decode=loading.decode, **named):
    Path(sys.argv[1]).touch()
    time.sleep(0.2)
    return decode(*arguments, **named)

loading.decode = slow
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        pytest.param(signal.SIGINT, 130, 0, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, 2, id="SIGTERM, workers"),
        pytest.param(signal.SIGINT, 130, 2, id="SIGINT, workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 0, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_model(
    tlkit: Tlkit,
    trained: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal goes to the whole process group, as from a terminal or a batch system, while images are read."""
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))  # nothing was computed before
    run, begun = tmp_path / "run", tmp_path / "begun"
    arguments = ("finetune", "--recipe", trained / "recipe.yaml", "--workers", workers, "--out", run, "--json")
    command = [sys.executable, "-c", SLOWLY, *map(str, (begun, *arguments))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert json.loads(stdout)["exit_code"] == code
    assert stderr.splitlines()[1:] == [
        f"note: go on with: tlkit finetune --resume {run}",
        f"tlkit: error: {'interrupted' if code == 130 else 'terminated'}",
    ]
    assert names(run) == {"recipe.yaml", "splits.csv", "state"}
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert weights(run) == weights(trained)


# Data


def test_val_and_test_fractions(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("--val-fraction", 0.25, "--test-fraction", 0.5, "--out", tmp_path / "run", "--json")
    told = tlkit("finetune", shapes, *small, *arguments).json
    assert told["images"] == {"train": 9, "val": 9, "test": 18}


def test_everything_may_be_trained_on(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    done = tlkit("finetune", shapes, *small, "--val-fraction", 0, "--out", tmp_path / "run")
    assert done.code == 0
    assert "none left to measure on" in done.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["metrics"], summary["images"]) == ({}, {"train": 36})
    assert summary["phases"][0]["val_top1"] is None


def test_groups_stay_together(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    """Images 00 and 10, 01 and 11 of all classes are made one group each."""
    arguments = ("--group-regex", r"\d(\d)\.\w+$", "--test-fraction", 0.25, "--out", tmp_path / "run", "--quiet")
    assert tlkit("finetune", shapes, *small, *arguments).code == 0
    stored = splits(tmp_path / "run")
    assert set(stored.values()) == {"train", "val", "test"}
    of_group: dict[str, set[str]] = {}
    for path, split in stored.items():
        of_group.setdefault(Path(path).stem[1], set()).add(split)
    assert all(len(found) == 1 for found in of_group.values()), of_group


@pytest.mark.parametrize("kind", ["csv", "csv with splits", "parquet with groups"])
def test_a_manifest_is_as_good_as_a_folder(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, kind: str
) -> None:
    paths = sorted(path for path in shapes.rglob("*") if path.is_file())
    rows = [{"path": str(path), "label": path.parent.name.upper()} for path in paths]
    if "splits" in kind:
        rows = [
            row | {"split": ("train", "train", "validation", "test")[number % 4]} for number, row in enumerate(rows)
        ]
    if "groups" in kind:
        rows = [row | {"group": Path(row["path"]).stem[1]} for row in rows]
    manifest = tmp_path / f"list.{kind.split()[0]}"
    if "parquet" in kind:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), manifest)
    else:
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    told = tlkit("finetune", manifest, *small, "--out", tmp_path / "run", "--json").json
    assert told["classes"] == ["DISC", "SQUARE", "TRIANGLE"]
    if "splits" in kind:
        assert told["images"] == {"train": 18, "val": 9, "test": 9}
    assert sum(told["images"].values()) == 36
    done = tlkit("evaluate", tmp_path / "run", "--json")
    assert done.json["metrics"]["images"] == told["images"]["test" if "splits" in kind else "val"]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_splits_that_are_there_are_kept(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path, val: str
) -> None:
    for seed, (split, images) in enumerate({"train": 6, val: 3, "test": 2}.items()):
        make_shapes(tmp_path / "data" / split, images=images, seed=seed)
    told = tlkit("finetune", tmp_path / "data", *small, "--out", tmp_path / "run", "--json").json
    assert told["images"] == {"train": 18, "val": 9, "test": 6}
    assert {name: figures["images"] for name, figures in told["metrics"].items()} == {"val": 9, "test": 6}
    assert all(
        path.split("/")[0] == (val if split == "val" else split) for path, split in splits(tmp_path / "run").items()
    )


@pytest.mark.parametrize(
    ("strategy", "options", "used"),
    [
        ("probe", ("--select-on", "train", "--test-fraction", 0.25), {"val": False, "test": False}),
        ("probe", ("--select-on", "val", "--test-fraction", 0.25), {"val": True, "test": False}),
        ("auto", ("--select-on", "train", "--test-fraction", 0.25), {"val": True, "test": False}),
        ("auto", ("--select-on", "val", "--test-fraction", 0.25), {"val": True, "test": False}),
        ("auto", ("--select-on", "val"), {"val": True}),
        ("auto", (), {"val": False}),  # the choosing part is cut from train: val alone is there to report
    ],
)
def test_what_was_chosen_on_is_said(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    strategy: str,
    options: tuple[Any, ...],
    used: dict[str, bool],
) -> None:
    arguments = ("--strategy", strategy, *options, "--out", tmp_path / "run", "--json")
    told = tlkit("finetune", shapes, *small, *arguments).json
    assert {name: figures["used_for_selection"] for name, figures in told["metrics"].items()} == used


def test_balanced_weights_help_the_rare_class(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    """Two kinds that the untrained network cannot tell apart (both are discs): the rare one is all but never predicted,
    unless both weigh the same."""
    data = tmp_path / "data"
    for split, counts in {"train": (36, 6), "val": (12, 12)}.items():
        make_shapes(data / split, ("disc",), counts[0], seed=len(split))
        other = make_shapes(tmp_path / f"other-{split}", ("disc",), counts[1], seed=10 + len(split))
        shutil.move(other / "disc", data / split / "rare")
    mean = {}
    for weighting in ("none", "balanced"):
        run = tmp_path / weighting
        arguments = ("--strategy", "probe", "--class-weights", weighting, "--out", run, "--quiet")
        assert tlkit("finetune", data, *small, *arguments).code == 0
        predicted = tlkit("predict", run, data / "val", "--top-k", 2, "--json").json["predictions"]
        mean[weighting] = np.mean([dict(row["top"])["rare"] for row in predicted])
    assert mean["none"] == pytest.approx(6 / 42, abs=0.1), "the share of the rare class in training"
    assert mean["balanced"] > mean["none"] + 0.15


def test_mirror_images_are_trained_on_too(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    """Doubling the data by mirror images gives the head that ``--train-views flip`` gives, up to the splits."""
    for views in ("center", "flip"):
        arguments = ("--strategy", "probe", "--train-views", views, "--out", tmp_path / views, "--quiet")
        assert tlkit("finetune", shapes, *small, *arguments).code == 0
    center, flip = (safetensors.torch.load_file(tmp_path / views / "model.safetensors") for views in ("center", "flip"))
    assert {name for name in center if not torch.equal(center[name], flip[name])} == {"fc.weight", "fc.bias"}


NAMES = ["größe 日本", "🐜 ants", "line\nbreak", "a,b;'c\"", "<b>&amp;", "[red]x", "  padded  ", "-r", "%s{}"]


def test_any_name_goes_through_unchanged(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    small: tuple[str, ...],
    tmp_path: Path,
    read_csv: Callable[[Path], list[dict[str, str]]],
) -> None:
    data, run = tmp_path / "daten 📷\nx", tmp_path / "läufe 🏃"
    for number, name in enumerate(NAMES):
        folder = make_shapes(tmp_path / "made", ("one",), 3, seed=number) / "one"
        for file in folder.iterdir():
            file.rename(file.with_name(f"{name}{file.name}"))
        shutil.move(folder, data / name)
    told = tlkit("finetune", data, *small, "--val-fraction", 0.34, "--out", run, "--json", "--quiet").json
    assert told["classes"] == sorted(NAMES)
    rows = read_csv(run / "predictions.csv")
    assert Counter(row["label"] for row in rows) == dict.fromkeys(NAMES, 3)
    assert all((data / row["path"]).is_file() for row in rows)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;amp;" in page and "<b>&amp;" not in page
    assert "größe 日本" in page and "🐜 ants" in page
    again = tlkit("evaluate", run, "--out", tmp_path / "evaluated", "--json", "--quiet").json
    assert again["metrics"]["images"] == told["metrics"]["val"]["images"] == len(NAMES)
    assert again["missing_classes"] == [] and again["unknown_classes"] == {}
    out = tmp_path / "labels.csv"
    assert tlkit("predict", run, data, "--out", out, "--quiet").code == 0
    assert {row["label"] for row in read_csv(out)} <= set(NAMES)
    assert {row["path"] for row in read_csv(out)} == {str(data / row["path"]) for row in rows}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux alone")
def test_a_name_that_is_no_text_goes_through(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    data, run = make_shapes(tmp_path / "data", ("disc", "square"), 4), tmp_path / "run"
    for file in list((data / "disc").iterdir()):
        file.rename(file.with_name(f"caf\udce9-{file.name}"))
    (data / "square" / "caf\udce9.png").write_bytes(b"broken")
    arguments = ("--on-error", "skip", "--out", run, "--json", "--quiet")
    assert len(tlkit("finetune", data, *small, *arguments).json["skipped_files"]) == 1
    told = tlkit("evaluate", run, "--split", "all", "--on-error", "skip", "--json", "--quiet").json
    assert told["metrics"]["images"] == 8
    for name in ("labels.csv", "labels.jsonl", "labels.parquet"):
        assert tlkit("predict", run, data, "--out", tmp_path / name, "--quiet").code == 0
    assert tlkit("finetune", "--resume", run).code == 0


# Files that cannot be read


@pytest.fixture
def with_bad_files(make_shapes: Callable[..., Path], tmp_path: Path) -> Path:
    data = make_shapes(tmp_path / "bad", images=6)
    (data / "disc" / "empty.jpg").touch()
    (data / "disc" / "text.png").write_text("not an image")
    whole = (data / "square" / "00.png").read_bytes()
    (data / "square" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "square" / "notes.txt").write_text("ignored")
    return data


BAD = ["disc/empty.jpg", "disc/text.png", "square/cut.png"]


def test_every_bad_file_is_named_and_no_run_left_behind(
    tlkit: Tlkit, with_bad_files: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    done = tlkit("finetune", with_bad_files, *small, "--out", tmp_path / "run")
    assert done.code == 1
    details = [line for line in done.err.splitlines() if line.startswith("tlkit: ")][:-1]
    assert [line.split(": ")[1] for line in details] == BAD
    assert all(line.split(": ", 2)[2] for line in details), "each with its reason"
    assert "3 of 21 images" in done.error and "--on-error skip" in done.error
    assert not (tmp_path / "run").exists()


def test_bad_files_can_be_left_out(
    tlkit: Tlkit,
    with_bad_files: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    read_csv: Callable[[Path], list[dict[str, str]]],
) -> None:
    run = tmp_path / "run"
    done = tlkit("finetune", with_bad_files, *small, "--on-error", "skip", "--out", run, "--json")
    assert [file["path"] for file in done.json["skipped_files"]] == BAD
    assert all(file["reason"] for file in done.json["skipped_files"])
    assert read_csv(run / "skipped_files.csv") == done.json["skipped_files"]
    assert sum(done.json["images"].values()) == 18
    assert len(read_csv(run / "predictions.csv")) == 18
    assert names(run) == FILES | {"skipped_files.csv"}
    assert "1 .txt" in done.err
    assert "disc/empty.jpg" in (run / "report.html").read_text(encoding="utf-8")


def test_a_class_without_one_readable_training_image_is_named(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("disc", "square"), 4)
    for file in (data / "square").iterdir():
        file.write_bytes(b"broken")
    done = tlkit("finetune", data, *small, "--on-error", "skip", "--out", tmp_path / "run")
    assert done.code == 1
    assert "class 'square' has no training image that can be read" in done.error
    assert not (tmp_path / "run").exists()


# Networks


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("deit_tiny_distilled_patch16_224", 32),  # two classifiers, whose logits are averaged
        ("dpn48b", 32),  # the classifier is a 1 x 1 convolution
        (
            "mobilenetv3_small_050",
            32,
        ),  # more layers between the pooling and the classifier; a layer class of timm's own
        ("vit_small_patch14_dinov2", 28),  # comes without a classifier
        ("test_nfnet", 64),
        ("test_convnext", 64),
    ],
)
def test_heads_of_all_kinds_are_folded_exactly(
    tlkit: Tlkit, make_shapes: Callable[..., Path], tmp_path: Path, model: str, size: int
) -> None:
    data, run = make_shapes(tmp_path / "data", ("disc", "square"), 6), tmp_path / "run"
    start = timm.create_model(model, **({"img_size": size} if "vit" in model or "deit" in model else {}))
    for module in start.modules():  # an untrained classifier is often zero, and would fit anything
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.abs().sum() == 0:
            torch.nn.init.normal_(module.weight, std=0.05)
    safetensors.torch.save_file(start.state_dict(), tmp_path / "start.safetensors")
    arguments = ("--model", model, "--weights", tmp_path / "start.safetensors", "--image-size", size)
    arguments += ("--strategy", "probe")
    done = tlkit("finetune", data, *arguments, "--precision", "fp32", "--out", run, "--json")
    assert done.json["classes"] == ["disc", "square"]

    network = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    with (run / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            with Image.open(data / row["path"]) as image, torch.inference_mode():
                logits = network(transform(image.convert("RGB")).unsqueeze(0))
            probabilities = logits.softmax(-1)[0]
            assert float(probabilities.max()) == pytest.approx(float(row["probability"]), abs=2e-3)


@pytest.mark.parametrize(("model", "size"), [("levit_128s", 224), ("volo_d1_224", 64)])
def test_a_network_that_has_no_linear_head_is_refused(
    tlkit: Tlkit, make_shapes: Callable[..., Path], tmp_path: Path, model: str, size: int
) -> None:
    data = make_shapes(tmp_path / "data", ("disc", "square"), 4)
    arguments = ("--model", model, "--weights", "random", "--image-size", size, "--out", tmp_path / "run", "--quiet")
    done = tlkit("finetune", data, *arguments)
    assert done.code == 1
    assert model in done.error and "choose another network" in done.error
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_started_from_a_run(
    tlkit: Tlkit, make_shapes: Callable[..., Path], trained: Path, tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("one", "two"), 6)
    for option in ("--model", "--weights"):
        named = (option, trained) if option == "--model" else ("--model", "test_resnet", option, trained)
        arguments = ("--strategy", "probe", "--precision", "fp32", "--out", tmp_path / option, "--json")
        told = tlkit("finetune", data, *named, *arguments).json
        assert (told["classes"], told["model"]) == (["one", "two"], "test_resnet")
        assert told["preprocessing"]["size"] == 64, "as stored in the run"
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("--model", "--weights")
    )
    before = safetensors.torch.load_file(trained / "model.safetensors")
    for name in before:
        assert torch.equal(first[name], second[name])
        assert name.startswith("fc.") or torch.equal(first[name], before[name])
