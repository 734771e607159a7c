"""CORAL: features are to have the same covariance in source and target.

Loss: |C_s - C_t|_F^2 / (4 D^2), with C the (unbiased) covariance matrices of the features (Sun and Saenko 2016, Deep
CORAL, arXiv:1607.01719, equations 1 to 3). The paper weighs it so that at the end of training it is about as large as
the cross-entropy.
"""

import torch
from torch import Tensor, nn

from tlkit.adaptation.method import Domains, Method


class CorrelationAlignment(nn.Module):
    """Squared Frobenius distance of the covariances of features; has no parameters."""

    def forward(self, domains: Domains) -> Tensor:
        apart = covariance(domains.source) - covariance(domains.target)
        return apart.square().sum() / (4 * apart.shape[0] ** 2)


def covariance(features: Tensor) -> Tensor:
    """Unbiased covariance matrix (D, D) of features (N, D)."""
    centred = features - features.mean(0)
    return torch.mm(centred.T, centred) / (len(features) - 1)


METHOD = Method(paper="Sun and Saenko 2016, arXiv:1607.01719", loss=lambda width, classes: CorrelationAlignment())
