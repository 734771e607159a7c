"""Two processes give the predictions and features of one: each image once, whatever divides them, bad files too."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
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
import contextlib, io, json, os, sys
from pathlib import Path
import numpy as np, timm, torch
from tlkit import compute, config, processes
from tlkit.cli.app import run
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
name = f"{accelerator.num_processes}-{accelerator.process_index}"
np.savez(out / f"{name}.npz", **found)

if processes.count() > 1:
    processes.leave = lambda: None  # the processes stay together for the next command
    (out / name).mkdir()
    os.chdir(out / name)
noted = {}
for command, words in json.loads((out / f"{processes.count()}.json").read_text()).items():
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        code = run(words)
    noted[command] = {"code": code, "out": printed.getvalue(), "err": told.getvalue()}
(out / f"{name}.json").write_text(json.dumps(noted))
"""
COUNTS, VIEWS = (37, 17, 8, 5), ("center", "ten-crop")


@pytest.fixture(scope="module")
def images(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images of three classes, one of which cannot be read."""
    folder = make_shapes(tmp_path_factory.mktemp("spread") / "data", images=(13, 12, 12))
    (folder / "square" / "04.png").write_bytes(b"broken")
    return folder


SKIP = ("--on-error", "skip")


def write_commands(out: Path, images: Path, small: tuple[str, ...]) -> None:
    """What one process is to extract (``1.json``), and what two are; the last commands are mistakes."""
    options = (*small, "--precision", "fp32", "--batch-size", 8, "--workers", 0, "--json")
    (out / "few.csv").write_text("path,label\n" + "".join(f"{images}/disc/0{row}.png,disc\n" for row in (0, 2, 4)))
    every = {
        "all.parquet": (images, *SKIP),
        "all.npz": (images, *SKIP),
        "all.safetensors": (images, *SKIP),
        "few.parquet": (out / "few.csv",),
        "map.parquet": (images, *SKIP, "--stage", "stage1"),
    }
    for count in "12":
        words = {name: (*given, *options, "--out", out / f"{count}-{name}") for name, given in every.items()}
        if count == "1":
            words["from one"] = (images, *options, "--out", out / "from-one.parquet")
        else:
            words["from one"] = (images, *options, *SKIP, "--out", out / "from-one.parquet")
            words["finished"] = ("--resume", out / "2-all.parquet", "--json")
            words["from two"] = (images, *options, "--out", out / "from-two.parquet")
            words["not shared"] = (images, *options, *SKIP, "--out", "features.parquet")
            words["there already"] = (images, *options, "--out", out / "2-all.parquet")
        told = {name: ["extract-features", *map(str, given)] for name, given in words.items()}
        (out / f"{count}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes write."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(
    images: Path, together: Callable[..., Any], place: Path, small: tuple[str, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """What each process holds in the end: ``1-0`` alone, ``2-0`` and ``2-1`` of two."""
    out = place
    script = out / "script.py"
    script.write_text(SCRIPT)
    write_commands(out, images, small)
    kept = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:  # one of them here: most of the time goes into imports
        patched.setattr(sys, "argv", [str(script), str(images), str(out)])
        runpy.run_path(str(script))
    signal.signal(signal.SIGTERM, kept)
    for done in together(script, images, out):
        assert done.returncode == 0, done.stderr
    return {path.stem: dict(np.load(path)) for path in out.glob("?-?.npz")}


@pytest.fixture(scope="module")
def noted(found: Any, place: Path) -> dict[str, dict[str, Any]]:
    """Of each process (``1-0``, ``2-0``, ``2-1``), by the name of a command, its exit code and what it printed."""
    return {path.stem: json.loads(path.read_text()) for path in place.glob("?-?.json")}


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


# Features


def features(path: Path) -> tuple[pyarrow.Table, dict[str, Any]]:
    """A file or a folder of parts, and what it says of itself."""
    table = pyarrow.parquet.read_table(path)
    return table, json.loads(table.schema.metadata[b"tlkit"])


@pytest.mark.parametrize("name", ["all.parquet", "few.parquet", "map.parquet"])
def test_parts_are_the_rows_of_the_one_file(noted: Any, place: Path, name: str) -> None:
    """In the order of their names, for whoever reads them; three images are one batch, and one part is empty."""
    assert noted["1-0"][name]["code"] == noted["2-0"][name]["code"] == noted["2-1"][name]["code"] == 0, noted
    one, folder = place / f"1-{name}", place / f"2-{name}"
    wanted, identity = features(one)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"part-0000{number}-of-00002.parquet" for number in range(2)]
    pieces = [features(part) for part in parts]
    assert pyarrow.concat_tables([table for table, _ in pieces]).equals(wanted)
    assert [known for _, known in pieces] == [identity, identity]
    assert features(folder)[0].equals(wanted) and features(folder)[1] == identity
    rows = [table.num_rows for table, _ in pieces]
    assert rows == ([16, 20] if name != "few.parquet" else [0, 3]), "whole batches; one of them lacks a bad file"


@pytest.mark.parametrize("name", ["all.npz", "all.safetensors"])
def test_other_formats_stay_one_file(noted: Any, place: Path, name: str) -> None:
    assert noted["2-0"][name]["code"] == noted["2-1"][name]["code"] == 0, noted
    assert (place / f"1-{name}").read_bytes() == (place / f"2-{name}").read_bytes()


@pytest.mark.parametrize("name", ["all.parquet", "all.npz", "few.parquet", "map.parquet"])
def test_the_first_process_tells_of_all(noted: Any, place: Path, name: str) -> None:
    one, two = (json.loads(noted[process][name]["out"]) for process in ("1-0", "2-0"))
    for key in ("images", "dim", "shape", "skipped_files", "model", "weights"):
        assert one[key] == two[key], key
    assert two["images"] == (3 if name == "few.parquet" else 36) and two["images_per_second"] > 0
    assert two["out"] == str(place / f"2-{name}")
    assert noted["2-1"][name]["out"] == noted["2-1"][name]["err"] == ""
    if name == "all.parquet":
        assert "left out square/04.png: " in noted["2-0"][name]["err"]
        assert "features, process 0 of 2: 16/16" in noted["2-0"][name]["err"]


def test_what_one_process_has_begun_two_go_on_with(noted: Any, place: Path) -> None:
    """It stopped at a bad file; both write a part of what it had done."""
    assert noted["1-0"]["from one"]["code"] == 1
    assert noted["2-0"]["from one"]["code"] == noted["2-1"]["from one"]["code"] == 0, noted
    assert "going on: 36 of 37 images are done" in noted["2-0"]["from one"]["err"]
    assert len(list((place / "from-one.parquet").iterdir())) == 2
    assert features(place / "from-one.parquet")[0].equals(features(place / "1-all.parquet")[0])


def test_what_two_processes_have_begun_one_goes_on_with(
    noted: Any, place: Path, images: Path, tlkit: Callable[..., Any], tmp_path: Path
) -> None:
    """They stopped at a bad file, which is mended; what they had done is not read again."""
    first, second = (noted[process]["from two"] for process in ("2-0", "2-1"))
    assert (first["code"], second["code"]) == (1, 1) and second["err"] == ""
    (line,) = (line for line in first["err"].splitlines() if line.startswith("tlkit: error"))
    assert "1 of 37 images cannot be read (square/04.png: " in line
    kept = sorted(path.name for path in (place / ".tlkit-from-two.parquet").iterdir())
    assert kept == ["log-0", "log-1", "recipe.yaml"]
    broken = (images / "square" / "04.png").read_bytes()
    try:
        shutil.copy(images / "square" / "06.png", images / "square" / "04.png")
        done = tlkit("extract-features", "--resume", place / "from-two.parquet")
    finally:
        (images / "square" / "04.png").write_bytes(broken)
    assert done.code == 0 and "going on: 36 of 37 images are done" in done.err, done.err
    found, wanted = features(place / "from-two.parquet")[0], features(place / "1-all.parquet")[0]
    assert found.num_rows == 37 and found["path"][17].as_py() == "square/04.png"
    assert pyarrow.concat_tables([found[:17], found[18:]]).equals(wanted)
    assert (place / "from-two.parquet").is_file() and not (place / ".tlkit-from-two.parquet").exists()


def test_a_folder_of_parts_is_finished(noted: Any, place: Path, tlkit: Callable[..., Any]) -> None:
    """For two processes and for one, and is never overwritten."""
    out = place / "2-all.parquet"
    assert json.loads(noted["2-0"]["finished"]["out"])["out"] == str(out)
    assert f"{out} is finished" in tlkit("extract-features", "--resume", out).out
    assert noted["2-0"]["there already"]["code"] == noted["2-1"]["there already"]["code"] == 1
    assert f"{out}: exists already, and is never overwritten" in noted["2-0"]["there already"]["err"]


def test_processes_that_do_not_see_one_folder(noted: Any, place: Path) -> None:
    """Each stands in a folder of its own, as on machines of their own."""
    first, second = (noted[process]["not shared"] for process in ("2-0", "2-1"))
    assert (first["code"], second["code"], second["err"]) == (1, 1, "")
    (line,) = (line for line in first["err"].splitlines() if line.startswith("tlkit: error"))
    assert line.startswith("tlkit: error: .tlkit-features.parquet: process 1 (") and "does not see this folder" in line
    assert line.endswith("give --out on a disk that all machines share")
    assert [list((place / name).iterdir()) for name in ("2-0", "2-1")] == [[], []]


def test_nothing_but_the_files_is_left(noted: Any, place: Path) -> None:
    hidden = {path.name for path in place.iterdir() if path.name.startswith(".")}
    assert hidden <= {".tlkit-from-two.parquet"}


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
