"""``tlkit compare``: the same images for all, none that any of them was trained on, and a paired test."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

Tlkit = Callable[..., Any]
FP32 = ("--precision", "fp32", "--quiet")


def right(run: Path) -> dict[str, bool]:
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["label"] == row["predicted"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def data(make_shapes: Callable[..., Path], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "data"
    for split, images in (("train", 6), ("test", 15)):
        make_shapes(folder / split, images=images, seed=images)
    return Path(folder)


@pytest.fixture(scope="module")
def runs(tlkit: Tlkit, data: Path, small: tuple[str, ...]) -> list[Path]:
    """A good network, one of other random weights, and one that learnt from two images a class."""
    made = []
    for name, options in {"good": (), "other": ("--seed", 5), "poor": ("--image-size", 16)}.items():
        made.append(data.parent / name)
        command = ("finetune", data, *small, *FP32, "--strategy", "probe", *options, "--out", made[-1])
        assert tlkit(*command).code == 0
    return made


def test_rows(tlkit: Tlkit, runs: list[Path], data: Path, tmp_path: Path) -> None:
    done = tlkit("compare", *runs, "--json", *FP32)
    told = done.json
    assert done.out.count("\n") == 1 and (told["split"], told["images"], told["classes"]) == ("test", 45, 3)
    found = {}
    for run in runs:
        single = tlkit("evaluate", run, data, "--out", tmp_path / run.name, "--json", *FP32).json
        row = next(row for row in told["rows"] if row["title"] == run.name)
        for name in ("top1", "top1_ci95", "loss", "ece", "balanced_accuracy"):
            assert row[name] == pytest.approx(single["metrics"][name], abs=1e-4), name
        assert "top5_error" not in row, "three classes"
        counted = tlkit("count-params", run, "--json").json["models"][0]
        assert (row["params"], row["macs"]) == (counted["params"], counted["macs"])
        assert row["images_per_second"] > 0
        found[run.name] = right(tmp_path / run.name)
    (best,) = [row for row in told["rows"] if row["best"]]
    assert best["mcnemar"] is None and best["top1"] == max(row["top1"] for row in told["rows"])
    adjusted = []
    for row in told["rows"]:
        if row is not best:
            only_best = sum(found[best["title"]][path] and not found[row["title"]][path] for path in found["good"])
            only_this = sum(found[row["title"]][path] and not found[best["title"]][path] for path in found["good"])
            assert (row["mcnemar"]["only_best"], row["mcnemar"]["only_this"]) == (only_best, only_this)
            exact = binomtest(only_best, only_best + only_this).pvalue if only_best + only_this else 1.0
            assert row["mcnemar"]["p"] == pytest.approx(exact)
            adjusted.append((row["mcnemar"]["p"], row["mcnemar"]["p_holm"]))
    (low, low_adjusted), (high, high_adjusted) = sorted(adjusted)
    assert low_adjusted == pytest.approx(min(1, 2 * low)) and high_adjusted == pytest.approx(max(high, low_adjusted))


def test_forms(tlkit: Tlkit, runs: list[Path], tmp_path: Path) -> None:
    table = tlkit("compare", *runs[:2], "--quiet")
    assert table.code == 0 and "good" in table.out and "McNemar" in table.out
    for ending in ("json", "md", "html"):
        out = tmp_path / f"compared.{ending}"
        assert tlkit("compare", *runs[:2], "--out", out, "--quiet").code == 0
        text = out.read_text(encoding="utf-8")
        assert "good" in text and "other" in text
        if ending == "json":
            assert len(json.loads(text)["rows"]) == 2
        assert text.startswith({"json": "{", "md": "**45 images", "html": "<!doctype html>"}[ending])
    assert json.loads(tlkit("compare", *runs[:2], "--format", "json", "--quiet").out)["images"] == 45
    assert tlkit("compare", *runs[:2], "--format", "markdown", "--quiet").out.count("\n| ") >= 3


def test_images_that_any_run_was_trained_on_are_left_out(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    """Two runs with different splits of one folder: each was trained on test images of the other."""
    data, splits = make_shapes(tmp_path / "data", images=20), []
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        options = ("--strategy", "probe", "--seed", seed, "--val-fraction", 0, "--test-fraction", 0.5, "--out", run)
        assert tlkit("finetune", data, *small, *FP32, *options).code == 0
        with (run / "splits.csv").open(newline="") as file:
            splits.append({row["path"] for row in csv.DictReader(file) if row["split"] == "test"})
    told = tlkit("compare", tmp_path / "run0", tmp_path / "run1", "--json", *FP32).json
    assert 0 < len(splits[0] & splits[1]) < 30
    assert (told["split"], told["images"]) == ("test", len(splits[0] & splits[1]))
    done = tlkit("compare", tmp_path / "run0", tmp_path / "run1", "--split", "train", *FP32)
    assert f"{60 - len(splits[0] & splits[1])} of the" in done.err and "trained on" in done.err


def test_networks_of_different_classes_are_compared_on_what_both_know(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], data: Path, runs: list[Path], tmp_path: Path
) -> None:
    two = make_shapes(tmp_path / "two", ("disc", "square"), 6)
    assert tlkit("finetune", two, *small, *FP32, "--strategy", "probe", "--out", tmp_path / "run").code == 0
    done = tlkit("compare", runs[0], tmp_path / "run", "--data", data, "--json", *FP32)
    assert (done.json["images"], done.json["left_out"], done.json["classes"]) == (30, 15, 2)
    assert "does not know" in done.err


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_bad_files(tlkit: Tlkit, runs: list[Path], data: Path, tmp_path: Path, how: str) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "test" / "disc" / "bad.png").write_bytes(b"nothing")
    done = tlkit("compare", *runs[:2], "--data", copy, "--on-error", how, "--json", *FP32)
    if how == "fail":
        assert done.code == 1 and "bad.png" in done.err
    else:
        assert done.json["images"] == 45
        assert [file["path"] for file in done.json["skipped_files"]] == ["test/disc/bad.png"]


def test_views_are_those_of_all(tlkit: Tlkit, runs: list[Path], data: Path) -> None:
    told = tlkit("compare", *runs[:2], "--tta", "flip", "--merge", "max", "--json", *FP32).json
    alone = tlkit("evaluate", runs[0], data, "--tta", "flip", "--merge", "max", "--json", *FP32).json
    row = next(row for row in told["rows"] if row["title"] == "good")
    assert told["tta"] == "flip" and row["loss"] == pytest.approx(alone["metrics"]["loss"], abs=1e-4)


def test_a_plan_measures_nothing(tlkit: Tlkit, runs: list[Path], tmp_path: Path) -> None:
    told = tlkit("compare", *runs, "--plan", "--json").json
    assert told["plan"] == {"models": ["good", "other", "poor"], "images": 45, "split": "test"}


def test_mistakes_are_one_line(tlkit: Tlkit, runs: list[Path], data: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((runs[0],), "one network alone"),
        ((runs[0], runs[0]), "named twice"),
        ((runs[0], "resnet81"), "resnet"),
        ((runs[0], runs[1], "--out", tmp_path / "x.doc"), ".doc"),
        ((runs[0], runs[1], "--out", tmp_path / "no" / "x.md"), "no such folder"),
        ((runs[0], runs[1], "--format", "html"), "--out"),
        ((runs[0], runs[1], "--tta", "fiip"), "did you mean 'flip'"),
        ((runs[0], runs[1], "--data", tmp_path / "nowhere"), "nowhere"),
        ((runs[0], runs[1], "--data", data, "--split", "val"), "no split 'val'"),
    ):
        done = tlkit("compare", *arguments)
        assert done.code == 1 and said in done.error, (arguments, done.err)
    done = tlkit("compare", "test_resnet", "test_vit")
    assert done.code == 2 and "--data" in done.error


def test_bad_files_are_not_of_unknown_classes(tlkit: Tlkit, runs: list[Path], data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "test" / "disc" / "bad.png").write_bytes(b"nothing")
    done = tlkit("compare", *runs[:2], "--data", copy, "--on-error", "skip", "--json", *FP32)
    assert done.json["left_out"] == 0
    assert "does not know" not in done.err and "bad.png" in done.err


def test_more_than_five_classes_have_a_top5_error(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    """Six, of which three look like the other three."""
    for split, images in (("train", 5), ("test", 8)):
        for half, name in enumerate(("warm", "cold")):
            folder = make_shapes(tmp_path / split / name, images=images, seed=images + half)
            for path in sorted(folder.iterdir()):
                shutil.copytree(path, tmp_path / "data" / split / f"{name} {path.name}")
    runs = [tmp_path / "first", tmp_path / "second"]
    for seed, run in enumerate(runs):
        options = ("--strategy", "probe", "--seed", seed, "--out", run)
        assert tlkit("finetune", tmp_path / "data", *small, *FP32, *options).code == 0
    told = tlkit("compare", *runs, "--json", *FP32).json
    assert told["classes"] == 6
    for row in told["rows"]:
        assert row["top5_error"] == pytest.approx(1 - row["top5"]) and row["top5_ci95"][0] <= row["top5"]
    assert "| top-5 error |" in tlkit("compare", *runs, "--format", "markdown", *FP32).out
