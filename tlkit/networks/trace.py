"""One pass through a network: what each operation costs, and which module it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tlkit.errors import TlkitError, first_line
from tlkit.networks.operations import Operation, weights_of_attention
from tlkit.networks.receptive_field import Field, field_of, follow, mark


class Output(NamedTuple):
    """What came out of a module: shape without the batch, and what its positions see of the image."""

    shape: tuple[int, ...]
    field: Field | None


class Trace:
    """What one pass through a network shows.

    Attributes:
        macs: Multiply-accumulates by name of the module that computes them itself, not in a module inside it.
        activations: Numbers that come out of these, likewise.
        macs_by_kind: Multiply-accumulates of ``convolution``, ``linear`` and ``attention``.
        elements_by_kind: Numbers that come out of ``normalisation``, ``activation`` and ``pooling``.
        uncounted: Names of operations that multiply in another way, and how often each was called.
        outputs: What came out of each module, in the order in which they ended; the network itself is ``""``.
        features: What came out of ``forward_features``; None where the network does not call it.
    """

    def __init__(self) -> None:
        self.macs: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.macs_by_kind: Counter[str] = Counter()
        self.elements_by_kind: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.outputs: dict[str, Output] = {}
        self.features: Output | None = None


def trace(network: nn.Module, image: Tensor) -> Trace:
    """Pass one image through a network, in evaluation mode.

    Args:
        network: Any timm network, on any device.
        image: One input (1, C, H, W), where the network is; on the meta device only its shape counts.

    Raises:
        TlkitError: The network does not take such images.
    """
    found = Trace()
    was_training = network.training
    mark(image, Field())
    try:
        # in inference mode an operation is seen as the network calls it, not as the several that it is made of
        with (
            torch.inference_mode(),
            torch.device(image.device),
            _features_seen(network, found),
            _modules_seen(network, found) as inside,
            _Counting(found, inside),
        ):
            network.eval()(image)
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        high, wide = image.shape[2:]
        size = f"{high}" if high == wide else f"{high} x {wide}"
        what = f"the network does not take images of {size} px ({first_line(error)})"
        raise TlkitError(what, where="--image-size", remedy="give another size") from error
    finally:
        network.train(was_training)
    return found


def _output(result: Any) -> Output | None:
    """Of several tensors the last: networks of several resolutions end with the coarsest."""
    if isinstance(result, Tensor):
        return Output(tuple(result.shape[1:]), field_of(result))
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return next((output for part in reversed(list(parts)) if (output := _output(part))), None)


@contextmanager
def _features_seen(network: Any, found: Trace) -> Iterator[None]:
    def forward_features(*args: Any, **kwargs: Any) -> Any:
        result = type(network).forward_features(network, *args, **kwargs)
        found.features = _output(result)
        return result

    network.__dict__["forward_features"] = forward_features
    try:
        yield
    finally:
        del network.__dict__["forward_features"]


@contextmanager
def _modules_seen(network: nn.Module, found: Trace) -> Iterator[list[str]]:
    """Keep the names of the modules that the pass is inside of, the innermost last."""
    names = {module: name for name, module in network.named_modules()}
    inside = [""]

    def enter(module: nn.Module, args: Any) -> None:
        inside.append(names.get(module, inside[-1]))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        name = inside.pop()
        output = _output(result)
        if output is not None:
            found.outputs.pop(name, None)  # so that the order is that of the last call
            found.outputs[name] = output

    handles = [
        global_hooks.register_module_forward_pre_hook(enter),
        global_hooks.register_module_forward_hook(leave),
    ]
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


class _Counting(TorchDispatchMode):
    """A context in which operations are counted for the innermost module."""

    def __init__(self, found: Trace, inside: list[str]) -> None:
        super().__init__()
        self.found = found
        self.inside = inside
        self.known: dict[Any, Operation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = self.known.get(func) or self.known.setdefault(func, Operation.of(func))
        if known.is_made_of_others:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = known.shape(args) if known.shape and not kwargs else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        place = self.inside[-1]
        if known.products:
            kind, macs = known.products(args, result)
            self.found.macs[place] += macs
            self.found.macs_by_kind[kind] += macs
            self.found.activations[place] += result.numel()
            if known.name == "scaled_dot_product_attention":  # has the weights and their softmax inside
                self.found.activations[place] += weights_of_attention(args)
                self.found.elements_by_kind["activation"] += weights_of_attention(args)
        elif known.kind == "uncounted":
            self.found.uncounted[known.name] += 1
        elif known.kind:
            first = result if isinstance(result, Tensor) else result[0]
            self.found.elements_by_kind[known.kind] += first.numel()
        follow(func, args, result, place)
        return result
