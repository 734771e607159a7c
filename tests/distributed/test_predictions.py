"""Two processes give the predictions of one: each image once, whatever the number divides into, bad files too."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    roc_auc_score,
)

SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np, timm, torch
from tlkit import compute, config
from tlkit.data.loading import ViewDataset
from tlkit.evaluation.predict import predict_all
from tlkit.evaluation.views import VIEWS
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
preprocessing = Preprocessing(32, 0.8, "center", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
accelerator = compute.accelerator(config.Compute(device="cpu", precision="fp32"))
torch.manual_seed(0)
network = timm.create_model("test_resnet", num_classes=3)
torch.nn.init.normal_(network.fc.weight, std=2)
paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
found = {}
for count in (37, 17, 8, 5):
    for view, workers in (("center", None), ("ten-crop", 0)):
        # every class among them, as the first paths alone would not have
        chosen = [paths[row * len(paths) // count] for row in range(count)]
        how = How(accelerator, batch_size=8, workers=workers, compile="never", say=lambda line: None)
        part = predict_all(network, ViewDataset(folder, chosen, preprocessing, VIEWS[view]), how)
        name = f"{count} {view} "
        found |= {name + key: getattr(part, key) for key in ("rows", "probabilities", "center")}
        found[name + "bad"] = np.array([file.path for file in part.bad], dtype=str)
        found[name + "paths"] = np.array(chosen)
np.savez(out / f"{accelerator.num_processes}-{accelerator.process_index}.npz", **found)
"""
COUNTS, VIEWS = (37, 17, 8, 5), ("center", "ten-crop")


@pytest.fixture(scope="module")
def images(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images of three classes, one of which cannot be read."""
    folder = make_shapes(tmp_path_factory.mktemp("spread") / "data", images=(13, 12, 12))
    (folder / "square" / "04.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def found(
    images: Path, together: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, np.ndarray]]:
    """What each process holds in the end: ``1-0`` alone, ``2-0`` and ``2-1`` of two."""
    out = tmp_path_factory.mktemp("out")
    script = out / "script.py"
    script.write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patched:  # one of them here: most of the time goes into imports
        patched.setattr(sys, "argv", [str(script), str(images), str(out)])
        runpy.run_path(str(script))
    for done in together(script, images, out):
        assert done.returncode == 0, done.stderr
    return {path.stem: dict(np.load(path)) for path in out.glob("*.npz")}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_give_what_one_gives(found: dict[str, Any], count: int, view: str) -> None:
    """With fewer images than a batch for each, the second process has none at all."""
    assert set(found) == {"1-0", "2-0", "2-1"}
    name = f"{count} {view} "
    for key in ("rows", "center", "bad"):
        for one in ("2-0", "2-1"):
            assert found[one][name + key].tolist() == found["1-0"][name + key].tolist(), key
    for one in ("2-0", "2-1"):
        np.testing.assert_array_equal(found[one][name + "probabilities"], found["1-0"][name + "probabilities"])


@pytest.mark.parametrize("view", VIEWS)
def test_each_image_is_there_once_but_for_the_bad_one(found: dict[str, Any], view: str) -> None:
    for count in COUNTS:
        told = found["2-1"]
        paths, bad = told[f"{count} {view} paths"].tolist(), told[f"{count} {view} bad"].tolist()
        rows = told[f"{count} {view} rows"].tolist()
        assert rows == [row for row in range(count) if row not in [paths.index(path) for path in bad]]
    assert found["2-0"][f"37 {view} bad"].tolist() == ["square/04.png"]


@pytest.mark.parametrize("count", [37, 17])
def test_figures_of_two_processes_are_scikit_learns(found: dict[str, Any], count: int) -> None:
    from tlkit.evaluation.metrics import measured

    told = found["2-1"]
    name = f"{count} ten-crop "
    probabilities, rows = told[name + "probabilities"], told[name + "rows"]
    classes = ["disc", "square", "triangle"]
    labels = np.array([classes.index(path.split("/")[0]) for path in told[name + "paths"][rows].tolist()])
    predicted, figures = probabilities.argmax(1), measured(probabilities, labels)
    precise = probabilities / probabilities.sum(1, keepdims=True, dtype=float)
    assert figures["images"] == len(labels) >= 16
    assert figures["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert figures["loss"] == pytest.approx(log_loss(labels, precise, labels=range(3)), rel=1e-5)
    brier = brier_score_loss(labels, precise, labels=range(3), scale_by_half=False)
    assert figures["brier"] == pytest.approx(brier, abs=1e-5)
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(3) if (labels == k).sum() >= 10]
    assert ("auroc" in figures) == bool(areas)
    if areas:
        assert figures["auroc"] == pytest.approx(np.mean(areas))


@pytest.mark.slow
def test_the_command_prints_one_object_and_writes_one_folder(
    tlkit: Callable[..., Any], together: Callable[..., Any], trained: Path, images: Path, tmp_path: Path, read_csv: Any
) -> None:
    """Through the real command line, as ``torchrun -m tlkit`` would start it."""
    told = {}
    for count in (1, 2):
        arguments = ("evaluate", trained, images, "--split", "all", "--on-error", "skip", "--tta", "flip")
        options = ("--precision", "fp32", "--device", "cpu", "--batch-size", 8, "--json")
        out = tmp_path / str(count)
        words = (*arguments, *options, "--out", out)
        if count == 1:
            told[count] = tlkit(*words).json
            continue
        done = together("-m", "tlkit", *words)
        assert [one.returncode for one in done] == [0, 0], done[-1].stderr
        assert [len(one.stdout.splitlines()) for one in done] == [1, 0]
        told[count] = json.loads(done[0].stdout)
    assert told[2]["metrics"] == told[1]["metrics"] and told[2]["metrics"]["images"] == 36
    for name in ("per_class", "reliability", "coverage", "confusion_matrix", "skipped_files"):
        assert told[2][name] == told[1][name], name
    audits = [{name: value for name, value in told[k]["tta_audit"].items() if "seconds" not in name} for k in (1, 2)]
    assert audits[0] == audits[1]
    assert read_csv(tmp_path / "1" / "predictions.csv") == read_csv(tmp_path / "2" / "predictions.csv")
    assert {path.name for path in (tmp_path / "1").iterdir()} == {path.name for path in (tmp_path / "2").iterdir()}


@pytest.mark.slow
def test_a_mistake_of_two_processes_ends_both(
    together: Callable[..., Any], trained: Path, images: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", trained, images, "--split", "all", "--device", "cpu", "--out", tmp_path / "out")
    done = together("-m", "tlkit", *arguments)
    assert [one.returncode for one in done] == [1, 1]
    assert "square/04.png" in done[0].stderr
    assert not (tmp_path / "out").exists()
