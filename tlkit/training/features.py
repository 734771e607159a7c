"""Features of a frozen backbone: one pass over the images, whatever is then fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tlkit.data.loading import BadFile, Progress, ViewDataset, silent
from tlkit.networks.forward import features_of, over_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


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


def extract(
    network: nn.Module,
    dataset: ViewDataset,
    *,
    accelerator: Accelerator,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Features:
    """Pass all images through the network up to its classifier.

    Raises:
        TlkitError: The network cannot be cut in front of its classifier.
    """
    rows, values, bad = [], [], []
    passed = over_images(
        network,
        dataset,
        features_of,
        accelerator=accelerator,
        batch_size=batch_size,
        workers=workers,
        label="features",
        progress=progress,
    )
    for in_batch, features, unreadable in passed:
        bad += [file for _, file in unreadable]
        if len(in_batch):
            rows.append(in_batch)
            values.append(features)
    if not rows:
        return Features(np.empty(0, dtype=np.int64), np.empty((0, 1, 0), dtype=np.float32), bad)
    return Features(torch.cat(rows).numpy(), torch.cat(values).numpy(), bad)
