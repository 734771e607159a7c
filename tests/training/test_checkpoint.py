"""The stored state: what goes in comes out, an optimiser goes on as if never stopped, a bad file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from tlkit import run_folder
from tlkit.errors import TlkitError
from tlkit.networks.stages import stages
from tlkit.training import checkpoint
from tlkit.training.checkpoint import (
    FILE,
    Checkpoint,
    Due,
    optimizer_state,
    plain_tensors,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from tlkit.training.optimizers import create_optimizer, parameter_groups


def stored(run: Path) -> Path:
    return run / run_folder.STATE / FILE


def tensors() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "network": {
            "plain": torch.randn(5, generator=generator),
            "channels_last": torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
            "transposed": torch.randn(3, 7, generator=generator).T,
            "one": shared,
            "other": shared,
            "view": shared.view(12),
            "half": torch.randn(3, generator=generator).bfloat16(),
            "count": torch.tensor(7),
            "empty": torch.empty(0),
            "empty too": torch.empty(0, 3),
            "mask": torch.tensor([True, False]),
            "trained": torch.nn.Parameter(torch.ones(2)),
        },
        "best/2": {"with/slash": torch.tensor([float("nan"), float("inf"), -0.0])},
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    values = {"phase": {"place": [1, 2.5, None, "café", True]}, "seconds": 0.1 + 0.2, "nothing": {}}
    assert read_checkpoint(tmp_path) is None
    given = tensors()
    given["best"] = given.pop("best/2")
    write_checkpoint(tmp_path, Checkpoint(given, values))
    found = read_checkpoint(tmp_path)
    assert found is not None and found.values == values
    assert {group: set(named) for group, named in found.tensors.items()} == {
        group: set(named) for group, named in given.items()
    }
    for group, named in given.items():
        for name, tensor in named.items():
            kept = found.tensors[group][name]
            assert kept.dtype == tensor.dtype and kept.shape == tensor.shape
            assert torch.equal(kept.nan_to_num(nan=5.0), tensor.detach().nan_to_num(nan=5.0)), name
    assert [path.name for path in stored(tmp_path).parent.iterdir()] == [FILE]


def test_a_later_state_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for number in range(3):
        write_checkpoint(tmp_path, Checkpoint({"network": {"w": torch.tensor(number)}}, {"step": number}))
    found = read_checkpoint(tmp_path)
    assert found is not None and found.values == {"step": 2} and found.tensors["network"]["w"].item() == 2


def test_tensors_that_share_memory_are_told_apart() -> None:
    shared = torch.arange(6.0)
    plain = plain_tensors({"one": shared, "other": shared.view(2, 3), "third": shared})
    assert len({tensor.data_ptr() for tensor in plain.values()}) == 3
    assert all(tensor.is_contiguous() for tensor in plain.values())
    assert plain["other"].tolist() == [[0, 1, 2], [3, 4, 5]]


# Optimisers


def make() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last)


def optimizer_for(name: str, network: Any) -> torch.optim.Optimizer:
    rates = {stage.name: 1e-2 for stage in stages(network)}
    return create_optimizer(name, parameter_groups(network, rates, 0.01), momentum=0.9)


def train(network: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        images = images.to(memory_format=torch.channels_last)
        torch.manual_seed(step)
        loss = torch.nn.functional.cross_entropy(network.train()(images), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def layout(tensor: Tensor) -> list[int]:
    """Strides of the axes along which there is more than one number."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadamw", "lion", "lamb", "adan", "adafactor", "adamc"])
def test_going_on_is_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    """5 steps, through the file, 5 more: bit for bit what 10 steps give, memory and its layout included."""
    network = make()
    optimizer = optimizer_for(name, network)
    train(network, optimizer, 0, 5)
    memory, values = optimizer_state(optimizer)
    write_checkpoint(
        tmp_path, Checkpoint({"network": network.state_dict(), "optimizer": memory}, {"optimizer": values})
    )

    found = read_checkpoint(tmp_path)
    assert found is not None
    other = make()
    other.load_state_dict(found.tensors["network"])
    again = optimizer_for(name, other)
    restore_optimizer(again, found.tensors["optimizer"], found.values["optimizer"])
    expected, restored = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert restored.keys() == expected.keys()
    for number, kept in expected.items():
        assert restored[number].keys() == kept.keys()
        for key, value in kept.items():
            if isinstance(value, Tensor):
                assert torch.equal(restored[number][key], value)
                assert restored[number][key].dtype == value.dtype
                assert layout(restored[number][key]) == layout(value), key
            else:
                assert restored[number][key] == value

    train(network, optimizer, 5, 10)
    train(other, again, 5, 10)
    after = other.state_dict()
    assert [key for key, tensor in network.state_dict().items() if not torch.equal(tensor, after[key])] == []


def test_an_optimiser_without_memory(tmp_path: Path) -> None:
    network = make()
    optimizer = optimizer_for("adamw", network)
    assert optimizer_state(optimizer) == ({}, {})
    restore_optimizer(optimizer, {}, {})
    assert optimizer.state_dict()["state"] == {}
    plain = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    plain.step()
    memory, values = optimizer_state(plain)
    restore_optimizer(torch.optim.SGD(network.parameters(), lr=0.1), memory, json.loads(json.dumps(values)))


# Files that are no stored state


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a state")


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, path)


def foreign_with_notes(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})


def no_json(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata={"tlkit": "{"})


@pytest.mark.parametrize("damage", [broken, emptied, text, foreign, foreign_with_notes, no_json])
def test_a_file_that_is_no_state_is_refused(damage: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint({"network": {"w": torch.ones(100)}}, {}))
    damage(stored(tmp_path))
    with pytest.raises(TlkitError, match="the stored state cannot be read") as caught:
        read_checkpoint(tmp_path)
    assert caught.value.where == str(stored(tmp_path))
    assert "remove" in caught.value.remedy


@pytest.mark.parametrize("values", [{"format": 0}, {"format": 99}, {}])
def test_a_state_of_another_version_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    stored(tmp_path).parent.mkdir()
    safetensors.torch.save_file({"a/w": torch.ones(2)}, stored(tmp_path), metadata={"tlkit": json.dumps(values)})
    with pytest.raises(TlkitError, match="the stored state is of another version"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("at", ["while the file is written", "while it takes its place"])
def test_the_last_state_stays_where_a_new_one_cannot_be_written(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, Checkpoint({"network": {"w": torch.ones(100)}}, {"step": 1}))
    before = stored(tmp_path).read_bytes()

    def half(_: object, path: Path, **__: object) -> None:
        Path(path).write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if at.endswith("written"):
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, Checkpoint({"network": {"w": torch.zeros(100)}}, {"step": 2}))
    assert stored(tmp_path).read_bytes() == before
    assert [path.name for path in stored(tmp_path).parent.iterdir()] == [FILE]
    found = read_checkpoint(tmp_path)
    assert found is not None and found.values == {"step": 1}


# When


@pytest.mark.parametrize("every", ["3steps", "3 steps", "3step"])
def test_due_by_steps(every: str) -> None:
    due = Due(every, 0.0)
    assert [due.after_step(1e9 * step) for step in range(9)] == [False, False, True] * 3


def test_due_at_each_step() -> None:
    due = Due("1step", 0.0)
    assert all(due.after_step(0.0) for _ in range(5))


@pytest.mark.parametrize(("every", "seconds"), [("90s", 90), ("5min", 300), ("0.5 h", 1800)])
def test_due_by_time(every: str, seconds: float) -> None:
    due = Due(every, 1000.0)
    assert not due.after_step(1000.0 + 0.99 * seconds)
    assert due.after_step(1000.0 + seconds)
    assert not due.after_step(1000.0 + 1.99 * seconds), "counted from the last one"
    assert due.after_step(1000.0 + 2.5 * seconds)
    assert not due.after_step(1000.0 + 3.4 * seconds)


def test_the_format_is_a_number_to_raise() -> None:
    assert isinstance(checkpoint.FORMAT, int)
