"""Batch norm over the whole of a batch whose parts several processes hold: N of them then learn what one would.

torch's own SyncBatchNorm does the same on CUDA devices alone, and takes the place of modules. Here calls are caught, so
that networks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tlkit import processes


class SharedBatchNorm(TorchFunctionMode):
    """Within, batch norm in training mode normalises by mean and variance over the parts of all processes.

    Running statistics follow these, and so are the same in all of them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm and kwargs and kwargs["training"]:
            return _batch_norm(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def _batch_norm(
    inputs: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of this process's part (B, C, ...) of a batch."""
    normalised, mean, variance, count = _Normalise.apply(inputs, eps)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    if weight is not None:
        normalised = normalised * weight.view(shape)
    if bias is not None:
        normalised = normalised + bias.view(shape)
    return normalised.to(inputs.dtype)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) by channel (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1).

    The parts' moments are put together as Chan, Golub and LeVeque do (1979, "Updating formulae and a pairwise algorithm
    for computing sample variances", equation 2.1), which loses no digits where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised inputs (B, C, ...) of 32 bits or more, mean and variance (C), number of values in a channel."""
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        variance, mean = torch.var_mean(values, axes, correction=0)
        here = torch.full_like(mean, values.numel() / len(mean))
        parts = [mean.new_empty(3, len(mean)) for _ in range(processes.count())]
        dist.all_gather(parts, torch.stack([mean, variance, here]))
        means, variances, counts = torch.stack(parts).double().unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        scale = (variance + eps).rsqrt().to(values.dtype)
        normalised = (values - mean.to(values.dtype).view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalised, scale, count.to(values.dtype))
        ctx.dtype = inputs.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normalised, scale, count = ctx.saved_tensors
        gradient = gradients[0]
        axes = [axis for axis in range(gradient.ndim) if axis != 1]
        sums = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])
        dist.all_reduce(sums)
        shape = (1, -1, *[1] * (gradient.ndim - 2))
        mean, along = ((total / count).view(shape) for total in sums)
        return ((gradient - mean - normalised * along) * scale.view(shape)).to(ctx.dtype), None
