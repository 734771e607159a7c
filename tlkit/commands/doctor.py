"""``tlkit doctor``: check the installation; whatever fails comes with its remedy.

Torch is only ever imported in a process of its own: this command is for the moment at which it cannot be.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tlkit import __version__, config
from tlkit.commands import torch_probe
from tlkit.commands.console import Console
from tlkit.commands.torch_probe import Answer
from tlkit.errors import TlkitError

MIB, GIB = 2**20, 2**30
DISK_NEEDED, DISK_WANTED = 100 * MIB, GIB
SHARED_MEMORY_WANTED = 256 * MIB
HUB_SECONDS = 2.0
EXTRAS = {
    "offline": "public weights without a network",
    "heic": "HEIC photos",
    "onnx": "export to ONNX; predict, evaluate with it",
    "remote": "shards from https://",
    "s3": "shards from s3://",
    "tensorboard": "--track tensorboard",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        ok: False where tlkit cannot do its work; what is merely optional stays true.
        detail: What was found.
        remedy: What to do about it; with ``ok``, what to do to have more.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def doctor(output: config.Output, console: Console) -> dict[str, Any]:
    """Check versions, devices, disk, shared memory, extras and the hub.

    Returns:
        ``checks``, a list of ``{name, ok, detail, remedy}``; with ``--plan`` ``plan``, a list of ``{name, does}``.
        ``exit_code`` is 1 where a check failed.
    """
    if output.out is not None and output.out.exists():
        raise TlkitError("exists already", where=output.out, remedy="give --out another name")
    if output.plan:
        plan = [{"name": _name(check), "does": (check.__doc__ or "").rstrip(".")} for check in (*CHECKS, *TORCH_CHECKS)]
        console.table("Would be checked", ["check", "does"], [list(row.values()) for row in plan])
        return {"plan": plan}

    console.say("importing torch in a process of its own ...")
    with torch_probe.start() as probe:  # it takes seconds: the other checks are made meanwhile
        checks = [found for check in CHECKS for found in check()]
        answers = torch_probe.answers(probe)
    checks += [found for check in TORCH_CHECKS for found in check(answers)]

    _show(checks, console)
    summary = {"checks": [asdict(check) for check in checks]}
    if output.out is not None:
        _write(output.out, summary)
    return summary | {"exit_code": int(any(not check.ok for check in checks))}


def _show(checks: list[Check], console: Console) -> None:
    rows = [[check.name, "ok" if check.ok else "FAILED", check.detail] for check in checks]
    console.table("tlkit doctor", ["check", "state", "detail"], rows)
    console.line()
    for check in checks:
        if check.remedy:
            console.line(f"{'optional' if check.ok else 'remedy'}: {check.name}: {check.remedy}")
    failed = [check.name for check in checks if not check.ok]
    console.line(f"failed: {', '.join(failed)}; run the remedies above" if failed else "all good")


def _write(path: Path, summary: dict[str, Any]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise TlkitError(
            f"cannot be written ({error.strerror})", where=path, remedy="give --out another path"
        ) from error


# What can be told without torch


def check_python() -> Iterator[Check]:
    """Python is new enough."""
    found = platform.python_version()
    wanted = SpecifierSet(_requires_python())
    ok = wanted.contains(found, prereleases=True)
    remedy = "" if ok else f"install tlkit into an environment with Python {wanted}"
    yield Check("python", ok, f"{found} on {platform.system()} {platform.machine()}, {sys.executable}", remedy)


def check_packages() -> Iterator[Check]:
    """Versions of tlkit and of every package that it needs."""
    installed = _version("tlkit") is not None
    remedy = "" if installed else "pip install -e . (run from a bare checkout, versions cannot be compared)"
    yield Check("tlkit", True, f"{__version__} in {Path(__file__).parents[1]}", remedy)
    for wanted in _requirements():
        found = _version(wanted.name)
        ok = found is not None and wanted.specifier.contains(found, prereleases=True)
        needs = f"tlkit needs {wanted.specifier}" if wanted.specifier else "tlkit needs it"
        detail = found if found is not None and ok else f"{found or 'not installed'}, but {needs}"
        yield Check(wanted.name, ok, detail, "" if ok else _upgrade(wanted))


def check_extras() -> Iterator[Check]:
    """Optional packages: what each adds, and how to install it."""
    for extra, adds in EXTRAS.items():
        remedy = f"pip install 'tlkit[{extra}]'"
        for wanted in _requirements(extra):
            found = _version(wanted.name)
            if found is None:
                yield Check(wanted.name, True, f"not installed (optional: {adds})", remedy)
            elif wanted.specifier.contains(found, prereleases=True):
                yield Check(wanted.name, True, f"{found} ({adds})")
            else:
                yield Check(wanted.name, True, f"{found}, but tlkit needs {wanted.specifier} ({adds})", remedy)


def check_disk() -> Iterator[Check]:
    """Free disk space where runs and temporary files are written."""
    places: list[tuple[str, Callable[[], str], str]] = [
        ("working folder", os.getcwd, "free some space, or give --out on another disk"),
        ("temporary folder", tempfile.gettempdir, "free some space, or set TMPDIR to a folder on another disk"),
    ]
    for name, place, remedy in places:
        try:
            folder = place()
            free = shutil.disk_usage(folder).free
        except OSError as error:  # a working folder that was deleted, no folder for temporary files at all
            yield Check(name, False, f"cannot be used ({error})", "change to an existing folder; set TMPDIR to one")
            continue
        detail = f"{free / GIB:.1f} GiB free in {folder}"
        if not os.access(folder, os.W_OK):
            yield Check(name, True, f"{detail}, not writable", "give --out in a folder that is writable")
        else:
            yield Check(name, free >= DISK_NEEDED, detail, "" if free >= DISK_WANTED else remedy)


def check_shared_memory() -> Iterator[Check]:
    """Shared memory, through which decoding processes hand over images."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Check("shared memory", True, "no /dev/shm on this system")
        return
    size = shutil.disk_usage(folder).total
    remedy = "give --workers 0, or start the container with --shm-size=1g (too little ends workers with a bus error)"
    yield Check("shared memory", True, f"{size / MIB:.0f} MiB", "" if size >= SHARED_MEMORY_WANTED else remedy)


def check_hub() -> Iterator[Check]:
    """The hub that public weights come from answers within two seconds."""
    otherwise = "weights must come from a package, file or run"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        yield Check("hub", True, f"not asked, HF_HUB_OFFLINE is set: {otherwise}")
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []
    # in a thread: the time limit of a socket does not hold for the name look-up before it
    thread = threading.Thread(target=lambda: answers.append(_answers_http(endpoint)), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    yield Check("hub", True, f"{endpoint} answers" if any(answers) else f"not reachable: {otherwise}")


def _answers_http(url: str) -> bool:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, method="HEAD"), timeout=HUB_SECONDS):
            return True
    except HTTPError:  # it answers, if only to say no
        return True
    except (OSError, ValueError, HTTPException):
        return False


# What torch tells, in a process of its own


def check_torch_pair(answers: dict[str, Answer]) -> Iterator[Check]:
    """torch and torchvision can be imported together: torchvision is compiled against one torch build."""
    name = "torch with torchvision"
    torch, torchvision = answers["torch"], answers["torchvision"]
    if not torch.error and not torchvision.error:
        yield Check(name, True, f"torch {torch.detail} with torchvision {torchvision.detail}")
        return
    installed = {package: _version(package) or "(not installed)" for package in ("torch", "torchvision")}
    pair = " and ".join(f"{package} {version}" for package, version in installed.items())
    if torch.error:
        detail = f"{pair}: torch cannot be imported: {torch.error}"
    else:
        asked = "".join(f" (this one asks for {r})" for r in _requirements(of="torchvision") if r.name == "torch")
        reason = f"torchvision is compiled against one torch build{asked}"
        detail = f"{pair} do not fit together: {torchvision.error}; {reason}"
    yield Check(name, False, detail, _reinstall(installed["torch"]))


def check_devices(answers: dict[str, Answer]) -> Iterator[Check]:
    """Processor, CUDA and Apple GPUs: speed features, memory, and whether they compute."""
    for name in ("cpu", "cuda", "mps"):
        answer = answers[name]
        # an error fails the check even beside a sound processor: `--device auto` would take the device and fail
        remedy = "give --device cpu, or install torch and torchvision builds that fit this device (pytorch.org)"
        if answer.error:
            yield Check(name, False, answer.error, remedy)
        else:
            yield Check(name, True, answer.detail, answer.remedy)


# What the installed packages say of themselves


def _version(package: str) -> str | None:
    try:
        return metadata.version(package) or None
    except (metadata.PackageNotFoundError, KeyError):  # KeyError: a folder of metadata without its content
        return None


def _requires_python() -> str:
    try:
        return metadata.metadata("tlkit")["Requires-Python"]
    except (metadata.PackageNotFoundError, KeyError):
        return ""


def _requirements(extra: str = "", of: str = "tlkit") -> list[Requirement]:
    """What a package needs, or what one of its extras adds; empty where the package is not installed."""
    try:
        stated = [Requirement(line) for line in metadata.requires(of) or []]
    except metadata.PackageNotFoundError:
        return []
    always = [r for r in stated if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [r for r in stated if r not in always and r.marker is not None and r.marker.evaluate({"extra": extra})]


def _upgrade(wanted: Requirement) -> str:
    names = ("torch", "torchvision") if wanted.name in ("torch", "torchvision") else (wanted.name,)
    both = [f"'{r.name}{r.specifier}'" for r in _requirements() if r.name in names]
    return f"pip install --upgrade {' '.join(both)}"  # torch and torchvision only ever together


def _reinstall(torch_version: str) -> str:
    """Both from one index: the one that torch's build came from (``2.6.0+cu124``), else pip's own."""
    _, _, build = torch_version.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install --force-reinstall torch torchvision{index}"


def _name(check: Callable[..., Any]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


CHECKS = (check_python, check_packages, check_extras, check_disk, check_shared_memory, check_hub)
TORCH_CHECKS = (check_torch_pair, check_devices)
