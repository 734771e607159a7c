"""Class probabilities of images, in the order of the data, each image once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from tlkit.data.loading import BadFile, ViewDataset, silent
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


def predict_batches(
    network: nn.Module, dataset: ViewDataset, how: How, merge: str = "mean", whole: int | None = None
) -> Iterator[Predictions]:
    """Predictions batch by batch, so that memory does not grow with the number of images.

    Args:
        network: Puts out logits.
        dataset: Images in their views.
        how: Device, precision, processes.
        merge: How the probabilities of an image's views become one (`tlkit.evaluation.views.MERGES`).
        whole: Images of the whole work where ``dataset`` is a part of it.
    """
    passed, seconds = FrozenPass(network, dataset, logits_of, how, whole=whole), 0.0
    for rows, logits, bad in passed:
        merged, center = torch.empty(0, 0), torch.empty(0, dtype=torch.long)
        if len(rows):
            probabilities = logits.softmax(-1)
            merged, center = views.merge(probabilities, merge), probabilities[:, dataset.view.center].argmax(-1)
        files, took, seconds = [file for _, file in bad], passed.network_seconds - seconds, passed.network_seconds
        yield Predictions(rows.numpy(), merged.numpy(), center.numpy(), files, took)


def predict_all(network: nn.Module, dataset: ViewDataset, how: How, merge: str = "mean") -> Predictions:
    """Predictions of all images, each once and in their order, on every process of as many as there are.

    Each process takes consecutive whole batches, so that an image is computed beside the same others on any number.

    Args:
        network: Puts out logits.
        dataset: Images in their views.
        how: Device, precision, processes.
        merge: As for `predict_batches`.
    """
    count, rank = how.accelerator.num_processes, how.accelerator.process_index
    if count == 1:
        return collect(predict_batches(network, dataset, how, merge))
    share = how.size * math.ceil(math.ceil(len(dataset) / how.size) / count)
    first = min(rank * share, len(dataset))
    paths = dataset.paths[first : first + share]
    part = ViewDataset(dataset.root, paths, dataset.preprocessing, dataset.view)
    own = how if rank == 0 else replace(how, progress=silent)
    found = collect(predict_batches(network, part, own, merge, whole=len(dataset)))
    gathered: list[Predictions] = gather_object([replace(found, rows=found.rows + first)])
    return collect(gathered)


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
