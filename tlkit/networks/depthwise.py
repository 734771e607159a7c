"""Depthwise convolutions on a CPU in bf16: their gradients, computed in float32, which is many times faster.

The CPU library that torch calls (oneDNN) has quick kernels for the backward pass of depthwise convolutions in float32,
but in bf16 falls back to plain loops: most of a training step of EfficientNets and MobileNets was spent there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class QuickDepthwise(TorchFunctionMode):
    """A context in which depthwise convolutions under bf16 autocast on a CPU take the quick way."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _is_depthwise(*args):
            images, weight, _, stride, padding, dilation, _ = args
            return _Depthwise.apply(images, weight, stride, padding, dilation)
        return func(*args, **(kwargs or {}))


def _is_depthwise(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    return (
        groups > 1
        and groups == weight.shape[0] == images.shape[1]
        and bias is None
        and not isinstance(padding, str)
        and images.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and torch.is_grad_enabled()
    )


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution: forward in bf16, backward in float32."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        images = images.to(torch.bfloat16)
        ctx.save_for_backward(images, weight)
        ctx.shape = stride, padding, dilation
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(images, weight.to(torch.bfloat16), None, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        images, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        of_images, of_weight, _ = torch.ops.aten.convolution_backward(
            gradients[0].float(), images.float(), weight.float(), None, *ctx.shape, False, [0, 0], len(weight), wanted
        )
        return None if of_images is None else of_images.to(torch.bfloat16), of_weight, None, None, None
