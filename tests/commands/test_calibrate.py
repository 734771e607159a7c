"""``evaluate --calibrate``: fitted on images that are not reported on, and written as a network for anybody."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

Tlkit = Callable[..., Any]
FP32 = ("--precision", "fp32", "--quiet")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def noisy(tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path_factory: Any) -> Path:
    """A run on images a fifth of whose labels are wrong, made ten times as sure as it has reason to be."""
    folder = tmp_path_factory.mktemp("noisy")
    for split, images in (("train", 10), ("val", 30), ("test", 30)):
        data = make_shapes(folder / "data" / split, images=images, seed=images + len(split))
        for path in sorted((data / "disc").iterdir())[::5]:
            path.rename(data / "square" / f"from disc {path.name}")
    run = Path(folder / "run")
    assert tlkit("finetune", folder / "data", *small, *FP32, "--strategy", "probe", "--out", run).code == 0
    state = safetensors.torch.load_file(run / "model.safetensors")
    sure = {name: 10 * value if name.startswith("fc.") else value for name, value in state.items()}
    safetensors.torch.save_file(sure, run / "model.safetensors", metadata={"format": "pt"})
    return run


@pytest.fixture(scope="module")
def calibrated(tlkit: Tlkit, noisy: Path) -> Any:
    out = noisy.parent / "calibrated"
    return out, tlkit("evaluate", noisy, "--calibrate", "--out", out, "--json", *FP32).json


def test_val_is_fitted_on_and_test_reported(calibrated: Any, noisy: Path) -> None:
    out, told = calibrated
    assert (told["calibration"]["fitted_on"], told["calibration"]["fitted_images"], told["split"]) == (
        "val",
        90,
        "test",
    )
    assert told["metrics"] == told["calibration"]["after"] and told["metrics"]["images"] == 90
    assert {row["path"].split("/")[0] for row in rows_of(out / "predictions.csv")} == {"test"}
    before = told["calibration"]["before"]
    assert told["calibration"]["temperature"] > 1.5, "it was made too sure"
    assert before["ece"] > 1.5 * told["metrics"]["ece"] and before["loss"] > told["metrics"]["loss"]
    assert before["top1"] == told["metrics"]["top1"], "the order of the classes stays"


def test_before_is_what_the_run_says_and_after_what_the_calibrated_one_says(
    tlkit: Tlkit, calibrated: Any, noisy: Path
) -> None:
    out, told = calibrated
    plain = tlkit("evaluate", noisy, "--json", *FP32).json
    again = tlkit("evaluate", out, "--json", *FP32).json
    assert again["split"] == "test"
    for name in ("images", "top1", "loss", "ece", "brier"):
        assert plain["metrics"][name] == pytest.approx(told["calibration"]["before"][name], abs=1e-4), name
        assert again["metrics"][name] == pytest.approx(told["calibration"]["after"][name], abs=1e-4), name


def test_the_temperature_is_in_the_weights(calibrated: Any, noisy: Path) -> None:
    out, told = calibrated
    plain, scaled = (timm.create_model(f"local-dir:{run}", pretrained=True).eval() for run in (noisy, out))
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(scaled(images) * told["calibration"]["temperature"], plain(images), rtol=1e-4, atol=1e-4)


def test_predict_takes_it(tlkit: Tlkit, calibrated: Any, noisy: Path) -> None:
    out, _ = calibrated
    photos = noisy.parent / "data" / "test" / "disc"
    plain, scaled = (tlkit("predict", run, photos, "--json", *FP32).json["predictions"] for run in (noisy, out))
    assert [row["label"] for row in plain] == [row["label"] for row in scaled]
    assert np.mean([row["probability"] for row in plain]) > np.mean([row["probability"] for row in scaled])


def test_without_test_half_of_val_is_fitted_on_and_counts_as_trained_on_from_then(
    tlkit: Tlkit, noisy: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(noisy.parent / "data", tmp_path / "data")
    shutil.rmtree(data / "test")
    out = tmp_path / "out"
    told = tlkit("evaluate", noisy, data, "--calibrate", "--out", out, "--json", *FP32).json
    assert told["calibration"]["fitted_on"] == "half of val"
    assert told["calibration"]["fitted_images"] + told["metrics"]["images"] == 90
    reported = {row["path"] for row in rows_of(out / "predictions.csv")}
    splits = {row["path"]: row["split"] for row in rows_of(out / "splits.csv")}
    assert reported == {path for path, split in splits.items() if split == "val"}
    fitted = {path for path, split in splits.items() if split == "train" and path.startswith("val/")}
    assert len(fitted) == told["calibration"]["fitted_images"] and not fitted & reported
    by_class = [sum(path.split("/")[1] == name for path in fitted) for name in ("disc", "square", "triangle")]
    assert by_class == [12, 18, 15], "half of each class"
    again = tlkit("evaluate", out, "--json", *FP32).json
    assert again["metrics"]["loss"] == pytest.approx(told["metrics"]["loss"], abs=1e-4)
    other = tlkit("evaluate", noisy, data, "--calibrate", "--out", tmp_path / "two", "--json", *FP32).json
    assert other["calibration"] == told["calibration"], "the halves are seeded"


def test_data_without_splits_is_halved(tlkit: Tlkit, noisy: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", noisy.parent / "data" / "test"
    told = tlkit("evaluate", noisy, data, "--calibrate", "--out", out, "--json", *FP32).json
    assert told["calibration"]["fitted_on"] == "half of all"
    again = tlkit("evaluate", out, "--json", *FP32).json
    assert again["metrics"]["images"] == told["metrics"]["images"] < 90
    assert again["metrics"]["loss"] == pytest.approx(told["metrics"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tta", "flip"), "--tta"),
        (("--split", "train"), "trained on"),
        (("--split", "all"), "trained on"),
    ],
)
def test_what_would_not_be_honest_is_refused(
    tlkit: Tlkit, noisy: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = tlkit("evaluate", noisy, "--calibrate", *options, "--out", tmp_path / "out")
    assert done.code == 1 and said in done.error and not (tmp_path / "out").exists()


def test_images_that_are_all_right_determine_no_temperature(
    tlkit: Tlkit, trained: Path, shapes: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    data = tmp_path / "data"
    for row in tlkit("predict", trained, shapes, "--json", *FP32).json["predictions"]:
        (data / row["label"]).mkdir(parents=True, exist_ok=True)  # labelled as the network would have it
        shutil.copy(row["path"], data / row["label"] / f"{Path(row['path']).parent.name} {Path(row['path']).name}")
    (run / "splits.csv").unlink()
    done = tlkit("evaluate", run, data, "--calibrate", "--out", tmp_path / "out", *FP32)
    assert done.code == 1 and "determine no temperature" in done.error
    assert not (tmp_path / "out").exists()


def test_too_few_images(tlkit: Tlkit, trained: Path, make_shapes: Callable[..., Path], tmp_path: Path) -> None:
    done = tlkit("evaluate", trained, make_shapes(tmp_path / "data", images=2), "--calibrate")
    assert done.code == 1 and "too few to be halved" in done.error


def test_a_network_whose_classifier_is_not_linear_is_refused(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--image-size", 224, "--epochs", 1, "--out", run, "--quiet", "--batch-size", 8)
    done = tlkit("pretrain", shapes, "--model", "levit_128s", *options)
    assert done.code == 0, done.err
    (run / "recipe.yaml").unlink()  # so that all of the images may be halved
    done = tlkit("evaluate", run, shapes, "--calibrate", "--out", tmp_path / "out")
    assert done.code == 1 and "--calibrate" in done.error and "linear" in done.error
    assert not (tmp_path / "out").exists()


def test_the_report_tells_it(calibrated: Any) -> None:
    out, told = calibrated
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{told['calibration']['temperature']:.2f}"[:3] in page and "emperature" in page
    assert json.loads((out / "summary.json").read_text())["calibration"] == told["calibration"]


def test_a_manifest_with_a_file_that_cannot_be_read(tlkit: Tlkit, noisy: Path, tmp_path: Path) -> None:
    """The calibrated run finds the same images again, by the manifest, and reports the same ones."""
    paths = sorted((noisy.parent / "data" / "test").rglob("*.*"))
    rows = [[str(path), path.parent.name] for path in paths] + [[str(tmp_path / "gone.png"), "disc"]]
    manifest, out = tmp_path / "list.csv", tmp_path / "out"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    options = ("--on-error", "skip", "--json", *FP32)
    told = tlkit("evaluate", noisy, manifest, "--calibrate", "--out", out, *options).json
    assert told["calibration"]["fitted_images"] + told["metrics"]["images"] == 90
    assert [Path(file["path"]).name for file in told["skipped_files"]] == ["gone.png"]
    again = tlkit("evaluate", out, *options).json
    assert again["metrics"]["images"] == told["metrics"]["images"]
    assert again["metrics"]["loss"] == pytest.approx(told["metrics"]["loss"], abs=1e-4)
