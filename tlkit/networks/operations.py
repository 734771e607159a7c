"""What each of torch's operations costs: multiplications, or of which kind the numbers are that come out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkit.networks.receptive_field import field_of, has_rule

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
    return "attention", weights_of_attention(args) * (args[0].shape[-1] + args[2].shape[-1])


def weights_of_attention(args: Sequence[Any]) -> int:
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


class Operation(NamedTuple):
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
    def of(cls, func: Any) -> Operation:
        """What is known of an ATen operation."""
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
    **dict.fromkeys(
        ("relu", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "dropout", "layer_norm", "group_norm"), _same
    ),
}
