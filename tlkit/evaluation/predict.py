"""Class probabilities of images, in the order of the data, each image once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tlkit.data.loading import BadFile, ViewDataset
from tlkit.evaluation import views
from tlkit.networks.forward import logits_of
from tlkit.networks.frozen_pass import FrozenPass, How


@dataclass(frozen=True)
class Predictions:
    """What a network makes of images.

    Args:
        rows: Positions in the dataset of the images that could be read (N), ascending.
        probabilities: Float32 (N, K), merged over the views.
        center: Class that the central view alone gives (N).
        bad: Files that could not be read.
        network_seconds: What the network took, without choosing its quickest form.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    center: np.ndarray
    bad: list[BadFile]
    network_seconds: float


def predict_batches(network: nn.Module, dataset: ViewDataset, how: How, merge: str = "mean") -> Iterator[Predictions]:
    """Predictions batch by batch, so that memory does not grow with the number of images.

    Of several processes each is given those of all images, each once and in their order.

    Args:
        network: Puts out logits.
        dataset: Images in their views.
        how: Device, precision, processes.
        merge: How the probabilities of an image's views become one (`tlkit.evaluation.views.MERGES`).
    """
    passed, seconds = FrozenPass(network, dataset, logits_of, how), 0.0
    for rows, logits, bad in passed:
        merged, center = torch.empty(0, 0), torch.empty(0, dtype=torch.long)
        if len(rows):
            probabilities = logits.softmax(-1)
            merged, center = views.merge(probabilities, merge), probabilities[:, dataset.view.center].argmax(-1)
        files, took, seconds = [file for _, file in bad], passed.network_seconds - seconds, passed.network_seconds
        yield Predictions(rows.numpy(), merged.numpy(), center.numpy(), files, took)


def predict_all(network: nn.Module, dataset: ViewDataset, how: How, merge: str = "mean") -> Predictions:
    """Predictions of all images as one; see `predict_batches`."""
    return collect(predict_batches(network, dataset, how, merge))


def collect(batches: Iterable[Predictions]) -> Predictions:
    """Predictions of consecutive parts as one."""
    parts = list(batches)
    read = [part for part in parts if len(part.rows)]
    return Predictions(
        rows=np.concatenate([part.rows for part in read]) if read else np.empty(0, dtype=np.int64),
        probabilities=np.concatenate([part.probabilities for part in read]) if read else np.empty((0, 0), np.float32),
        center=np.concatenate([part.center for part in read]) if read else np.empty(0, np.int64),
        bad=[file for part in parts for file in part.bad],
        network_seconds=sum(part.network_seconds for part in parts),
    )
