"""Class probabilities of images, in the order of the data, each image once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tlkit.data.loading import BadFile, Views
from tlkit.networks.forward import logits_of
from tlkit.networks.frozen_pass import FrozenPass, How


@dataclass(frozen=True)
class Predictions:
    """What a network makes of images.

    Args:
        rows: Positions in the dataset of the images that could be read (N), ascending.
        probabilities: Float32 (N, K), averaged over the views.
        bad: Files that could not be read.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    bad: list[BadFile]


def predict_batches(network: nn.Module, dataset: Views, how: How) -> Iterator[Predictions]:
    """Predictions batch by batch, so that memory does not grow with the number of images."""
    for rows, logits, bad in FrozenPass(network, dataset, logits_of, how):
        probabilities = logits.softmax(-1).mean(1) if len(rows) else torch.empty(0, 0)
        yield Predictions(rows.numpy(), probabilities.numpy(), [file for _, file in bad])


def collect(batches: Iterable[Predictions]) -> Predictions:
    """All predictions of `predict_batches` as one."""
    parts = list(batches)
    read = [part for part in parts if len(part.rows)]
    return Predictions(
        rows=np.concatenate([part.rows for part in read]) if read else np.empty(0, dtype=np.int64),
        probabilities=np.concatenate([part.probabilities for part in read]) if read else np.empty((0, 0), np.float32),
        bad=[file for part in parts for file in part.bad],
    )
