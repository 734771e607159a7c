"""What a frozen network tells of images: which show the same, and whose labels look wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tlkit import config
from tlkit.audit.duplicates import Group
from tlkit.audit.suspects import Suspect, label_suspects
from tlkit.cache_folder import default_folder
from tlkit.data.folders import Samples
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import CENTER
from tlkit.networks.build import Loaded, build
from tlkit.networks.frozen_pass import How
from tlkit.training.cache import FeatureCache
from tlkit.training.features import Features, extract


@dataclass(frozen=True)
class Deep:
    """A network to look with.

    Args:
        loaded: The network.
        how: Device, precision, processes.
        seed: Of the folds.
    """

    loaded: Loaded
    how: How
    seed: int

    @classmethod
    def of(cls, network: config.Network, compute: config.Compute, how: How) -> Deep:
        """The network that the options name."""
        torch.manual_seed(compute.seed)
        loaded = build(network.model, network.weights, config.Preprocess(), norm=network.norm)
        if not loaded.network.num_classes:  # some backbones (DINOv2, CLIP) come without a classifier
            loaded.network.reset_classifier(2)  # type: ignore[operator]
        return cls(loaded, how, compute.seed)

    @property
    def told(self) -> dict[str, str]:
        """Its name and where its weights are from."""
        return {"model": self.loaded.name, "weights": self.loaded.weights}

    def features(self, samples: Samples) -> Features:
        """As a probe on the same images would compute them, which then finds them in the cache."""
        dataset = ViewDataset(samples.root, samples.paths, self.loaded.preprocessing, CENTER)
        cache = FeatureCache(default_folder(), config.size(config.Caching().cache_budget))
        return extract(self.loaded, dataset, self.how, cache)

    def suspects(self, features: np.ndarray, labels: np.ndarray, groups: Sequence[Group]) -> tuple[list[Suspect], int]:
        """Labels (N) that look wrong to a head on features (N, D), and how many were judged; see `label_suspects`."""
        first = np.arange(len(labels))
        for group in groups:  # a near group includes the exact copies of its images, and comes later
            first[list(group.rows)] = group.rows[0]
        return label_suspects(features, labels, first, seed=self.seed)
