"""``tlkit count-params`` through the real command line: fields, formats, runs, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tlkit.networks.build import build, save_network
from tlkit.networks.freezing import freeze
from tlkit.networks.stages import stages
from tlkit.reports.complexity import COLUMNS, LAYER_COLUMNS, SPEED_COLUMNS, markdown, short

Tlkit = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("offline")

FIELDS = {
    *("model", "params", "trainable_params", "buffers", "macs", "flops", "activations", "image_size"),
    *("receptive_field", "stride", "stages"),
}
PART_FIELDS = {"name", "params", "trainable_params", "macs", "output_shape", "receptive_field", "stride"}
"""Of models, and of stages and layers, as CLI.md fixes them."""

# test_resnet of timm 1.0.31: its tensors by stage
SIZES = {"stem": 7_472, "stage1": 18_560, "stage2": 36_384, "stage3": 42_432, "stage4": 267_840, "head": 97_000}
WHOLE = 469_688


@pytest.fixture
def count(tlkit: Tlkit) -> Callable[..., list[dict[str, Any]]]:
    """The models of ``--json``."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        done = tlkit("count-params", *arguments, "--json")
        assert done.out.count("\n") == 1
        models: list[dict[str, Any]] = done.json["models"]
        return models

    return run


def rows_of(text: str) -> list[list[str]]:
    """Cells of a table on a terminal, its header first; the line between is left out."""
    lines = [line for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in re.split("[│┃]", line)] for line in lines]


def tables_of(text: str) -> list[list[list[str]]]:
    """Cells of each Markdown table; ``\\|`` is no end of a cell."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


# JSON


def test_json_has_the_contracts_fields(tlkit: Tlkit) -> None:
    done = tlkit("count-params", "test_resnet", "test_vit", "--layers", "--json")
    told = done.json
    assert done.out.count("\n") == 1
    assert told["command"] == "count-params" and {"version", "seconds"} <= set(told)
    assert [model["model"] for model in told["models"]] == ["test_resnet", "test_vit"]
    for model in told["models"]:
        assert set(model) >= FIELDS | {"layers"}
        for part in (*model["stages"], *model["layers"]):
            assert set(part) >= PART_FIELDS
            assert part["flops"] == 2 * part["macs"]
        assert model["flops"] == 2 * model["macs"]
        for field in ("params", "trainable_params", "buffers", "macs", "activations"):
            assert model[field] == sum(part[field] for part in model["stages"])
            assert model[field] == sum(part[field] for part in model["layers"])


def test_figures_of_a_published_model(count: Callable[..., Any]) -> None:
    """torchvision 0.29's metadata: 25,557,032 parameters, 4.089 GMACs."""
    (model,) = count("resnet50")
    assert (model["params"], round(model["macs"] / 1e9, 3)) == (25_557_032, 4.089)
    assert (model["receptive_field"], model["stride"], model["image_size"]) == (427, 32, 224)
    assert [part["output_shape"] for part in model["stages"]] == [
        *([64, 112, 112], [256, 56, 56], [512, 28, 28], [1024, 14, 14], [2048, 7, 7], [1000]),
    ]
    assert [part["stride"] for part in model["stages"]] == [2, 4, 8, 16, 32, None]


def test_numbers_of_a_network_without_a_field_are_still_json(count: Callable[..., Any]) -> None:
    (model,) = count("test_vit", "--layers")
    assert model["receptive_field"] is None and "attention in blocks.0.attn" in model["receptive_field_limit"]
    assert {"convolution", "linear", "attention"} == set(model["macs_by_kind"])


def test_layers_are_shown_only_when_asked(count: Callable[..., Any]) -> None:
    assert "layers" not in count("test_resnet")[0]
    (model,) = count("test_resnet", "--layers")
    network = timm.create_model("test_resnet")
    listed = {layer["name"]: layer["params"] for layer in model["layers"]}
    for name, module in network.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        assert listed.get(name, 0) == own
    assert model["layers"][0]["type"] == "Conv2d" and model["layers"][-1]["name"] == "fc"


# Options


@pytest.mark.parametrize("key", ["name", "params", "macs", "activations", "receptive-field"])
def test_sorted_with_the_largest_last(count: Callable[..., Any], key: str) -> None:
    names = ["test_vit", "test_resnet", "lenet", "test_convnext3", "test_efficientnet", "test_convnext"]
    assert [model["model"] for model in count(*names)] == names
    models = count(*names, "--sort", key)
    field = {"name": "model", "receptive-field": "receptive_field"}.get(key, key)
    values = [float("inf") if model[field] is None else model[field] for model in models]
    assert values == sorted(values)
    assert sorted(model["model"] for model in models) == sorted(names)
    assert [model["model"] for model in models] != names


def test_another_head(count: Callable[..., Any]) -> None:
    (model,) = count("test_resnet", "--num-classes", 10_000)
    head = model["stages"][-1]
    assert model["num_classes"] == 10_000
    assert head["params"] == 96 * 10_000 + 10_000
    assert (head["macs"], head["output_shape"]) == (96 * 10_000, [10_000])
    assert model["params"] == WHOLE - 97_000 + head["params"]


def test_other_channels(count: Callable[..., Any]) -> None:
    (model,) = count("test_resnet", "--in-chans", 1)
    assert (model["in_chans"], model["params"]) == (1, WHOLE - 2 * 9 * 16)


@pytest.mark.parametrize("size", [32, 64, 96, 320])
def test_another_size(count: Callable[..., Any], size: int) -> None:
    (model,) = count("test_resnet", "--image-size", size)
    assert (model["image_size"], model["params"]) == (size, WHOLE)
    (usual,) = count("test_resnet")
    convolutions, before = model["macs_by_kind"]["convolution"], usual["macs_by_kind"]["convolution"]
    assert convolutions * 160**2 == before * size**2
    assert model["receptive_field"] == usual["receptive_field"] == 167


@pytest.mark.parametrize("norm", ["layer", "instance", "group"])
def test_another_norm(count: Callable[..., Any], norm: str) -> None:
    (model,) = count("test_resnet", "--norm", norm)
    assert (model["norm"], model["params"], model["buffers"]) == (norm, WHOLE, 0)
    assert model["receptive_field"] is None and "statistics" in model["receptive_field_limit"]
    assert model["title"] == f"test_resnet ({norm} norm)"


def test_no_norm_has_none_of_its_parameters(count: Callable[..., Any]) -> None:
    network = timm.create_model("test_resnet")
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    (model,) = count("test_resnet", "--norm", "none")
    assert model["params"] == WHOLE - sum(2 * module.num_features for module in norms)
    assert "normalisation" not in model["elements_by_kind"]


def test_wildcards_and_names_once_each(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    names = [model["model"] for model in count("vgg1[13]", "lenet", "len?t", "vgg11")]
    assert names == ["vgg11", "vgg13", "lenet"]
    plan = tlkit("count-params", "resnet*", "--plan", "--json").json["plan"]
    assert plan == timm.list_models("resnet*")
    text = tlkit("count-params", "vgg1?", "--plan").out
    assert all(name in text for name in ("vgg11", "vgg13", "vgg16", "vgg19"))


def test_names_with_tags(count: Callable[..., Any]) -> None:
    """A tag may set another size of images and other classes."""
    small, large = count("resnet50.tv_in1k", "resnetv2_50x1_bit.goog_in21k")
    assert (small["model"], small["image_size"]) == ("resnet50.tv_in1k", 224)
    assert large["num_classes"] == 21_843


def test_models_of_a_wildcard_that_cannot_be_counted_are_named(tlkit: Tlkit) -> None:
    done = tlkit("count-params", "mobilenetv5_*", "test_resnet", "--quiet", "--json")
    told = done.json
    assert [model["model"] for model in told["models"]] == ["mobilenetv5_300m", "mobilenetv5_base", "test_resnet"]
    assert told["not_counted"] == [{"model": "mobilenetv5_300m_enc", "reason": "has no classifier"}]
    assert done.err == "note: mobilenetv5_300m_enc is left out: has no classifier\n"
    done = tlkit("count-params", "mobilenetv5_*", "mobilenetv5_300m_enc")
    assert done.code == 1 and "mobilenetv5_300m_enc: has no classifier" in done.error


def test_progress_of_several_models_is_on_stderr(tlkit: Tlkit) -> None:
    done = tlkit("count-params", "test_resnet", "lenet", "--format", "csv")
    assert "models: 2/2" in done.err and "models:" not in done.out
    assert tlkit("count-params", "test_resnet", "lenet", "--quiet").err == ""
    assert tlkit("count-params", "test_resnet").err == ""


# Strategies

ORDER = list(SIZES)
PHASES = {
    "probe": [["head"]],
    "full": [ORDER],
    "differential": [ORDER],
    "lp-ft": [["head"], ORDER],
    "gradual": [ORDER[first:] for first in range(5, -1, -1)],
}


@pytest.mark.parametrize("name", [*PHASES, "auto"])
def test_phases_of_a_strategy(tlkit: Tlkit, count: Callable[..., Any], name: str) -> None:
    (model,) = count("test_resnet", "--strategy", name)
    assert {part["name"]: part["params"] for part in model["stages"]} == SIZES
    assert model["strategy"] == name
    found = [phase["stages"] for phase in model["phases"]]
    if name == "auto":  # from the head down, as far as its budget goes
        assert found == PHASES["gradual"][: len(found)] and len(found) > 1
    else:
        assert found == PHASES[name]
    network = timm.create_model("test_resnet")
    cut = {stage.name: stage for stage in stages(network)}
    for phase in model["phases"]:
        tensors = [network.get_parameter(p) for stage in phase["stages"] for p in cut[stage].parameters]
        assert phase["trainable_params"] == sum(tensor.numel() for tensor in tensors)
    shown = tlkit("count-params", "test_resnet", "--strategy", name).out
    last = model["phases"][-1]["trainable_params"]
    assert f"phases of {name}" in shown
    assert any(f"{last:,}" in row and f"{last / WHOLE:.1%}" in row for row in rows_of(shown))


# Runs


def test_a_run(tlkit: Tlkit, trained: Path, count: Callable[..., Any]) -> None:
    """Trained by a probe: three classes at 64 px, and the head alone."""
    (model,) = count(trained)
    assert (model["model"], model["run"]) == ("test_resnet", str(trained))
    assert (model["image_size"], model["num_classes"]) == (64, 3)
    assert model["trainable_params"] == 3 * 96 + 3
    assert [part["trainable_params"] for part in model["stages"]] == [0, 0, 0, 0, 0, 3 * 96 + 3]
    assert model["params"] == WHOLE - 97_000 + 3 * 96 + 3
    (same,) = count("test_resnet", "--image-size", 64, "--num-classes", 3)
    assert [model[key] for key in ("params", "macs", "buffers")] == [same[key] for key in ("params", "macs", "buffers")]
    shown = tlkit("count-params", trained).out
    assert "trained: 291 parameters (0.1%)" in shown


def test_a_run_is_counted_without_its_weights(
    count: Callable[..., Any], contents: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "model.safetensors").write_bytes(b"not a file of weights")
    before = contents(run)
    (broken,), (whole,) = count(run), count(trained)
    assert {**broken, "run": ""} == {**whole, "run": ""}
    assert contents(run) == before


def test_a_run_beside_models(count: Callable[..., Any], trained: Path) -> None:
    models = count(trained, "lenet", "--image-size", 32)
    assert [(model["model"], model["image_size"]) for model in models] == [("test_resnet", 32), ("lenet", 32)]
    assert "run" not in models[1]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run of a network with group norm and the small stem, without a summary."""
    loaded = build("test_resnet", "random", stem="small", norm="group")
    folder = tmp_path / "a|b"
    folder.mkdir()
    save_network(folder, replace(loaded, preprocessing=replace(loaded.preprocessing, size=40)))
    return folder


def test_a_run_brings_its_norm_and_stem(tlkit: Tlkit, made: Path, count: Callable[..., Any]) -> None:
    (model,) = count(made)
    assert (model["norm"], model["stem"], model["image_size"]) == ("group", "small", 40)
    assert model["title"] == "test_resnet (small stem, group norm)"
    assert model["trainable_params"] == model["params"], "where nothing says what was trained"
    network = build(str(made), "default").network
    assert model["params"] == sum(parameter.numel() for parameter in network.parameters())
    done = tlkit("count-params", made, "--norm", "layer")
    assert done.code == 1 and "was trained with group norm" in done.error


@pytest.mark.parametrize("trained_stages", [["head"], ["stage4", "head"], ["stage1", "head"]])
def test_stages_that_the_phases_of_a_run_trained(
    count: Callable[..., Any], made: Path, trained_stages: list[str]
) -> None:
    phases = [{"stages": ["head"]}, {"stages": trained_stages}, {"stages": ["stem", "head"], "kept": False}]
    (made / "summary.json").write_text(json.dumps({"phases": phases}))
    (model,) = count(made)
    assert [part["name"] for part in model["stages"] if part["trainable_params"]] == trained_stages
    network = build(str(made), "default").network
    freeze(network, [stage.name for stage in stages(network) if stage.name not in trained_stages])
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert model["trainable_params"] == trainable


def test_a_bar_in_a_folders_name_ends_no_cell(tlkit: Tlkit, made: Path) -> None:
    text = tlkit("count-params", made, "--format", "markdown").out
    assert "a\\|b" in text
    for table in tables_of(text):
        assert len({len(row) for row in table}) == 1


# Formats


def numbers_of(model: dict[str, Any]) -> dict[str, str]:
    """A model as CSV has it."""
    return {name: "" if model.get(name) is None else str(model[name]) for name in COLUMNS}


def test_csv_is_the_json_as_plain_numbers(tlkit: Tlkit, count: Callable[..., Any], trained: Path) -> None:
    given = ("test_resnet", "test_vit", trained)
    rows = list(csv.DictReader(io.StringIO(tlkit("count-params", *given, "--format", "csv").out)))
    assert rows == [numbers_of(model) for model in count(*given)]
    assert set(COLUMNS) >= FIELDS - {"stages"}


def test_csv_of_layers(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    text = tlkit("count-params", "test_resnet", "test_vit", "--layers", "--format", "csv").out
    rows = list(csv.DictReader(io.StringIO(text)))
    layers = [
        (model["model"], layer) for model in count("test_resnet", "test_vit", "--layers") for layer in model["layers"]
    ]
    assert len(rows) == len(layers) > 50
    for row, (model, layer) in zip(rows, layers, strict=True):
        assert tuple(row) == LAYER_COLUMNS
        assert (row["model"], row["name"], row["type"], row["stage"]) == (
            *(model, layer["name"], layer["type"], layer["stage"]),
        )
        for name in ("params", "trainable_params", "buffers", "macs", "flops", "activations"):
            assert int(row[name]) == layer[name]
        assert row["receptive_field"] == ("" if layer["receptive_field"] is None else str(layer["receptive_field"]))
        shape = [int(side) for side in re.findall(r"\d+", row["output_shape"])]
        assert shape == (layer["output_shape"] or [])


@pytest.mark.parametrize("more", [(), ("--layers",), ("--strategy", "gradual"), ("--published",)], ids=" ".join)
def test_markdown_tables_are_whole(tlkit: Tlkit, count: Callable[..., Any], more: tuple[str, ...]) -> None:
    text = tlkit("count-params", "vgg11", "test_resnet", "--format", "markdown", *more).out
    tables = tables_of(text)
    assert len(tables) == {"--layers": 5, "--strategy": 3, "--published": 2}.get(more[0] if more else "", 1)
    for table in tables:
        assert len({len(row) for row in table}) == 1
        assert all(re.fullmatch("-+:?", cell) for cell in table[1])
    models = tables[0]
    assert [row[0] for row in models[2:]] == ["vgg11", "test_resnet"]
    for row, model in zip(models[2:], count("vgg11", "test_resnet"), strict=True):
        cells = dict(zip(models[0], row, strict=True))
        assert cells["parameters"] == f"{model['params']:,}"
        assert cells["MACs"] == short(model["macs"])
        assert cells["FLOPs"] == short(model["flops"])
        assert cells["field"] == str(model["receptive_field"])


def test_markdown_of_nothing() -> None:
    assert tables_of(markdown([]))[0][0][0] == "model"


def test_format_json_is_the_json(tlkit: Tlkit) -> None:
    told, same = (tlkit("count-params", "test_resnet", *how).json for how in (("--json",), ("--format", "json")))
    assert told["models"] == same["models"]


@pytest.mark.parametrize("ending", ["json", "csv", "md", "txt", "JSON", "table"])
def test_the_ending_of_out_chooses_the_format(tlkit: Tlkit, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"counted.{ending}"
    done = tlkit("count-params", "test_resnet", "--out", path)
    assert done.code == 0 and done.out == f"1 model written to {path}\n"
    text = path.read_text()
    match ending.lower():
        case "json":
            assert json.loads(text)["models"][0]["params"] == WHOLE
        case "csv":
            assert next(csv.DictReader(io.StringIO(text)))["params"] == str(WHOLE)
        case _:
            assert "| test_resnet | 469,688 |" in text
    again = tlkit("count-params", "lenet", "--out", path)
    assert again.code == 1 and "never overwritten" in again.error
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_format_goes_before_the_ending(tlkit: Tlkit, tmp_path: Path) -> None:
    path = tmp_path / "counted.txt"
    done = tlkit("count-params", "test_resnet", "--out", path, "--format", "csv", "--json")
    assert done.out.count("\n") == 1 and done.json["models"][0]["params"] == WHOLE
    assert next(csv.DictReader(path.open()))["params"] == str(WHOLE)


USUAL = ("resnet50", "tf_efficientnet_lite0", "vit_base_patch16_224", "densenet121", "convnext_tiny")
USUAL += ("alexnet_torchvision", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224", "vgg16_bn")


@pytest.mark.parametrize("name", USUAL)
def test_tables_fit_80_columns(tlkit: Tlkit, name: str) -> None:
    """No line is longer, and no cell is folded into a second one."""
    text = tlkit("count-params", name, "--strategy", "probe").out
    lines = [line for line in text.splitlines() if "│" in line or "┃" in line]
    assert len(lines) > 5 and max(map(len, lines)) <= 80
    assert all(row[0] for row in rows_of(text))
    assert [row[0] for row in rows_of(text)][:2] == ["model", name]


def test_a_table_of_many_models_fits_80_columns(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    rows = rows_of(tlkit("count-params", *USUAL).out)
    assert [row[0] for row in rows[1:]] == list(USUAL)
    for row, model in zip(rows[1:], count(*USUAL), strict=True):
        assert row[1:4] == [f"{model['params']:,}", short(model["macs"]), short(model["flops"])]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0 "), (7, "7 "), (999, "999 "), (1000, "1.000 k"), (999_400, "999.400 k"), (999_600, "1.000 M")),
        *((4_089_184_256, "4.089 G"), (999_999_999, "1.000 G"), (2_100_000_000_000, "2.100 T")),
    ],
)
def test_short_numbers(number: int, text: str) -> None:
    assert short(number) == text


# Speed and published accuracies


def test_measured(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    given = (
        "test_resnet",
        "--image-size",
        32,
        "--measure",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        2,
    )
    (model,) = count(*given)
    speed = model["speed"]
    for spread in (speed["latency"], speed["images_per_second"]):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert (speed["batch_size"], speed["device"], speed["precision"]) == (2, "cpu", "fp32")
    assert min(speed["repeats"]) >= 10 and speed["threads"] == torch.get_num_threads()
    (row,) = csv.DictReader(io.StringIO(tlkit("count-params", *given, "--format", "csv").out))
    assert tuple(row) == (*COLUMNS, *SPEED_COLUMNS)
    assert 0 < float(row["latency_low"]) <= float(row["latency_seconds"]) <= float(row["latency_high"])
    assert 0 < float(row["images_per_second_low"]) <= float(row["images_per_second"])
    assert row["batch_size"] == "2"


@pytest.mark.slow
def test_measured_models_can_be_sorted_by_latency(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    models = count("test_vit4", "lenet", "--measure", "--device", "cpu", "--sort", "latency", "--batch-size", 1)
    assert [model["model"] for model in models] == ["lenet", "test_vit4"]
    out = tlkit("count-params", "lenet", "test_vit", "--measure", "--device", "cpu", "--batch-size", 1).out
    assert "images/s" in out and max(len(line) for line in out.splitlines() if "│" in line) <= 80


def test_published(tlkit: Tlkit, count: Callable[..., Any]) -> None:
    """torchvision 0.29's metadata: 76.13 and 92.862 for ResNet-50's first weights, 80.858 for the second."""
    with_tag, without, nothing = count("resnet50.tv2_in1k", "resnet50", "test_resnet", "--published")
    assert [entry["weights"] for entry in with_tag["published"]] == ["tv2_in1k"]
    assert with_tag["published"][0]["top1"] == 0.80858
    first = without["published"][0]
    assert (first["weights"], first["top1"], first["top5"]) == ("tv_in1k", 0.7613, 0.92862)
    assert all(entry["protocol"] and entry["source"] for entry in without["published"])
    assert nothing["published"] == []
    text = tlkit("count-params", "resnet50.tv_in1k", "test_resnet", "--published").out
    assert "76.13" in text and "92.862" in text and "nothing is listed for test_resnet" in text
    assert "published" not in count("resnet50")[0]


# What it refuses

WRONG: dict[str, tuple[list[Any], list[str]]] = {
    "mistyped": (["resnet81"], ["resnet81", "did you mean 'resnet18'"]),
    "no such tag": (["resnet18.tv2_in1k"], ["resnet18.tv2_in1k", "no weights of that tag", "resnet18.tv_in1k"]),
    "empty wildcard": (["nosuch*"], ["nosuch*", "no model has such a name"]),
    "small image": (["alexnet", "--image-size", 16], ["alexnet", "16", "--image-size", "usual is 227"]),
    "smallest image": (["test_convnext", "--image-size", 1], ["test_convnext", "does not take images of 1 px"]),
    "no classes": (["resnet18", "--num-classes", 0], ["--num-classes", "0 is too small"]),
    "no channels": (["resnet18", "--in-chans", 0], ["--in-chans", "0 is too small"]),
    "no size": (["resnet18", "--image-size", 0], ["--image-size", "0 is too small"]),
    "device for nothing": (["resnet18", "--device", "cpu"], ["--device", "--measure"]),
    "batch for nothing": (["resnet18", "--batch-size", 2], ["--batch-size", "--measure"]),
    "precision for nothing": (["resnet18", "--precision", "bf16"], ["--precision", "--measure"]),
    "latency for nothing": (["resnet18", "--sort", "latency"], ["--sort latency", "--measure"]),
    "instance norm of single numbers": (
        ["resnet18", "--norm", "instance", "--image-size", 32],
        ["resnet18", "32 px", "instance norm", "layer4", "--norm layer"],
    ),
    "no norm to replace": (["convnext_atto", "--norm", "group"], ["convnext_atto", "--norm"]),
    "no classifier": (["gemma4_vit_167m_enc"], ["gemma4_vit_167m_enc", "has no classifier"]),
    "only without classifier": (["gemma4_vit_*_enc"], ["gemma4_vit_*_enc", "can be counted"]),
    "not square": (["test_resnet", "vit_base_patch16_sapiens2"], ["vit_base_patch16_sapiens2", "1024 x 768"]),
    "a strange format": (["resnet18", "--format", "xml"], ["--format", "'xml'", "markdown"]),
    "a strange order": (["resnet18", "--sort", "size"], ["--sort", "'size'", "params"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tlkit: Tlkit, case: str) -> None:
    arguments, words = WRONG[case]
    done = tlkit("count-params", *arguments, "--quiet")
    assert done.code == 1
    assert done.out == ""
    assert all(word in done.error for word in words), done.error
    others = [line for line in done.err.splitlines() if not line.startswith(("tlkit: error: ", "note: "))]
    assert others == []


def test_folders_that_are_no_runs(tlkit: Tlkit, tmp_path: Path, trained: Path) -> None:
    done = tlkit("count-params", tmp_path)
    assert done.code == 1 and str(tmp_path) in done.error and "not a finished run" in done.error
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "model.safetensors", run)
    (run / "config.json").write_text("{")
    done = tlkit("count-params", run)
    assert done.code == 1 and "config.json" in done.error


def test_a_missing_folder_of_out_is_one_line(tlkit: Tlkit, tmp_path: Path) -> None:
    done = tlkit("count-params", "test_resnet", "--out", tmp_path / "missing" / "counted.csv")
    assert done.code == 1 and "missing" in done.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--layers",), ("resnet18", "--no-such-option")])
def test_usage_errors_are_2(tlkit: Tlkit, arguments: tuple[str, ...]) -> None:
    done = tlkit("count-params", *arguments)
    assert done.code == 2 and done.error
