"""Which images each training step sees: global batches, cut into one part for each process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from tlkit.errors import TlkitError

BUFFER = 10_000
"""Images that training draws from where they lie in shards."""


class Plan(Protocol):
    """Which images each step sees."""

    @property
    def batch_size(self) -> int:
        """Images in one step, over all processes."""

    @property
    def processes(self) -> int:
        """How many there are."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Rows of each global batch."""

    def part(self, batch: np.ndarray) -> np.ndarray:
        """What this process sees of a global batch."""

    def weight(self, batch: np.ndarray) -> float:
        """This process's share of a batch times the number of processes."""


@dataclass(frozen=True)
class BatchPlan:
    """The batches of all epochs, a function of the seed alone: the same on any number of processes and workers.

    Args:
        labels: Class of each training image (N).
        batch_size: Images in one step, over all processes.
        seed: Of the order.
        balanced: Draw as many images of each class, with repeats, instead of each image once.
        rank: Of this process.
        processes: How many there are.
        shards: Number of the shard that each image lies in; empty where each is a file of its own (N or 0).
    """

    labels: np.ndarray
    batch_size: int
    seed: int
    balanced: bool = False
    rank: int = 0
    processes: int = 1
    shards: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    def __post_init__(self) -> None:
        if min(self.batch_size, len(self.labels)) < self.processes:
            few = f"{min(self.batch_size, len(self.labels))} images in a step for {self.processes} processes"
            raise TlkitError(few, where="--batch-size", remedy="use fewer processes or a larger batch")

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        # a last batch of one has no variance for batch norm (nor has one image a process): it joins the one before
        return max(1, whole + (rest >= 2 * self.processes))

    def order(self, epoch: int) -> np.ndarray:
        """Rows of an epoch in the order in which they are seen (N)."""
        random = np.random.default_rng([self.seed, epoch])
        rows = self._drawn(random)
        return by_shard(rows, self.shards, random) if len(self.shards) else rows

    def _drawn(self, random: np.random.Generator) -> np.ndarray:
        if not self.balanced:
            return random.permutation(len(self.labels))
        classes, of_class = np.unique(self.labels), []
        for number, share in zip(classes, _shares(len(self.labels), len(classes), random), strict=True):
            rows = np.flatnonzero(self.labels == number)
            rounds = [random.permutation(rows) for _ in range(-(-share // len(rows)))]
            of_class.append(np.concatenate([np.empty(0, dtype=np.int64), *rounds])[:share])
        return random.permutation(np.concatenate(of_class))

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Rows of each global batch; together the whole epoch."""
        ends = [self.batch_size * number for number in range(1, self.steps)]
        return np.split(self.order(epoch), ends)

    def part(self, batch: np.ndarray) -> np.ndarray:
        """What this process sees of a global batch; no part is empty, and together they are the batch."""
        return np.array_split(batch, self.processes)[self.rank]

    def weight(self, batch: np.ndarray) -> float:
        """This process's share of a batch times the number of processes: makes the mean of their means the batch's."""
        return len(self.part(batch)) * self.processes / len(batch)


@dataclass(frozen=True)
class StreamPlan:
    """Batches of one size, of images that are gone through again and again: an epoch need not be a whole number of
    times. What adapts takes as many images of one domain as of the other, however many there are.

    Args:
        rounds: The order of each time.
        batch_size: Images in one step, over all processes.
        steps: In an epoch.
    """

    rounds: BatchPlan
    batch_size: int
    steps: int

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.rounds.processes

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Rows of each global batch."""
        images, taken = len(self.rounds.labels), self.steps * self.batch_size
        first = epoch * taken
        begun = first // images
        rounds = [self.rounds.order(number) for number in range(begun, -(-(first + taken) // images))]
        stream = np.concatenate(rounds)[first - begun * images :][:taken]
        return list(stream.reshape(self.steps, self.batch_size))

    def part(self, batch: np.ndarray) -> np.ndarray:
        """What this process sees of a global batch."""
        return self.rounds.part(batch)

    def weight(self, batch: np.ndarray) -> float:
        """This process's share of a batch times the number of processes."""
        return self.rounds.weight(batch)


def by_shard(rows: np.ndarray, shards: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows in an order in which shards need be held a few at a time: as from a buffer that is filled shard by shard.

    The shards come in random order, each from one end to the other; and each image is drawn from among the `BUFFER`
    that follow. An order of rows, not of what was read: any process can begin anywhere in it.

    Args:
        rows: Of an epoch, in random order (N).
        shards: Number of the shard of each row.
        random: What is drawn from.
    """
    turn = random.permutation(int(shards.max()) + 1)
    stream = rows[np.argsort(turn[shards[rows]], kind="stable")]
    return stream[np.argsort(np.arange(len(stream)) + random.uniform(0, BUFFER, len(stream)), kind="stable")]


def _shares(count: int, classes: int, random: np.random.Generator) -> list[int]:
    """``count`` divided among the classes, each getting the same or one more; which ones get more is drawn."""
    more = set(random.permutation(classes)[: count % classes].tolist())
    return [count // classes + (number in more) for number in range(classes)]


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Keys ``(epoch, row)`` of each batch, from a given step of a given epoch on, through all epochs.

    One stream for all epochs: worker processes start once and read ahead across the end of an epoch.
    """

    def __init__(self, plan: Plan, epochs: int, first_epoch: int = 0, first_step: int = 0) -> None:
        self.plan, self.epochs, self.first_epoch, self.first_step = plan, epochs, first_epoch, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first_epoch, self.epochs):
            skipped = self.first_step if epoch == self.first_epoch else 0
            for batch in self.plan.batches(epoch)[skipped:]:
                yield [(epoch, row) for row in self.plan.part(batch).tolist()]

    def __len__(self) -> int:
        return self.plan.steps * (self.epochs - self.first_epoch) - self.first_step
