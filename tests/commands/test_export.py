"""``tlkit export`` through the real command line: round trips of each format, the checks, mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from tlkit import __version__
from tlkit.commands import export as export_module
from tlkit.networks.build import build
from tlkit.preprocessing import Preprocessing

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Tlkit = Callable[..., Any]
CLASSES = ["disc", "square", "triangle"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def told(tlkit: Tlkit, trained: Path, out: Path) -> Any:
    """The JSON object of exporting `trained` to an ONNX file."""
    return tlkit("export", trained, "--out", out / "shapes.onnx", "--json", "--quiet").json


@pytest.fixture(scope="module")
def file(told: dict[str, Any]) -> Path:
    """That file. Read only."""
    return Path(told["out"])


@pytest.fixture(scope="module")
def photos(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled images of each class that the run has not seen. Read only."""
    return make_shapes(tmp_path_factory.mktemp("new") / "photos", images=2, seed=9)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))


def wanted(run: Path, given: torch.Tensor) -> torch.Tensor:
    """Probabilities that the run's network gives images in [0, 1]."""
    loaded = build(str(run), "default")
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (loaded.preprocessing.mean, loaded.preprocessing.std)
    )
    with torch.no_grad():
        return loaded.network((given - mean) / std).softmax(-1)


# ONNX


def test_the_differences_are_told(told: dict[str, Any]) -> None:
    assert set(told) >= {
        "command",
        "version",
        "seconds",
        "model",
        "format",
        "quantise",
        "out",
        "bytes",
        "check",
        "metrics",
    }
    check = told["check"]
    assert (check["of"], check["images"]) == ("images of test", 9)
    assert check["same_labels"] == check["images"]
    assert check["max_difference"] < 1e-5 < check["tolerance"]
    assert told["metrics"]["export"]["top1"] == told["metrics"]["network"]["top1"]
    assert told["bytes"] == Path(told["out"]).stat().st_size
    assert [path.name for path in Path(told["out"]).parent.glob("shapes*")] == ["shapes.onnx"], "one file"


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_number_of_images_with_onnxruntime_alone(file: Path, trained: Path, count: int) -> None:
    given = images(count)
    logits, found = onnxruntime.InferenceSession(file).run(["logits", "probabilities"], {"images": given.numpy()})
    assert found.shape == (count, 3)
    np.testing.assert_allclose(found, wanted(trained, given), atol=1e-5)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(-1), found, atol=1e-6)


def test_the_file_tells_how_it_is_used(file: Path, trained: Path) -> None:
    session = onnxruntime.InferenceSession(file)
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["batch", 3, 64, 64])]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("logits", ["batch", 3]),
        ("probabilities", ["batch", 3]),
    ]
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == CLASSES
    stored = json.loads((trained / "config.json").read_text())["tlkit"]["preprocessing"]
    assert json.loads(told["preprocessing"]) == stored
    assert (told["model"], told["precision"], told["tlkit"]) == ("test_resnet", "fp32", __version__)
    assert told["licence_of_weights"] == "unknown", "it started from random weights"
    onnx.checker.check_model(onnx.load(file))


@pytest.mark.parametrize("options", [(), ("--tta", "five-crop"), ("--mean", 0.4, 0.4, 0.4, "--crop", 0.7)], ids=str)
def test_predict_gives_the_runs_rows(
    tlkit: Tlkit, file: Path, trained: Path, photos: Path, options: tuple[Any, ...]
) -> None:
    words = (photos, "--device", "cpu", "--precision", "fp32", "--json", *options)
    ours, theirs = (tlkit("predict", network, *words).json["predictions"] for network in (trained, file))
    assert [(row["path"], row["label"]) for row in ours] == [(row["path"], row["label"]) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_evaluate_gives_the_runs_figures(tlkit: Tlkit, file: Path, trained: Path, photos: Path, tmp_path: Path) -> None:
    words = (photos, "--device", "cpu", "--precision", "fp32", "--json")
    ours = tlkit("evaluate", trained, *words).json
    theirs = tlkit("evaluate", file, *words, "--out", tmp_path / "measured").json
    assert theirs["metrics"]["top1"] == ours["metrics"]["top1"]
    assert theirs["metrics"]["loss"] == pytest.approx(ours["metrics"]["loss"], abs=1e-5)
    assert theirs["confusion_matrix"] == ours["confusion_matrix"]
    assert theirs["preprocessing"] == ours["preprocessing"]
    assert (tmp_path / "measured" / "report.html").is_file()
    recipe = yaml.safe_load((tmp_path / "measured" / "recipe.yaml").read_text())
    assert recipe["model"] == str(file.resolve())


def test_evaluate_says_what_it_computed_with(tlkit: Tlkit, file: Path, photos: Path) -> None:
    told = tlkit("evaluate", file, photos, "--precision", "bf16", "--compile", "always", "--json").json
    assert (told["device"], told["precision"]) == ("cpu", "no")


@pytest.mark.parametrize(("quantise", "difference"), [("fp16", 0.01), ("int8", 0.15)])
def test_fewer_bits_state_their_accuracy(
    tlkit: Tlkit, trained: Path, file: Path, tmp_path: Path, quantise: str, difference: float
) -> None:
    small = tmp_path / "small.onnx"
    told = tlkit("export", trained, "--out", small, "--quantise", quantise, "--json").json
    assert small.stat().st_size < file.stat().st_size
    assert 0 < told["check"]["max_difference"] < difference
    assert set(told["metrics"]["network"]) == set(told["metrics"]["export"]) >= {"top1", "top1_ci95"}
    session = onnxruntime.InferenceSession(small)
    assert session.get_modelmeta().custom_metadata_map["precision"] == quantise
    assert {one.type for one in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    assert session.run(["probabilities"], {"images": images(7).numpy()})[0].shape == (7, 3)


def test_a_transformer_by_name_and_size_on_noise(tlkit: Tlkit, tmp_path: Path) -> None:
    words = ("--weights", "random", "--image-size", 48, "--out", tmp_path / "vit.onnx", "--json")
    done = tlkit("export", "test_vit", *words)
    check = done.json["check"]
    assert (check["images"], check["of"], check["same_labels"]) == (32, "made noise", 32)
    assert done.json["metrics"] == {}
    assert "compared on noise" in done.err
    assert onnxruntime.InferenceSession(tmp_path / "vit.onnx").get_inputs()[0].shape == ["batch", 3, 48, 48]


# The other formats


def test_torch_export_needs_torch_alone(tlkit: Tlkit, trained: Path, out: Path) -> None:
    told = tlkit("export", trained, "--out", out / "shapes.pt2", "--json").json
    assert told["format"] == "torch-export"
    assert told["check"]["same_labels"] == told["check"]["images"]
    extra = {"tlkit.json": ""}
    program = torch.export.load(out / "shapes.pt2", extra_files=extra).module()
    for count in (1, 3, 7):
        torch.testing.assert_close(program(images(count))[1], wanted(trained, images(count)), atol=1e-5, rtol=0)
    assert json.loads(json.loads(extra["tlkit.json"])["classes"]) == CLASSES


def test_hub_folder_loads_with_timm(tlkit: Tlkit, trained: Path, out: Path, photos: Path) -> None:
    told = tlkit("export", trained, "--format", "hub", "--out", out / "hub", "--json").json
    assert sorted(path.name for path in (out / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert told["check"]["max_difference"] == 0
    network = timm.create_model(f"local-dir:{out / 'hub'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(network)
    stored = json.loads((trained / "config.json").read_text())["tlkit"]["preprocessing"]
    assert Preprocessing.from_timm(data).to_dict() == stored
    assert network.pretrained_cfg["label_names"] == CLASSES
    mean, std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found = network((images(3) - mean) / std).softmax(-1)
    torch.testing.assert_close(found, wanted(trained, images(3)))
    rows = [tlkit("predict", network, photos, "--json").json["predictions"] for network in (trained, out / "hub")]
    assert rows[0] == rows[1]


def test_the_model_card_tells_what_the_run_told(tlkit: Tlkit, trained: Path, tmp_path: Path) -> None:
    assert tlkit("export", trained, "--format", "hub", "--out", tmp_path / "hub").code == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.license_name) == ("timm", "other", "unknown")
    summary = json.loads((trained / "summary.json").read_text())
    low, high = summary["metrics"]["test"]["top1_ci95"]
    assert f"{summary['metrics']['test']['top1']:.3f} ({low:.3f} to {high:.3f})" in card.text
    for name, counts in summary["data"].items():
        assert f"| {name} | {counts['train']} | {counts['val']} | {counts['test']} |" in card.text
    assert "put your own licence" in card.text
    assert str(trained) not in card.text and str(tmp_path) not in card.text, "nobody's folders are published"


# What it is checked on


def test_images_that_are_named_are_drawn_from(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    words = ("--check", photos, "--check-images", 4, "--format", "hub", "--out", tmp_path / "hub", "--json")
    told = tlkit("export", trained, *words).json
    assert (told["check"]["images"], told["metrics"]["export"]["images"]) == (4, 4)


def test_images_of_nobodys_classes_are_compared_on(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    words = ("--check", photos / "disc", "--format", "hub", "--out", tmp_path / "hub", "--json")
    told = tlkit("export", trained, *words).json
    assert (told["check"]["images"], told["metrics"]) == (2, {})


def test_a_run_whose_images_are_gone_is_compared_on_noise(tlkit: Tlkit, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": str(tmp_path / "gone")}))
    told = tlkit("export", run, "--format", "hub", "--out", tmp_path / "hub", "--json").json
    assert told["check"]["of"] == "made noise"
    done = tlkit("export", run, "--quantise", "int8", "--out", tmp_path / "it.onnx")
    assert done.error.endswith("give --calibrate-on FOLDER, a hundred images such as it will see")


@pytest.mark.parametrize(
    ("shift", "words", "error"),
    [(9.0, (), "(0.001 is allowed)"), (np.nan, ("--quantise", "fp16"), "are not numbers, as where 16 bits overflow")],
)
def test_what_differs_is_not_written(
    tlkit: Tlkit,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shift: float,
    words: tuple[str, ...],
    error: str,
) -> None:
    def other(part: Path, *_: Any) -> Any:
        loaded = build(str(trained), "default")
        with torch.no_grad():
            loaded.network.get_classifier().bias[0] += shift
        part.write_bytes(b"wrong")
        return loaded.network

    monkeypatch.setattr(export_module, "_write", other)
    done = tlkit("export", trained, "--out", tmp_path / "it.onnx", *words)
    assert done.code == 1
    assert "not written: " in done.error and error in done.error
    assert list(tmp_path.iterdir()) == []


# Mistakes


def test_plan_writes_nothing(tlkit: Tlkit, trained: Path, tmp_path: Path) -> None:
    told = tlkit("export", trained, "--out", tmp_path / "it.onnx", "--plan", "--json").json
    assert told["plan"] == {"out": str(tmp_path / "it.onnx"), "images": 9, "of": "images of test"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--out", "it.pb"), "it.pb: its ending names no format; end it in .onnx or .pt2, or give --format hub"),
        (("--out", "it.pt2", "--format", "onnx"), "it.pt2: not what --format onnx writes; end it in .onnx"),
        (("--out", "it.onnx", "--format", "hub"), "it.onnx: not what --format hub writes; give a folder"),
        (("--format", "onx"), "--format: unknown value 'onx'; did you mean 'onnx'?"),
        (("--format", "hub", "--quantise", "int8"), "--quantise: hub has no fewer bits; leave it out"),
        (("--calibrate-on", "."), "--calibrate-on: only int8 needs it; add --quantise int8"),
        (("--out", "there.onnx"), "there.onnx: exists already"),
        (("--out", "no/it.onnx"), "no/it.onnx: cannot be written"),
        (("--check", "no"), "no: "),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_mistakes_are_one_line(
    tlkit: Tlkit, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").touch()
    done = tlkit("export", trained, *words)
    assert done.code == 1
    assert done.error.startswith(error)
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_what_is_no_network_is_one_line(tlkit: Tlkit, tmp_path: Path) -> None:
    assert "this folder is not a finished run" in tlkit("export", tmp_path).error
    assert "unknown model" in tlkit("export", "resnet999").error


def test_what_an_exporter_cannot_express_is_one_line(
    tlkit: Tlkit, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(network: Any, images: torch.Tensor) -> torch.Tensor:
        logits = network.forward_head(network.forward_features(images))
        return logits if images.sum() > 0 else -logits

    def export(*_: object, **__: object) -> None:
        raise RuntimeError("a page of advice") from ValueError("no such operation:\n  spiral\n  and so on")

    monkeypatch.setattr(type(build(str(trained), "default").network), "forward", forward)
    monkeypatch.setattr("torch.onnx.export", export)
    for ending, form in (("onnx", "ONNX (no such operation: spiral)"), ("pt2", "torch.export (")):
        done = tlkit("export", trained, "--out", tmp_path / f"it.{ending}")
        assert done.code == 1
        assert done.error.startswith(f"test_resnet: cannot be expressed in {form}")
        assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_line(
    tlkit: Tlkit, trained: Path, file: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words in (("export", trained, "--out", tmp_path / "it.onnx"), ("predict", file, photos)):
        assert tlkit(*words).error.endswith("need onnxruntime; pip install 'tlkit[onnx]'")
    assert tlkit("export", trained, "--format", "hub", "--out", tmp_path / "hub").code == 0


def test_files_of_others_are_one_line(tlkit: Tlkit, file: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\0not a network")
    assert "cannot be run" in tlkit("predict", tmp_path / "broken.onnx", photos).error
    assert "there is no such file" in tlkit("predict", tmp_path / "gone.onnx", photos).error
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    assert "'tlkit export' did not write it" in tlkit("evaluate", tmp_path / "bare.onnx", photos).error


def test_what_an_onnx_file_cannot_do_is_one_line(tlkit: Tlkit, file: Path, photos: Path, shapes: Path) -> None:
    for words in (
        ("finetune", photos, "--model", file),
        ("count-params", file),
        ("export", file),
        ("compare", file, "test_resnet", "--data", photos),
        ("extract-features", photos, "--model", file, "--out", "features.npz"),
    ):
        assert "an ONNX file is for predict and evaluate alone" in tlkit(*words).error
    assert tlkit("evaluate", file, shapes, "--calibrate").error.startswith("--calibrate: ")
    assert "takes images of 64 px alone" in tlkit("predict", file, photos, "--image-size", 96).error
    assert tlkit("predict", file, photos, "--weights", "random").error.startswith("--weights: ")


def test_a_usual_name_is_that_of_the_run(
    tlkit: Tlkit, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = [tlkit("export", trained, "--format", form, "--plan", "--json").json for form in ("onnx", "hub")]
    assert [one["plan"]["out"] for one in told] == ["trained.onnx", "trained-hub"]


# Real images


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.usefixtures("packaged")
def test_lite0_on_200_real_images(tlkit: Tlkit, shared_data: Path, tmp_path: Path) -> None:
    words = ("--check", shared_data / "imagenet_sample_256", "--out", tmp_path / "lite0.onnx", "--json")
    told = tlkit("export", "tf_efficientnet_lite0", *words).json
    assert told["check"]["images"] == told["check"]["same_labels"] == 200
    assert told["check"]["max_difference"] <= 1e-3
    assert told["licence_of_weights"] == "apache-2.0"
