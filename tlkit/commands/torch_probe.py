"""What torch and torchvision tell on import: in a process of its own, which a broken build may take down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120.0
MARK = "tlkit-probe "
GIB = 2**30


@dataclass(frozen=True)
class Answer:
    """What was told about one thing, or why nothing could be told.

    Args:
        detail: What was found.
        remedy: What to do to have more.
        error: The exception, or how the process ended; empty where all is well.
    """

    detail: str = ""
    remedy: str = ""
    error: str = ""


def start() -> subprocess.Popen[str]:
    """Start the process that imports torch."""
    # it sees the modules that any other command would see, in the same order, and adds no folder of its own (-P)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-c", "from tlkit.commands.torch_probe import probe; probe()"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")


def answers(process: subprocess.Popen[str]) -> dict[str, Answer]:
    """Wait for the process; what it did not live to tell about has its end as the error, the rest is unknown."""
    try:
        told, complaints = process.communicate(timeout=SECONDS)
        last = complaints.strip().splitlines()[-1:]
        end = last[0] if process.returncode == 1 and last else f"the import ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        end = f"no answer within {SECONDS:.0f} s"
    lines = [line.removeprefix(MARK) for line in told.splitlines() if line.startswith(MARK)]  # libraries print, too
    found = {name: Answer(**answer) for name, answer in map(json.loads, lines)}
    for name in ASKED:
        failed = any(answer.error for answer in found.values())
        found.setdefault(name, Answer(detail="unknown: torch could not be asked") if failed else Answer(error=end))
    return found


def probe() -> None:
    """Tell about everything in `ASKED` on a line of its own, so that a crash loses only the rest."""
    for name, ask in ASKED.items():
        try:
            answer = ask()
        except Exception as error:  # whatever a broken build raises is the finding
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps([name, answer]), flush=True)
        if name == "torch" and "error" in answer:  # a second try at a half-imported torch fails in misleading ways
            break


def _torch() -> dict[str, str]:
    import torch

    return {"detail": torch.__version__}


def _torchvision() -> dict[str, str]:
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # compiled code, which an import alone may not reach
    return {"detail": torchvision.__version__}


def _cpu() -> dict[str, str]:
    import torch

    from tlkit.compute import native_bf16

    bf16 = "native bf16" if native_bf16("cpu") else "no native bf16: computes in fp32"
    return {"detail": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {bf16}"}


def _cuda() -> dict[str, str]:
    import torch

    from tlkit.compute import native_bf16

    with warnings.catch_warnings(record=True) as caught:  # torch tells of an old driver in a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    build = f"torch build with CUDA {torch.version.cuda}" if torch.version.cuda else "torch build without CUDA"
    if not available:
        why = "".join(f"; {warning.message}" for warning in caught)
        there = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
        remedy = "to use the GPU, update its driver or install torch and torchvision builds that fit it (pytorch.org)"
        return {"detail": f"none ({build}){why}", "remedy": remedy if there or why else ""}
    found = []
    for index in range(torch.cuda.device_count()):
        (torch.ones(1, device=f"cuda:{index}") + 1).item()  # fails where the build has no code for this GPU
        about = torch.cuda.get_device_properties(index)
        found.append(f"{about.name} ({about.total_memory / GIB:.0f} GiB, capability {about.major}.{about.minor})")
    bf16 = "native bf16" if native_bf16("cuda") else "no native bf16: computes in fp32"
    return {"detail": f"{', '.join(found)}, {build}, {bf16}"}


def _mps() -> dict[str, str]:
    import torch

    if not torch.backends.mps.is_available():
        return {"detail": "none"}
    (torch.ones(1, device="mps") + 1).item()
    return {"detail": "available"}


ASKED: dict[str, Callable[[], dict[str, str]]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "cpu": _cpu,
    "cuda": _cuda,
    "mps": _mps,
}
