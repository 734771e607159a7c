"""A network cut in two at a module: what it puts out there, and running what comes after from that output alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlkit.errors import first_line


class CannotSplit(Exception):
    """A network does not fall into a part before a module and a part after it; says why."""


class _Reached(Exception):
    """All outputs are there: what comes after them need not be computed."""


def outputs_at(network: nn.Module, modules: Sequence[str], images: Tensor) -> tuple[Tensor, ...]:
    """What the named modules put out for images (B, C, S, S), each (B, ...); the network ends at the last of them.

    Raises:
        CannotSplit: One puts out something else than one tensor with a row for each image, or was never called.
    """
    found: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = output
        if len(found) == len(set(modules)):
            raise _Reached
        if isinstance(output, Tensor):
            found[name] = output.clone()  # a layer after it may work in place

    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in modules
    ]
    try:
        network(images)
        missing = sorted(set(modules) - set(found))
        if missing:
            raise CannotSplit(f"{missing[0]} is never called")
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name, output in found.items():
        if not isinstance(output, Tensor) or len(output) != len(images):
            raise CannotSplit(f"{name} puts out more than one map")
    return tuple(found[name] for name in modules)


@dataclass(frozen=True)
class Split:
    """How a network runs from the output of one of its modules.

    Args:
        boundary: Name of the module whose output is given.
        before: Modules that have finished by then, none inside another, each with what it puts out.
        shape: Of an image (C, S, S).
    """

    boundary: str
    before: dict[str, Callable[[int], Tensor]]
    shape: tuple[int, ...]

    @contextmanager
    def spliced(self, network: nn.Module, given: Tensor, *, poisoned: bool = False) -> Iterator[Tensor]:
        """Within, the network called with the tensor that this yields begins with ``given`` (B, ...) at the boundary.

        What lies before the boundary is not computed: it puts out memory of the right shape with nothing in it, or nan
        where it is ``poisoned``.
        """

        def empty(make: Callable[[int], Tensor]) -> Tensor:
            made = make(len(given))
            return made.fill_(math.nan) if poisoned and made.is_floating_point() else made

        replaced = {name: (lambda *_, make=make, **__: empty(make)) for name, make in self.before.items()}
        replaced[self.boundary] = lambda *_, **__: given
        modules = {name: network.get_submodule(name) for name in replaced}
        own = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}
        try:
            for name, module in modules.items():
                module.forward = replaced[name]
            yield empty(lambda count: torch.empty(count, *self.shape, device=given.device))
        finally:
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                if name in own:
                    module.forward = own[name]


def split_at(network: nn.Module, boundary: str, images: Tensor) -> Split:
    """Cut a network after a module, and make sure that it is the same network.

    Modules are looked at from outside: no graph is traced. What happens between them (a position embedding that is
    added, a reshape) is done to memory with nothing in it, and only matters once the boundary has been passed.

    Args:
        network: In evaluation mode; left as it is.
        boundary: Name of the module.
        images: At least one, normalised (B, C, S, S).

    Raises:
        CannotSplit: The network uses more than the boundary's output of what was computed before it.
    """
    finished: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def done(name: str, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if boundary not in finished:
            # a layer after the boundary may work in place
            finished[name] = output.clone() if name == boundary and isinstance(output, Tensor) else output

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: done(name, output))
        for name, module in network.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            wanted = network(images)
    finally:
        for handle in handles:
            handle.remove()
    if calls.get(boundary) != 1:
        raise CannotSplit(f"{boundary} is called {calls.get(boundary, 0)} times")
    given = finished.pop(boundary)
    if not isinstance(given, Tensor) or len(given) != len(images):
        raise CannotSplit(f"{boundary} puts out more than one map")
    around = {name: output for name, output in finished.items() if not _related(name, boundary)}
    outermost = [name for name in around if not any(name.startswith(f"{other}.") for other in around)]
    if again := [name for name in outermost if calls[name] != 1]:
        raise CannotSplit(f"{again[0]} is called {calls[again[0]]} times")
    before = {name: _maker(name, around[name], len(images)) for name in outermost}
    split = Split(boundary, before, tuple(images.shape[1:]))
    try:
        with torch.no_grad(), split.spliced(network, given.clone(), poisoned=True) as dummy:
            found = network(dummy)
    except Exception as error:  # whatever its code does with what it does not expect
        raise CannotSplit(f"{type(error).__name__}: {first_line(error)}") from error
    if not torch.equal(found, wanted):
        raise CannotSplit("what comes after depends on more than that")
    return split


def _related(name: str, boundary: str) -> bool:
    return name.startswith(f"{boundary}.") or boundary.startswith(f"{name}.")


def _maker(name: str, output: Any, count: int) -> Callable[[int], Tensor]:
    """What makes memory like ``output`` for any number of images."""
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) % count:
        raise CannotSplit(f"{name}, before it, puts out something else than a map for each image")
    each, rest, dtype, device = len(output) // count, tuple(output.shape[1:]), output.dtype, output.device
    if math.prod(rest) == 0:
        raise CannotSplit(f"{name}, before it, puts out nothing")
    return lambda images: torch.empty(images * each, *rest, dtype=dtype, device=device)
