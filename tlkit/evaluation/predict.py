"""Class probabilities of images, in the order of the data, each image once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tlkit.data.loading import BadFile, Progress, ViewDataset, silent
from tlkit.networks.forward import logits_of, over_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


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


def predict_batches(
    network: nn.Module,
    dataset: ViewDataset,
    *,
    accelerator: Accelerator,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Iterator[Predictions]:
    """Predictions batch by batch, so that memory does not grow with the number of images."""
    passed = over_images(
        network,
        dataset,
        logits_of,
        accelerator=accelerator,
        batch_size=batch_size,
        workers=workers,
        label="images",
        progress=progress,
    )
    for rows, logits, bad in passed:
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
