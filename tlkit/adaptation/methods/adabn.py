"""AdaBN: the network learns from the source; then batch norm's statistics become those of the target.

Each layer's mean and variance are those of all its inputs from the target's images (Li et al. 2016, Revisiting batch
normalization for practical domain adaptation, arXiv:1603.04779, algorithm 1). The weights stay.
"""

from tlkit.adaptation.method import Method
from tlkit.networks.norm_statistics import estimate_from, refuse_without_statistics

METHOD = Method(
    paper="Li et al. 2016, arXiv:1603.04779",
    norms=estimate_from,
    refuse=lambda network: refuse_without_statistics(network, "adabn replaces its statistics: choose another --method"),
)
