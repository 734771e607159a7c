"""Extracting features by processes that are killed, or of which one fails."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tlkit.data.feature_log import ROWS
from tlkit.data.unfinished_features import LOG, working_folder

pytestmark = pytest.mark.slow

SLOWLY = """
import errno, os, sys, time
from tlkit import processes
from tlkit.cli.app import run
from tlkit.data import feature_log, loading

def slow(*arguments, decode=loading.decode, **named):
    time.sleep(0.1)
    return decode(*arguments, **named)

def full(self, *arguments, add=feature_log.Log.add):
    if processes.rank() == 1 and self.count:
        raise OSError(errno.ENOSPC, "No space left on device", "features.f32")
    return add(self, *arguments)

loading.decode = slow
if sys.argv.pop(1) == "full":
    feature_log.Log.add = full
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def images(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images of three classes."""
    return make_shapes(tmp_path_factory.mktemp("kept") / "data", images=(13, 12, 12))


@pytest.fixture(scope="module")
def words(images: Path, small: tuple[str, ...]) -> tuple[Any, ...]:
    """The command, but for its --out."""
    return ("extract-features", images, *small, "--precision", "fp32", "--batch-size", 2, "--workers", 0, "--out")


@pytest.fixture(scope="module")
def undisturbed(tlkit: Callable[..., Any], words: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("kept") / "whole.parquet"
    done = tlkit(*words, out)
    assert done.code == 0, done.err
    return out


def done_by(out: Path) -> list[list[str]]:
    """Of each log the images that it holds, but for a last line that is torn."""
    logs = []
    for path in sorted(working_folder(out).glob(f"{LOG}*/{ROWS}")):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        logs.append([image for line in lines for image in json.loads(line)["images"]])
    return logs


def killed(started: list[subprocess.Popen[str]], out: Path, moment: float) -> None:
    """Let processes work until one of them has done something new, and a moment longer."""
    before = sum(map(len, done_by(out)))
    while sum(map(len, done_by(out))) == before:
        assert all(process.poll() is None for process in started), [process.communicate() for process in started]
        time.sleep(0.01)
    time.sleep(moment)
    for process in started:
        process.kill()
    for process in started:
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before"
    assert not out.exists()


@pytest.mark.parametrize(("counts", "seed"), [((2, 2, 1), 0), ((1, 2, 3), 1), ((3, 2, 2), 2)])
def test_what_is_killed_is_gone_on_with_by_any_number_of_processes(
    several: Any,
    printed: Any,
    words: tuple[Any, ...],
    undisturbed: Path,
    tmp_path: Path,
    counts: tuple[int, ...],
    seed: int,
) -> None:
    """Killed twice; what was done before is not done again, and the rows are those of one left alone."""
    out, chance = tmp_path / "features.parquet", random.Random(seed)
    *begin, last = counts
    for count in begin:
        killed(several(count, "-c", SLOWLY, "slow", *words, out), out, chance.uniform(0, 0.4))
    kept = done_by(out)
    images = [image for log in kept for image in log]
    assert 2 <= len(images) < 37 and len(set(images)) == len(images)
    ended = printed(several(last, "-m", "tlkit", "extract-features", "--resume", out))
    for done in ended:
        assert done.returncode == 0, done.stderr
    assert f"going on: {len(images)} of 37 images are done" in ended[0].stderr
    assert out.is_dir() == (last > 1)
    found, wanted = pyarrow.parquet.read_table(out), pyarrow.parquet.read_table(undisturbed)
    assert found.equals(wanted) and found.schema.metadata == wanted.schema.metadata
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_one_that_fails_ends_all_at_once(
    several: Any, printed: Any, words: tuple[Any, ...], undisturbed: Path, tmp_path: Path
) -> None:
    """One line tells what the other had to say; what both had done is kept."""
    out = tmp_path / "features.parquet"
    done = printed(several(2, "-c", SLOWLY, "full", *words, out, "--quiet"))
    assert [one.returncode for one in done] == [1, 1], done[0].stderr + done[1].stderr
    assert done[0].stderr.splitlines() == [
        f"note: go on with: tlkit extract-features --resume {out}",
        "tlkit: error: process 1 of 2: features.f32: no space left on the disk; free some space, or give --out on "
        "another disk",
    ]
    assert done[1].stderr == ""
    first, second = done_by(out)
    assert 0 < len(first) < 18 and len(second) == 2, "the first one had not come to its end"
    for one in printed(several(2, "-m", "tlkit", "extract-features", "--resume", out, "--quiet")):
        assert one.returncode == 0, one.stderr
    assert pyarrow.parquet.read_table(out).equals(pyarrow.parquet.read_table(undisturbed))
