"""Training images: decoded, varied, and brought to the device in batches, from any step on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tlkit.data.augment import augment, least_side_for, mix
from tlkit.data.batches import BatchSampler, Plan
from tlkit.data.decode import UnreadableImage, decode
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile, bad_file, default_workers, refuse_lost
from tlkit.data.transforms import normalise
from tlkit.errors import InputLost
from tlkit.preprocessing import Preprocessing
from tlkit.shards.folder import Folder


class TrainingDataset(Dataset):
    """Varied images by ``(epoch, row)``. How one is varied depends on seed, epoch and row alone, whoever decodes it."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing, preset: str, seed: int) -> None:
        self.root, self.paths, self.labels = samples.root, samples.paths, samples.labels
        self.preprocessing, self.preset, self.seed = preprocessing, preset, seed
        self.least_side = least_side_for(preset, preprocessing)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | BadFile, int]:
        epoch, row = key
        try:
            image = decode(self.root / self.paths[row], min_side=self.least_side)
        except (UnreadableImage, InputLost) as error:
            return bad_file(self.paths[row], error), int(self.labels[row])
        with _drawn_by(seed_of(self.seed, epoch, row)):
            return augment(image, self.preprocessing, self.preset), int(self.labels[row])


class VariedViews(Dataset):
    """Several varied views of each image, each drawn by a seed of its own."""

    def __init__(
        self,
        root: Folder,
        paths: Sequence[str],
        preprocessing: Preprocessing,
        preset: str,
        draws: Sequence[Sequence[int]],
    ) -> None:
        self.root, self.paths, self.preprocessing, self.preset, self.draws = root, paths, preprocessing, preset, draws
        self.least_side = least_side_for(preset, preprocessing)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadFile]:
        """The row itself and its views, 8-bit (V, C, S, S)."""
        try:
            image = decode(self.root / self.paths[row], min_side=self.least_side)
        except (UnreadableImage, InputLost) as error:
            return row, bad_file(self.paths[row], error)
        views = []
        for draw in self.draws[row]:
            with _drawn_by(draw):
                views.append(augment(image, self.preprocessing, self.preset))
        return row, torch.stack(views)


_DRAWING = threading.Lock()


@contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Within, torch's global generator, from which views are drawn, is seeded; afterwards it is as it was.

    It is the training loop's where there are no decoding processes, and shared by all threads where there are some.
    """
    with _DRAWING:
        kept = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(kept)


def seed_of(*numbers: int) -> int:
    """A seed of 64 bits that depends on all of the numbers, in their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def collate(items: list[tuple[Tensor | BadFile, int]]) -> tuple[Tensor, Tensor] | BadFile:
    """8-bit images (B, C, S, S) and labels (B); or a file that could not be read."""
    images = []
    for image, _ in items:
        if isinstance(image, BadFile):
            return image
        images.append(image)
    return torch.stack(images), torch.tensor([label for _, label in items])


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix: alphas of their Beta distributions, 0 for none; ``classes`` is K."""

    mixup: float
    cutmix: float
    classes: int


class TrainingBatches:
    """Batches ``(images, labels)`` on the device, normalised, epoch by epoch.

    Args:
        dataset: What to decode.
        plan: Which images each step sees.
        epochs: How many there are in all.
        device: Where batches go.
        workers: Decoding processes; by default what suits the machine.
        mixing: Mix images of a batch with each other; labels are then probabilities (B, K).
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        plan: Plan,
        *,
        epochs: int,
        device: torch.device,
        workers: int | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.dataset, self.plan, self.epochs = dataset, plan, epochs
        self.device, self.workers, self.mixing = device, workers, mixing
        self._stream: Iterator[tuple[Tensor, Tensor] | BadFile] | None = None
        self._cut: tuple[int, list[np.ndarray]] = -1, []

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.plan.steps

    def weight(self, epoch: int, step: int) -> float:
        """What the mean loss of this process's part of a batch counts for; 1 for a single process."""
        if self.plan.processes == 1:
            return 1.0
        if self._cut[0] != epoch:  # an epoch's order is drawn once, not at every step
            self._cut = epoch, self.plan.batches(epoch)
        return self.plan.weight(self._cut[1][step])

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step ``first`` on; epochs are asked for in their order.

        Raises:
            InputLost: An image cannot be read any more.
        """
        if self._stream is None:
            self._stream = self._start(epoch, first)
        for _ in range(first, self.steps):
            batch = next(self._stream)
            if isinstance(batch, BadFile):
                refuse_lost([batch])
                raise InputLost(batch.path, where=self.dataset.root, reason=batch.reason)
            yield self._prepare(*batch)

    def _start(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor] | BadFile]:
        workers = self.workers
        if workers is None:
            workers = default_workers(self.plan.steps * (self.epochs - epoch) * self.plan.batch_size)
        loader = DataLoader(
            self.dataset,
            batch_sampler=BatchSampler(self.plan, self.epochs, epoch, first),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else each start would draw from the training loop's
        )
        return iter(loader)

    def _prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        images = normalise(images, self.dataset.preprocessing).contiguous(memory_format=torch.channels_last)
        if self.mixing is not None:
            images, labels = mix(
                images, labels, self.mixing.classes, mixup=self.mixing.mixup, cutmix=self.mixing.cutmix
            )
        return images, labels
