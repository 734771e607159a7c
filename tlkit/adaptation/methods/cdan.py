"""CDAN+E: the discriminator sees features together with predictions, and certain images count for more.

Loss: binary cross-entropy of a discriminator of the products f_i g_j of features f and softmax outputs g, weighed by
1 + exp(-entropy of g), behind reversed gradients (Long et al. 2018, Conditional adversarial domain adaptation,
arXiv:1705.10667, equations 5 to 8). Where there would be too many products, their random projection, which has the same
inner products on average, takes their place (equation 6).
"""

import torch
from torch import Tensor, nn

from tlkit.adaptation.adversarial import certainty, discriminator, domain_loss, ramp, reversed_gradient
from tlkit.adaptation.method import Domains, Method

MOST_PRODUCTS = 4096
"""From there on they are projected at random: section 3.2 of the paper."""
PROJECTED = 1024


class ConditionalDomainAdversarial(nn.Module):
    """Entropy-weighted cross-entropy of a discriminator of features and predictions, behind reversed gradients.

    Args:
        width: Of the features, D.
        classes: K.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        projects = width * classes > MOST_PRODUCTS
        self.of_features: Tensor | None
        self.of_classes: Tensor | None
        self.register_buffer("of_features", torch.randn(width, PROJECTED) if projects else None)
        self.register_buffer("of_classes", torch.randn(classes, PROJECTED) if projects else None)
        self.discriminator = discriminator(PROJECTED if projects else width * classes)

    def forward(self, domains: Domains) -> Tensor:
        features = torch.cat([domains.source, domains.target])
        shares = torch.cat([domains.source_logits, domains.target_logits]).softmax(1).detach()
        joint = reversed_gradient(self.products(features, shares), ramp(domains.progress))
        sources = len(domains.source)
        weights = torch.cat([certainty(shares[:sources]), certainty(shares[sources:])])
        return domain_loss(self.discriminator(joint), sources, weights)

    def products(self, features: Tensor, shares: Tensor) -> Tensor:
        """The multilinear map of features (B, D) and softmax outputs (B, K): (B, D K), or its random projection."""
        if self.of_features is None or self.of_classes is None:
            return (features[:, :, None] * shares[:, None, :]).flatten(1)
        return (features @ self.of_features) * (shares @ self.of_classes) / PROJECTED**0.5


METHOD = Method(paper="Long et al. 2018, arXiv:1705.10667", loss=ConditionalDomainAdversarial)
