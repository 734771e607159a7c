"""What a training step minimises: a module that owns the network and maps a batch to named losses."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn import functional as F

from tlkit.networks.splitting import Split


class Supervised(nn.Module):
    """Cross-entropy on labelled images.

    Args:
        network: Maps images (B, C, H, W) to logits (B, K).
        label_smoothing: Share of each label that is spread over all classes (Szegedy et al. 2016, section 7).
        class_weights: Weight of each class (K), 1 on average over the training images; by default all 1.
        anchor: Pulls what trains back to where it started, alpha / 2 * |w - w0|^2 (Li, Grandvalet and Davoine 2018,
            "Explicit inductive bias for transfer learning", equation 2: L2-SP).
        anchored: Start values w0 by parameter name; parameters without one are not pulled.
        split: Where the network begins, which is then given outputs of its frozen stages (B, ...) in place of images.
    """

    couples_samples = False
    """Whether the loss of one sample depends on the others of its batch, which then cannot be computed in parts."""

    def __init__(
        self,
        network: nn.Module,
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        anchor: float = 0.0,
        anchored: dict[str, Tensor] | None = None,
        split: Split | None = None,
    ) -> None:
        super().__init__()
        self.split = split
        self.network, self.label_smoothing, self.anchor = network, label_smoothing, anchor
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        parameters = dict(network.named_parameters())
        trained = [name for name in anchored or () if parameters[name].requires_grad] if anchor else []
        self._pulled = [(parameters[name], (anchored or {})[name]) for name in trained]

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named losses, of which ``loss`` is minimised.

        Args:
            images: (B, C, H, W), or what the frozen stages make of them.
            labels: Classes (B), or their probabilities (B, K).
        """
        with nullcontext(images) if self.split is None else self.split.spliced(self.network, images) as given:
            logits = self.network(given).float()
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weights is not None:
            soft = labels.ndim == 2
            losses = losses * (labels @ self.class_weights if soft else self.class_weights[labels])
        # the mean over images, not over their weights: parts of a batch then add up to the whole
        task = losses.mean()
        if not self._pulled:
            return {"loss": task}
        pull = self.anchor / 2 * sum((now - start).square().sum() for now, start in self._pulled)
        return {"loss": task + pull, "task": task.detach(), "anchor": pull.detach()}  # type: ignore[union-attr]
