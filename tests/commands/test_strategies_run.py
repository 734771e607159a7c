"""Each strategy of ``tlkit finetune`` through the command line: phases, what moves and is written, plans, refusals."""

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
LOOP = ("--epochs", 2, "--precision", "fp32")
GRADUAL = ("--stages", 3, "--epochs-per-stage", 1, "--patience", 0, "--precision", "fp32")

STRATEGIES: dict[str, tuple[tuple[Any, ...], list[list[str]], list[int], bool]] = {
    # options, stages and epochs of each phase, whether something was chosen
    "probe": (("--precision", "fp32"), [["head"]], [1], False),
    "full": (LOOP, [WHOLE], [2], False),
    "differential": (LOOP, [WHOLE], [2], False),
    "lp-ft": (LOOP, [["head"], WHOLE], [1, 2], False),
    "gradual": (GRADUAL, [["head"], ["stage4", "head"], ["stage3", "stage4", "head"]], [1, 1, 1], False),
    "gradual, early stopping": (
        ("--stages", 2, "--epochs-per-stage", 2, "--precision", "fp32"),
        *([["head"], ["stage4", "head"]], [1, 2], True),
    ),
    "full, early stopping": ((*LOOP, "--patience", 1), [WHOLE], [2], True),
}


def network_files(run: Path, start: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """Weights before and after, and the stage of each tensor (buffers included)."""
    network = timm.create_model("test_resnet", num_classes=3)
    of_stage = {}
    for stage in stages(network):
        for module in stage.modules:
            own = [*network.get_submodule(module).named_parameters(recurse=False)]
            own += network.get_submodule(module).named_buffers(recurse=False)
            of_stage |= {f"{module}.{name}" if module else name: stage.name for name, _ in own}
        of_stage |= dict.fromkeys(stage.parameters, stage.name)
    after = safetensors.torch.load_file(run / "model.safetensors")
    assert set(of_stage) == set(after)
    return safetensors.torch.load_file(start), after, of_stage


@pytest.mark.parametrize("case", STRATEGIES)
def test_a_strategy_runs_its_phases_and_moves_what_they_train(
    tlkit: Tlkit, shapes: Path, start: Path, tmp_path: Path, case: str
) -> None:
    options, trained, epochs, chooses = STRATEGIES[case]
    name, run = case.partition(",")[0], tmp_path / "run"
    arguments = ("--strategy", name, "--model", "test_resnet", "--weights", start, "--image-size", 64)
    arguments += ("--device", "cpu", "--test-fraction", 0.25, "--out", run, "--json")
    told = tlkit("finetune", shapes, *arguments, *options).json

    assert told["strategy"] == name
    assert [phase["stages"] for phase in told["phases"]] == trained
    sizes = {stage.name: stage for stage in stages(timm.create_model("test_resnet", num_classes=3))}
    reference = timm.create_model("test_resnet", num_classes=3)
    for phase, count in zip(told["phases"], epochs, strict=True):
        assert set(phase) >= {"stages", "epochs", "trainable_params", "seconds", "val_top1"}
        assert phase["epochs"] <= count if chooses else phase["epochs"] == count
        assert phase["trainable_params"] == sum(
            reference.get_parameter(name).numel() for stage in phase["stages"] for name in sizes[stage].parameters
        )
        assert phase["seconds"] > 0
        assert 0 <= phase["val_top1"] <= 1
    assert told["phases"][-1]["val_top1"] == told["metrics"]["val"]["top1"]
    used = {split: figures["used_for_selection"] for split, figures in told["metrics"].items()}
    assert used == {"val": chooses, "test": False}, "with a test split, val is what is chosen on"

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        (phase, epoch) for phase, count in enumerate(epochs, start=1) for epoch in range(1, count + 1)
    ]
    for row in rows:
        assert row["epochs"] == epochs[row["phase"] - 1]
        if "rates" in row:
            assert set(row["rates"]) == set(trained[row["phase"] - 1])
            assert row["losses"]["loss"] > 0
    assert json.loads((run / "summary.json").read_text()) | {"seconds": 0} == told | {"seconds": 0}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ("Learning curve" in page or "learning curve" in page.lower()) == any("rates" in row for row in rows)
    assert not (run / "state").exists()

    before, after, of_stage = network_files(run, start)
    frozen = set(WHOLE) - set(trained[-1])
    for name, tensor in after.items():
        if of_stage[name] in frozen:
            assert tensor.numpy().tobytes() == before[name].numpy().tobytes(), f"{name} is frozen"
    for stage in trained[-1]:
        if stage != "head" and not chooses:
            moved = [name for name in after if of_stage[name] == stage and not torch.equal(before[name], after[name])]
            assert moved, f"{stage} trains"
    statistics = [name for name in after if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(before[name], after[name]) for name in statistics), "by default they stay"


def test_auto_says_what_it_decided_and_why(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    told = tlkit("finetune", shapes, *small, "--precision", "fp32", "--out", tmp_path / "run", "--json").json
    assert told["strategy"] == "auto"
    first, *trials = told["phases"]
    assert first["stages"] == ["head"] and first["val_top1"] is not None
    assert trials, "at least one stage was tried"
    for phase in trials[:1]:
        assert phase["kept"] in (True, False)
        assert "standard error" in phase["why"]
    assert told["decision"].startswith("kept ")
    assert told["choosing"] == {"on": "train", "images": 6}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert told["decision"].split(" (")[0] in page


def test_what_auto_keeps_is_the_probe_bit_for_bit(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    """Where no trial pays, the model is that of ``--strategy probe``: nothing of the trial is left."""
    for strategy in ("probe", "auto"):
        arguments = ("--strategy", strategy, "--precision", "fp32", "--out", tmp_path / strategy, "--json")
        told = tlkit("finetune", shapes, *small, *arguments).json
    assert [phase.get("kept") for phase in told["phases"]] == [None, False], "the case that this test is about"
    probe, auto = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("probe", "auto"))
    assert probe == auto


@pytest.mark.parametrize("strategy", ["full", "differential"])
def test_what_has_no_linear_head_is_trained_all_the_same(
    tlkit: Tlkit, make_shapes: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    data = make_shapes(tmp_path / "data", ("disc", "square"), 4)
    arguments = ("--model", "levit_128s", "--weights", "random", "--image-size", 224, "--device", "cpu", "--json")
    arguments += ("--epochs", 1, "--augment", "none", "--strategy", strategy, "--out", tmp_path / "run")
    told = tlkit("finetune", data, *arguments).json
    assert told["phases"][0]["epochs"] == 1
    network = timm.create_model("levit_128s", num_classes=2)
    assert told["phases"][0]["trainable_params"] == sum(tensor.numel() for tensor in network.parameters())
    assert tlkit("evaluate", tmp_path / "run", "--json").json["metrics"] == {
        name: value for name, value in told["metrics"]["val"].items() if name != "used_for_selection"
    }


def test_differential_rates_of_each_stage(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--lr", 0.01, "--layer-decay", 0.5, "--schedule", "constant", "--warmup", 0, "--epochs", 1)
    arguments = ("--strategy", "differential", *options, "--out", tmp_path / "run", "--json")
    (phase,) = tlkit("finetune", shapes, *small, *arguments).json["phases"]
    expected = {"head": 0.01, "stage4": 1e-3, "stage3": 5e-4, "stage2": 2.5e-4, "stage1": 1.25e-4, "stem": 6.25e-5}
    assert phase["rates"] == pytest.approx(expected)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["rates"] == pytest.approx(expected)


# Plans


PLANS = {
    "probe": [["head"]],
    "full": [WHOLE],
    "differential": [WHOLE],
    "lp-ft": [["head"], WHOLE],
    "gradual": [WHOLE[place:] for place in range(5, -1, -1)],
    "auto": [WHOLE[place:] for place in range(5, 3, -1)],
}


@pytest.mark.parametrize("strategy", PLANS)
def test_a_plan_names_phases_rates_and_time_and_writes_nothing(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = tlkit("finetune", shapes, *small, "--strategy", strategy, "--plan", "--json").json
    assert list(tmp_path.iterdir()) == []
    assert told["strategy"] == strategy
    plan = told["plan"]
    found = [phase["stages"] for phase in plan["phases"]]
    assert found[: len(PLANS[strategy])] == PLANS[strategy]
    assert strategy == "auto" or len(found) == len(PLANS[strategy])
    for phase in plan["phases"]:
        assert phase["trainable_params"] == sum(plan["stages"][name] for name in phase["stages"])
        assert phase["trial"] == (strategy == "auto" and phase["stages"] != ["head"]) or phase["rates"]
        if phase["stages"] == ["head"]:
            assert phase["rates"] == {}
            continue
        assert set(phase["rates"]) == set(phase["stages"])
        ratio = phase["rates"]["head"] / phase["rates"]["stage4"]
        assert ratio == pytest.approx(1 if strategy in ("full", "lp-ft") else 10)
    assert plan["estimated_seconds"] >= 0
    done = tlkit("finetune", shapes, *small, "--strategy", strategy, "--plan")
    assert all(word in done.out for word in (f"phases of {strategy}", "highest rates", "estimated time", "head"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_what_its_plan_says(tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("--strategy", "gradual", "--stages", 3, "--epochs-per-stage", 1, "--patience", 0, "--json")
    plan = tlkit("finetune", shapes, *small, *arguments, "--plan").json["plan"]
    told = tlkit("finetune", shapes, *small, *arguments, "--out", tmp_path / "run").json
    for planned, done in zip(plan["phases"], told["phases"], strict=True):
        for name in ("stages", "epochs", "trainable_params"):
            assert planned[name] == done[name]
        assert planned["rates"] == done.get("rates", {})


# Options that would do nothing


IDLE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "--stages": ("full", ("--stages", 2)),
    "--epochs-per-stage": ("auto", ("--epochs-per-stage", 2)),
    "--order": ("lp-ft", ("--order", "bottom-up")),
    "--epochs": ("gradual", ("--epochs", 3)),
    "--patience": ("auto", ("--patience", 2)),
    "--layer-decay": ("full", ("--layer-decay", 0.5)),
    "--anchor": ("full", ("--anchor", 0.1)),  # with random weights, as `small` says
    "--min-lr": ("full", ("--schedule", "constant", "--min-lr", 0.1)),
    "--step-every": ("full", ("--step-every", 2)),
    "--gamma": ("full", ("--gamma", 0.5)),
    "--warmup": ("full", ("--schedule", "one-cycle", "--warmup", 0.2)),
    "--train-views": ("full", ("--train-views", "flip")),
    **{
        f"{flag} (probe)": ("probe", (flag, value))
        for flag, value in {
            "--epochs": 3,
            "--time-limit": "1min",
            "--patience": 1,
            "--optimizer": "sgd",
            "--lr": 0.1,
            "--layer-decay": 0.5,
            "--schedule": "constant",
            "--warmup": 0.5,
            "--min-lr": 0.1,
            "--step-every": 2,
            "--gamma": 0.5,
            "--momentum": 0.5,
            "--weight-decay": 0.5,
            "--anchor": 0.1,
            "--bn": "frozen",
            "--clip": 1,
            "--accumulate": 2,
            "--ema": 0.9,
            "--augment": "light",
            "--mixup": 0.1,
            "--cutmix": 0.1,
            "--label-smoothing": 0.1,
        }.items()
    },
    "--balanced-sampling (probe)": ("probe", ("--balanced-sampling",)),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_would_do_nothing_is_refused(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, case: str
) -> None:
    strategy, options = IDLE[case]
    flag = case.split()[0]
    done = tlkit("finetune", shapes, *small, "--strategy", strategy, *options, "--out", tmp_path / "run")
    assert done.code == 1
    assert done.error.startswith(f"{flag}: does nothing with ")
    assert done.error.endswith(("leave it out", f"leave {flag} out"))
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimizer_is_named_with_the_nearest_one(tlkit: Tlkit, shapes: Path) -> None:
    done = tlkit("finetune", shapes, "--strategy", "full", "--optimizer", "adamm")
    assert done.code == 1
    assert done.error.startswith("--optimizer: unknown optimiser 'adamm'; did you mean ")


@pytest.mark.parametrize("option", [("--lr", "fast"), ("--time-limit", "5 parsecs"), ("--checkpoint-every", "often")])
def test_a_value_that_is_not_understood_is_told(tlkit: Tlkit, shapes: Path, option: tuple[str, str]) -> None:
    done = tlkit("finetune", shapes, "--strategy", "full", *option)
    assert done.code == 1
    assert option[0] in done.error and option[1] in done.error
