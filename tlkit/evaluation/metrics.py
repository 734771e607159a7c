"""Figures of merit of predicted probabilities, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The metrics object of every command.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: True class of each row (N), in [0, K).

    Returns:
        ``images`` N; ``top1`` and its 95 % interval ``top1_ci95`` (Wilson 1927); ``top5`` only with more than five
        classes; ``balanced_accuracy``, the mean recall of the classes that occur; ``loss``, the mean negative
        log-likelihood in nats; ``ece``, the expected calibration error over 15 bins of equal width (Guo et al. 2017,
        equation 3).
    """
    count, classes = probabilities.shape
    predicted = probabilities.argmax(1)
    right = predicted == labels
    of_truth = probabilities[np.arange(count), labels]
    out: dict[str, Any] = {"images": count, "top1": float(right.mean()), "top1_ci95": wilson(int(right.sum()), count)}
    if classes > 5:
        # ties are counted against the network, so that constant outputs score no more than chance
        out["top5"] = float(((probabilities >= of_truth[:, None]).sum(1) <= 5).mean())
    occur, total = np.unique(labels, return_counts=True)
    hits = np.bincount(labels[right], minlength=classes)[occur]
    out["balanced_accuracy"] = float((hits / total).mean())
    out["loss"] = float(image_losses(probabilities, labels).mean())
    out["ece"] = calibration_error(probabilities.max(1), right)
    return out


def image_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood in nats of each image (N), of probabilities (N, K); never infinite."""
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(of_truth, np.finfo(np.float32).tiny))


def wilson(hits: int, count: int, z: float = 1.959964) -> list[float]:
    """Score interval of a proportion (Wilson 1927): ``[low, high]``, 95 % by default."""
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean gap between confidence and accuracy (N), over bins of equal width weighted by what they hold."""
    bins = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def per_class(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class; null where there is nothing to divide by."""
    count = len(classes)
    truth, guesses = np.bincount(labels, minlength=count), np.bincount(predicted, minlength=count)
    hits = np.bincount(labels[predicted == labels], minlength=count)
    return [
        {
            "class": name,
            "images": int(truth[row]),
            "precision": _ratio(hits[row], guesses[row]),
            "recall": _ratio(hits[row], truth[row]),
            "f1": _ratio(2 * hits[row], truth[row] + guesses[row]),
        }
        for row, name in enumerate(classes)
    ]


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
