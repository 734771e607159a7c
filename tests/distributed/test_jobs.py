"""Jobs of torchrun that lose a process, are stopped, started again, go on with another number, or span machines."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tlkit.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

LONG = ("--strategy", "full", "--epochs", 16, "--bn", "train", "--optimizer", "sgd", "--lr", "0.003", "--ema", 0.9)
OPTIONS = (*LONG, "--augment", "light", "--batch-size", 12, "--precision", "fp32", "--workers", 0, "--quiet")
OFTEN = ("--checkpoint-every", "2steps")
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def images(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("jobs") / "data", images=8)


@pytest.fixture(scope="module")
def begin(images: Path, small: tuple[str, ...]) -> tuple[Any, ...]:
    """The command, but for its --out."""
    return ("finetune", images, *small, *OPTIONS, *OFTEN, "--out")


@pytest.fixture(scope="module")
def undisturbed(torchrun: Any, begin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = tmp_path_factory.mktemp("jobs") / "undisturbed"
    finish(torchrun(2, *begin, run))
    return run


def finish(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stderr


def started(command: list[str], run: Path, after: int) -> subprocess.Popen[str]:
    """A job that has come so far that a state has been stored ``after`` times."""
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state, seen = run / "state" / "checkpoint.safetensors", set()
    while len(seen) < after:
        assert job.poll() is None, job.communicate()[1]
        if state.is_file():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.002)
    return job


def process(job: subprocess.Popen[str], rank: int) -> psutil.Process:
    return next(one for one in psutil.Process(job.pid).children() if one.environ().get("RANK") == str(rank))


def assert_alike(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same steps at the same rates; what is learnt differs by rounding, which many steps amplify."""
    for one, other in zip(found, wanted, strict=True):
        assert (one["step"], one["rates"]) == (other["step"], other["rates"])
        assert one["losses"]["loss"] == pytest.approx(other["losses"]["loss"], rel=0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_costs_nothing_where_torchrun_starts_the_job_again(
    torchrun: Any, begin: Any, undisturbed: Path, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    job = started(torchrun(2, *begin, run, restarts=1), run, after=2)
    process(job, rank).kill()
    _, told = job.communicate(timeout=500)
    assert job.returncode == 0, told
    assert (run / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


def test_a_killed_process_ends_the_job_and_leaves_a_whole_state(
    torchrun: Any, tlkit: Any, begin: Any, undisturbed: Path, tmp_path: Path, lines: Any
) -> None:
    """What is then gone on with by a single process learns, but for rounding, the same."""
    run = tmp_path / "run"
    job = started(torchrun(2, *begin, run), run, after=2)
    process(job, 1).kill()
    _, told = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "tlkit: error: another process of this job has ended; see what it said; go on with --resume" in told
    stored = read_checkpoint(run)
    assert stored is not None and 0 < stored.values["state"]["phase"]["place"]["epoch"] < 16
    assert tlkit("finetune", "--resume", run, *OFTEN, "--quiet").code == 0
    assert_alike(lines(run / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl"))


def test_a_job_that_is_stopped_goes_on_to_the_same_bytes(
    torchrun: Any, begin: Any, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = started(torchrun(2, *begin, run, "--checkpoint-every", "1h"), run, after=0)
    while not (run / "metrics.jsonl").is_file():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=200)
    assert job.returncode != 0
    assert f"go on with: tlkit finetune --resume {run}" in told
    assert read_checkpoint(run) is not None
    finish(torchrun(2, "finetune", "--resume", run, "--quiet"))
    assert (run / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()


def test_one_process_that_is_told_to_stop_stops_all(torchrun: Any, begin: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = started(torchrun(2, *begin, run, "--checkpoint-every", "1h"), run, after=0)
    while not (run / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process(job, 1).terminate()
    _, told = job.communicate(timeout=200)
    assert job.returncode != 0 and "tlkit: error: terminated" in told
    assert read_checkpoint(run) is not None


def test_a_run_of_one_goes_on_with_two(
    torchrun: Any, begin: Any, undisturbed: Path, tmp_path: Path, lines: Any
) -> None:
    run = tmp_path / "run"
    job = started([torchrun(1)[0], "-m", "tlkit", *map(str, begin), str(run)], run, after=2)
    job.kill()
    job.communicate()
    finish(torchrun(2, "finetune", "--resume", run, "--quiet"))
    assert_alike(lines(run / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl"))


def test_two_machines(torchrun: Any, images: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    """As two agents that find each other by a port; each could be a machine of its own, with a cache of its own."""
    run = tmp_path / "run"
    words = torchrun(1, "unfreeze", images, *small, "--stages", 2, "--epochs-per-stage", 1, "--json", "--out", run)
    words[words.index("-m", 3) : words.index("-m", 3)] = ["--nnodes", "2", "--rdzv-id", "job"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(words, **pipes) for _ in range(2)]
    printed = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    (told,) = (json.loads(out) for out, _ in printed if out)
    assert told["run"] == str(run) and (run / "report.html").is_file()
