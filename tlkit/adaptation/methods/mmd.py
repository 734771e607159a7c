"""MMD: source and target are to have the same mean in the space of Gaussian kernels (deep adaptation).

Loss: the unbiased estimate of the squared maximum mean discrepancy between features,
E k(s, s') + E k(t, t') - 2 E k(s, t), with k the mean of five Gaussian kernels whose variances are 1/8 to 2 times the
median squared distance of the step's features (Long et al. 2015, Learning transferable features with deep adaptation
networks, arXiv:1502.02791, equations 1 to 5; estimate: Gretton et al. 2012, equation 3).
"""

import torch
from torch import Tensor, nn

from tlkit.adaptation.kernels import gaussian, median, mmd2, squared_distances
from tlkit.adaptation.method import Domains, Method


class MaximumMeanDiscrepancy(nn.Module):
    """Unbiased multi-kernel MMD^2 between features; has no parameters."""

    def forward(self, domains: Domains) -> Tensor:
        apart = squared_distances(torch.cat([domains.source, domains.target]))
        return mmd2(gaussian(apart, median(apart)), len(domains.source))


METHOD = Method(paper="Long et al. 2015, arXiv:1502.02791", loss=lambda width, classes: MaximumMeanDiscrepancy())
