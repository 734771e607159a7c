"""Gaussian kernels, and the maximum mean discrepancy that they measure."""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""The kernels' variances in median squared distances: 2^k for k from -3 to 1."""


def squared_distances(features: Tensor) -> Tensor:
    """Between all rows of (N, D): (N, N), never below 0, and 0 of each row to itself."""
    squares = features.square().sum(1)
    apart = squares[:, None] + squares[None] - 2 * features @ features.T
    return apart.clamp_min(0).fill_diagonal_(0) if not apart.requires_grad else apart.clamp_min(0)


def median(distances: Tensor) -> Tensor:
    """The median of the squared distances between different rows, as a constant: the median heuristic.

    (Gretton et al. 2012, A kernel two-sample test, section 8.) A small number where all rows are alike.
    """
    count = len(distances)
    apart = distances.detach()[torch.ones(count, count, dtype=torch.bool, device=distances.device).triu(1)]
    return apart.median().clamp_min(torch.finfo(distances.dtype).eps)


def gaussian(distances: Tensor, variance: Tensor | float, factors: tuple[float, ...] = FACTORS) -> Tensor:
    """Mean of Gaussian kernels, exp(-d^2 / (2 s^2)) with s^2 a multiple of ``variance`` for each.

    Args:
        distances: Squared (N, N).
        variance: What the factors are multiples of.
        factors: Of each kernel.
    """
    kernels = [torch.exp(-distances / (2 * factor * variance)) for factor in factors]
    return torch.stack(kernels).mean(0)


def mmd2(kernel: Tensor, first: int) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy; may be slightly negative.

    (Gretton et al. 2012, equation 3.)

    Args:
        kernel: Between all samples (N, N), those of the first distribution before those of the second.
        first: How many are of the first; at least two of each.
    """
    second = len(kernel) - first
    within, beyond = kernel[:first, :first], kernel[first:, first:]
    alike = (within.sum() - within.diagonal().sum()) / (first * (first - 1))
    others = (beyond.sum() - beyond.diagonal().sum()) / (second * (second - 1))
    return alike + others - 2 * kernel[:first, first:].mean()
