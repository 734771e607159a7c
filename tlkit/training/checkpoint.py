"""The state that a stopped run goes on from: one file of tensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlkit import config, run_folder
from tlkit.errors import TlkitError
from tlkit.networks.weights import plain_tensors

FILE = "checkpoint.safetensors"
FORMAT = 1
GROUP = "group "


@dataclass(frozen=True)
class Checkpoint:
    """A stored state.

    Args:
        tensors: By group (``network``, ``optimizer`` ...) and name.
        values: Whatever JSON can hold.
    """

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Put the state in place of the last one; on a full disk the last one stays."""
    import safetensors.torch

    folder = run / run_folder.STATE
    folder.mkdir(exist_ok=True)
    flat = {f"{group}/{name}": value for group, named in checkpoint.tensors.items() for name, value in named.items()}
    text = json.dumps({"format": FORMAT} | checkpoint.values)
    with run_folder.atomically(folder / FILE) as part:
        safetensors.torch.save_file(plain_tensors(flat), part, metadata={"tlkit": text})


def read_checkpoint(run: Path) -> Checkpoint | None:
    """The last state that a run stored; None where it stored none.

    Raises:
        TlkitError: The file is broken, or of another version.
    """
    import safetensors

    path = run / run_folder.STATE / FILE
    if not path.is_file():
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["tlkit"])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        remedy = f"remove {path} to begin again from the run's recipe"
        raise TlkitError(f"the stored state cannot be read ({error})", where=path, remedy=remedy) from error
    if values.pop("format", None) != FORMAT:
        remedy = "use the version of tlkit that wrote it"
        raise TlkitError("the stored state is of another version", where=path, remedy=remedy)
    return Checkpoint(tensors, values)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's memory as tensors and plain values, both by ``number of the parameter.name``.

    Some (LAMB, Adan) count steps for a group instead: ``group number.step``.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, memory in optimizer.state_dict()["state"].items():
        for name, value in memory.items():
            (tensors if isinstance(value, Tensor) else values)[f"{number}.{name}"] = value
    for number, group in enumerate(optimizer.param_groups):
        if "step" in group:
            values[f"{GROUP}{number}.step"] = int(group["step"])
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_state`, for an optimiser made anew over the same parameters.

    Memory gets the layout of its parameter: the file holds plain rows, and the same arithmetic on another layout may
    round otherwise.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        number, _, name = key.partition(".")
        if number.startswith(GROUP):
            optimizer.param_groups[int(number.removeprefix(GROUP))][name] = value
            continue
        parameter = parameters[int(number)]
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        kept = torch.empty_like(parameter, dtype=value.dtype).copy_(value) if alike else value
        state.setdefault(int(number), {})[name] = kept
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Due:
    """When the next checkpoint is to be written: every so many steps, or so much time.

    Args:
        every: ``"200steps"`` or a duration such as ``"5min"``.
        now: Seconds now.
    """

    def __init__(self, every: str, now: float) -> None:
        self.steps = int(every.split("step")[0]) if "step" in every else None
        self.seconds = None if self.steps else config.seconds(every)
        self.since, self.at = 0, now

    def after_step(self, now: float) -> bool:
        """Count one step; True when a checkpoint is due, which is then counted as written."""
        self.since += 1
        due = self.since >= self.steps if self.steps else now - self.at >= (self.seconds or 0)
        if due:
            self.since, self.at = 0, now
        return due
