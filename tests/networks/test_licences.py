"""Where weights came from at first, through the runs that they were trained in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tlkit.networks.build import Loaded, build
from tlkit.networks.licences import origin


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(0)
    network: Any = build("test_resnet", "random")
    network.network.pretrained_cfg["license"] = "mit"
    return network


def run(folder: Path, weights: str) -> str:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"weights": weights}))
    return f"run {folder}"


@pytest.mark.parametrize(
    ("weights", "licence"),
    [("hub", "mit"), ("package some-weights", "mit"), ("random", None), ("mine.safetensors", None), ("unknown", None)],
)
def test_licence_is_that_of_public_weights_alone(
    loaded: Loaded, tmp_path: Path, weights: str, licence: str | None
) -> None:
    assert origin(replace(loaded, weights=weights)) == (weights, licence)
    first = run(tmp_path / "first", weights)
    second = run(tmp_path / "second", first)
    assert origin(replace(loaded, weights=second)) == (weights, licence)


def test_runs_that_tell_nothing(loaded: Loaded, tmp_path: Path) -> None:
    assert origin(replace(loaded, weights=f"run {tmp_path / 'gone'}")) == ("unknown", None)
    itself = run(tmp_path / "itself", f"run {tmp_path / 'itself'}")
    assert origin(replace(loaded, weights=itself)).licence is None
