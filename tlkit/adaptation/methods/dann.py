"""DANN: features are to be such that a discriminator cannot tell source from target.

Loss: binary cross-entropy of a discriminator of features, which minimises it; the features, behind a layer that
reverses gradients, maximise it, ever more as training goes on (Ganin et al. 2016, Domain-adversarial training of neural
networks, arXiv:1505.07818, equations 9 to 18).
"""

import torch
from torch import Tensor, nn

from tlkit.adaptation.adversarial import discriminator, domain_loss, ramp, reversed_gradient
from tlkit.adaptation.method import Domains, Method


class DomainAdversarial(nn.Module):
    """Cross-entropy of a domain discriminator behind reversed gradients.

    Args:
        width: Of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.discriminator = discriminator(width)

    def forward(self, domains: Domains) -> Tensor:
        features = reversed_gradient(torch.cat([domains.source, domains.target]), ramp(domains.progress))
        return domain_loss(self.discriminator(features), len(domains.source))


METHOD = Method(paper="Ganin et al. 2016, arXiv:1505.07818", loss=lambda width, classes: DomainAdversarial(width))
