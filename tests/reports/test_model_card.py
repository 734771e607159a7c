"""Model cards: what the hub reads of them, and what they say of licences, figures and preprocessing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import RepoCard

from tlkit.networks.build import Loaded, build
from tlkit.networks.licences import Origin
from tlkit.reports.model_card import model_card

FIGURES = {"images": 40, "top1": 0.9, "top1_ci95": [0.77, 0.96], "loss": 0.25, "used_for_selection": True}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(0)
    return replace(build("test_resnet", "random"), classes=("a|b", "c"))


@pytest.mark.parametrize(
    ("came", "licence", "said"),
    [
        (Origin("hub", "apache-2.0"), "apache-2.0", "have the licence apache-2.0"),
        (Origin("random", None), "other", "put your own licence"),
        (Origin("unknown", None), "other", "is not known: find it out"),
    ],
)
def test_licence(loaded: Loaded, came: Origin, licence: str, said: str) -> None:
    card = RepoCard(model_card(loaded, came, {}), ignore_metadata_errors=False)
    assert card.data.to_dict()["license"] == licence
    assert ("license_name" in card.data.to_dict()) == (licence == "other"), "the hub wants a name with it"
    assert isinstance(ModelCardData(**card.data.to_dict()), ModelCardData)
    assert said in card.text


@pytest.mark.parametrize(
    ("metrics", "split"), [({"val": FIGURES}, "val"), (FIGURES, "test"), ({"target": FIGURES, "mmd2": {}}, "target")]
)
def test_figures_of_every_kind_of_run(loaded: Loaded, metrics: dict[str, Any], split: str) -> None:
    text = model_card(loaded, Origin("hub", None), {"metrics": metrics, "split": "test"})
    assert f"| {split} | 40 | 0.900 (0.770 to 0.960) | - | 0.250 | - |" in text
    assert f"Something was chosen on {split}" in text


def test_data_and_classes(loaded: Loaded) -> None:
    data = {"a|b": {"val": 1, "train": 3}, "c": {"train": 4}}
    text = model_card(loaded, Origin("hub", None), {"data": data})
    assert "| class | train | val |\n| --- | --- | --- |\n| a\\|b | 3 | 1 |\n| c | 4 | 0 |\n| all | 7 | 1 |" in text
    assert "`a|b`, `c`" in model_card(loaded, Origin("hub", None), {})


@pytest.mark.parametrize(("mode", "said"), [("center", "cut out"), ("squash", "both sides"), ("border", "padded")])
def test_preprocessing(loaded: Loaded, mode: str, said: str) -> None:
    kept = replace(loaded.preprocessing, crop_mode=mode, size=96, crop=0.75)
    text = model_card(replace(loaded, preprocessing=kept), Origin("hub", None), {})
    assert said in text and "128 px" in text


def test_what_timm_alone_cannot_build_says_so(loaded: Loaded) -> None:
    assert "tlkit.networks" in model_card(replace(loaded, norm="group"), Origin("random", None), {})
    assert "tlkit.networks" not in model_card(loaded, Origin("random", None), {})
