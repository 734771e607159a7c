"""One step as a process of its own: its memory is freed when it ends, and its crash is no other's."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tlkit

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Args:
        code: Its exit code, negative for the signal that killed it.
        told: The JSON object that it printed; empty where it printed none.
    """

    code: int
    told: dict[str, Any]

    @property
    def error(self) -> str:
        """What went wrong, in one line."""
        given = self.told.get("error")
        if isinstance(given, dict):
            line = f"{given['where']}: {given['what']}" if given.get("where") else str(given["what"])
            return f"{line}; {given['remedy']}" if given.get("remedy") else line
        if self.told:
            return "its checks found something"  # check-data --strict, doctor
        if self.code == -9:
            return "it was killed, perhaps for lack of memory"
        return "it did not say why" if self.code > 0 else f"it was ended by {signal.Signals(-self.code).name}"


def command_line(words: Sequence[str], processes: int = 1) -> list[str]:
    """How ``tlkit WORDS`` is called, by this interpreter and with this package."""
    # not with whatever is called tlkit, or like a module of Python's, in the folder that one happens to stand in
    package = Path(tlkit.__file__).resolve().parents[1]
    python = [sys.executable, *([] if package == Path.cwd() else ["-P"])]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [*python, *several, "-m", "tlkit", *words]


def run_child(command: Sequence[str], log: Path, tell: Callable[[str], None], descriptors: Sequence[int]) -> Ended:
    """Run one command line to its end.

    Where this process is stopped (Ctrl-C, SIGTERM) it waits for the other, which stores its state.

    Args:
        command: The whole command line.
        log: What the process says is added to this file, each line with the time.
        tell: Is given each line, too.
        descriptors: What the process inherits.
    """
    environment = os.environ | {"PYTHONPATH": _search_path()}
    stopping = threading.Event()
    with tempfile.TemporaryFile() as out, log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=tuple(descriptors),
            preexec_fn=_preparation(),  # noqa: PLW1509  # no other thread runs now
        )
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, file, tell, stopping), daemon=True)
        reader.start()
        try:
            process.wait()
        except BaseException:
            stopping.set()
            _stop(process)
            raise
        finally:
            reader.join(timeout=10)  # a process that the step has left behind may hold the other end for longer
        out.seek(0)
        ended = Ended(process.returncode, _object_in(out.read()))
        if ended.code and ended.told:
            file.write(json.dumps(ended.told, indent=2) + "\n")
        return ended


def _pass_on(lines: IO[bytes], file: IO[str], tell: Callable[[str], None], stopping: threading.Event) -> None:
    for raw in lines:
        line = raw.decode(errors="backslashreplace").rstrip()
        if file.closed:
            return
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        file.flush()
        if not stopping.is_set():
            tell(line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the process store its state; a person who asks twice is not kept waiting."""
    try:
        process.terminate()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _object_in(out: bytes) -> dict[str, Any]:
    for line in reversed(out.decode(errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _search_path() -> str:
    """This package is found first only where Python would not find it by itself."""
    package, given = str(Path(tlkit.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")
    installed = "site-packages" in package or "dist-packages" in package
    return given if installed or package in given.split(os.pathsep) else os.pathsep.join(filter(None, (package, given)))


def _preparation() -> Callable[[], None] | None:
    """What the process does before it becomes tlkit.

    It leaves Ctrl-C, which a terminal sends to both, to this process: told twice, it would break off the saving of its
    state. On Linux it is told to end where this process is killed.
    """
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # killed in between
                os._exit(143)

    return prepare
