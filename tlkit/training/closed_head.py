"""A phase that trains the head alone: fitted in closed form on features, then folded into the network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tlkit.data.folders import Samples
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded
from tlkit.networks.forward import classify, set_classifier, splits_at_head
from tlkit.training.features import Features
from tlkit.training.probe import Head, fit_head


@dataclass(frozen=True)
class HeadOptions:
    """How a head is fitted.

    Args:
        seed: Of the cross-validation folds.
        balanced: Every class weighs the same.
        on_val: Choose the strength on val rather than by cross-validation.
    """

    seed: int
    balanced: bool
    on_val: bool


def fit_closed(samples: Samples, features: Features, rows: np.ndarray, options: HeadOptions) -> Head:
    """Fit a head to the features of the images in ``rows`` (a mask of N)."""
    val = samples.splits == "val"
    return fit_head(
        features.values[rows],
        samples.labels[rows],
        len(samples.classes),
        seed=options.seed,
        groups=samples.groups[rows] if len(samples.groups) else (),
        balanced=options.balanced,
        held_out=(features.values[val, 0], samples.labels[val]) if options.on_val and val.any() else None,
    )


def fold(loaded: Loaded, network: nn.Module, head: Head, features: Features) -> None:
    """Make the head the network's own classifier, and make sure that it is.

    Raises:
        TlkitError: It does not fit into the network's classifier.
    """
    set_classifier(network, torch.from_numpy(head.weight), torch.from_numpy(head.bias))
    some = features.values[:64, 0]
    device = next(network.parameters()).device
    with torch.no_grad():
        through_network = classify(network, torch.from_numpy(some).to(device)).softmax(-1).cpu().numpy()
    channels, size = len(loaded.preprocessing.mean), loaded.preprocessing.size
    noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    same = np.allclose(through_network, head.probabilities(some.astype(np.float64)), atol=1e-3)
    if not (same and splits_at_head(network, noise)):
        raise TlkitError(
            "the head does not fit into its classifier", where=loaded.name, remedy="choose another network"
        )
