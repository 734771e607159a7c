"""What a learner is given of the images of a domain: decoded once where there is memory for it, else each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tlkit.data.batches import BatchPlan, Plan, StreamPlan
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile, ViewDataset, load
from tlkit.data.training import TrainingBatches, TrainingDataset
from tlkit.data.transforms import CENTER, normalise
from tlkit.errors import InputLost, TlkitError
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing

MEMORY = 10**9
"""Bytes of decoded images that are kept of a domain."""
MEASURED_AT_ONCE = 256


class Stream(Protocol):
    """Training batches of one domain."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (B, ...) and labels (B) of an epoch's steps from ``first`` on."""


class Inputs(Protocol):
    """A domain's images, as a learner takes them.

    Args:
        shards: Number of the shard that each lies in, where they are read again and again; else empty (N or 0).
    """

    shards: np.ndarray

    def stream(self, rows: np.ndarray, plan: StreamPlan, epochs: int, seed: int) -> Stream:
        """Training batches of some rows, which ``plan`` counts from 0."""

    def batches(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Inputs (B, ...) of some rows, in their order, as evaluation sees them."""


class Vectors:
    """Features of a frozen backbone.

    Args:
        values: (N, P).
        labels: (N).
        device: Where they are wanted.
    """

    def __init__(self, values: np.ndarray, labels: np.ndarray, device: torch.device) -> None:
        self.values, self.labels = torch.from_numpy(values).to(device), torch.from_numpy(labels).to(device)
        self.shards = np.empty(0, dtype=np.int32)

    def stream(self, rows: np.ndarray, plan: StreamPlan, epochs: int, seed: int) -> Stream:
        """Training batches of some rows."""
        return _Kept(self.values, self.labels, rows, plan, None)

    def batches(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Inputs of some rows."""
        for part in np.array_split(rows, -(-len(rows) // MEASURED_AT_ONCE)):
            yield self.values[part]


class Images:
    """Images of a folder.

    Args:
        samples: Which; all can be read.
        preprocessing: What the network expects.
        preset: How they are varied in training.
        how: Device and processes; who is told.
        title: What the progress calls them.
    """

    def __init__(self, samples: Samples, preprocessing: Preprocessing, preset: str, how: How, title: str) -> None:
        self.samples, self.preprocessing, self.preset, self.how = samples, preprocessing, preset, how
        self.labels = torch.from_numpy(samples.labels).to(how.accelerator.device)
        self.kept: Tensor | None = None
        if len(samples) * len(preprocessing.mean) * preprocessing.size**2 <= MEMORY:
            self.kept = torch.cat(list(self._decoded(np.arange(len(samples)), title)))
        self.shards = samples.shards() if self.kept is None else np.empty(0, dtype=np.int32)

    def stream(self, rows: np.ndarray, plan: StreamPlan, epochs: int, seed: int) -> Stream:
        """Training batches of some rows."""
        if self.kept is not None and self.preset == "none":
            return _Kept(self.kept, self.labels, rows, plan, self.preprocessing)
        dataset = TrainingDataset(self.samples.take(rows), self.preprocessing, self.preset, seed)
        device = self.how.accelerator.device
        return TrainingBatches(dataset, plan, epochs=epochs, device=device, workers=self.how.workers)

    def batches(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Inputs of some rows."""
        if self.kept is None:
            parts: Iterator[Tensor] = self._decoded(rows, "")
        else:
            kept = self.kept
            parts = (kept[part] for part in np.array_split(rows, -(-len(rows) // MEASURED_AT_ONCE)))
        for part in parts:
            yield _normalised(part.to(self.how.accelerator.device), self.preprocessing)

    def _decoded(self, rows: np.ndarray, title: str) -> Iterator[Tensor]:
        """8-bit images (B, C, S, S) of some rows."""
        samples, done = self.samples, 0
        dataset = ViewDataset(samples.root, [samples.paths[row] for row in rows.tolist()], self.preprocessing, CENTER)
        for batch in load(dataset, batch_size=self.how.size, workers=self.how.workers):
            if batch.bad:  # readable when the run began
                _, file = batch.bad[0]
                raise InputLost(file.path, where=samples.root, reason=file.reason)
            done += len(batch.rows)
            if title:
                self.how.progress(title, done, len(rows))
            yield batch.images[:, 0]


@dataclass(frozen=True)
class _Kept:
    """Training batches of what is in memory."""

    values: Tensor
    labels: Tensor
    rows: np.ndarray
    plan: Plan
    preprocessing: Preprocessing | None

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.plan.batches(epoch)[first:]:
            rows = self.rows[self.plan.part(batch)]
            values = self.values[rows]
            if self.preprocessing is not None:
                values = _normalised(values.to(self.labels.device), self.preprocessing)
            yield values, self.labels[rows]


def _normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    return normalise(images, preprocessing).contiguous(memory_format=torch.channels_last)


class DomainBatches:
    """Steps of as many source images as target images; an epoch is once through the larger domain.

    Args:
        source: Where inputs come from.
        target: Likewise.
        source_rows: Those that are trained on (S).
        labels: Their classes (S).
        target_rows: Likewise (T).
        each: Images of each domain in a step, over all processes.
        epochs: How many there are.
        seed: Of the order, and of how images are varied.
        balanced: Draw as many images of each source class.
        rank: Of this process.
        processes: How many there are.
    """

    def __init__(
        self,
        source: Inputs,
        target: Inputs,
        source_rows: np.ndarray,
        labels: np.ndarray,
        target_rows: np.ndarray,
        *,
        each: int,
        epochs: int,
        seed: int,
        balanced: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.steps = max(len(source_rows), len(target_rows)) // each
        self.images = self.steps * each
        none = np.zeros(len(target_rows), dtype=np.int64)
        at, there = (_of(part.shards, rows) for part, rows in ((source, source_rows), (target, target_rows)))
        order = BatchPlan(labels, each, seed, balanced=balanced, rank=rank, processes=processes, shards=at)
        other = BatchPlan(none, each, seed + 1, rank=rank, processes=processes, shards=there)
        self.plan = StreamPlan(order, each, self.steps)
        self.source = source.stream(source_rows, self.plan, epochs, seed)
        self.target = target.stream(target_rows, StreamPlan(other, each, self.steps), epochs, seed + 1)
        self._weight = order.weight(np.arange(each))

    def weight(self, epoch: int, step: int) -> float:
        """What this process's mean loss counts for in a step; 1 for a single process."""
        return self._weight

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Source inputs, their labels and target inputs of each step from ``first`` on."""
        pairs = zip(self.source.epoch(epoch, first), self.target.epoch(epoch, first), strict=True)
        for (inputs, labels), (others, _) in pairs:
            yield inputs, labels, others


def refuse_too_few(images: int, each: int, where: object, split: str = "") -> None:
    """Raise where a domain has fewer images than a step takes of it.

    Raises:
        TlkitError: With the largest batch that it has images for.
    """
    if images < each:
        what = f"has {images} {split + ' ' if split else ''}images, and a step takes {each} of each domain"
        remedy = f"give --batch-size {2 * images} or less" if images > 1 else "give more images"
        raise TlkitError(what, where=where, remedy=remedy)


def unreadable(bad: list[BadFile], samples: Samples) -> np.ndarray:
    """Mask of the images (N) that can be read."""
    lost = {file.path for file in bad}
    return np.array([path not in lost for path in samples.paths], dtype=bool)


def _of(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return shards[rows] if len(shards) else shards
