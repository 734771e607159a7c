"""JMMD: features and predictions are to have the same joint distribution in source and target.

Loss: the unbiased estimate of the squared discrepancy under the product of two kernels, one of features and one of
softmax outputs (Long et al. 2017, Deep transfer learning with joint adaptation networks, arXiv:1605.06636, equation 9).
Both have the bandwidths of the median heuristic; of the softmax a single kernel.
"""

import torch
from torch import Tensor, nn

from tlkit.adaptation.kernels import gaussian, median, mmd2, squared_distances
from tlkit.adaptation.method import Domains, Method


class JointMaximumMeanDiscrepancy(nn.Module):
    """Unbiased MMD^2 of features and softmax outputs together; has no parameters."""

    def forward(self, domains: Domains) -> Tensor:
        apart = squared_distances(torch.cat([domains.source, domains.target]))
        shares = torch.cat([domains.source_logits, domains.target_logits]).softmax(1)
        shares_apart = squared_distances(shares)
        features = gaussian(apart, median(apart))
        predictions = gaussian(shares_apart, median(shares_apart), (1.0,))
        return mmd2(features * predictions, len(domains.source))


METHOD = Method(paper="Long et al. 2017, arXiv:1605.06636", loss=lambda width, classes: JointMaximumMeanDiscrepancy())
