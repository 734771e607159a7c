"""A step as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tlkit.pipelines.child import Ended, run_child

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_what_it_says_is_passed_on_and_logged(tmp_path: Path) -> None:
    said: list[str] = []
    program = (
        "import sys; print('a', file=sys.stderr); sys.stderr.buffer.write(b'\\xff\\n'); print('noise\\n{\"x\": 1}')"
    )
    ended = run_child(python(program), tmp_path / "log", said.append, ())
    assert ended == Ended(0, {"x": 1})
    assert said == ["a", "\\xff"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in lines[1:]] == said
    assert run_child(python("raise SystemExit(3)"), tmp_path / "log", said.append, ()).code == 3
    assert len((tmp_path / "log").read_text().splitlines()) > len(lines), "a second attempt is added"


@pytest.mark.parametrize(
    ("code", "told", "line"),
    [
        (1, {"error": {"what": "bad", "where": "x", "remedy": "mend it"}}, "x: bad; mend it"),
        (1, {"error": {"what": "bad", "where": "", "remedy": ""}}, "bad"),
        (1, {"findings": {}}, "its checks found something"),
        (-9, {}, "it was killed, perhaps for lack of memory"),
        (-11, {}, "it was ended by SIGSEGV"),
        (1, {}, "it did not say why"),
    ],
)
def test_why_it_failed_is_one_line(code: int, told: dict[str, object], line: str) -> None:
    assert Ended(code, told).error == line


@unix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_told_once_to_end_and_waited_for(tmp_path: Path, number: int) -> None:
    """The signal comes to both, as from a terminal or a batch system."""
    step = """
import signal, sys, time
def end(*_):
    print("saving", file=sys.stderr, flush=True)
    time.sleep(0.3)
    print("saved", file=sys.stderr, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_IGN), end()))
print("ready", file=sys.stderr, flush=True)
time.sleep(30)
"""
    program = f"""
import signal, sys
from pathlib import Path
from tlkit.pipelines.child import run_child
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
run_child([sys.executable, "-c", {step!r}], Path({str(tmp_path / "log")!r}), lambda line: print(line, flush=True), ())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        python(program),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    process.wait(timeout=20)
    said = [line.split(" ")[-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert said[-3:] == ["ready", "saving", "saved"]


@unix
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it goes on by itself")
def test_it_is_told_to_end_where_the_pipeline_is_killed(tmp_path: Path) -> None:
    step = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(30)"
    program = f"""
import sys
from pathlib import Path
from tlkit.pipelines.child import run_child
run_child([sys.executable, "-c", {step!r}], Path({str(tmp_path / "log")!r}), lambda line: print(line, flush=True), ())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    other = int(process.stdout.readline())
    descriptor = os.pidfd_open(other)
    process.kill()
    process.wait()
    import select

    assert select.select([descriptor], [], [], 10)[0], "it has ended"
    os.close(descriptor)
