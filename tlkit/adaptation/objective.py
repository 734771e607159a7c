"""What a step of adaptation minimises: the task's loss on the source, and the method's on both domains."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tlkit import processes
from tlkit.adaptation.method import Domains
from tlkit.networks.forward import classify, pooled_features
from tlkit.networks.stages import BOTTLENECK


class Whole(nn.Module):
    """A network that gives the features it classifies along with the logits.

    Args:
        network: Any timm network whose classifier is linear in pooled features.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to features (B, D) and logits (B, K), in float32."""
        features = pooled_features(self.network, images).float()
        return features, classify(self.network, features)


class Head(nn.Module):
    """What is behind a frozen backbone: the bottleneck, if there is one, and the classifier.

    Args:
        network: It shares these with.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.bottleneck = getattr(network, BOTTLENECK, nn.Identity())
        self.classifier = network.get_classifier()

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """What the backbone puts out (B, P) to features (B, D) and logits (B, K), in float32."""
        with torch.autocast(pooled.device.type, enabled=False):  # so small that half the bits would gain nothing
            features = self.bottleneck(pooled)
            return features, self.classifier(features)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(processes.count())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(processes.count())[processes.rank()]


def joined(rows: Tensor) -> Tensor:
    """A tensor's rows of all processes, in their order, as many of each; gradients flow back to each one's own.

    What flows back is the sum over processes. Where all compute the same loss of it, the mean of their gradients, which
    is what they learn by, is thus the gradient of that loss.
    """
    if processes.count() == 1:
        return rows
    found: Tensor = _Joined.apply(rows)
    return found


class Adaptation(nn.Module):
    """Cross-entropy on the source, and the method's loss on source and target.

    Both domains go through one forward pass: batch norm, and whatever runs in parallel, sees them together. Several
    processes pass their parts of a batch, and each computes the losses of the whole of it.

    Args:
        learner: Maps inputs to features and logits.
        loss: Maps `Domains` to the method's loss; None where the target is not seen.
        weight: Of that loss.
        label_smoothing: Share of each label that is spread over all classes.
        class_weights: Of each class (K), 1 on average over the images; by default all 1.
    """

    couples_samples = True
    """Discrepancies and domain classifiers compare the samples of a batch: no part of it stands for the whole."""

    def __init__(
        self,
        learner: nn.Module,
        loss: nn.Module | None,
        weight: float,
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.learner, self.loss, self.weight, self.label_smoothing = learner, loss, weight, label_smoothing
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.progress = 0.0
        """Share of the optimiser's steps that are done; whoever trains it says so before each."""

    def forward(self, source: Tensor, labels: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses, of which ``loss`` is minimised.

        Args:
            source: Inputs of labelled images (S, ...).
            labels: Their classes (S).
            target: Inputs of unlabelled images (T, ...).
        """
        seen = target if self.loss is not None else None
        features, logits = self.learner(source if seen is None else torch.cat([source, seen]))
        with torch.autocast(features.device.type, enabled=False):
            of_source, of_target = (slice(len(source)), slice(len(source), None))
            labels, source_logits = joined(labels), joined(logits[of_source])
            task = F.cross_entropy(source_logits, labels, self.class_weights, label_smoothing=self.label_smoothing)
            if self.loss is None or seen is None:
                return {"loss": task, "task": task.detach()}
            both = joined(features[of_source]), joined(features[of_target])
            target_logits = joined(logits[of_target])
            transfer = self.loss(Domains(*both, source_logits, target_logits, labels, self.progress))
        return {"loss": task + self.weight * transfer, "task": task.detach(), "transfer": transfer.detach()}
