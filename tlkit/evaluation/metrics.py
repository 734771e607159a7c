"""Figures of merit of predicted probabilities, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15
RANKED_FROM = 10
"""Images that a class must have for its ranking (AUROC) to be told."""
RESAMPLES = 1000
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences below which predictions are rejected in turn."""


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Figures of merit that take next to no time, so that each epoch has them; `measured` gives the rest.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: True class of each row (N), in [0, K).

    Returns:
        ``images`` N; ``top1`` and its 95 % interval ``top1_ci95`` (Wilson 1927); ``top5`` only with more than five
        classes; ``balanced_accuracy``, the mean recall of the classes that occur; ``macro_f1``, the mean F1 of the
        classes that occur or were predicted; ``loss``, the mean negative log-likelihood in nats; ``brier``, the mean
        squared distance of the probabilities from the truth, in [0, 2] (Brier 1950); ``ece``, the expected calibration
        error over 15 bins of equal width (Guo et al. 2017, equation 3).
    """
    count, classes = probabilities.shape
    predicted = probabilities.argmax(1)
    right = predicted == labels
    of_truth = probabilities[np.arange(count), labels]
    out: dict[str, Any] = {"images": count, "top1": float(right.mean()), "top1_ci95": wilson(int(right.sum()), count)}
    if classes > 5:
        # ties are counted against the network, so that constant outputs score no more than chance
        out["top5"] = float(((probabilities >= of_truth[:, None]).sum(1) <= 5).mean())
    counts = _counts(labels, predicted, classes)
    out["balanced_accuracy"], out["macro_f1"] = _balanced(*counts), _macro_f1(*counts)
    out["loss"] = float(image_losses(probabilities, labels).mean())
    out["brier"] = float(brier_scores(probabilities, labels).mean())
    out["ece"] = calibration_error(probabilities.max(1), right)
    return out


def measured(probabilities: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The metrics object of every command: `metrics`, ``auroc``, and the 95 % interval of each figure.

    ``auroc`` is the mean area under the ROC curve, one class against the rest, over the classes with at least 10 images
    (absent where there is none). ``top1_ci95`` and ``top5_ci95`` are Wilson's; the other ``..._ci95`` are percentiles
    over 1,000 resamples of the images with replacement (Efron 1979); AUROC's of what each image adds to it.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: True class of each row (N), in [0, K).
        seed: Of the resampling.
    """
    found = metrics(probabilities, labels)
    means = {"loss": image_losses(probabilities, labels), "brier": brier_scores(probabilities, labels)}
    if _ranked(labels, probabilities.shape[1]):
        found["auroc"], influences = _auroc_influences(probabilities, labels)
        means["auroc"] = found["auroc"] + influences
    if "top5" in found:
        found["top5_ci95"] = wilson(round(found["top5"] * len(labels)), len(labels))
    return found | _intervals(probabilities, labels, means, seed)


def _intervals(
    probabilities: np.ndarray, labels: np.ndarray, means: dict[str, np.ndarray], seed: int
) -> dict[str, list[float]]:
    """95 % intervals of the means of what each image gives (N), and of the figures that are no such mean."""
    count, classes = probabilities.shape
    predicted, confidence = probabilities.argmax(1), probabilities.max(1).astype(np.float64)
    bins, gaps, values = _bins(confidence), confidence - (predicted == labels), np.stack(list(means.values()))
    random, drawn = np.random.default_rng([seed, count]), []
    for _ in range(RESAMPLES):
        rows = random.integers(count, size=count)
        counts = _counts(labels[rows], predicted[rows], classes)
        ece = np.abs(np.bincount(bins[rows], weights=gaps[rows], minlength=BINS)).sum() / count
        drawn.append((_balanced(*counts), _macro_f1(*counts), ece, *values[:, rows].mean(1)))
    ends = np.percentile(np.array(drawn), (2.5, 97.5), axis=0).clip(0)
    names = ("balanced_accuracy", "macro_f1", "ece", *means)
    return {
        f"{name}_ci95": [float(low), min(float(high), 1.0) if name == "auroc" else float(high)]
        for name, low, high in zip(names, *ends, strict=True)
    }


def class_aurocs(probabilities: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Area under the ROC curve of each class against the rest (K); None below 10 images, or where there is no rest.

    The share of pairs, one image of the class and one of the rest, that the class's probability puts in order; ties
    count half (Hanley and McNeil 1982).
    """
    out: list[float | None] = [None] * probabilities.shape[1]
    for label in _ranked(labels, probabilities.shape[1]):
        positive = labels == label
        out[label] = float(_placements(probabilities[:, label], positive)[positive].mean())
    return out


def _auroc_influences(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean AUROC over classes, and what each image (N) adds to it to first order; these average to 0.

    Resampling them is resampling AUROC without sorting all scores anew each time (DeLong et al. 1988 take their
    variance).
    """
    ranked, total, influence = _ranked(labels, probabilities.shape[1]), 0.0, np.zeros(len(labels))
    for label in ranked:
        positive = labels == label
        placements, share = _placements(probabilities[:, label], positive), positive.mean()
        area = placements[positive].mean()
        influence += (placements - area) / np.where(positive, share, 1 - share)
        total += area
    return float(total / len(ranked)), influence / len(ranked)


def _ranked(labels: np.ndarray, classes: int) -> list[int]:
    images = np.bincount(labels, minlength=classes)
    return np.flatnonzero((images >= RANKED_FROM) & (images < len(labels))).tolist()


def _placements(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each image (N) the share of the other side that its score stands right to: above it, or below; ties half."""
    out = np.empty(len(scores))
    for side, sign in ((positive, 1), (~positive, -1)):
        others = np.sort(sign * scores[~side])
        own = sign * scores[side]
        below = np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")
        out[side] = below / (2 * len(others))
    return out


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Images by true class (rows) and predicted class (columns): (K, K)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, predictions and hits of each class, each (K)."""
    truth, guesses = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    return truth, guesses, np.bincount(labels[predicted == labels], minlength=classes)


def _balanced(truth: np.ndarray, guesses: np.ndarray, hits: np.ndarray) -> float:
    return float((hits[truth > 0] / truth[truth > 0]).mean())


def _macro_f1(truth: np.ndarray, guesses: np.ndarray, hits: np.ndarray) -> float:
    either = truth + guesses
    return float((2 * hits[either > 0] / either[either > 0]).mean())


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance of each image's probabilities (N, K) from its truth (N): in [0, 2]."""
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return (probabilities.astype(np.float64) ** 2).sum(1) - 2 * of_truth + 1


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
    gaps = np.bincount(_bins(confidence), weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """What `calibration_error` sums over: images, mean confidence and accuracy of each bin that has any.

    Args:
        confidence: Probability of the predicted class (N).
        right: Whether it is the true one (N).

    Returns:
        ``{low, high, images, confidence, accuracy}`` of bins ``(low, high]`` in ascending order.
    """
    bins, out = _bins(confidence), []
    for place in np.unique(bins).tolist():
        there = bins == place
        sure, hits = float(confidence[there].astype(np.float64).mean()), float(right[there].mean())
        ends: dict[str, Any] = {"low": place / BINS, "high": (place + 1) / BINS}
        out.append(ends | {"images": int(there.sum()), "confidence": sure, "accuracy": hits})
    return out


def coverage(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """What is kept, and how much of it is right, where predictions below a threshold are rejected.

    Args:
        confidence: Probability of the predicted class (N).
        right: Whether it is the true one (N).

    Returns:
        ``{threshold, images, coverage, accuracy, accuracy_ci95}`` for each of `THRESHOLDS`; the last two are None
        where nothing is kept.
    """
    rows = []
    for threshold in THRESHOLDS:
        kept = confidence >= threshold
        images, hits = int(kept.sum()), int(right[kept].sum())
        figures: dict[str, Any] = {
            "accuracy": _ratio(hits, images),
            "accuracy_ci95": wilson(hits, images) if images else None,
        }
        rows.append({"threshold": threshold, "images": images, "coverage": images / len(right)} | figures)
    return rows


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)


def per_class(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Images, precision, recall, F1 and AUROC of each class; null where there is nothing to divide by.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: True class of each row (N), in [0, K).
        classes: K names.
    """
    predicted, areas = probabilities.argmax(1), class_aurocs(probabilities, labels)
    truth, guesses, hits = _counts(labels, predicted, len(classes))
    return [
        {
            "class": name,
            "images": int(truth[row]),
            "precision": _ratio(hits[row], guesses[row]),
            "recall": _ratio(hits[row], truth[row]),
            "f1": _ratio(2 * hits[row], truth[row] + guesses[row]),
            "auroc": areas[row],
        }
        for row, name in enumerate(classes)
    ]


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
