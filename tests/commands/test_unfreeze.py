"""``tlkit unfreeze``: which stages join when, where it starts from, and that it is ``finetune --strategy gradual``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from tlkit.networks.stages import stages

Tlkit = Callable[..., Any]
WHOLE = ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
QUICK = ("--epochs-per-stage", 1, "--patience", 0, "--precision", "fp32", "--quiet")


def sizes(classes: int = 3) -> dict[str, int]:
    network = timm.create_model("test_resnet", num_classes=classes)
    return {
        stage.name: sum(network.get_parameter(name).numel() for name in stage.parameters) for stage in stages(network)
    }


def test_each_stage_joins_from_the_top_down(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    told = tlkit("unfreeze", shapes, *small, *QUICK, "--out", tmp_path / "run", "--json").json
    assert (told["command"], told["strategy"]) == ("unfreeze", "gradual")
    assert [phase["stages"] for phase in told["phases"]] == [WHOLE[place:] for place in range(5, -1, -1)]
    for phase in told["phases"]:
        assert phase["trainable_params"] == sum(sizes()[name] for name in phase["stages"])
    assert told["phases"][-1]["trainable_params"] == sum(sizes().values()), "the last phase trains everything"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--stages", 1), [["head"]]),
        (("--stages", 2), [["head"], ["stage4", "head"]]),
        (("--stages", 3, "--order", "bottom-up"), [["head"], ["stem", "head"], ["stem", "stage1", "head"]]),
        (("--stages", 99), [WHOLE[place:] for place in range(5, -1, -1)]),
    ],
)
def test_stages_counts_the_heads_phase_too(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    options: tuple[Any, ...],
    expected: list[list[str]],
) -> None:
    told = tlkit("unfreeze", shapes, *small, *QUICK, *options, "--out", tmp_path / "run", "--json").json
    assert [phase["stages"] for phase in told["phases"]] == expected
    assert [phase["epochs"] for phase in told["phases"]] == [1] * len(expected)


def test_bottom_up_leaves_the_top_alone(tlkit: Tlkit, shapes: Path, start: Path, tmp_path: Path) -> None:
    arguments = ("--model", "test_resnet", "--weights", start, "--image-size", 64, "--device", "cpu")
    options = ("--stages", 2, "--order", "bottom-up", "--out", tmp_path / "run")
    assert tlkit("unfreeze", shapes, *arguments, *QUICK, *options).code == 0
    before = safetensors.torch.load_file(start)
    after = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_stage = {name: stage.name for stage in stages(timm.create_model("test_resnet")) for name in stage.parameters}
    assert {of_stage[name] for name in moved} == {"stem", "head"}


@pytest.mark.parametrize("count", [1, 3])
def test_epochs_of_each_phase(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, count: int) -> None:
    options = ("--stages", 2, "--patience", 0, "--epochs-per-stage", count)
    told = tlkit("unfreeze", shapes, *small, *options, "--out", tmp_path / "run", "--json").json
    assert [phase["epochs"] for phase in told["phases"]] == [1, count]


def test_it_is_the_gradual_strategy_of_finetune_bit_for_bit(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, outcome: Callable[[Path], dict[str, Any]]
) -> None:
    options = ("--stages", 3, "--epochs-per-stage", 2, "--precision", "fp32", "--quiet")
    assert tlkit("unfreeze", shapes, *small, *options, "--out", tmp_path / "one").code == 0
    assert tlkit("finetune", shapes, *small, "--strategy", "gradual", *options, "--out", tmp_path / "two").code == 0
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for summary in (one["summary.json"], two["summary.json"]):
        summary.pop("command")
    assert one == two


def test_its_recipe_repeats_a_run(
    tlkit: Tlkit, shapes: Path, trained: Path, tmp_path: Path, outcome: Callable[[Path], dict[str, Any]]
) -> None:
    options = ("--from", trained, "--stages", 2, "--device", "cpu", *QUICK, "--out", tmp_path / "one")
    assert tlkit("unfreeze", shapes, *options).code == 0
    assert "from: " in (tmp_path / "one" / "recipe.yaml").read_text()
    arguments = ("--recipe", tmp_path / "one" / "recipe.yaml", "--out", tmp_path / "two", "--quiet")
    assert tlkit("unfreeze", *arguments).code == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


# From a run


@pytest.fixture(scope="module")
def pretrained(shapes: Path, tmp_path_factory: pytest.TempPathFactory, tlkit: Tlkit) -> Path:
    """A run of ``pretrain`` with the small stem, for 32 pixels. Read only."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    options = ("--model", "test_resnet", "--image-size", 32, "--epochs", 1, "--device", "cpu", "--quiet")
    assert tlkit("pretrain", shapes, *options, "--out", run).code == 0
    return run


@pytest.mark.parametrize("source", ["finetune", "pretrain"])
def test_it_starts_from_a_run(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    trained: Path,
    pretrained: Path,
    tmp_path: Path,
    source: str,
) -> None:
    """Its network, stem, weights and preprocessing; what stays frozen has its bytes."""
    origin = {"finetune": trained, "pretrain": pretrained}[source]
    data = make_shapes(tmp_path / "data", ("one", "two"), 8)
    options = ("--stages", 2, "--device", "cpu", *QUICK, "--out", tmp_path / "run", "--json")
    told = tlkit("unfreeze", data, "--from", origin, *options).json
    assert (told["model"], told["classes"]) == ("test_resnet", ["one", "two"])
    assert told["preprocessing"]["size"] == {"finetune": 64, "pretrain": 32}[source]
    before, after = (safetensors.torch.load_file(run / "model.safetensors") for run in (origin, tmp_path / "run"))
    assert before.keys() == after.keys()
    moving = ("layer4.", "fc.")
    moved = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert moved and all(name.startswith(moving) for name in moved)
    assert any(name.startswith("layer4.") for name in moved)
    assert after["fc.weight"].shape == (2, 96)
    assert tlkit("evaluate", tmp_path / "run", "--json").json["metrics"]["top1"] == told["metrics"]["val"]["top1"]


@pytest.mark.parametrize("option", [("--model", "test_vit"), ("--weights", "random")])
def test_a_run_brings_its_own_network(tlkit: Tlkit, shapes: Path, trained: Path, option: tuple[str, str]) -> None:
    done = tlkit("unfreeze", shapes, "--from", trained, *option)
    assert done.code == 1
    assert "--from: a run brings its own model and weights" in done.error


@pytest.mark.parametrize("kind", ["missing", "no run"])
def test_what_is_no_run_is_told(tlkit: Tlkit, shapes: Path, tmp_path: Path, kind: str) -> None:
    where = tmp_path / "nowhere" if kind == "missing" else shapes
    done = tlkit("unfreeze", shapes, "--from", where, "--out", tmp_path / "run")
    assert done.code == 1
    assert str(where) in done.error
    assert not (tmp_path / "run").exists()


def test_epochs_is_refused_with_the_option_that_is_meant(tlkit: Tlkit, shapes: Path, small: tuple[str, ...]) -> None:
    done = tlkit("unfreeze", shapes, *small, "--epochs", 3)
    assert done.code == 1
    assert "--epochs: does nothing with" in done.error and "--epochs-per-stage" in done.error


def test_a_plan_of_it(
    tlkit: Tlkit, shapes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--from", trained, "--stages", 3, "--device", "cpu", "--plan", "--json")
    plan = tlkit("unfreeze", shapes, *arguments).json["plan"]
    assert [phase["stages"] for phase in plan["phases"]] == [WHOLE[5:], WHOLE[4:], WHOLE[3:]]
    assert [phase["epochs"] for phase in plan["phases"]] == [1, 3, 3]
    assert list(tmp_path.iterdir()) == []


def test_images_that_the_first_run_was_trained_on_are_pointed_out(
    tlkit: Tlkit, shapes: Path, trained: Path, make_shapes: Callable[..., Path], tmp_path: Path
) -> None:
    """Another split of the same folder puts images into val that the network has seen; another folder does not."""
    stage = ("--stages", 1, "--plan")
    again = tlkit("unfreeze", shapes, "--from", trained, *stage, "--seed", 5)
    assert again.code == 0 and f"{trained} was trained on" in again.err
    other = tlkit("unfreeze", make_shapes(tmp_path / "other", seed=3), "--from", trained, *stage)
    assert other.code == 0 and "was trained on" not in other.err
