"""MCC: predictions on the target are to confuse classes as little as possible.

Loss: the mean share of confusion between different classes. With Y the softmax outputs of the target at temperature 2.5
and W weights 1 + exp(-entropy), which make certain images count for more, the confusion of classes j and j' is
C_jj' = y_j^T W y_j'; each row is divided by its sum (Jin et al. 2020, Minimum class confusion for versatile domain
adaptation, arXiv:1912.03699, equations 1 to 6).
"""

from torch import Tensor, nn

from tlkit.adaptation.adversarial import certainty
from tlkit.adaptation.method import Domains, Method

TEMPERATURE = 2.5


class MinimumClassConfusion(nn.Module):
    """Mean confusion between classes on the target; has no parameters."""

    def forward(self, domains: Domains) -> Tensor:
        shares = (domains.target_logits / TEMPERATURE).softmax(1)
        confusion = (shares * certainty(shares)[:, None]).T @ shares
        confusion = confusion / confusion.sum(1, keepdim=True).clamp_min(1e-12)
        return (confusion.sum() - confusion.diagonal().sum()) / len(confusion)


METHOD = Method(paper="Jin et al. 2020, arXiv:1912.03699", loss=lambda width, classes: MinimumClassConfusion())
