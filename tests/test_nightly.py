"""``recipes/nightly.sh``: what it does in a night, and after one that was stopped; and how cron starts it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlkit.cli.app import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "nightly.sh"
CRON = ROOT / "recipes" / "nightly.cron"
NEEDED = ("bash", "flock", "setsid")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"{', '.join(NEEDED)} are of Linux")

# Stands for tlkit: notes what it is asked for; the command HANGS waits for SIGTERM, FAILS ends with CODE.
STAND_IN = """#!/bin/bash
echo "$*" >> said
for word; do [[ ${last:-} == --out ]] && out=$word; last=$word; done
if [[ $1 == "${HANGS:-}" ]]; then
  if [[ $1 == finetune ]]; then mkdir -p "$out"; touch "$out/recipe.yaml"; fi
  trap 'echo "{}"; exit 143' TERM
  echo $$ > hangs.new; mv hangs.new hangs
  while :; do sleep 0.02; done
fi
if [[ $1 == "${FAILS:-}" ]]; then echo '{"exit_code": 1}'; echo "tlkit: error: photo.jpg: broken" >&2; exit "$CODE"; fi
echo '{"metrics": {"images": 8, "top1": 0.875, "top1_ci95": [0.5, 0.9]}}'
"""


class Nights:
    """A folder with photos, photos to label, and nights; ``tlkit`` is what the file of that name in it does."""

    def __init__(self, home: Path, tlkit: str) -> None:
        self.home, self.nights = home, home / "nights"
        for name in ("photos", "new"):
            (home / name).mkdir(exist_ok=True)
        (home / "tlkit").write_text(tlkit)
        (home / "tlkit").chmod(0o755)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        words = [SCRIPT, "photos", "new", "nights", *options]
        path = f"{self.home}{os.pathsep}{os.environ['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment
        return subprocess.Popen(words, cwd=self.home, env=env, text=True, start_new_session=True, **pipes)

    def run(self, *options: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a night."""
        process = self.start(*options, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def wait_for(self, path: str) -> None:
        while not list(self.home.glob(path)):
            time.sleep(0.01)

    @property
    def said(self) -> list[str]:
        """The command of each call."""
        return [line.partition(" ")[0] for line in (self.home / "said").read_text().splitlines()]

    @property
    def folders(self) -> list[Path]:
        return sorted(path for path in self.nights.iterdir() if path.is_dir())


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "photo.jpg").touch()
    return Nights(tmp_path, STAND_IN)


STEPS = ["check-data", "finetune", "evaluate", "predict"]


def test_a_night_takes_its_steps_and_keeps_what_they_say(nights: Nights) -> None:
    code, out, err = nights.run("--strategy", "probe")
    (night,) = nights.folders
    assert (code, err) == (0, "")
    assert out == f"nights/{night.name}: done, top-1 0.875\n"
    assert nights.said == STEPS
    for step in STEPS:
        assert json.loads((night / f"{step}.json").read_text())["metrics"]["top1"] == 0.875
    assert (night / "exit-code").read_text() == "0\n"
    finetune = (nights.home / "said").read_text().splitlines()[1]
    begin, out = f"nights/{night.name}/clean.csv", f"nights/{night.name}/run"
    assert finetune == f"finetune {begin} --test-fraction 0.2 --out {out} --strategy probe --json"


def test_without_new_photos_none_are_labelled(nights: Nights) -> None:
    (nights.home / "new" / "photo.jpg").unlink()
    assert nights.run()[0] == 0
    assert nights.said == STEPS[:-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("step", ["check-data", "finetune", "predict"])
def test_a_stopped_night_is_gone_on_with(nights: Nights, number: int, code: int, step: str) -> None:
    """The whole group gets the signal, as from a terminal or a batch system."""
    process = nights.start(HANGS=step)
    nights.wait_for("hangs")
    os.killpg(process.pid, number)
    if number == signal.SIGKILL:  # tlkit has a session of its own: it dies too where the machine does
        os.kill(int((nights.home / "hangs").read_text()), number)
        subprocess.run(["flock", nights.nights / ".lock", "true"], check=True)  # its last child has ended
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    (night,) = nights.folders
    if code > 0:
        assert err == f"nightly.sh: nights/{night.name}: stopped; the next night goes on with it\n"
    done = len(nights.said)
    assert nights.run("--strategy", "probe")[0] == 0
    assert nights.folders == [night], "the same night"
    assert nights.said[done:] == STEPS[STEPS.index(step) :]
    resumed = f"finetune --resume nights/{night.name}/run --json" in (nights.home / "said").read_text().splitlines()
    assert resumed == (step == "finetune")


@pytest.mark.parametrize(("step", "code"), [("check-data", 1), ("finetune", 2)])
def test_a_mistake_ends_the_night_with_its_line_and_the_next_begins_anew(nights: Nights, step: str, code: int) -> None:
    found, out, err = nights.run(FAILS=step, CODE=str(code))
    assert (found, out, err) == (code, "", "nightly.sh: tlkit: error: photo.jpg: broken\n")
    (night,) = nights.folders
    assert json.loads((night / f"{step}.json").read_text()) == {"exit_code": 1}
    night.rename(night.with_name("20260101-013000"))  # the next one may come within the same second
    assert nights.run()[0] == 0
    assert len(nights.folders) == 2


def test_a_process_that_the_system_killed_is_a_mistake_that_is_gone_on_with(nights: Nights) -> None:
    code, _, err = nights.run(FAILS="finetune", CODE="137")
    assert code == 1
    assert "tlkit finetune ended with 137" in err
    assert nights.run()[0] == 0
    assert len(nights.folders) == 1


def test_never_two_at_once(nights: Nights) -> None:
    first = nights.start(HANGS="finetune")
    nights.wait_for("hangs")
    code, _, err = nights.run()
    assert (code, err) == (1, "nightly.sh: nights: another night is still at work there; wait, or stop it\n")
    first.terminate()
    first.communicate(timeout=60)
    assert nights.run()[0] == 0


def test_what_cannot_be_is_one_line(nights: Nights) -> None:
    asked = subprocess.run([SCRIPT, "photos"], capture_output=True, text=True, cwd=nights.home, check=False)
    assert (asked.returncode, asked.stderr) == (
        2,
        "nightly.sh: usage: nightly.sh PHOTOS NEW NIGHTS [OPTION of tlkit finetune ...]\n",
    )
    assert nights.run(TLKIT="no-such-program")[2].startswith("nightly.sh: no-such-program: not found; ")
    (nights.home / "photos").rmdir()
    assert nights.run() == (1, "", "nightly.sh: photos: does not exist; give a folder of class folders\n")
    assert not nights.nights.exists()


def test_cron_lines_are_of_commands_that_there_are() -> None:
    lines = [line for line in CRON.read_text().splitlines() if not line.startswith("#")]
    names = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]+=", line))
    assert "/bin" in names["PATH"].split(":")
    jobs = [line.split(maxsplit=5) for line in lines if line[0].isdigit()]
    assert len(names) + len(jobs) == len(lines)
    for *when, command in jobs:
        assert all(re.fullmatch(r"\*|\d+", field) for field in when)
        assert "%" not in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    nightly, cache = (shlex.split(job[-1].partition(" > ")[0]) for job in jobs)
    assert SCRIPT.name in " ".join(nightly)
    for words, command in ((nightly, "finetune"), (cache, "cache")):
        options = {option for one in _command(command).params for option in one.opts}
        assert {word for word in words if word.startswith("--")} - {"--signal=TERM"} <= options


def _command(name: str) -> Any:
    import typer

    return typer.main.get_command(app).commands[name]


REAL = f"""#!/bin/bash
exec {shlex.quote(sys.executable)} -m tlkit "$@"
"""


@pytest.mark.slow
def test_real_nights_on_made_images(
    tmp_path: Path, make_shapes: Callable[..., Path], small: tuple[str, ...], read_csv: Callable[[Path], Any]
) -> None:
    """One is left alone, one stopped once it has learnt something and gone on with: both end with the same network."""
    models = {}
    for name in ("whole", "stopped"):
        home = tmp_path / name
        make_shapes(home / "photos")
        (home / "photos" / "disc" / "broken.jpg").write_bytes(b"no image")
        make_shapes(home / "new", images=2, seed=5)
        nights = Nights(home, REAL)
        options = (*small, "--strategy", "full", "--epochs", "12", "--precision", "fp32", "--workers", "0")
        if name == "stopped":
            process = nights.start(*options)
            nights.wait_for("nights/*/run/metrics.jsonl")
            process.terminate()
            process.communicate(timeout=120)
            assert process.returncode == 143
            (night,) = nights.folders
            assert (night / "run" / "state" / "checkpoint.safetensors").is_file()
        code, out, err = nights.run(*options)
        assert (code, err) == (0, ""), err
        (night,) = nights.folders
        assert out.startswith(f"nights/{night.name}: done, top-1 ")
        assert json.loads((night / "check-data.json").read_text())["manifest"]["dropped"] == 1
        assert json.loads((night / "finetune.json").read_text())["metrics"]["test"]["images"] == 6
        assert json.loads((night / "evaluate.json").read_text())["metrics"]["images"] == 6
        assert len(json.loads((night / "predict.json").read_text())["predictions"]) == 6
        assert len(read_csv(night / "labels.csv")) == 6
        models[name] = (night / "run" / "model.safetensors").read_bytes()
    assert models["stopped"] == models["whole"]
