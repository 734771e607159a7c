"""Receptive fields, followed from operation to operation.

A tensor that depends on the image carries a `Field`: how many pixels a position of it sees along each side, and by how
many pixels neighbouring positions are apart. For windows (convolution, pooling) of kernel k, stride s and dilation d

    size_out = size_in + d * (k - 1) * stride_in        stride_out = stride_in * s

(Araujo et al., Computing Receptive Fields of Convolutional Neural Networks, Distill 2019, equations 1 and 2); where
branches meet, the longest path counts. What makes a position depend on the whole image, or takes positions apart so
that they are none any more, is remembered in words: there the receptive field has no size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """What the positions of a tensor see of the image.

    Args:
        size: Pixels along height and width that one position sees, the image's border aside.
        stride: Pixels between neighbouring positions along height and width.
        dims: Dimensions of height and width, counted from the last (-2, -1 for B x C x H x W); one where both are
            flattened into it; none where there are no positions.
        grid: Height and width in positions, while ``dims`` is one.
        limit: Why the size means nothing; empty where it does.
    """

    size: tuple[float, float] = (1, 1)
    stride: tuple[float, float] = (1, 1)
    dims: tuple[int, ...] = (-2, -1)
    grid: tuple[int, int] = (0, 0)
    limit: str = ""


def mark(tensor: Tensor, field: Field) -> None:
    """Give a tensor its field."""
    tensor._tlkit_field = field  # type: ignore[attr-defined]


def field_of(tensor: Any) -> Field | None:
    """The field of a tensor; None where it does not depend on the image."""
    return getattr(tensor, "_tlkit_field", None)


def follow(func: Any, args: Sequence[Any], result: Any, place: str) -> None:
    """Give the results of an operation their fields.

    Args:
        func: An ATen operation.
        args: Its positional arguments.
        result: What it returned.
        place: Name of the module that called it, for `Field.limit`.
    """
    found = _fields(args)
    if not found:
        return
    rule = _RULES.get(func) or _RULES.setdefault(func, _rule(func))
    field = rule(found, args, result)
    if field.limit.endswith(" in "):
        field = field._replace(limit=f"{field.limit}{place or 'the network itself'}")
    for tensor in (result,) if isinstance(result, Tensor) else result:
        if isinstance(tensor, Tensor):
            mark(tensor, field)


def _fields(args: Iterable[Any]) -> list[Field]:
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            field = field_of(arg)
            if field is not None:
                found.append(field)
        elif isinstance(arg, list | tuple):
            found += _fields(arg)
    return found


Rule = Callable[[list[Field], Sequence[Any], Any], Field]
"""Maps the fields among an operation's arguments, its arguments and its result to the result's field."""


def has_rule(name: str) -> bool:
    """Whether an operation of ATen's can be followed as it is, without a look at what it is made of."""
    return name.removeprefix("_") in _BY_NAME


def _rule(func: Any) -> Rule:
    name = func._schema.name.partition("::")[2].rstrip("_").removeprefix("_")
    if has_rule(name):
        return _BY_NAME[name]
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    return lambda fields, args, result: _whole(_merge(fields), f"{name} in ")._replace(dims=())


def _merge(fields: list[Field]) -> Field:
    """The longest path; positions are those of the branch that has them."""
    first = fields[0]
    if len(fields) == 1 or all(field == first for field in fields):
        return first
    base = max(fields, key=lambda field: (len(field.dims), field.stride))
    limit = next((field.limit for field in fields if field.limit), "")
    size = max(field.size[0] for field in fields), max(field.size[1] for field in fields)
    return base._replace(size=size, limit=limit)


def _whole(field: Field, why: str) -> Field:
    """The field where one position depends on all; ``why`` ends in " in ", to which the place is added."""
    return field if field.limit else field._replace(limit=why)


def _pointwise(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    return _merge(fields)


def _windows(field: Field, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1)) -> Field:
    """Windows over height and width, the last two of as many dimensions as ``kernel`` has."""
    if field.dims != (-2, -1):
        return _whole(field, "a window over something else than positions in ")
    (high, wide), (down, right) = field.size, field.stride
    return field._replace(
        size=(high + dilation[-2] * (kernel[-2] - 1) * down, wide + dilation[-1] * (kernel[-1] - 1) * right),
        stride=(down * stride[-2], right * stride[-1]),
    )


def _pair(args: Sequence[Any], place: int, default: int = 1) -> Sequence[int]:
    value = args[place] if len(args) > place else default
    return (value, value) if isinstance(value, int) else value or (default, default)


def _convolution(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    weight = args[1]
    if weight.ndim != 4:
        return _whole(_merge(fields), f"a convolution over {weight.ndim - 2} dimensions in ")
    return _windows(_merge(fields), weight.shape[2:], _pair(args, 3), _pair(args, 5))


def _general_convolution(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    transposed = len(args) > 6 and args[6]
    if transposed or isinstance(args[4], str):
        return _whole(_merge(fields), "a transposed convolution in ")
    return _convolution(fields, args, result)


def _pooling(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    kernel = _pair(args, 1)
    stride = _pair(args, 2, 0)
    return _windows(_merge(fields), kernel, stride if all(stride) else kernel)


def _max_pooling(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    kernel, stride = _pair(args, 1), _pair(args, 2, 0)
    return _windows(_merge(fields), kernel, stride if all(stride) else kernel, _pair(args, 4))


def _adaptive_pooling(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field = _merge(fields)
    inputs, outputs = args[0].shape[-2:], (result if isinstance(result, Tensor) else result[0]).shape[-2:]
    if any(size % wanted for size, wanted in zip(inputs, outputs, strict=True)):
        return _whole(field, f"pooling from {_times(inputs)} to {_times(outputs)} in ")
    kernel = [size // wanted for size, wanted in zip(inputs, outputs, strict=True)]
    if math.prod(outputs) == 1 < math.prod(inputs):
        return _whole(field, "global pooling in ")._replace(dims=())
    return _windows(field, kernel, kernel)


def _times(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _upsampling(taps: int) -> Rule:
    def rule(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
        """Interpolation between ``taps`` neighbours along each side."""
        field, before, after = _merge(fields), args[0].shape[-2:], result.shape[-2:]
        if field.dims != (-2, -1):
            return _whole(field, "interpolation of something else than positions in ")
        (high, wide), (down, right) = field.size, field.stride
        return field._replace(
            size=(high + (taps - 1) * down, wide + (taps - 1) * right),
            stride=(down * before[0] / after[0], right * before[1] / after[1]),
        )

    return rule


def _reduction(place: int) -> Rule:
    def rule(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
        """Over the dimensions that argument number ``place`` lists."""
        field, shape = _merge(fields), args[0].shape
        value = args[place] if len(args) > place else None
        listed = [value] if isinstance(value, int) else value or range(len(shape))
        reduced = {dim if dim < 0 else dim - len(shape) for dim in listed}
        over = [dim for dim in field.dims if dim in reduced]
        if any(shape[dim] > 1 for dim in over):
            field = _whole(field, "global pooling in ")
        first = result if isinstance(result, Tensor) else result[0]
        if first.ndim == len(shape):
            return field._replace(dims=()) if over else field
        left = tuple(dim + sum(other > dim for other in reduced) for dim in field.dims if dim not in reduced)
        return field._replace(dims=left if len(left) == len(field.dims) else ())

    return rule


def _over_last(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    """Normalisation over the last dimensions, whose sizes are the second argument."""
    field = _merge(fields)
    reached = [dim for dim in field.dims if dim >= -len(args[1])]
    return _whole(field, "normalisation over positions in ") if reached else field


def _over_map(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    """Normalisation by statistics of a whole map."""
    field = _merge(fields)
    several = any(args[0].shape[dim] > 1 for dim in field.dims)
    return _whole(field, "statistics over all positions in ") if several else field


def _along(what: str) -> Rule:
    def rule(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
        """Something along the dimension that the second argument names, by default the last."""
        field, value = _merge(fields), args[1] if len(args) > 1 else -1
        listed = value if isinstance(value, list | tuple) else [value]
        dims = [dim if dim < 0 else dim - args[0].ndim for dim in listed]
        return _whole(field, f"{what} in ") if any(dim in field.dims for dim in dims) else field

    return rule


def _linear(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field = _merge(fields)
    return _whole(field, "a linear layer over positions in ")._replace(dims=()) if -1 in field.dims else field


def _product(first: int) -> Rule:
    def rule(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
        """A product of two matrices, the arguments ``first`` and ``first + 1``."""
        left, right = field_of(args[first]), field_of(args[first + 1])
        if left is not None and right is not None:
            return _whole(_merge([left, right]), "attention in ")._replace(dims=left.dims)
        field = left or right or _merge(fields)
        summed = -1 if left is not None else -2
        if summed in field.dims:
            return _whole(field, "a linear layer over positions in ")._replace(dims=())
        return field

    return rule


def _attention(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    return _whole(_merge(fields), "attention in ")


def _reshape(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    """Height and width are found again where what stands before them, and they themselves, kept their sizes."""
    field, old, new = _merge(fields), args[0].shape, result.shape
    if not field.dims or old == new:
        return field
    grid = field.grid if len(field.dims) == 1 else (old[field.dims[0]], old[field.dims[1]])
    adjacent = len(field.dims) == 1 or field.dims[1] == field.dims[0] + 1
    before = math.prod(old[: len(old) + field.dims[0]])
    for dim in range(len(new)):
        if not adjacent or math.prod(new[:dim]) != before:
            continue
        if new[dim] == grid[0] * grid[1] and (len(new) == dim + 1 or new[dim : dim + 2] != grid):
            return field._replace(dims=(dim - len(new),), grid=grid)
        if new[dim : dim + 2] == grid:
            return field._replace(dims=(dim - len(new), dim + 1 - len(new)))
    if math.prod(grid) == 1:  # nothing is taken apart
        return field._replace(dims=())
    if adjacent:
        return _whole(field, "positions taken apart in ")._replace(dims=())
    places = [_same_place(old, dim + len(old), new) for dim in field.dims]
    if None in places:
        return _whole(field, "positions taken apart in ")._replace(dims=())
    return field._replace(dims=tuple(place - len(new) for place in places if place is not None))


def _same_place(old: Sequence[int], dim: int, new: Sequence[int]) -> int | None:
    before = math.prod(old[:dim])
    return next((at for at in range(len(new)) if new[at] == old[dim] and math.prod(new[:at]) == before), None)


def _permute(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field, count = _merge(fields), args[0].ndim
    order = [dim % count for dim in args[1]]
    return field._replace(dims=tuple(order.index(dim + count) - count for dim in field.dims))


def _transpose(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field, count = _merge(fields), args[0].ndim
    one, other = (dim % count - count for dim in (args[1:3] if len(args) > 2 else (0, 1)))
    swapped = {one: other, other: one}
    return field._replace(dims=tuple(swapped.get(dim, dim) for dim in field.dims))


def _slice(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field, dim = _merge(fields), args[1] if len(args) > 1 else 0
    dim = dim % args[0].ndim - args[0].ndim
    step = args[4] if len(args) > 4 else 1
    if dim not in field.dims or (step == 1 and len(field.dims) == 2):
        return field
    if len(field.dims) == 1:  # part of the positions: no grid any more
        return field if result.shape == args[0].shape else field._replace(dims=())
    sides = [side * (step if at == dim else 1) for at, side in zip(field.dims, field.stride, strict=True)]
    return field._replace(stride=(sides[0], sides[1]))


def _select(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field, dim = _merge(fields), args[1] if len(args) > 1 else 0
    dim = dim % args[0].ndim - args[0].ndim
    if dim in field.dims:
        return field._replace(dims=())
    return field._replace(dims=tuple(at + (dim > at) for at in field.dims))


def _part(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    """Split along a dimension."""
    field, dim = _merge(fields), args[2] if len(args) > 2 else 0
    dim = dim % args[0].ndim - args[0].ndim
    return field._replace(dims=()) if dim in field.dims and len(result) > 1 else field


def _concatenation(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field = _merge(fields)
    dim = (args[1] if len(args) > 1 else 0) % result.ndim - result.ndim
    return field._replace(dims=()) if dim in field.dims else field


def _stack(fields: list[Field], args: Sequence[Any], result: Any) -> Field:
    field = _merge(fields)
    dim = (args[1] if len(args) > 1 else 0) % result.ndim - result.ndim
    return field._replace(dims=tuple(at - (dim >= at) for at in field.dims))


_BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("batch_norm", "native_batch_norm", "dropout", "feature_dropout", "clone", "contiguous", "to", "to_copy"),
            *("detach", "alias", "lift_fresh", "copy", "expand", "pad", "constant_pad_nd", "reflection_pad2d"),
            *("replication_pad2d", "type_as", "prelu", "hardswish", "log_sigmoid"),
        ),
        _pointwise,
    ),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("convolution", "convolution_mode"), _general_convolution),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), _pooling),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), _max_pooling),
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptive_max_pool2d"), _adaptive_pooling),
    "upsample_nearest2d": _upsampling(1),
    "upsample_bilinear2d": _upsampling(2),
    "upsample_bicubic2d": _upsampling(4),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp"), _reduction(1)
    ),
    "linalg_vector_norm": _reduction(2),
    **dict.fromkeys(("layer_norm", "rms_norm", "fused_rms_norm"), _over_last),
    **dict.fromkeys(("group_norm", "instance_norm", "native_group_norm"), _over_map),
    **dict.fromkeys(("softmax", "log_softmax"), _along("softmax over positions")),
    "glu": _along("a gate between positions"),
    "cumsum": _along("a sum over positions"),
    "flip": _along("positions in another order"),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("view", "unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t"), _transpose),
    "slice": _slice,
    **dict.fromkeys(("select", "unbind"), _select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _part),
    "cat": _concatenation,
    "stack": _stack,
}
_RULES: dict[Any, Rule] = {}  # by operation, found once each
