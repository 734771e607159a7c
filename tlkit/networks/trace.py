"""One pass through a network: what each operation costs, and which module it belongs to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tlkit.errors import TlkitError, first_line
from tlkit.networks.receptive_field import Field, field_of, follow, has_rule, mark


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
        size = " x ".join(map(str, image.shape[2:]))
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _KNOWN.get(func) or _KNOWN.setdefault(func, _Operation.of(func))
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
                self.found.activations[place] += _weights_of_attention(args)
                self.found.elements_by_kind["activation"] += _weights_of_attention(args)
        elif known.kind == "uncounted":
            self.found.uncounted[known.name] += 1
        elif known.kind:
            first = result if isinstance(result, Tensor) else result[0]
            self.found.elements_by_kind[known.kind] += first.numel()
        follow(func, args, result, place)
        return result


Products = Callable[[Sequence[Any], Any], tuple[str, int]]
"""Maps arguments and result of an operation to the kind of its products and how many there are."""


def _of_convolution(args: Sequence[Any], result: Tensor) -> tuple[str, int]:
    """A filter (C_out, C_in / groups, k, k) is applied once for each number that comes out."""
    transposed = len(args) > 6 and args[6] is True
    return "convolution", (args[0] if transposed else result).numel() * math.prod(args[1].shape[1:])


def _of_transposed_convolution(args: Sequence[Any], result: Tensor) -> tuple[str, int]:
    return "convolution", args[0].numel() * math.prod(args[1].shape[1:])


def _of_linear(args: Sequence[Any], result: Tensor) -> tuple[str, int]:
    return "linear", result.numel() * args[1].shape[-1]


def _of_matrices(first: int, args: Sequence[Any], result: Tensor) -> tuple[str, int]:
    """Matrices that are both computed from images make attention; one that is learnt makes a linear layer."""
    left, right = args[first], args[first + 1]
    kind = "attention" if field_of(left) is not None and field_of(right) is not None else "linear"
    return kind, result.numel() * left.shape[-1]


def _of_attention(args: Sequence[Any], result: Tensor) -> tuple[str, int]:
    """Queries (..., N, D) with keys (..., M, D), and the weights (..., N, M) with values (..., M, E)."""
    return "attention", _weights_of_attention(args) * (args[0].shape[-1] + args[2].shape[-1])


def _weights_of_attention(args: Sequence[Any]) -> int:
    """How many numbers are in the product of queries (..., N, D) with keys (..., M, D)."""
    return math.prod(args[0].shape[:-1]) * args[1].shape[-2]


_PRODUCTS: dict[str, Products] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _of_convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _of_transposed_convolution),
    "linear": _of_linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), partial(_of_matrices, 0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), partial(_of_matrices, 1)),
    "scaled_dot_product_attention": _of_attention,
}
_KINDS: dict[str, str] = {
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"), "normalisation"),
    **dict.fromkeys(
        (
            *("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh"),
            *("hardtanh", "hardsigmoid", "hardswish", "softplus", "softmax", "log_softmax", "glu", "log_sigmoid"),
        ),
        "activation",
    ),
    **dict.fromkeys(
        (
            *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
            *("adaptive_max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool3d", "max_pool3d", "avg_pool3d"),
        ),
        "pooling",
    ),
    # what multiplies in another way than counted here
    **dict.fromkeys(("fft_fft", "fft_ifft", "fft_fft2", "fft_ifft2", "fft_rfft", "fft_irfft"), "uncounted"),
    **dict.fromkeys(("fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "grid_sampler", "cdist"), "uncounted"),
    **dict.fromkeys(("deform_conv2d", "_fft_r2c", "_fft_c2r", "_fft_c2c"), "uncounted"),
}


class _Operation(NamedTuple):
    """What is known of an operation.

    Args:
        name: As ATen has it, without its overload and without the underscore of those that work in place.
        products: How many multiplications it makes.
        kind: What it is counted as otherwise; empty for what is not counted.
        is_made_of_others: It may be made of other operations, which are looked at instead.
        shape: Makes its result on the meta device from shapes alone, or None where that takes torch.
    """

    name: str
    products: Products | None
    kind: str
    is_made_of_others: bool
    shape: Callable[[Sequence[Any]], Tensor | None] | None

    @classmethod
    def of(cls, func: Any) -> _Operation:
        full = func._schema.name.partition("::")[2]
        name = full if full in _PRODUCTS else full.rstrip("_")
        products, kind = _PRODUCTS.get(name), _KINDS.get(name, "")
        in_place = full.endswith("_") and torch.Tag.pointwise in func.tags
        quick = _in_place if in_place else _SHAPES.get(name)
        return cls(name, products, kind, not (products or kind or has_rule(name)), quick)


# Torch's own functions for the meta device take most of the time of a count: for what networks are mostly made of, the
# shape is told here. Whatever is unusual is left to torch.


def _convolved(args: Sequence[Any]) -> Tensor | None:
    images, weight = args[0], args[1]
    stride, padding = args[3] if len(args) > 3 else (1, 1), args[4] if len(args) > 4 else (0, 0)
    dilation, groups = args[5] if len(args) > 5 else (1, 1), args[6] if len(args) > 6 else 1
    if not images.is_meta or len(images.shape) != 4 or not len(stride) == len(padding) == len(dilation) == 2:
        return None
    batch, channels, *sides = images.shape
    out, fan, *kernel = weight.shape
    if channels != fan * groups:
        return None
    for axis in (0, 1):
        sides[axis] = (sides[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
    return images.new_empty((batch, out, *sides)) if min(sides) > 0 else None


def _times_matrix(args: Sequence[Any]) -> Tensor | None:
    inputs, weight = args[0], args[1]
    if not inputs.is_meta or inputs.shape[-1] != weight.shape[-1]:
        return None
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


def _same(args: Sequence[Any]) -> Tensor | None:
    return torch.empty_like(args[0]) if args[0].is_meta else None


def _in_place(args: Sequence[Any]) -> Tensor | None:
    first = args[0]
    if not first.is_meta:
        return None
    return first if all(arg.shape == first.shape for arg in args[1:] if isinstance(arg, Tensor)) else None


def _normalised(args: Sequence[Any]) -> Tensor | None:
    scale = args[1]
    fits = args[0].is_meta and args[0].ndim > 1 and (scale is None or scale.shape[0] == args[0].shape[1])
    return torch.empty_like(args[0]) if fits else None


def _joined(args: Sequence[Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    dim %= first.ndim or 1
    around = [(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors]
    if not first.is_meta or any(other != around[0] for other in around) or any(t.dtype != first.dtype for t in tensors):
        return None
    return first.new_empty((*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]))


_SHAPES: dict[str, Callable[[Sequence[Any]], Tensor | None]] = {
    "conv2d": _convolved,
    "linear": _times_matrix,
    "cat": _joined,
    "batch_norm": _normalised,
    **dict.fromkeys(("relu", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "dropout", "layer_norm"), _same),
}
_KNOWN: dict[Any, _Operation] = {}  # by ATen operation, found once each
