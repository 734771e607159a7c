"""What adversarial methods share: the reversal of gradients, the ramp, the discriminator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 1024


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


def reversed_gradient(inputs: Tensor, factor: float) -> Tensor:
    """The inputs themselves; gradients that flow back through them are multiplied by ``-factor``.

    (Ganin et al. 2016, Domain-adversarial training of neural networks, arXiv:1505.07818, section 4.2.)
    """
    found: Tensor = _Reversal.apply(inputs, factor)
    return found


def ramp(progress: float, steepness: float = 10.0) -> float:
    """From 0 to nearly 1 as training goes on: 2 / (1 + exp(-10 p)) - 1 (Ganin et al. 2016, section 5.2.2).

    A discriminator that knows nothing yet would only disturb the features.
    """
    return 2 / (1 + math.exp(-steepness * progress)) - 1


def discriminator(inputs: int) -> nn.Module:
    """Two hidden layers with batch norm, and one logit: positive for the source. Maps (B, D) to (B)."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 1),
        nn.Flatten(0),
    )


def domain_loss(logits: Tensor, sources: int, weights: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of a discriminator's logits (B), each domain counting for a half.

    Args:
        logits: Of the source's images, then of the target's.
        sources: How many are the source's.
        weights: Of each image (B), 1 on average in each domain.
    """
    truth = (torch.arange(len(logits), device=logits.device) < sources).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, truth, weight=weights, reduction="none")
    return (losses[:sources].mean() + losses[sources:].mean()) / 2


def certainty(probabilities: Tensor) -> Tensor:
    """Weights 1 + exp(-entropy) of predictions (B, K), 1 on average (B), as constants."""
    entropy = -(probabilities * probabilities.clamp_min(1e-12).log()).sum(1)
    weights = (1 + torch.exp(-entropy)).detach()
    return weights / weights.mean()
