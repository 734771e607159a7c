"""Device, processes and precision: the one place where Accelerate is set up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from tlkit import config, processes
from tlkit.errors import TlkitError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer


def accelerator(compute: config.Compute) -> Accelerator:
    """The device and precision that the options ask for; brings the processes together, where there are several.

    Raises:
        TlkitError: The device is not there, or it cannot compute in that precision.
    """
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = compute.device
    if device == "auto":
        device = "cuda" if has["cuda"] else "mps" if has["mps"] and processes.count() == 1 else "cpu"
    if processes.count() > 1 and device != "cpu":
        _refuse_too_many(device)
    if not has[device]:
        remedy = "use --device auto; 'tlkit doctor' lists devices"
        raise TlkitError(f"no {device} device", where="--device", remedy=remedy)
    precision = compute.precision
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    if precision == "fp16" and device == "cpu":
        raise TlkitError("fp16 needs a GPU", where="--precision", remedy="use bf16 or fp32")

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if AcceleratorState._shared_state:  # a second command in one process (tests, pipelines) may ask for another device
        AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to people who call Accelerate themselves
        processes.join("nccl" if device == "cuda" else "gloo")
        PartialState(cpu=device == "cpu")
        return Accelerator(cpu=device == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))


def _refuse_too_many(device: str) -> None:
    """Raise where not each process of this machine can have a device of its own."""
    import torch

    devices, here = torch.cuda.device_count() if device == "cuda" else 1, processes.count_here()
    if here > devices or device == "mps":
        what = f"{here} processes were started on a machine that has {devices} {device} device{'s' * (devices != 1)}"
        raise TlkitError(what, where="--device", remedy="start a process for each of its GPUs, or give --device cpu")


def prepare(
    accelerator: Accelerator, objective: nn.Module, optimizer: Optimizer, idle: Callable[[], bool]
) -> tuple[nn.Module, Optimizer]:
    """What the loop trains: several processes then average their gradients.

    Args:
        accelerator: Device, precision, processes.
        objective: Maps batches to losses.
        optimizer: Of its parameters.
        idle: Whether it may hold parameters that train but are never used.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    if accelerator.num_processes > 1:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=idle())
    module, wrapped = accelerator.prepare(objective, optimizer)
    return module, wrapped


def native_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware: GPUs since Ampere; CPUs with AMX, AVX512-BF16, Arm's bf16."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device == "cpu":
        # older torch cannot say: fp32 is always right
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False
