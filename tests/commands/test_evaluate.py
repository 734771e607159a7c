"""``tlkit evaluate`` through the real command line: which images, whose classes, the same figures as elsewhere."""

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
import timm.data
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support, roc_auc_score
from timm.data import ImageNetInfo

Tlkit = Callable[..., Any]
FIGURES = {"images", "top1", "balanced_accuracy", "macro_f1", "loss", "brier", "ece"}
INTERVALS = {f"{name}_ci95" for name in FIGURES - {"images"}}
CLASSES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def four(tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path_factory: Any) -> Path:
    """A run with four classes, all images trained on, so that it knows them nearly by heart."""
    folder = tmp_path_factory.mktemp("four")
    data = make_shapes(folder / "data", CLASSES, 8)
    arguments = ("--val-fraction", 0, "--precision", "fp32", "--out", folder / "run", "--quiet")
    assert tlkit("finetune", data, *small, *arguments).code == 0
    return Path(folder / "run")


# The run's own data


def test_json_is_one_object_with_the_contracts_fields(tlkit: Tlkit, trained: Path) -> None:
    done = tlkit("evaluate", trained, "--json")
    assert done.out.count("\n") == 1
    told = done.json
    assert set(told) >= {"command", "version", "seconds", "metrics", "per_class", "tta"}
    assert "run" not in told, "no run folder was asked for"
    assert (told["command"], told["tta"], told["split"]) == ("evaluate", "center", "test")
    assert set(told["metrics"]) == FIGURES | INTERVALS, "no AUROC: fewer than ten images of each class"
    assert (told["merge"], told["network_images_per_second"] > 0) == ("mean", True)
    assert "tta_audit" not in told and "calibration" not in told
    assert [row["class"] for row in told["per_class"]] == ["disc", "square", "triangle"]
    assert all(set(row) == {"class", "images", "precision", "recall", "f1", "auroc"} for row in told["per_class"])
    matrix = np.array(told["confusion_matrix"])
    assert matrix.sum(1).tolist() == [row["images"] for row in told["per_class"]]
    assert matrix.trace() == round(told["metrics"]["top1"] * told["metrics"]["images"])
    assert sum(row["images"] for row in told["reliability"]) == told["metrics"]["images"]
    whole = told["coverage"][0]
    assert (whole["threshold"], whole["coverage"], whole["accuracy"]) == (0, 1, told["metrics"]["top1"])
    assert told["data"]["disc"]["test"] == 3


@pytest.mark.parametrize("split", ["auto", "test", "val", "train", "all"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "its own"])
def test_on_its_own_data_a_runs_stored_split_is_used(
    tlkit: Tlkit, trained: Path, shapes: Path, split: str, named: bool
) -> None:
    stored = json.loads((trained / "summary.json").read_text())
    arguments = [trained, *([shapes] if named else []), "--split", split, "--precision", "fp32", "--json", "--quiet"]
    told = tlkit("evaluate", *arguments).json
    counted = stored["images"] | {"all": 36, "auto": stored["images"]["test"]}
    assert told["metrics"]["images"] == counted[split]
    reference = stored["metrics"].get("test" if split == "auto" else split)
    if reference:
        for name in FIGURES:
            assert told["metrics"][name] == pytest.approx(reference[name], abs=1e-4), name


def test_a_split_that_is_not_there_is_said(tlkit: Tlkit, make_shapes: Any, trained: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_shapes(tmp_path / "data" / split, images=2)
    done = tlkit("evaluate", trained, tmp_path / "data", "--split", "test")
    assert done.code == 1
    assert "no split 'test'" in done.error and "train, val" in done.error
    assert tlkit("evaluate", trained, tmp_path / "data", "--json").json["split"] == "val"


def test_a_network_that_was_copied_without_its_recipe_can_be_evaluated(
    tlkit: Tlkit, trained: Path, shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(trained / name, tmp_path / "copy")
    told = tlkit("evaluate", tmp_path / "copy", shapes, "--json").json
    assert (told["split"], told["metrics"]["images"]) == ("all", 36)
    done = tlkit("evaluate", tmp_path / "copy")
    assert done.code == 2
    assert "missing argument DATA" in done.error


def test_images_that_are_gone_are_said(
    tlkit: Tlkit, make_shapes: Callable[..., Path], small: tuple[str, ...], tmp_path: Path
) -> None:
    data, run = make_shapes(tmp_path / "data", ("disc", "square"), 6), tmp_path / "run"
    assert tlkit("finetune", data, *small, "--out", run, "--quiet").code == 0
    (data / "disc" / "02.png").unlink()
    done = tlkit("evaluate", run)
    assert done.code == 1
    assert "disc/02.png" in done.error and str(data) in done.error


def test_a_label_that_changed_is_said(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    rows = [[str(path), path.parent.name] for path in sorted(shapes.rglob("*.*"))]
    manifest, run = tmp_path / "list.csv", tmp_path / "run"

    def write() -> None:
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], *rows])

    write()
    assert tlkit("finetune", manifest, *small, "--out", run, "--quiet").code == 0
    rows[0][1] = "triangle"
    write()
    done = tlkit("evaluate", run)
    assert done.code == 1
    assert "was of class 'disc' in the run, and is of 'triangle' now" in done.error


# Other data: classes are matched by name


@pytest.mark.parametrize("gone", CLASSES)
def test_a_missing_class_shifts_nothing(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path, gone: str
) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 4, seed=5)
    whole = tlkit("evaluate", four, data, "--precision", "fp32", "--json", "--quiet").json
    shutil.rmtree(data / gone)
    done = tlkit("evaluate", four, data, "--precision", "fp32", "--json")
    told = done.json
    assert told["missing_classes"] == [gone]
    assert "1 of the network's 4 classes have no image here" in done.err and gone in done.err
    assert told["metrics"]["images"] == 12
    before = {row["class"]: row["recall"] for row in whole["per_class"]}
    after = {row["class"]: row["recall"] for row in told["per_class"]}
    assert after == before | {gone: None}
    recalls = [after[name] for name in CLASSES if name != gone]
    assert told["metrics"]["top1"] == pytest.approx(np.mean(recalls))
    assert told["metrics"]["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert np.mean(recalls) > 0.6, "shifted labels would be right for the classes before the gap alone"


@pytest.mark.parametrize("extra", ["0", "aa", "bb", "z"])
def test_an_extra_class_is_left_out_and_shifts_nothing(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path, extra: str
) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 4, seed=5)
    whole = tlkit("evaluate", four, data, "--precision", "fp32", "--json", "--quiet").json
    make_shapes(data, (extra,), 3)
    done = tlkit("evaluate", four, data, "--precision", "fp32", "--json")
    for name in FIGURES:
        assert done.json["metrics"][name] == pytest.approx(whole["metrics"][name], abs=1e-4), name
    assert done.json["unknown_classes"] == {extra: 3}
    assert f"3 images of 1 classes that the network does not know are left out: {extra} (3)" in done.err


def test_no_class_in_common_is_an_error(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("A", "B"), 3)
    done = tlkit("evaluate", four, data)
    assert done.code == 1
    assert "the network knows none of these classes" in done.error
    assert str(data) in done.error and "a, b, c, d" in done.error


def test_figures_are_those_of_the_predictions_written(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path, read_csv: Any
) -> None:
    data, out = make_shapes(tmp_path / "data", CLASSES, (5, 2, 7, 4), seed=9), tmp_path / "out"
    told = tlkit("evaluate", four, data, "--out", out, "--json").json
    rows = read_csv(out / "predictions.csv")
    truth, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
    precision, recall, f1, images = precision_recall_fscore_support(truth, predicted, labels=CLASSES, zero_division=0)
    for number, row in enumerate(told["per_class"]):
        assert row["images"] == images[number]
        assert (row["precision"] or 0) == pytest.approx(precision[number])
        assert (row["recall"], row["f1"]) == (pytest.approx(recall[number]), pytest.approx(f1[number]))
    assert told["metrics"]["balanced_accuracy"] == pytest.approx(recall.mean())


def test_out_is_a_folder_with_a_report(tlkit: Tlkit, trained: Path, tmp_path: Path, contents: Any) -> None:
    before, out = contents(trained), tmp_path / "out"
    told = tlkit("evaluate", trained, "--out", out, "--json").json
    assert told["run"] == str(out)
    assert {path.name for path in out.iterdir()} >= {"report.html", "predictions.csv", "summary.json"}
    assert json.loads((out / "summary.json").read_text()) | {"seconds": 0} == told | {"seconds": 0}
    assert contents(trained) == before, "a run never writes into another's folder"
    done = tlkit("evaluate", trained, "--out", out)
    assert done.code == 1
    assert "exists already" in done.error


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_plan_measures_nothing(tlkit: Tlkit, trained: Path, tmp_path: Path, as_json: bool) -> None:
    done = tlkit("evaluate", trained, "--plan", "--out", tmp_path / "out", *(["--json"] if as_json else []))
    assert done.code == 0
    assert not (tmp_path / "out").exists()
    if as_json:
        assert done.json["plan"] == {"images": {"test": {"disc": 3, "square": 3, "triangle": 3}}, "total": 9}
    else:
        assert "disc" in done.out and "test_resnet" in done.out


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_bad_files(tlkit: Tlkit, make_shapes: Callable[..., Path], trained: Path, tmp_path: Path, how: str) -> None:
    data = make_shapes(tmp_path / "data", images=2)
    (data / "disc" / "bad.jpg").touch()
    done = tlkit("evaluate", trained, data, "--on-error", how, "--json")
    if how == "skip":
        assert done.json["metrics"]["images"] == 6
        assert [file["path"] for file in done.json["skipped_files"]] == ["disc/bad.jpg"]
    else:
        assert done.code == 1
        assert "disc/bad.jpg" in done.error


# Views


def predicted(run: Path) -> dict[str, tuple[str, str]]:
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: (row["label"], row["predicted"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("views", ["flip", "five-crop", "ten-crop", "multi-scale", "multi-scale+ten-crop"])
def test_the_audit_is_what_two_evaluations_differ_in(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path, views: str
) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 20, seed=11)
    options = ("--crop", 0.6, "--precision", "fp32", "--quiet", "--json")
    alone = tlkit("evaluate", four, data, *options, "--out", tmp_path / "alone").json
    told = tlkit("evaluate", four, data, *options, "--tta", views, "--out", tmp_path / "views").json
    before, after = predicted(tmp_path / "alone"), predicted(tmp_path / "views")
    fixed = sum(before[path][1] != label and guess == label for path, (label, guess) in after.items())
    broken = sum(before[path][1] == label and guess != label for path, (label, guess) in after.items())
    audit = told["tta_audit"]
    assert (audit["fixed"], audit["broken"]) == (fixed, broken)
    assert audit["center_top1"] == pytest.approx(alone["metrics"]["top1"])
    assert told["metrics"]["top1"] * 80 == pytest.approx(alone["metrics"]["top1"] * 80 + fixed - broken)
    assert audit["views"] == {"flip": 2, "five-crop": 5, "ten-crop": 10, "multi-scale": 3}.get(views, 30)
    assert audit["network_seconds"] > 0 and 0 < audit["p"] <= 1


def test_merges_differ_and_are_said(tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 10, seed=12)
    losses = set()
    for merge in ("mean", "geometric", "max"):
        told = tlkit("evaluate", four, data, "--tta", "ten-crop", "--crop", 0.6, "--merge", merge, "--json").json
        assert told["merge"] == merge
        losses.add(round(told["metrics"]["loss"], 6))
    assert len(losses) == 3


def test_crops_without_room_are_pointed_out(tlkit: Tlkit, trained: Path) -> None:
    done = tlkit("evaluate", trained, "--tta", "ten-crop", "--crop", 1.0)
    assert done.code == 0 and "--crop 0.875 gives them room" in done.err
    assert "gives them room" not in tlkit("evaluate", trained, "--tta", "flip", "--crop", 1.0).err


@pytest.mark.parametrize(
    ("views", "said"),
    [("tencrop", "did you mean 'ten-crop'"), ("flip+flip", "both say"), ("ten-crop+five-crop", "both say"), ("", "''")],
)
def test_views_that_are_none_are_one_line(tlkit: Tlkit, trained: Path, views: str, said: str) -> None:
    done = tlkit("evaluate", trained, "--tta", views)
    assert done.code == 1 and said in done.error and "--tta" in done.error


def test_the_recipe_repeats_it_from_any_folder(
    tlkit: Tlkit, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    told = tlkit("evaluate", trained.name, "--tta", "flip", "--out", tmp_path / "out", "--json").json
    monkeypatch.chdir(tmp_path)
    again = tlkit("evaluate", "--recipe", "out/recipe.yaml", "--json").json
    assert again["metrics"] == told["metrics"] and again["tta"] == "flip"


def test_the_matrix_is_written_cell_by_cell(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path, read_csv: Any
) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 6, seed=13)
    told = tlkit("evaluate", four, data, "--out", tmp_path / "out", "--json").json
    cells = {(row["class"], row["predicted"]): int(row["images"]) for row in read_csv(tmp_path / "out/confusions.csv")}
    for true, row in zip(CLASSES, told["confusion_matrix"], strict=True):
        assert [cells.get((true, guess), 0) for guess in CLASSES] == row


# ImageNet networks


IDS = {"disc": "n02124075", "square": "n01440764", "triangle": "n07753592"}  # not in the order of the shapes
SPELLINGS = {
    "ids": IDS,
    "names": {"disc": "Egyptian cat", "square": "tench", "triangle": "banana"},
    "other spellings": {"disc": "egyptian_cat", "square": "Tinca tinca", "triangle": "BANANA"},
}


@pytest.fixture(scope="module")
def imagenet_file(trained: Path, tmp_path_factory: Any) -> Path:
    """The network of `trained` as one of 1000 classes, of which it ever answers three."""
    state = safetensors.torch.load_file(trained / "model.safetensors")
    order = ImageNetInfo("imagenet-1k").label_names()
    network = timm.create_model("test_resnet", num_classes=1000)
    weight, bias = torch.zeros(1000, state["fc.weight"].shape[1]), torch.full((1000,), -1e4)
    for row, name in enumerate(("disc", "square", "triangle")):
        weight[order.index(IDS[name])], bias[order.index(IDS[name])] = state["fc.weight"][row], state["fc.bias"][row]
    network.load_state_dict(state | {"fc.weight": weight, "fc.bias": bias})
    path = Path(tmp_path_factory.mktemp("imagenet")) / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_imagenet_network_on_folders_of_its_classes(
    tlkit: Tlkit, make_shapes: Callable[..., Path], trained: Path, imagenet_file: Path, tmp_path: Path, spelling: str
) -> None:
    data = make_shapes(tmp_path / "shapes", images=5, seed=3)
    options = ("--precision", "fp32", "--json", "--quiet")
    reference = tlkit("evaluate", trained, data, *options).json
    for shape, name in SPELLINGS[spelling].items():
        (data / shape).rename(data / name)
    arguments = ("--weights", imagenet_file, "--image-size", 64)
    told = tlkit("evaluate", "test_resnet", data, *arguments, *options).json
    assert told["metrics"]["top1"] == reference["metrics"]["top1"] > 0.5
    assert told["metrics"]["top5"] == 1.0, "with 1000 classes, of which three are ever likely"
    assert told["metrics"]["loss"] == pytest.approx(reference["metrics"]["loss"], rel=1e-3)
    assert told["unknown_classes"] == {}
    assert len(told["missing_classes"]) == 997
    recalls = {row["class"]: row["recall"] for row in told["per_class"] if row["images"]}
    assert recalls == {IDS[row["class"]]: row["recall"] for row in reference["per_class"]}


def test_weights_may_be_those_of_a_run(tlkit: Tlkit, trained: Path, shapes: Path) -> None:
    direct = tlkit("evaluate", trained, shapes, "--split", "all", "--json").json
    told = tlkit("evaluate", "test_resnet", shapes, "--weights", trained, "--split", "all", "--json").json
    assert told["metrics"] == direct["metrics"]


def test_random_weights_mean_nothing(tlkit: Tlkit, shapes: Path) -> None:
    done = tlkit("evaluate", "test_resnet", shapes, "--weights", "random")
    assert done.code == 1
    assert "nobody knows what its outputs mean" in done.error


def test_a_person_sees_the_worst_classes_first(
    tlkit: Tlkit, make_shapes: Callable[..., Path], four: Path, tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", CLASSES, 4, seed=5)
    shutil.rmtree(data / "d")
    (data / "b").rename(data / "d")  # now all wrong
    make_shapes(data, CLASSES[:1], 4, seed=5)
    done = tlkit("evaluate", four, data)
    table = done.out[done.out.index("per class") :]
    assert "top-1" in done.out
    assert table.index("\nd ") < table.index("\na ")


# What is told of the predictions


@pytest.fixture(scope="module")
def hard(make_shapes: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """Images of the classes of `four` of which it gets many wrong: most are cut off, or of another class's folder."""
    data = make_shapes(tmp_path_factory.mktemp("hard") / "data", CLASSES, 12, seed=21)
    for name, other in zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True):
        for number in range(0, 12, 4):
            shutil.move(data / name / f"{number:02d}.png", data / other / f"from_{name}_{number:02d}.png")
    return data


@pytest.fixture(scope="module")
def measured(tlkit: Tlkit, four: Path, hard: Path, tmp_path_factory: Any) -> Callable[..., tuple[dict[str, Any], Path]]:
    """``measured(views, merge)``: what evaluate prints, and its folder; each measured once."""
    kept: dict[tuple[str, str], tuple[dict[str, Any], Path]] = {}

    def measure(views: str = "center", merge: str = "mean") -> tuple[dict[str, Any], Path]:
        if (views, merge) not in kept:
            out = tmp_path_factory.mktemp("measured") / f"{views} {merge}"
            options = ("--precision", "fp32", "--crop", 0.7, "--json", "--out", out)
            told = tlkit("evaluate", four, hard, "--tta", views, "--merge", merge, *options).json
            kept[views, merge] = told, out
        return kept[views, merge]

    return measure


def test_figures_are_scikit_learns_of_the_predictions_written(measured: Any, read_csv: Any) -> None:
    told, out = measured()
    rows = read_csv(out / "predictions.csv")
    truth, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
    right = [label == guess for label, guess in zip(truth, predicted, strict=True)]
    figures, confidence = told["metrics"], np.array([float(row["probability"]) for row in rows])
    assert figures["images"] == len(rows) == 48 and 0 < sum(right) < 48
    assert figures["top1"] == pytest.approx(np.mean(right))
    assert figures["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    low, high = figures["top1_ci95"]
    assert [low, high] == pytest.approx(list(binomtest(sum(right), 48).proportion_ci(method="wilson")), abs=1e-6)
    matrix = [[sum((a, b) == pair for pair in zip(truth, predicted, strict=True)) for b in CLASSES] for a in CLASSES]
    assert told["confusion_matrix"] == matrix
    cells = {(row["class"], row["predicted"]): int(row["images"]) for row in read_csv(out / "confusions.csv")}
    pairs = zip(CLASSES, matrix, strict=True)
    assert cells == {(a, b): count for a, row in pairs for b, count in zip(CLASSES, row, strict=True) if count}
    for row in told["coverage"]:
        kept = [hit for hit, sure in zip(right, confidence, strict=True) if sure >= row["threshold"]]
        assert row["images"] == len(kept) and row["coverage"] == pytest.approx(len(kept) / 48)
        assert row["accuracy"] == (pytest.approx(np.mean(kept)) if kept else None)
    assert sum(row["images"] for row in told["reliability"]) == 48
    error = sum(row["images"] / 48 * abs(row["accuracy"] - row["confidence"]) for row in told["reliability"])
    assert figures["ece"] == pytest.approx(error)


def test_figures_are_those_of_timm_alone(measured: Any, four: Path, hard: Path) -> None:
    """The run's network as timm loads it, its preprocessing as timm makes it, the figures by scikit-learn."""
    told, _ = measured()
    network = timm.create_model(f"local-dir:{four}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network) | {"crop_pct": 0.7}
    transform = timm.data.create_transform(**config, is_training=False)
    paths = sorted(hard.rglob("*.*"))
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        probabilities = network(batch).double().softmax(-1).numpy()
    figures = told["metrics"]
    assert figures["top1"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    assert figures["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-3)
    areas = [roc_auc_score(labels == row, probabilities[:, row]) for row in range(4)]
    assert [row["auroc"] for row in told["per_class"]] == pytest.approx(areas, abs=1e-3)
    assert figures["auroc"] == pytest.approx(np.mean(areas), abs=1e-3)
    assert figures["auroc_ci95"][0] <= figures["auroc"] <= figures["auroc_ci95"][1]


def test_an_audit_that_counts_something_has_its_p(measured: Any) -> None:
    audits = [measured(views)[0]["tta_audit"] for views in ("flip", "five-crop", "ten-crop", "multi-scale")]
    assert sum(audit["fixed"] + audit["broken"] for audit in audits) > 0, "or nothing is compared here"
    for audit in audits:
        fixed, differing = audit["fixed"], audit["fixed"] + audit["broken"]
        assert audit["p"] == pytest.approx(binomtest(fixed, differing).pvalue if differing else 1)


@pytest.mark.parametrize("merge", ["geometric", "max"])
def test_merges_differ_and_their_audit_is_of_the_same_centre(measured: Any, merge: str) -> None:
    told, mean = measured("ten-crop", merge)[0], measured("ten-crop")[0]
    assert told["merge"] == merge
    assert told["metrics"]["loss"] != pytest.approx(mean["metrics"]["loss"], abs=1e-4)
    assert told["tta_audit"]["center_top1"] == mean["tta_audit"]["center_top1"]
    assert measured("center", merge)[0]["metrics"] == measured()[0]["metrics"], "one view is merged with none"


def test_a_recipe_repeats_all_of_the_evaluation(tlkit: Tlkit, measured: Any, tmp_path: Path, read_csv: Any) -> None:
    told, out = measured("ten-crop", "max")
    again = tlkit("evaluate", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again", "--json").json
    for name in ("metrics", "per_class", "tta", "merge", "confusion_matrix", "preprocessing", "split"):
        assert again[name] == told[name], name
    assert read_csv(out / "predictions.csv") == read_csv(tmp_path / "again" / "predictions.csv")


@pytest.mark.parametrize("folders", [False, True], ids=["rows alone", "rows of another folder"])
def test_a_recipe_repeats_the_evaluation_of_a_manifest(
    tlkit: Tlkit, four: Path, hard: Path, tmp_path: Path, folders: bool
) -> None:
    """Which is a file, beside which there may be other images."""
    manifest = (hard.parent if folders else tmp_path) / "list.csv"
    paths = sorted(hard.rglob("*.*"))[::2]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *([str(path), path.parent.name] for path in paths)])
    options = ("--precision", "fp32", "--json")
    told = tlkit("evaluate", four, manifest, *options, "--out", tmp_path / "first").json
    assert told["metrics"]["images"] == 24
    again = tlkit("evaluate", "--recipe", tmp_path / "first" / "recipe.yaml", *options).json
    assert again["metrics"] == told["metrics"]


def test_the_folder_has_a_page_of_its_own(measured: Any) -> None:
    told, out = measured("ten-crop")
    names = {path.name for path in out.iterdir()}
    assert names >= {"report.html", "predictions.csv", "confusions.csv", "summary.json", "recipe.yaml"}
    assert not names & {"model.safetensors", "config.json", "skipped_files.csv"}
    page = (out / "report.html").read_text()
    assert (
        "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and all(c in page for c in CLASSES)
    )
    assert json.loads((out / "summary.json").read_text())["tta_audit"] == told["tta_audit"]


def test_a_person_is_told_of_views_that_gain_nothing(tlkit: Tlkit, trained: Path) -> None:
    done = tlkit("evaluate", trained, "--tta", "flip", "--precision", "fp32")
    assert done.code == 0
    assert "flip: top-1" in done.out and "put right" in done.out and "2 views" in done.out
    told = tlkit("evaluate", trained, "--tta", "flip", "--precision", "fp32", "--json").json
    gains = told["tta_audit"]["fixed"] > told["tta_audit"]["broken"]
    assert ("gains nothing" in done.err or "hurts" in done.err) != gains


def test_a_matrix_of_many_classes_is_in_the_file_alone(
    tlkit: Tlkit, make_shapes: Callable[..., Path], imagenet_file: Path, tmp_path: Path, read_csv: Any
) -> None:
    data, out = make_shapes(tmp_path / "shapes", images=3, seed=3), tmp_path / "out"
    for shape, name in IDS.items():
        (data / shape).rename(data / name)
    arguments = ("--weights", imagenet_file, "--image-size", 64, "--out", out, "--json")
    told = tlkit("evaluate", "test_resnet", data, *arguments).json
    assert "confusion_matrix" not in told and {"top5", "top5_ci95"} <= set(told["metrics"])
    rows = read_csv(out / "confusions.csv")
    assert sum(int(row["images"]) for row in rows) == 9 and {row["class"] for row in rows} == set(IDS.values())
