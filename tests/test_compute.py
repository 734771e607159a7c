"""Device and precision: what ``auto`` means, what is refused, and that one process may ask for several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlkit import compute, config
from tlkit.errors import TlkitError


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, **cpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True, "avx2": True}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"avx2": True, "amx_bf16": False}, "no"),
        ({}, "no"),
    ],
    ids=str,
)
def test_auto_is_bf16_where_the_processor_has_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, **capabilities)
    made = compute.accelerator(config.Compute())
    assert (str(made.device), made.mixed_precision) == ("cpu", expected)


def test_a_torch_that_does_not_say_what_the_processor_has_gets_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not compute.native_bf16("cpu")
    assert compute.accelerator(config.Compute(device="cpu")).mixed_precision == "no"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_bf16_since_ampere(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert compute.native_bf16("cuda") == expected


def test_mps_is_asked_for_fp32() -> None:
    assert not compute.native_bf16("mps")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    with pytest.raises(TlkitError, match=f"no {device} device") as caught:
        compute.accelerator(config.Compute(device=device))
    assert caught.value.where == "--device"
    assert "--device auto" in caught.value.remedy


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("mps", 0)])
def test_each_of_several_processes_needs_a_device_of_its_own(
    device: Any, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, cuda=gpus > 0, mps=device == "mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TlkitError, match=f"2 processes were started on a machine that has 1 {device} device"):
        compute.accelerator(config.Compute(device=device))


def test_fp16_on_a_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    with pytest.raises(TlkitError, match="fp16 needs a GPU") as caught:
        compute.accelerator(config.Compute(device="cpu", precision="fp16"))
    assert (caught.value.where, caught.value.remedy) == ("--precision", "use bf16 or fp32")


def test_one_process_may_ask_for_one_precision_after_another() -> None:
    """As a pipeline does; each must be what the matrix product is then computed in."""
    matrix = torch.randn(8, 8)
    for precision, dtype in [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)]:
        made = compute.accelerator(config.Compute(device="cpu", precision=precision))  # type: ignore[arg-type]
        assert made.device == torch.device("cpu")
        with made.autocast():
            assert (matrix @ matrix).dtype == dtype
