"""Two processes that carry out commands together, as torchrun would start them, over gloo on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SEVERAL = 2


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start(count: int, *arguments: object, folders: Sequence[Path] = ()) -> list[subprocess.Popen[str]]:
    """Start one Python command line in so many processes; each in a folder of its own, where these are given."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            cwd=folders[rank] if folders else None,
            **pipes,
        )
        for rank in range(count)
    ]


def ended(started: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """What processes have printed, once they have ended."""
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=500)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done


@pytest.fixture(scope="session")
def several() -> Callable[..., list[subprocess.Popen[str]]]:
    """``several(3, "-m", "tlkit", ...)`` starts three processes."""
    return start


@pytest.fixture(scope="session")
def printed() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """``printed(several(...))``: how they ended, and what they have printed."""
    return ended


@pytest.fixture(scope="session")
def together() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """``together("-m", "tlkit", ...)`` in two processes."""
    return lambda *arguments, folders=(): ended(start(SEVERAL, *arguments, folders=folders))


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., list[str]]:
    """``torchrun(2, "finetune", ..., restarts=1)`` gives the command line of a job."""

    def command(count: int, *arguments: object, restarts: int = 0) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", count, "--max-restarts", restarts]
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        return [sys.executable, *map(str, [*launcher, *place, "--monitor-interval", "0.2", "-m", "tlkit", *arguments])]

    return command


@pytest.fixture(scope="session")
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
