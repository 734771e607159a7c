"""What a phase is trained with, as the options say: objective, batches, schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tlkit import config
from tlkit.data.batches import BatchPlan
from tlkit.data.folders import Samples
from tlkit.data.training import Mixing, TrainingBatches, TrainingDataset
from tlkit.data.transforms import CENTER, View
from tlkit.networks.splitting import Split
from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing
from tlkit.training import schedules
from tlkit.training.closed_head import HeadOptions
from tlkit.training.objectives import Supervised

if TYPE_CHECKING:
    from accelerate import Accelerator


TRAIN_VIEWS = {"center": CENTER, "flip": View(mirrored=True)}


@dataclass(frozen=True)
class Settings:
    """What a run's options say about training.

    Args:
        training: How the network learns; what becomes of batch norm is given.
        augmentation: How images are varied; the preset is given.
        compute: Workers and seed.
        caching: What is kept of frozen stages.
        batch_size: Images in a step, over all processes.
        patience: Epochs without a lower loss on the choosing part after which a phase ends; 0 for never.
        head: How a head is fitted in closed form.
        train_views: Views of an image that it is fitted on, by name.
    """

    training: config.Training
    augmentation: config.Augmentation
    compute: config.Compute
    caching: config.Caching
    batch_size: int
    patience: int
    head: HeadOptions
    train_views: str = "center"

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.augmentation.mixup > 0 or self.augmentation.cutmix > 0


def anchors(network: nn.Module) -> dict[str, Tensor]:
    """Where pretrained weights start from, by name: all but the head's, which are new."""
    head = {name for stage in stages(network) if stage.name == "head" for name in stage.parameters}
    return {name: tensor.detach().clone() for name, tensor in network.named_parameters() if name not in head}


def make_objective(
    network: nn.Module,
    samples: Samples,
    settings: Settings,
    anchored: Mapping[str, Tensor],
    split: Split | None = None,
) -> Supervised:
    """Cross-entropy on ``samples``, with the weights of classes and the pull that the options ask for."""
    weights = None
    if settings.augmentation.class_weights == "balanced":
        counts = np.bincount(samples.labels, minlength=len(samples.classes))
        weights = torch.tensor(len(samples) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
    return Supervised(
        network,
        label_smoothing=settings.augmentation.label_smoothing,
        class_weights=weights,
        anchor=settings.training.anchor,
        anchored=dict(anchored),
        split=split,
    )


def make_plan(samples: Samples, settings: Settings, accelerator: Accelerator, seed: int) -> BatchPlan:
    """Which of ``samples`` each step sees."""
    return BatchPlan(
        samples.labels,
        settings.batch_size,
        seed,
        balanced=settings.augmentation.balanced_sampling,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        shards=samples.shards(),
    )


def make_batches(
    samples: Samples,
    preprocessing: Preprocessing,
    settings: Settings,
    accelerator: Accelerator,
    epochs: int,
    seed: int,
) -> TrainingBatches:
    """Batches of varied images of ``samples``."""
    augmentation = settings.augmentation
    assert augmentation.augment is not None
    return TrainingBatches(
        TrainingDataset(samples, preprocessing, augmentation.augment, seed),
        make_plan(samples, settings, accelerator, seed),
        epochs=epochs,
        device=accelerator.device,
        workers=settings.compute.workers,
        mixing=Mixing(augmentation.mixup, augmentation.cutmix, len(samples.classes)) if settings.mixes else None,
    )


def schedule(
    training: config.Optimisation, epochs: int, steps: int, watched: Sequence[float]
) -> Callable[[int], float]:
    """The rate's factor for each step of a phase.

    Args:
        training: Which schedule.
        epochs: Of the phase.
        steps: In an epoch.
        watched: Loss after each epoch so far; grows as the phase goes on.
    """
    whole = epochs * steps
    if training.schedule == "one-cycle":
        return lambda step: schedules.one_cycle(step, whole)
    rise = round(training.warmup * whole)
    every = round(training.step_every * steps, 6)  # 0.7 x 10 is a little more than 7
    patience = max(1, round(training.step_every))
    shapes: dict[str, Callable[[int], float]] = {
        "constant": schedules.constant,
        "step": lambda step: schedules.step_decay(step, every, training.gamma),
        "cosine": lambda step: schedules.cosine(max(0, step - rise), max(1, whole - rise), training.min_lr),
        "plateau": lambda step: schedules.plateau(watched, patience, training.gamma),
    }
    shape = shapes[training.schedule]
    return lambda step: schedules.warm_up(step, rise) * shape(step)
