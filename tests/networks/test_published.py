"""The table of published accuracies: against torchvision, timm's tags, and figures from outside."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import get_pretrained_cfg
from torchvision.models import get_model_weights

from tlkit.networks.published import PAPER, Published, published

OURS = ("alexnet", "alexnet_2gpu", "alexnet_torchvision")
TORCHVISION_TAGS = {"IMAGENET1K_V1": "tv_in1k", "IMAGENET1K_V2": "tv2_in1k"}
TEXT = files("tlkit.networks").joinpath("published.csv").read_text(encoding="utf-8")
ROWS = list(csv.DictReader(TEXT.splitlines()))
MODELS = tuple(dict.fromkeys(row["model"] for row in ROWS))
RESULTS = [result for model in MODELS for result in published(model)]
FROM_TORCHVISION = [result for result in RESULTS if result.source.startswith("torchvision ")]


@pytest.fixture
def facts(shared_data: Path, read_csv: Callable[[Path], list[dict[str, str]]]) -> Callable[[str], list[dict[str, str]]]:
    """Rows of a file of figures from outside; skips where it is not there."""

    def read(name: str) -> list[dict[str, str]]:
        path = shared_data.parent / "facts" / name
        if not path.is_file():
            pytest.skip(f"the figures from outside are not there ({path})")
        return read_csv(path)

    return read


def one(model: str, weights: str, protocol: str) -> Published:
    """The one result of a model whose protocol begins so."""
    (found,) = [
        result for result in published(model) if result.weights == weights and result.protocol.startswith(protocol)
    ]
    return found


def test_every_row_is_read() -> None:
    assert len(RESULTS) == len(ROWS) > 80
    for result, row in zip(RESULTS, ROWS, strict=True):
        texts = (result.model, result.weights, result.protocol, result.source)
        assert texts == (row["model"], row["weights"], row["protocol"], row["source"])
        assert all(text and text == text.strip() for text in texts)
        for value, text in ((result.top1, row["top1"]), (result.top5, row["top5"])):
            assert value is None if text == "" else value == pytest.approx(float(text) / 100, abs=1e-12)


def test_an_entry() -> None:
    first, second = published("resnet50")[:2]
    assert first == Published(
        model="resnet50",
        weights="tv_in1k",
        top1=0.7613,
        top5=0.92862,
        protocol="val, 224 px centre crop, resized to 256, bilinear",
        source="torchvision 0.29 weights metadata, IMAGENET1K_V1",
    )
    assert (second.weights, second.top1) == ("tv2_in1k", 0.80858)
    with pytest.raises(FrozenInstanceError):
        first.top1 = 1.0  # type: ignore[misc]


def test_nothing_published() -> None:
    assert published("test_resnet") == published("alexnet") == published("no such model") == []


def test_a_list_of_ones_own() -> None:
    published("resnet50").clear()
    assert published("resnet50")


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: f"{result.model}-{result.weights}")
def test_range(result: Published) -> None:
    """Accuracies, not errors, and fractions: top-1 above one half; one of five guesses is right more often."""
    assert result.top1 is not None or result.top5 is not None
    assert result.top1 is None or 0.5 < result.top1 < 0.9
    assert result.top5 is None or 0.75 < result.top5 < 0.98
    assert result.top1 is None or result.top5 is None or result.top1 + 0.1 < result.top5
    assert result.protocol.split(", ")[0] in ("val", "test")
    assert result.protocol.startswith("val") or result.weights == PAPER, "test labels are not public"


@pytest.mark.parametrize("model", MODELS)
def test_names_and_tags(model: str) -> None:
    tags = {result.weights for result in published(model)} - {PAPER}
    if model in OURS:
        assert tags <= {"tv_in1k"}
    else:
        assert timm.is_model(model)
        assert "." not in model
        assert {f"{model}.{tag}" for tag in tags} <= set(timm.list_pretrained(f"{model}.*"))
        assert get_pretrained_cfg(model).tag in tags, "what timm loads without a tag"


def test_no_duplicates() -> None:
    keys = [(result.model, result.weights, result.protocol) for result in RESULTS]
    assert len(set(keys)) == len(keys)


def test_order(facts: Callable[[str], list[dict[str, str]]]) -> None:
    """Family by family; in a model, public weights before papers; torchvision's own, V1 first."""
    assert [model for model, _ in itertools.groupby(row["model"] for row in ROWS)] == list(MODELS)
    for model in MODELS:
        places = [[*TORCHVISION_TAGS.values(), "", PAPER].index(tag) for tag in tags_in_order(model)]
        assert places == sorted(places)
    lites = [f"tf_efficientnet_lite{size}" for size in range(5)]
    assert list(MODELS) == ["alexnet_2gpu", *(row["model"] for row in facts("imagenet_models.csv")), *lites]


def tags_in_order(model: str) -> list[str]:
    known = (*TORCHVISION_TAGS.values(), PAPER)
    return [result.weights if result.weights in known else "" for result in published(model)]


def torchvision_weights(model: str) -> dict[str, Any]:
    """Those of the installed torchvision that classify, by timm's tag."""
    listed = get_model_weights(model.removesuffix("_torchvision"))
    return {TORCHVISION_TAGS[each.name]: each for each in listed if not math.isnan(accuracies(each)["acc@1"])}


def accuracies(weights: Any) -> dict[str, float]:
    return weights.meta["_metrics"]["ImageNet-1K"]


@pytest.mark.parametrize("model", dict.fromkeys(result.model for result in FROM_TORCHVISION))
def test_torchvision(model: str) -> None:
    """All its weights, with the figures and the preprocessing that the installed torchvision states."""
    listed = torchvision_weights(model)
    mine = {result.weights: result for result in FROM_TORCHVISION if result.model == model}
    assert list(mine) == list(listed)
    for tag, weights in listed.items():
        result, view = mine[tag], weights.transforms()
        assert result.top1 == pytest.approx(accuracies(weights)["acc@1"] / 100, abs=1e-12)
        assert result.top5 == pytest.approx(accuracies(weights)["acc@5"] / 100, abs=1e-12)
        (side,), (resized,) = view.crop_size, view.resize_size
        how = f"val, {side} px centre crop, resized to {resized}, {view.interpolation.value}"
        assert result.protocol == how
        assert result.source.endswith(weights.name)
        url = model not in OURS and get_pretrained_cfg(f"{model}.{tag}").url
        assert not url or url == weights.url, "the tag means the same file"


def test_torchvision_as_in_the_facts(facts: Callable[[str], list[dict[str, str]]]) -> None:
    mine = {(result.model, result.weights): result for result in FROM_TORCHVISION}
    stated = {}
    for row in facts("imagenet_models.csv"):  # read from torchvision 0.29's metadata by others
        for version, tag in (("v1", "tv_in1k"), ("v2", "tv2_in1k")):
            if row[f"{version}_top1"]:
                stated[row["model"], tag] = (float(row[f"{version}_top1"]), float(row[f"{version}_top5"]))
    assert list(mine) == list(stated)
    for key, (top1, top5) in stated.items():
        assert (mine[key].top1, mine[key].top5) == pytest.approx((top1 / 100, top5 / 100), abs=1e-12)


@pytest.mark.parametrize("result", [result for result in RESULTS if "results-imagenet" in result.source])
def test_timm_protocol(result: Published) -> None:
    """timm's own figures are for the size and crop of training, or of testing, that its configuration has."""
    config = get_pretrained_cfg(f"{result.model}.{result.weights}")
    sides = [(config.input_size[-1], config.crop_pct)]
    if config.test_input_size:
        sides.append((config.test_input_size[-1], config.test_crop_pct))
    assert result.protocol in [
        f"val, {side} px centre crop, resized to {math.floor(side / part)}, {config.interpolation}"
        for side, part in sides
    ]


@pytest.mark.parametrize(
    "model, protocol, error",
    [
        ("alexnet_2gpu", "test, seven networks averaged", 15.3),
        ("vgg16", "test, seven networks averaged", 7.3),
        ("resnet50", "val, multi-scale dense", 5.3),
        ("resnet101", "val, multi-scale dense", 4.6),
    ],
)
def test_seed_document(model: str, protocol: str, error: float) -> None:
    """The four top-5 errors that the seed document gives, without a protocol, to one decimal place."""
    top5 = one(model, PAPER, protocol).top5
    assert top5 is not None
    assert 100 * (1 - top5) == pytest.approx(error, abs=0.0501)


@pytest.mark.parametrize("crops, protocol", [("single", "val, 224 px centre crop"), ("ten_crop", "val, ten crops")])
def test_fb_resnet_torch(facts: Callable[[str], list[dict[str, str]]], crops: str, protocol: str) -> None:
    (row,) = [row for row in facts("ten_crop.csv") if row["model"] == "resnet18"]
    result = one("resnet18", PAPER, protocol)
    assert row["source"] in result.source
    errors = [float(row[f"top{count}_error_{crops}"]) / 100 for count in (1, 5)]
    assert [result.top1, result.top5] == pytest.approx([1 - error for error in errors], abs=1e-12)


@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_more_views_are_better(model: str) -> None:
    """One crop, ten crops, all positions at five scales: in this order in every paper's table."""
    papers = [result for result in published(model) if result.weights == PAPER]
    for field in ("top1", "top5"):
        values = [getattr(result, field) for result in papers]
        assert values == sorted(values)
