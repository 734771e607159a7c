"""A run stopped anywhere (at every step, between phases, on any line of the trainer) goes on to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tlkit.training
from tlkit.training import rate_finder
from tlkit.training import trainer as trainer_module
from tlkit.training.trainer import Trainer

Tlkit = Callable[..., Any]
Outcome = Callable[[Path], dict[str, Any]]
FOLDER = str(Path(tlkit.training.__file__).parent)
NEVER = 10**9
UNFREEZE = ("unfreeze", "--stages", 3, "--epochs-per-stage", 2)
FULL = ("finetune", "--strategy", "full", "--epochs", 3)
RUNS: dict[str, tuple[Any, ...]] = {
    "three phases": UNFREEZE,
    "every epoch kept": (*UNFREEZE, "--patience", 0),
    "auto": ("finetune", "--epochs", 4),
    "auto, trained again on all": ("finetune", "--epochs", 4, "--lr", "1e-8"),
    "probe, then all": ("finetune", "--strategy", "lp-ft", "--epochs", 2),
    "average, momentum, plateau": (
        *(*FULL, "--optimizer", "sgd", "--lr", 0.01, "--ema", 0.9, "--schedule", "plateau"),
        *("--step-every", 1, "--patience", 2),
    ),
    "mixing, clipping, accumulating": (
        *(*FULL, "--mixup", 0.4, "--cutmix", 1, "--clip", 1, "--accumulate", 2, "--balanced-sampling"),
        *("--augment", "strong", "--class-weights", "balanced", "--label-smoothing", 0.1, "--bn", "train"),
    ),
    "a rate searched for": (*FULL[:-1], 2, "--lr", "auto", "--schedule", "one-cycle", "--bn", "frozen"),
    "an optimiser of timm's": (*FULL[:-1], 2, "--optimizer", "adopt", "--lr", 1e-3),
}
POINTS = ("_carry_out", "_solve", "_train", "_parts", "_restore_phase", "_after_epoch", "predict")
"""Methods of the trainer whose every call is a moment at which a run may be stopped, beside every step."""


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of a rate in 12 steps rather than 100, whose result tells each of the losses that it saw."""
    rate_at = rate_finder.rate_at
    monkeypatch.setattr(rate_finder, "suggest", lambda rates, losses: 1e-3 * (1 + sum(losses) % 1))
    monkeypatch.setattr(rate_finder, "STEPS", 12)
    monkeypatch.setattr(rate_finder, "rate_at", lambda step: rate_at(step, 12))


@pytest.fixture
def start_run(shapes: Path, start: Path, tlkit: Tlkit) -> Callable[..., Any]:
    """``start_run(run, *options)`` starts one on the CPU in float32, ``--workers 0``."""

    def begin(run: Path, *options: Any) -> Any:
        command, *rest = options
        model = ("--model", "test_resnet", "--image-size", 64) + (("--weights", start) if command != "pretrain" else ())
        arguments = ("--device", "cpu", "--precision", "fp32", "--workers", 0, "--out", run, "--quiet")
        return tlkit(command, shapes, *model, *arguments, *rest)

    return begin


@contextmanager
def tripped(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """Ctrl-C at the ``at``-th moment; yields the moments there were."""
    seen: list[str] = []

    def moment(name: str) -> None:
        seen.append(name)
        if len(seen) == at:
            raise KeyboardInterrupt

    def before(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            moment(name)
            return method(*arguments, **named)

        return call

    fit = trainer_module.fit

    def watched_fit(*arguments: Any, after_step: Callable[[], bool], **named: Any) -> None:
        def step() -> bool:
            moment("a step")
            return after_step()

        fit(*arguments, after_step=step, **named)

    with monkeypatch.context() as context:
        for name in POINTS:
            context.setattr(Trainer, name, before(name, getattr(Trainer, name)))
        context.setattr(trainer_module, "fit", watched_fit)
        yield seen


def moments(run: str, whole: Path, start_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The moments of a run that is not stopped, which is left in ``whole``."""
    with tripped(monkeypatch, NEVER) as seen:
        done = start_run(whole, *RUNS[run])
    assert done.code == 0, done.err
    assert {"_carry_out", "_after_epoch", "predict", "a step"} <= set(seen)
    return seen


def assert_goes_on(tlkit: Tlkit, outcome: Outcome, run: Path, whole: dict[str, Any], where: object) -> None:
    command = whole["summary.json"]["command"]
    done = tlkit(command, "--resume", run, "--quiet")
    assert done.code == 0, (where, done.err)
    found = outcome(run)
    for name, value in whole.items():
        assert found[name] == value, (where, name)


@pytest.mark.parametrize(
    "run", [name if name == "three phases" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_stop_at_every_moment(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    run: str,
) -> None:
    """At each moment alone: between any two steps, in validation, before and after each phase."""
    seen = moments(run, tmp_path / "whole", start_run, monkeypatch)
    whole = outcome(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for at in range(1, len(seen) + 1, 1 if request.node.get_closest_marker("slow") else 4):
        with tripped(monkeypatch, at):
            done = start_run(stopped, *RUNS[run])
        assert done.code == 130, (at, done.err)
        assert_goes_on(tlkit, outcome, stopped, whole, f"{at}: {seen[at - 1]}")
        shutil.rmtree(stopped)


@pytest.mark.parametrize(
    "run", ["three phases", "average, momentum, plateau", pytest.param("auto", marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_again_and_again(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: str,
) -> None:
    """Every few moments, so that some stops come before what was stored has been taken up."""
    moments(run, tmp_path / "whole", start_run, monkeypatch)
    whole, stopped = outcome(tmp_path / "whole"), tmp_path / "stopped"
    draw, stops = random.Random(1), 0
    with tripped(monkeypatch, 12):
        assert start_run(stopped, *RUNS[run]).code == 130
    while not (stopped / "summary.json").exists():
        with tripped(monkeypatch, draw.randint(1, 9)):
            done = tlkit(RUNS[run][0], "--resume", stopped, "--quiet")
        assert done.code in (0, 130), done.err
        stops += done.code == 130
        assert stops < 200
    assert stops >= 3
    for name, value in outcome(stopped).items():
        assert value == whole[name], name


# A signal on any line


def lines_of_the_trainer(work: Callable[[], Any], at: int = NEVER) -> int:
    """Send Ctrl-C to this process on the ``at``-th line run in ``tlkit/training``; returns how many there were."""
    count = 0

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                signal.raise_signal(signal.SIGINT)
        return line

    def called(frame: Any, *_: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(FOLDER) else None

    sys.settrace(called)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "run", [name if name == "three phases" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_ctrl_c_on_any_line(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    run: str,
) -> None:
    """Lines drawn at random: nothing is left half-done anywhere between one and the next."""
    count = lines_of_the_trainer(lambda: start_run(tmp_path / "whole", *RUNS[run]))
    whole, stopped = outcome(tmp_path / "whole"), tmp_path / "stopped"
    draw = random.Random(7)
    for _ in range(6 if request.node.get_closest_marker("slow") else 3):
        at, codes = draw.randint(1, count), []
        lines_of_the_trainer(lambda codes=codes: codes.append(start_run(stopped, *RUNS[run])), at)
        (done,) = codes
        if done.code == 0:  # in a part that swallows it: then the run is whole
            assert outcome(stopped) == whole, at
        else:
            assert done.code == 130, (at, done.err)
            assert_goes_on(tlkit, outcome, stopped, whole, f"line {at} of {count}")
        shutil.rmtree(stopped)


# What is stored


def test_phases_of_a_resumed_run_train_the_same_parameters(
    tlkit: Tlkit, start_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What requires a gradient when a step is made, by phase, with and without a stop in the middle of each."""
    found: dict[str, set[tuple[int, frozenset[str]]]] = {"whole": set(), "stopped": set()}
    fit, name = trainer_module.fit, "whole"

    def watched(prepared: Any, batches: Any, optimizer: Any, *rest: Any, **named: Any) -> None:
        network = prepared.network
        trained = {key for key, tensor in network.named_parameters() if tensor.requires_grad}
        of_optimizer = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        assert {key for key, tensor in network.named_parameters() if id(tensor) in of_optimizer} == trained
        found[name].add((len(trained), frozenset(trained)))
        fit(prepared, batches, optimizer, *rest, **named)

    monkeypatch.setattr(trainer_module, "fit", watched)
    assert start_run(tmp_path / "whole", *UNFREEZE).code == 0
    name = "stopped"
    with tripped(monkeypatch, 14):
        assert start_run(tmp_path / "stopped", *UNFREEZE).code == 130
    for _ in range(20):
        with tripped(monkeypatch, 14):
            if tlkit("unfreeze", "--resume", tmp_path / "stopped", "--quiet").code == 0:
                break
    assert found["stopped"] == found["whole"] and len(found["whole"]) == 2
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "stopped")]
    first, second = ([phase["trainable_params"] for phase in summary["phases"]] for summary in summaries)
    assert first == second


def test_a_state_is_never_stored_after_the_loss_has_left(
    start_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loop looks at the loss now and then only, as on a GPU, the last good state stays."""
    import safetensors.torch
    import torch

    monkeypatch.setattr("tlkit.training.fit.CHECKED_EVERY", {"cpu": 16})
    forward = trainer_module.Supervised.forward
    calls = []

    def spoilt(self: Any, images: Any, labels: Any) -> Any:
        calls.append(1)
        losses = forward(self, images, labels)
        return {name: loss * float("nan") for name, loss in losses.items()} if len(calls) >= 5 else losses

    monkeypatch.setattr(trainer_module.Supervised, "forward", spoilt)
    done = start_run(tmp_path / "run", *FULL, "--checkpoint-every", "1steps")
    assert done.code == 1
    assert "the loss became nan in step 5" in done.error
    state = safetensors.torch.load_file(tmp_path / "run" / "state" / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())
