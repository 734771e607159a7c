"""How good an epoch's network is on a target without labels: a score, higher for better."""

from __future__ import annotations

import numpy as np

from tlkit.evaluation.metrics import image_losses

TEMPERATURE = 0.05
AT_ONCE = 1024


def score(name: str, target: np.ndarray, source: np.ndarray, labels: np.ndarray, epoch: int) -> float:
    """What `--select` goes by.

    Args:
        name: ``infomax``, ``entropy``, ``snd``, ``source-val`` or ``last``.
        target: Probabilities of the target's images (N, K).
        source: Probabilities of the source's images set apart (M, K).
        labels: Their classes (M).
        epoch: From 1.
    """
    match name:
        case "infomax":
            return infomax(target)
        case "entropy":
            return -mean_entropy(target)
        case "snd":
            return neighbourhood_density(target)
        case "source-val":
            return -float(image_losses(source, labels).mean())
        case "last":
            return float(epoch)
    raise ValueError(name)


def entropies(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row (N, K): (N)."""
    shares = probabilities.astype(np.float64)
    found: np.ndarray = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
    return found


def mean_entropy(probabilities: np.ndarray) -> float:
    """Mean entropy of predictions: low where the network is certain (Morerio et al. 2018, arXiv:1711.10288).

    A network that calls everything by one name is certain, too.
    """
    return float(entropies(probabilities).mean())


def infomax(probabilities: np.ndarray) -> float:
    """Mutual information of image and prediction: the entropy of the mean prediction, less the mean entropy.

    High where predictions are certain and spread over the classes (Shi and Sha 2012, arXiv:1206.6438; as a validator:
    Musgrave et al. 2022, arXiv:2208.07360).
    """
    return float(entropies(probabilities.mean(0, dtype=np.float64))) - mean_entropy(probabilities)


def neighbourhood_density(probabilities: np.ndarray) -> float:
    """Soft neighbourhood density: mean entropy of each image's similarities to the others.

    Similarities are the inner products of predictions of unit length, as a softmax of temperature 0.05 over all other
    images (Saito et al. 2021, arXiv:2108.10860, equations 1 to 3).
    """
    shares = probabilities.astype(np.float32)
    shares /= np.linalg.norm(shares, axis=1, keepdims=True)
    found = []
    for first in range(0, len(shares), AT_ONCE):
        alike = shares[first : first + AT_ONCE] @ shares.T / TEMPERATURE
        alike[np.arange(len(alike)), first + np.arange(len(alike))] = -np.inf
        alike = np.exp(alike - alike.max(1, keepdims=True))
        found.append(entropies(alike / alike.sum(1, keepdims=True)))
    return float(np.concatenate(found).mean())
