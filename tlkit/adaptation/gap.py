"""How far two domains are apart in a network's features, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tlkit.adaptation.kernels import gaussian, median, mmd2, squared_distances
from tlkit.training.probe import fit_head

MOST = 2000
"""Images of each domain that distances are measured on."""
PERMUTATIONS = 999
DRAWN = 500
"""Images of each domain in the picture."""


@dataclass(frozen=True)
class Gap:
    """How far two domains are apart.

    Args:
        mmd2: Unbiased squared maximum mean discrepancy; may be slightly negative.
        p: How likely so large a one (or larger) is where both are samples of one distribution: the permutation test.
        a_distance: The proxy A-distance: 0 where a linear classifier cannot tell the domains apart, 2 where it can.
    """

    mmd2: float
    p: float
    a_distance: float


def sampled(images: int, seed: int, most: int = MOST) -> np.ndarray:
    """Rows of at most so many images, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(images)[:most])


def unit(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length 1: a network that scales all its features down has brought nothing together."""
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def bandwidth(source: np.ndarray, target: np.ndarray) -> float:
    """Median squared distance of features of unit length: of what is before, for what is after, too."""
    return float(median(squared_distances(torch.from_numpy(unit(np.concatenate([source, target]))))))


def measure(source: np.ndarray, target: np.ndarray, variance: float, seed: int) -> Gap:
    """Distances of the features of two domains, brought to unit length.

    Args:
        source: (N, D).
        target: (M, D).
        variance: Of the kernel, from `bandwidth`.
        seed: Of the permutations and of the halves.
    """
    both = unit(np.concatenate([source, target]))
    kernel = gaussian(squared_distances(torch.from_numpy(both)), variance)
    value = float(mmd2(kernel, len(source)))
    return Gap(value, permutation_p(kernel, len(source), value, seed), a_distance(both, len(source), seed))


def permutation_p(kernel: torch.Tensor, first: int, value: float, seed: int) -> float:
    """Share of random divisions of all samples whose MMD^2 is at least ``value``, itself counted among them.

    (Gretton et al. 2012, section 8; counted as in Phipson and Smyth 2010.)

    Args:
        kernel: Between all samples (N, N).
        first: How many are of the first distribution.
        value: Their MMD^2.
        seed: Of the divisions.
    """
    count, second = len(kernel), len(kernel) - first
    random = np.random.default_rng(seed)
    members = np.zeros((count, PERMUTATIONS), dtype=np.float32)
    for column in range(PERMUTATIONS):
        members[random.permutation(count)[:first], column] = 1
    ones, single = torch.from_numpy(members), kernel.float()
    reached = single @ ones  # (N, P): of each sample to the first part
    within = (reached * ones).sum(0).double()
    to_first = reached.sum(0).double()
    between = to_first - within
    beyond = kernel.sum() - within - 2 * between
    diagonal = kernel.diagonal()
    own = (diagonal.float() @ ones).double()
    others = diagonal.sum() - own
    values = (within - own) / (first * (first - 1)) + (beyond - others) / (second * (second - 1))
    values -= 2 * between / (first * second)
    return float(((values >= value).sum() + 1) / (PERMUTATIONS + 1))


def a_distance(features: np.ndarray, first: int, seed: int) -> float:
    """Proxy A-distance, 2 (1 - 2 e), with e the error of a linear classifier of the domains on images new to it.

    (Ben-David et al. 2007, Analysis of representations for domain adaptation, section 5.) The classifier is logistic
    regression on one half of each domain, its regularisation chosen by cross-validation in there; e is the mean of both
    domains' errors on the other half.

    Args:
        features: Of both domains (N, D).
        first: How many are of the first.
        seed: Of the halves.
    """
    random, is_second = np.random.default_rng(seed), np.arange(len(features)) >= first
    order = random.permutation(len(features))
    halves = [np.concatenate([order[is_second[order] == side][part::2] for side in (0, 1)]) for part in (0, 1)]
    learnt, held = halves
    if len(np.unique(is_second[held])) < 2:  # a single image of a domain
        return 0.0
    head = fit_head(features[learnt, None].astype(np.float32), is_second[learnt].astype(np.int64), 2, seed=seed)
    wrong = head.probabilities(features[held]).argmax(1) != is_second[held]
    error = np.mean([wrong[is_second[held] == side].mean() for side in (False, True)])
    return max(0.0, float(2 * (1 - 2 * error)))


def project(features: np.ndarray, how: Literal["pca", "tsne"], seed: int) -> np.ndarray:
    """Two dimensions (N, 2) of features (N, D): their principal components, or t-SNE (van der Maaten and Hinton 2008).

    Args:
        features: Of both domains.
        how: Which.
        seed: Of what is random in it.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = unit(features)
    if len(features) < 3:
        return np.zeros((len(features), 2))
    components = min(2 if how == "pca" else 50, *features.shape)
    found: np.ndarray = PCA(components, random_state=seed).fit_transform(features)
    if how == "tsne":
        perplexity = min(30.0, (len(features) - 1) / 3)
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(found)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
