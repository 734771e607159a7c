"""Going on with a run that was killed, stopped, or ran out of disk: real processes, real signals, a real full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tlkit.training import checkpoint as checkpoint_module
from tlkit.training import trainer as trainer_module

Tlkit = Callable[..., Any]
Outcome = Callable[[Path], dict[str, Any]]
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
UNFREEZE = ("unfreeze", "--stages", 3, "--epochs-per-stage", 3, "--patience", 0)
STATE = Path("state") / "checkpoint.safetensors"

# Counts the steps of a run in a file that the test watches, and makes each last long enough to be hit.
COUNTED = """
import sys, time
from pathlib import Path
from tlkit.cli.app import run
from tlkit.training import trainer

fit, steps = trainer.fit, 0

def counted(*arguments, after_step, **named):
    def step():
        global steps
        steps += 1
        Path(sys.argv[1]).write_text(str(steps))
        time.sleep(0.02)
        return after_step()
    fit(*arguments, after_step=step, **named)

trainer.fit = counted
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture
def arguments(shapes: Path, start: Path) -> Callable[..., tuple[Any, ...]]:
    """A whole command line on the CPU in float32, from the options that matter to a test."""

    def whole(run: Path, *options: Any) -> tuple[Any, ...]:
        command, *rest = options
        model = ("--model", "test_resnet", "--image-size", 64)
        model += ("--weights", start) if command != "pretrain" else ()
        return (command, shapes, *model, "--device", "cpu", "--precision", "fp32", "--out", run, *rest)

    return whole


def started(folder: Path, *words: Any) -> subprocess.Popen[str]:
    """A tlkit process in a session of its own, which writes the number of its steps into ``folder/steps``."""
    command = [sys.executable, "-c", COUNTED, str(folder / "steps"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def hit(process: subprocess.Popen[str], folder: Path, step: int, number: int) -> tuple[str, str]:
    """Send a signal to the process and its children once so many steps are done; what it printed."""
    counter = folder / "steps"
    while process.poll() is None:
        if counter.exists() and int(counter.read_text() or 0) >= step:
            os.killpg(process.pid, number)
            break
        time.sleep(0.003)
    return process.communicate()


CASES: dict[str, tuple[Any, ...]] = {
    "unfreeze": UNFREEZE,
    "full, sgd with momentum, average, mixup": (
        *("finetune", "--strategy", "full", "--epochs", 9, "--optimizer", "sgd", "--lr", 0.01, "--ema", 0.9),
        *("--mixup", 0.4, "--bn", "train"),
    ),
    "pretrain, plateau and patience": (
        *("pretrain", "--epochs", 9, "--schedule", "plateau", "--step-every", 1, "--patience", 7),
    ),
}


@unix
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_three_times_gives_the_same_model(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], outcome: Outcome, tmp_path: Path, case: str
) -> None:
    """SIGKILL at moments drawn at random; some state may be older than the kill, none is broken."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*arguments(whole, *CASES[case]), "--quiet").code == 0
    draw = random.Random(case)
    often = ("--checkpoint-every", "3steps", "--quiet")
    words: tuple[Any, ...] = (*arguments(run, *CASES[case]), *often)
    for _ in range(3):
        process = started(tmp_path, *words)
        hit(process, tmp_path, draw.randint(4, 8), signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        (tmp_path / "steps").unlink()
        assert (run / STATE).is_file() and not (run / "summary.json").exists()
        words = (CASES[case][0], "--resume", run, *often)
    assert tlkit(*words).code == 0
    assert outcome(run) == outcome(whole)


@unix
@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        pytest.param(signal.SIGTERM, 143, 2, id="SIGTERM, workers"),
        pytest.param(signal.SIGINT, 130, 2, id="SIGINT, workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 0, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 0, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_in_training_stores_its_state_and_goes_on_at_once(
    tlkit: Tlkit,
    arguments: Callable[..., tuple[Any, ...]],
    outcome: Outcome,
    tmp_path: Path,
    number: int,
    code: int,
    workers: int,
) -> None:
    """The whole process group gets the signal, as from a terminal or a batch system; no checkpoint was due before."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*arguments(whole, *UNFREEZE), "--workers", 0, "--quiet").code == 0
    process = started(tmp_path, *arguments(run, *UNFREEZE), "--workers", workers, "--json")
    stdout, stderr = hit(process, tmp_path, 7, number)
    assert process.returncode == code, stderr
    assert json.loads(stdout)["exit_code"] == code
    assert stderr.splitlines()[-2:] == [
        f"note: go on with: tlkit unfreeze --resume {run}",
        f"tlkit: error: {'interrupted' if code == 130 else 'terminated'}",
    ]
    assert "Traceback" not in stderr
    state = json.loads(safetensors.safe_open(run / STATE, "pt").metadata()["tlkit"])["state"]
    assert len(state["outcomes"]) >= 1, "the steps done are in it"
    done = tlkit("unfreeze", "--resume", run)
    assert done.code == 0
    assert "going on with phase" in done.err
    found, expected = outcome(run), outcome(whole)
    assert found == expected


@pytest.mark.parametrize("workers", [(0, 2), pytest.param((2, 0), marks=pytest.mark.slow)], ids=str)
def test_another_number_of_workers_goes_on_to_the_same_model(
    tlkit: Tlkit,
    arguments: Callable[..., tuple[Any, ...]],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: tuple[int, int],
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    first, second = workers
    assert tlkit(*arguments(whole, *UNFREEZE[:3]), "--workers", second, "--quiet").code == 0
    with monkeypatch.context() as context:
        stopped_after(8, context)
        assert tlkit(*arguments(run, *UNFREEZE[:3]), "--workers", first, "--quiet").code == 130
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"workers: {first}", f"workers: {second}"))
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after so many steps."""
    fit, done = trainer_module.fit, []

    def stopping(*arguments: Any, after_step: Callable[[], bool], **named: Any) -> None:
        def step() -> bool:
            done.append(1)
            if len(done) == steps:
                raise KeyboardInterrupt
            return after_step()

        fit(*arguments, after_step=step, **named)

    monkeypatch.setattr(trainer_module, "fit", stopping)


NETWORKS = {
    "dropout and stochastic depth": ("convnext_atto", 32, ("--strategy", "full", "--bn", "train")),
    "two classifiers": ("deit_tiny_distilled_patch16_224", 32, ("--strategy", "lp-ft")),
    "a hidden layer in the head": ("mobilenetv3_small_050", 32, ("--strategy", "lp-ft")),
    "no classifier of its own": ("vit_small_patch14_dinov2", 28, ("--strategy", "full")),
    "a convolution as classifier": ("dpn48b", 32, ("--strategy", "lp-ft")),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (number > 1)) for number, name in enumerate(NETWORKS)]
)
def test_networks_of_all_kinds_go_on(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    if case.startswith("dropout"):  # timm takes no rates on the command line: give the network some
        create = trainer_module.Trainer.__init__

        def with_dropout(self: Any, loaded: Any, *rest: Any, **named: Any) -> None:
            drops = [module for module in loaded.network.modules() if hasattr(module, "drop_prob")]
            loaded.network.head.drop.p = 0.5
            for block in loaded.network.modules():
                if type(block).__name__ == "ConvNeXtBlock":
                    from timm.layers import DropPath

                    block.drop_path = DropPath(0.3)
            assert not drops
            create(self, loaded, *rest, **named)

        monkeypatch.setattr(trainer_module.Trainer, "__init__", with_dropout)
    data = make_shapes(tmp_path / "data", ("disc", "square"), 8)
    model, size, options = NETWORKS[case]
    words = ("finetune", data, "--model", model, "--weights", "random", "--image-size", size, "--device", "cpu")
    words += ("--precision", "fp32", "--epochs", 2, "--quiet", *options)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*words, "--out", whole).code == 0
    with monkeypatch.context() as context:
        stopped_after(2, context)
        assert tlkit(*words, "--out", run).code == 130
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


# What is stored, and kept


def test_the_state_goes_when_the_run_is_finished_unless_it_is_to_stay(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], tmp_path: Path
) -> None:
    often = ("--checkpoint-every", "1steps", "--quiet")
    for name, keep in {"gone": (), "kept": ("--keep-state",)}.items():
        assert tlkit(*arguments(tmp_path / name, *UNFREEZE[:3]), *often, *keep).code == 0
    assert not (tmp_path / "gone" / "state").exists()
    assert (tmp_path / "kept" / STATE).is_file()
    assert {path.name for path in (tmp_path / "kept" / "state").iterdir()} == {"checkpoint.safetensors"}


def test_a_finished_run_says_so_and_stays_as_it_is(
    tlkit: Tlkit,
    arguments: Callable[..., tuple[Any, ...]],
    contents: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    assert tlkit(*arguments(run, *UNFREEZE[:3]), "--quiet").code == 0
    before = contents(run)
    done = tlkit("unfreeze", "--resume", run)
    assert done.code == 0
    assert "is finished" in done.out and str(run / "report.html") in done.out
    assert tlkit("unfreeze", "--resume", run, "--json").json == json.loads((run / "summary.json").read_text())
    assert contents(run) == before


def test_another_commands_run_is_refused(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch)
    assert tlkit(*arguments(tmp_path / "run", *UNFREEZE), "--quiet").code == 130
    done = tlkit("finetune", "--resume", tmp_path / "run")
    assert done.code == 1
    assert "this is a run of 'unfreeze'" in done.error and "with that command" in done.error


@pytest.fixture
def stopped(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An ``unfreeze`` run stopped after five steps."""
    with monkeypatch.context() as context:
        stopped_after(5, context)
        assert tlkit(*arguments(tmp_path / "stopped", *UNFREEZE), "--quiet").code == 130
    return tmp_path / "stopped"


@pytest.mark.parametrize("kind", ["cut", "empty", "no tensors", "no JSON", "another version"])
def test_a_broken_state_is_told_in_one_line(
    tlkit: Tlkit, stopped: Path, contents: Callable[[Path], dict[str, Any]], kind: str
) -> None:
    state = stopped / STATE
    whole = state.read_bytes()
    match kind:
        case "cut":
            state.write_bytes(whole[: len(whole) // 2])
        case "empty":
            state.write_bytes(b"")
        case "no tensors":
            state.write_text("x" * 100)
        case "no JSON":
            safetensors.torch.save_file(safetensors.torch.load_file(state), state, metadata={"tlkit": "{"})
        case "another version":
            metadata = {"tlkit": json.dumps({"format": 10**6})}
            safetensors.torch.save_file(safetensors.torch.load_file(state), state, metadata=metadata)
    before = contents(stopped)
    done = tlkit("unfreeze", "--resume", stopped)
    assert done.code == 1
    assert "version" in done.error if kind == "another version" else "stored state cannot be read" in done.error
    assert str(state) in done.error
    assert done.err.count("\n") == 1
    assert contents(stopped) == before


def test_without_its_broken_state_a_run_begins_again(
    tlkit: Tlkit, stopped: Path, arguments: Callable[..., tuple[Any, ...]], outcome: Outcome, tmp_path: Path
) -> None:
    """As the remedy says."""
    assert tlkit(*arguments(tmp_path / "whole", *UNFREEZE), "--quiet").code == 0
    (stopped / STATE).unlink()
    assert tlkit("unfreeze", "--resume", stopped, "--quiet").code == 0
    assert outcome(stopped) == outcome(tmp_path / "whole")


def test_a_photo_that_is_gone_is_told_before_anything(
    tlkit: Tlkit, stopped: Path, shapes: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / "disc" / "00.png").unlink()
    recipe = stopped / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(shapes.resolve()), str(data)))
    state = (stopped / STATE).read_bytes()
    done = tlkit("unfreeze", "--resume", stopped)
    assert done.code == 1
    assert "disc/00.png" in done.error
    assert (stopped / STATE).read_bytes() == state


# A state that could not be written


def failing_at(number: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ``number``-th checkpoint and all later ones break off with half the file written."""
    save, calls = safetensors.torch.save_file, []

    def write(tensors: Any, path: Path, **named: Any) -> None:
        if "tlkit" not in named.get("metadata", {}):
            return save(tensors, path, **named)
        calls.append(1)
        if len(calls) < number:
            return save(tensors, path, **named)
        Path(path).write_bytes(b"\0" * 1000)
        raise error()

    monkeypatch.setattr("safetensors.torch.save_file", write)


ERRORS = {
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "no space, from Rust": lambda: safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
    "interrupted": KeyboardInterrupt,
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_checkpoint_that_breaks_off_leaves_the_last_one_whole(
    tlkit: Tlkit,
    arguments: Callable[..., tuple[Any, ...]],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*arguments(whole, *UNFREEZE), "--quiet").code == 0
    with monkeypatch.context() as context:
        failing_at(4, ERRORS[error], context)
        done = tlkit(*arguments(run, *UNFREEZE), "--checkpoint-every", "2steps")
    if error == "interrupted":
        assert done.code == 130
    else:
        assert done.code == 1
        assert done.error == f"{run}: no space left on the disk; free some space, or give --out on another disk"
        assert done.err.count("could not be written") == 1
        assert f"tlkit unfreeze --resume {run}" in done.err
    assert {path.name for path in (run / "state").iterdir()} == {STATE.name}, "nothing half-written lies about"
    assert checkpoint_module.read_checkpoint(run) is not None
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MiB of its own; for root alone."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, check=False, capture_output=True).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(
    tlkit: Tlkit,
    arguments: Callable[..., tuple[Any, ...]],
    outcome: Outcome,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, run, ballast = tmp_path / "whole", small_disk / "run", small_disk / "ballast"
    assert tlkit(*arguments(whole, *UNFREEZE), "--quiet").code == 0
    write, calls = checkpoint_module.write_checkpoint, []

    def filling(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            with ballast.open("wb") as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"\0" * 4096)
                    file.flush()
        write(*given)

    with monkeypatch.context() as context:
        context.setattr(trainer_module, "write_checkpoint", filling)
        done = tlkit(*arguments(run, *UNFREEZE), "--checkpoint-every", "2steps")
    assert done.code == 1
    assert "no space left on the disk" in done.error and "free some space" in done.error
    assert "Traceback" not in done.err
    assert checkpoint_module.read_checkpoint(run) is not None
    ballast.unlink()
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


@unix
@pytest.mark.slow
@pytest.mark.parametrize("file", ["the second checkpoint", "the network"])
def test_a_kill_while_a_file_is_written_leaves_the_last_checkpoint_and_nothing_else(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], outcome: Outcome, tmp_path: Path, file: str
) -> None:
    """The process dies with half of the file on the disk."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*arguments(whole, *UNFREEZE), "--quiet").code == 0
    program = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from tlkit.cli.app import run

save, calls = safetensors.torch.save_file, []

def write(tensors, path, **named):
    calls.append(1)
    save(tensors, path, **named)
    if len(calls) == 2 if sys.argv[1] == "the second checkpoint" else Path(path).parent.name == "run":
        os.truncate(path, 5000)
        os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = write
sys.exit(run(sys.argv[2:]))
"""
    words = (file, *arguments(run, *UNFREEZE), "--checkpoint-every", "3steps", "--quiet")
    command = [sys.executable, "-c", program, *map(str, words)]
    process = subprocess.run(command, check=False, start_new_session=True)
    assert process.returncode == -signal.SIGKILL
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


# Trouble in training


def test_a_loss_that_leaves_for_good_is_told_with_step_and_rates(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], tmp_path: Path
) -> None:
    options = ("finetune", "--strategy", "full", "--optimizer", "sgd", "--lr", "1e30", "--warmup", 0)
    done = tlkit(*arguments(tmp_path / "run", *options, "--checkpoint-every", "1steps"), "--quiet")
    assert done.code == 1
    assert "the loss became" in done.error and " in step " in done.error and "head 1e+30" in done.error
    assert "stem 1e+30" in done.error and "lower --lr" in done.error
    assert "Traceback" not in done.err
    kept = (tmp_path / "run").exists()
    assert kept == ("the last good state is in" in done.error)
    if kept:
        state = safetensors.torch.load_file(tmp_path / "run" / STATE)
        assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


def test_a_lack_of_memory_is_told_once_and_changes_nothing_but_time(
    tlkit: Tlkit, arguments: Callable[..., tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    forward = trainer_module.Supervised.forward

    def tight(self: Any, images: Any, labels: Any) -> Any:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, images, labels)

    options = ("finetune", "--strategy", "full", "--epochs", 2, "--optimizer", "sgd", "--lr", 1e-3)
    assert tlkit(*arguments(tmp_path / "whole", *options), "--quiet").code == 0
    with monkeypatch.context() as context:
        context.setattr(trainer_module.Supervised, "forward", tight)
        done = tlkit(*arguments(tmp_path / "tight", *options))
        assert done.code == 0
        assert done.err.count("not enough memory") == 1
        context.setattr(trainer_module.Supervised, "couples_samples", True)
        refused = tlkit(*arguments(tmp_path / "refused", *options), "--quiet")
        assert refused.code == 1
        assert "compares the samples of a batch" in refused.error and "--batch-size" in refused.error
        assert not (tmp_path / "refused").exists()
    first, second = (safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("whole", "tight"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)
