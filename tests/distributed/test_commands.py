"""The same commands in one process and in two: the same order, rates and figures, one folder, one voice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("worker.py")
SGD = ("--optimizer", "sgd", "--lr", "0.001", "--augment", "none", "--batch-size", 8, "--precision", "fp32")
LEARNT = {
    "full": ("finetune", "--strategy", "full", "--epochs", 2, "--bn", "train", *SGD),
    "gradual": ("unfreeze", "--stages", 3, "--epochs-per-stage", 2, "--ema", 0.5, "--test-fraction", 0.2, *SGD),
    "auto": ("finetune", "--strategy", "auto", "--epochs", 1, "--precision", "fp32"),
    "folds": ("finetune", "--strategy", "probe", "--folds", 2, "--precision", "fp32"),
    "mixed": ("pretrain", "--epochs", 2, "--mixup", 0.2, "--clip", 1, "--accumulate", 2, "--precision", "fp32"),
    "sharded": ("finetune", "--strategy", "full", "--epochs", 2, "--bn", "train", *SGD),
    "searched": ("finetune", "--strategy", "full", "--epochs", 1, "--lr", "auto", "--bn", "frozen", "--ema", 0.5),
}
ADAPTED = {
    "whole": ("--strategy", "full", "--method", "mmd", "--epochs", 2, *SGD),
    "probe": ("--strategy", "probe", "--method", "dann", "--epochs", 2, "--optimizer", "sgd", "--lr", "0.01"),
}


@pytest.fixture(scope="module")
def images(
    tlkit: Callable[..., Any], make_shapes: Callable[..., Path], trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """37 images of three classes: no number of processes divides them. They lie in shards, too, beside a network for
    onnxruntime."""
    folder = make_shapes(tmp_path_factory.mktemp("several") / "data", images=(13, 12, 12))
    assert tlkit("shard", folder, folder.with_name("shards"), "--max-images", 10).code == 0
    assert tlkit("export", trained, "--out", folder.with_name("net.onnx")).code == 0
    return folder


@pytest.fixture(scope="module")
def others(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("several") / "others", images=8, seed=5)


def commands(out: Path, images: Path, others: Path, trained: Path, small: tuple[str, ...]) -> dict[str, list[str]]:
    """Command lines by the name of what they write in a folder."""
    start = [word for word in small if word not in ("--weights", "random")]
    shards = images.with_name("shards")
    found: dict[str, tuple[Any, ...]] = {
        name: (
            words[0],
            shards if name == "sharded" else images,
            *(start if words[0] == "pretrain" else small),
            *words[1:],
        )
        for name, words in LEARNT.items()
    }
    found |= {
        name: ("adapt", "--source", images, "--target", others, *small, "--precision", "fp32", *words)
        for name, words in ADAPTED.items()
    }
    on_run = ("--device", "cpu", "--batch-size", 8, "--precision", "fp32")
    found |= {
        "evaluated": ("evaluate", trained, images, "--split", "all", "--tta", "flip", *on_run),
        "labels.csv": ("predict", trained, images, *on_run),
        "features.npz": ("extract-features", images, *small, "--batch-size", 8),
        "sharded.npz": ("extract-features", shards, *small, "--batch-size", 8),
        "onnx.csv": ("predict", images.with_name("net.onnx"), images, *on_run[:4]),
        "sharded.csv": ("predict", trained, shards, *on_run),
    }
    return {name: [*map(str, words), "--json", "--out", str(out / name)] for name, words in found.items()} | {
        "plan": ["finetune", str(images), *map(str, small), "--plan", "--json"],
        "unknown": ["finetune", str(images), "--model", "resnet81", "--weights", "random"],
        "one alone": ["check-data", str(images)],
        "shares": ["adapt", "--source", str(images), "--target", str(others), *small, "--batch-size", "6"],
        "nothing": ["evaluate", str(trained), str(images / "nothing")],
    }


@pytest.fixture(scope="module")
def alone(
    tlkit: Callable[..., Any], images: Path, others: Path, trained: Path, small: tuple[str, ...], tmp_path_factory: Any
) -> Path:
    """What one process writes."""
    out: Path = tmp_path_factory.mktemp("alone")
    for name, words in commands(out, images, others, trained, small).items():
        if (out / name).parent == out and str(out / name) in words:
            done = tlkit(*words)
            assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def both(
    together: Callable[..., Any],
    images: Path,
    others: Path,
    trained: Path,
    small: tuple[str, ...],
    tmp_path_factory: Any,
) -> Path:
    """What two processes write together, and what each of them noted: ``0.json``, ``1.json``."""
    out: Path = tmp_path_factory.mktemp("both")
    words = commands(out, images, others, trained, small)
    (out / "commands.json").write_text(json.dumps(list(words.values())))
    for done in together(WORKER, out / "commands.json", out):
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def noted(both: Path, images: Path, others: Path, trained: Path, small: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each process what it noted, by the name of the command."""
    names = list(commands(both, images, others, trained, small))
    return [dict(zip(names, json.loads((both / f"{rank}.json").read_text()), strict=True)) for rank in range(2)]


FILES = ("labels.csv", "features.npz", "sharded.csv", "sharded.npz", "onnx.csv")
WRITES = (*LEARNT, *ADAPTED, "evaluated", *FILES, "plan")


@pytest.mark.parametrize("name", WRITES)
def test_the_first_process_speaks_alone(noted: Any, name: str) -> None:
    first, second = (one[name] for one in noted)
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert json.loads(first["out"])["command"]
    assert (second["out"], second["err"]) == ("", "")


@pytest.mark.parametrize("name", LEARNT)
def test_every_step_sees_the_same_images(noted: Any, alone: Path, name: str, both: Path, lines: Any) -> None:
    """Together the processes see each training image of an epoch once; there are as many steps, at the same rates."""
    first, second = (one[name]["rows"] for one in noted)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one and other and not {tuple(key) for key in one} & {tuple(key) for key in other}
    wanted, found = lines(alone / name / "metrics.jsonl"), lines(both / name / "metrics.jsonl")
    assert [row.get("step") for row in found] == [row.get("step") for row in wanted]
    if name not in ("searched", "auto"):  # there, the rates or phases depend on how far learning goes
        assert [row.get("rates") for row in found] == [row.get("rates") for row in wanted]


@pytest.mark.parametrize("name", LEARNT)
def test_weights_are_the_same_in_all_processes_after_every_phase(noted: Any, both: Path, name: str) -> None:
    first, second = (one[name]["weights"] for one in noted)
    assert first == second
    assert len(first) >= len(json.loads((both / name / "summary.json").read_text())["phases"])


@pytest.mark.parametrize("name", ["full", "sharded", "whole", "probe"])
def test_two_processes_learn_what_one_learns(alone: Path, both: Path, name: str, lines: Any) -> None:
    """But for rounding, which a few batches of eight amplify: the batch is the same, batch norm's statistics, too.

    With the statistics of each process's own part, losses differ by a twentieth.
    """
    one, two = (safetensors.numpy.load_file(folder / name / "model.safetensors") for folder in (alone, both))
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-2, atol=2e-3, err_msg=key)
    for wanted, found in zip(*(lines(folder / name / "metrics.jsonl") for folder in (alone, both)), strict=True):
        for loss, value in wanted["losses"].items():
            assert found["losses"][loss] == pytest.approx(value, rel=1e-3, abs=1e-4)


def test_evaluating_gives_the_same_bytes(alone: Path, both: Path, noted: Any) -> None:
    one, two = ((folder / "evaluated" / "predictions.csv").read_bytes() for folder in (alone, both))
    assert one == two
    figures = [json.loads((folder / "evaluated" / "summary.json").read_text()) for folder in (alone, both)]
    for name in ("metrics", "per_class", "confusion_matrix", "coverage"):
        assert figures[0][name] == figures[1][name]
    assert figures[1]["metrics"]["images"] == 37


@pytest.mark.parametrize(("labels", "features"), [FILES[:2], FILES[2:4]])
def test_labels_and_features_are_the_same(alone: Path, both: Path, labels: str, features: str) -> None:
    assert (alone / labels).read_bytes() == (both / labels).read_bytes()
    one, two = (np.load(folder / features) for folder in (alone, both))
    for name in ("features", "path", "label", "split"):
        np.testing.assert_array_equal(one[name], two[name])


def test_labels_of_an_exported_network_are_the_same(alone: Path, both: Path) -> None:
    assert (alone / "onnx.csv").read_bytes() == (both / "onnx.csv").read_bytes()


def test_nothing_else_is_written(alone: Path, both: Path) -> None:
    for name in (*LEARNT, *ADAPTED, "evaluated"):
        one, two = (sorted(path.name for path in (folder / name).rglob("*")) for folder in (alone, both))
        assert one == two, name


MISTAKES = {
    "unknown": "resnet81: unknown model; did you mean",
    "one alone": "tlkit check-data: 2 processes were started for a command of one; start it without torchrun",
    "shares": "--batch-size: 3 images of each domain cannot be shared among 2 processes alike; give a multiple of 4",
    "nothing": "no such file or folder",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_once(noted: Any, name: str) -> None:
    first, second = (one[name] for one in noted)
    assert (first["code"], second["code"]) == (1, 1)
    (line,) = (line for line in first["err"].splitlines() if line.startswith("tlkit: error"))
    assert MISTAKES[name] in line
    assert (second["out"], second["err"]) == ("", "")


def test_processes_that_see_other_images_are_told(
    together: Callable[..., Any], images: Path, small: tuple[str, ...], tmp_path: Path, make_shapes: Callable[..., Path]
) -> None:
    """One of them with an image less, in a folder of the same name."""
    for rank in range(2):
        make_shapes(tmp_path / str(rank) / "data", images=4)
    (tmp_path / "1" / "data" / "square" / "01.jpg").unlink()
    folders = [tmp_path / "0", tmp_path / "1"]
    done = together("-m", "tlkit", "finetune", "data", *small, "--out", tmp_path / "run", folders=folders)
    assert [one.returncode for one in done] == [1, 1]
    (line,) = done[0].stderr.splitlines()
    assert line.startswith("tlkit: error: data: process 1 (")
    assert "11 and 12, the first that differs is square/01.jpg; give all processes the same folder" in line
    assert done[1].stderr == "" and not (tmp_path / "run").exists()
