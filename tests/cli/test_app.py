"""The command line as a whole: exit codes, errors as one line, JSON whatever happens, signals, what is imported."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tlkit
from tlkit.cli import app as app_module
from tlkit.cli.app import run
from tlkit.errors import TlkitError, UsageError

HEAVY = ("torch", "torchvision", "timm", "accelerate", "sklearn", "pandas", "pyarrow", "matplotlib", "numpy")


def tlkit_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tlkit", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``tlkit demo`` with this function in the place of the real command."""
    monkeypatch.setattr(app_module.signal, "signal", lambda *_: None)

    def call(function: Any, *arguments: str) -> int:
        monkeypatch.setattr(app_module, "_import_command", lambda _: SimpleNamespace(demo=function))
        return run(["demo", *arguments])

    return call


def raising(error: BaseException) -> Any:
    def command(**_: Any) -> dict[str, Any]:
        raise error

    return command


# As a user calls it


def test_version() -> None:
    done = tlkit_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tlkit {tlkit.__version__}\n", "")


def test_called_bare_it_shows_its_help() -> None:
    bare, asked = tlkit_process(), tlkit_process("--help")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == asked.stdout
    assert "finetune" in bare.stdout


def test_help_of_everything_imports_nothing_heavy() -> None:
    code = f"""
import sys
from tlkit.cli.app import app, run
assert run(["--help"]) == 0
for info in app.registered_commands:
    assert run([info.name or info.callback.__name__.replace("_", "-"), "--help"]) == 0
print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["finetun", "photos"], 2, "did you mean 'finetune'?"),
        (["finetune", "photos", "--modle", "resnet18"], 2, "did you mean '--model'"),
        (["finetune", "photos", "--on-error", "fial"], 1, "did you mean 'fail'?"),
        (["finetune", "photos", "--seed", "x"], 2, "'--seed'"),
        (["finetune", "photos", "--seed", "-1"], 1, "--seed: -1 is too small; give at least 0"),
        (["finetune", "photos", "--seed"], 2, "--seed"),
        (["finetune", "photos", "and", "more"], 2, "and more"),
        (["predict"], 2, "Missing argument"),
        (["finetune", "photos", "--recipe", "no/such.yaml"], 1, "no/such.yaml: the recipe cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_mistake_is_one_line_with_its_remedy(arguments: list[str], code: int, told: str, as_json: bool) -> None:
    done = tlkit_process(*arguments, *(["--json"] if as_json else []))
    assert done.returncode == code
    assert done.stderr.startswith("tlkit: error: ")
    assert done.stderr.count("\n") == 1
    assert told.lower() in done.stderr.lower()
    if not as_json:
        assert done.stdout == ""
        return
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert (answer["command"], answer["version"], answer["exit_code"]) == (arguments[0], tlkit.__version__, code)
    assert answer["error"]["what"]


# What a command returns and raises


def test_the_result_has_the_fields_of_all_commands(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(lambda **_: {"images": 3}, "--json") == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err == ""
    assert (answer["command"], answer["version"], answer["images"]) == ("demo", tlkit.__version__, 3)
    assert answer["seconds"] >= 0
    assert "exit_code" not in answer


def test_a_command_may_end_with_a_code_of_its_own(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(lambda **_: {"images": 3, "exit_code": 1}, "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 3
    assert printed.err == "", "its result says what is wrong: no error besides"


def test_a_command_gets_its_groups_and_a_console(demo: Any) -> None:
    got: dict[str, Any] = {}

    def command(**groups: Any) -> dict[str, Any]:
        got.update(groups)
        return {}

    assert demo(command, "--quiet", "--seed", "4") == 0
    assert set(got) == {"compute", "output", "console"}
    assert got["compute"].seed == 4
    assert got["console"].quiet


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TlkitError("no images", where="photos", remedy="add some"), 1, "photos: no images; add some"),
        (TlkitError("breaks\nthe line", where="a\nb"), 1, "a b: breaks the line"),
        (UsageError("nothing to do", remedy="give DATA"), 2, "nothing to do; give DATA"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (app_module._Terminated(), 143, "terminated"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            1,
            "runs/a: no space left on the disk; free some space, or give --out on another disk",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_an_error_is_one_line_and_with_json_one_object(
    demo: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str, as_json: bool
) -> None:
    assert demo(raising(error), *(["--json"] if as_json else [])) == code
    printed = capsys.readouterr()
    assert printed.err == f"tlkit: error: {line}\n"
    if as_json:
        assert printed.out.count("\n") == 1
        assert json.loads(printed.out)["exit_code"] == code
    else:
        assert printed.out == ""


def test_findings_stand_before_the_line_and_in_the_object(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = TlkitError("2 bad files", where="photos", remedy="remove them", details=["a.jpg: cut off", "b.jpg: empty"])
    assert demo(raising(error), "--json") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "tlkit: a.jpg: cut off",
        "tlkit: b.jpg: empty",
        "tlkit: error: photos: 2 bad files; remove them",
    ]
    told = {"what": "2 bad files", "where": "photos", "remedy": "remove them"}
    assert json.loads(printed.out)["error"] == told | {"details": ["a.jpg: cut off", "b.jpg: empty"]}


@pytest.mark.parametrize("error", [ValueError("ours"), PermissionError(errno.EACCES, "denied"), AssertionError()])
def test_a_programmers_mistake_is_not_dressed_up(demo: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        demo(raising(error))


# Signals and pipes

SLEEPER = """
import signal, sys, time
from types import SimpleNamespace
from tlkit.cli import app

def demo(**_):
    try:  # before the word: the signal may come right after it
        print("ready", file=sys.stderr, flush=True)
        time.sleep(120)
    finally:
        print("saved", file=sys.stderr, flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
app._import_command = lambda _: SimpleNamespace(demo=demo)
sys.exit(app.run(["demo", "--json"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_stopped_command_saves_and_says_so(number: signal.Signals, code: int) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert process.returncode == code
    assert stderr.splitlines()[0] == "saved"
    assert stderr.splitlines()[1].startswith("tlkit: error: ")
    assert len(stderr.splitlines()) == 2
    assert json.loads(stdout)["exit_code"] == code


BOTH = """
import os, signal, sys
from types import SimpleNamespace
from tlkit.cli import app

def demo(**_):
    signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does where decoding processes run
    both = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

app._import_command = lambda _: SimpleNamespace(demo=demo)
sys.exit(app.run(["demo"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_a_decoding_process_that_ends_at_the_same_moment_adds_nothing_to_what_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr.splitlines() == ["tlkit: error: terminated"]


TALKER = """
import sys
from types import SimpleNamespace
from tlkit.cli import app

def demo(console, **_):
    for _ in range(20_000):
        console.line("x" * 60)
    return {"rows": ["x" * 60] * 20_000}

app._import_command = lambda _: SimpleNamespace(demo=demo)
sys.exit(app.run(["demo", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["human", "json"])
def test_a_reader_that_leaves_early_causes_no_noise(arguments: list[str]) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", TALKER, *arguments], stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        complaints = process.stderr.read()
    assert complaints == b""


def test_a_name_in_no_encoding_is_printed_all_the_same() -> None:
    code = """
import sys
from types import SimpleNamespace
from tlkit.cli import app

def demo(console, **_):
    console.table("Files", ["path"], [["caf\\udce9.jpg"]])
    return {"path": "caf\\udce9.jpg"}

app._import_command = lambda _: SimpleNamespace(demo=demo)
sys.exit(app.run(["demo", *sys.argv[1:]]))
"""
    command = [sys.executable, "-X", "utf8", "-c", code]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    human = subprocess.run(command, capture_output=True, env=strict, check=True)
    assert "caf\\udce9.jpg" in human.stdout.decode()
    script = subprocess.run([*command, "--json"], capture_output=True, env=strict, check=True)
    assert json.loads(script.stdout.decode())["path"] == "caf\udce9.jpg"


# An installation that does not fit together

BROKEN = {
    "operators": ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
    "symbols": ("torchvision", "raise ImportError('/lib/_C.so: undefined symbol: _ZN5torch3jit17parseSchema')"),
    "CUDA library": ("torch", "raise OSError('libcudart.so.12: cannot open shared object file: No such file')"),
    "older torch": ("torchvision", "raise AttributeError(\"module 'torch.library' has no attribute 'register_fake'\")"),
    "missing": ("torchvision", "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"),
    "other package": ("timm", "import nowhere_to_be_found"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_installation_is_one_line_that_names_doctor(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, body = BROKEN[kind]
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(body)
    (tmp_path / "demo.py").write_text(f"import {package}\n")
    monkeypatch.setattr(app_module.signal, "signal", lambda *_: None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tlkit.commands.__path__", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name == "tlkit.commands.demo"]:
        monkeypatch.delitem(sys.modules, name)

    assert run(["demo"]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "cannot be imported" in stderr
    assert "run 'tlkit doctor'" in stderr
    assert ("pip install --force-reinstall torch torchvision" in stderr) == (package != "timm")


@pytest.mark.parametrize("body", ["import tlkit.no_such_module", "from tlkit.errors import no_such_name", "1 / 0"])
def test_a_mistake_of_our_own_is_no_broken_installation(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.py").write_text(body)
    monkeypatch.setattr(app_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr("tlkit.commands.__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tlkit.commands.demo", raising=False)
    with pytest.raises((ImportError, ZeroDivisionError)):
        run(["demo"])


# The code


def test_click_is_not_used() -> None:
    """Typer no longer depends on it: what it has of it is its own."""
    package = Path(tlkit.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "click" or "_click" in name], file


def test_every_command_has_a_file_of_its_name() -> None:
    folder = Path(tlkit.__file__).parent / "commands"
    for info in app_module.app.registered_commands:
        assert info.callback is not None
        assert info.callback.__doc__
        assert (folder / f"{info.name or info.callback.__name__}.py").is_file()
