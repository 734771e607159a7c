"""Features of a frozen backbone: one pass over the images, whatever is then fitted to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tlkit.data.loading import BadFile, Views
from tlkit.networks.forward import features_of
from tlkit.networks.frozen_pass import FrozenPass, How


@dataclass(frozen=True)
class Features:
    """Pooled features.

    Args:
        rows: Positions in the dataset of the images that could be read (N), ascending.
        values: Float32 (N, V, D): what the classifier sees of each of V views.
        bad: Files that could not be read.
    """

    rows: np.ndarray
    values: np.ndarray
    bad: list[BadFile]


def extract(network: nn.Module, dataset: Views, how: How) -> Features:
    """Pass all images through the network up to its classifier.

    Raises:
        TlkitError: The network cannot be cut in front of its classifier.
    """
    rows, values, bad = [], [], []
    for in_batch, features, unreadable in FrozenPass(network, dataset, features_of, how, label="features"):
        bad += [file for _, file in unreadable]
        if len(in_batch):
            rows.append(in_batch)
            values.append(features)
    if not rows:
        return Features(np.empty(0, dtype=np.int64), np.empty((0, 1, 0), dtype=np.float32), bad)
    return Features(torch.cat(rows).numpy(), torch.cat(values).numpy(), bad)
