"""A regularised linear head on frozen features: multinomial logistic regression, its strength chosen by data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tlkit.data.splits import folds

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Values of C, the inverse strength of the penalty: the loss is sum(nll) + |W|^2 / (2 C)."""
DEFAULT_STRENGTH = 0.1
SHRINKAGE = 0.1
"""Part of the mean variance that is added to each feature's before dividing by it. A feature that is all but constant on
a few training images would otherwise be blown up on new ones."""
LARGE = 2e10
"""Images x features x classes from which one fit takes minutes: then the strength is not searched for."""


@dataclass(frozen=True)
class Head:
    """A linear classifier of raw features, and how it was found.

    Args:
        weight: (K, D).
        bias: (K).
        strength: The C that was used.
        losses: Mean negative log-likelihood in nats on what was held out, for each C tried; empty if none was tried.
        chosen_on: In words.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    losses: dict[float, float]
    chosen_on: str

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, D) to (N, K)."""
        return _softmax(features @ self.weight.T + self.bias)


def fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    seed: int,
    groups: Sequence[str] | np.ndarray = (),
    balanced: bool = False,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
) -> Head:
    """Fit the head.

    Features are centred and divided by their standard deviation over the training images, the head is fitted to these,
    and both are folded into one linear map of raw features.

    Args:
        features: (N, V, D); each view of an image is a training row of weight 1 / V.
        labels: Class of each image (N), in [0, K); every class occurs.
        classes: K.
        seed: Of the folds.
        groups: Images of one group (N) are held out together.
        balanced: Every class weighs the same, however few its images.
        held_out: First views (M, D) and labels (M) to choose the strength on; by default cross-validation.
    """
    count, views, width = features.shape
    rows = features.reshape(count * views, width).astype(np.float64 if features.size < 5e7 else np.float32)
    mean, variance = rows.mean(0), rows.var(0)
    scale = np.sqrt(variance + SHRINKAGE * variance.mean() + 1e-12)
    rows = (rows - mean) / scale
    weights = _image_weights(labels, classes, balanced)
    fit = _Fit(rows.reshape(count, views, width), labels, weights, classes)

    everything = np.arange(count)
    if held_out is not None:
        scaled, chosen_on = (held_out[0] - mean) / scale, "val"
        losses = fit.path(everything, scaled, held_out[1], _image_weights(held_out[1], classes, balanced))
    else:
        losses, chosen_on = _cross_validate(fit, groups, seed)
    strength = min(losses, key=lambda value: losses[value]) if losses else DEFAULT_STRENGTH
    model = fit.model(strength)
    fit.train(model, everything)
    coefficients, intercepts = _as_softmax(model.coef_, model.intercept_)
    weight = coefficients / scale
    return Head(weight, intercepts - weight @ mean, strength, losses, chosen_on)


def _cross_validate(fit: _Fit, groups: Sequence[str] | np.ndarray, seed: int) -> tuple[dict[float, float], str]:
    count, _, width = fit.rows.shape
    parts = folds(fit.labels, groups, seed)
    if not parts or count * width * fit.classes > LARGE:
        return {}, "nothing: " + (
            "too few images" if not parts else "too large a problem"
        ) + f", C = {DEFAULT_STRENGTH:g}"
    total = dict.fromkeys(STRENGTHS, 0.0)
    for part in parts:
        rest = np.setdiff1d(np.arange(count), part)
        if len(np.unique(fit.labels[rest])) < fit.classes:
            return {}, f"nothing: a class has a single group, C = {DEFAULT_STRENGTH:g}"
        found = fit.path(rest, fit.rows[part, 0], fit.labels[part], fit.weights[part])
        total = {strength: total[strength] + found[strength] * fit.weights[part].sum() for strength in total}
    return {
        strength: loss / fit.weights.sum() for strength, loss in total.items()
    }, f"{len(parts)}-fold cross-validation inside train"


class _Fit:
    """The regression problem: standardised rows (N, V, D), labels (N), weight of each image (N)."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int) -> None:
        self.rows, self.labels, self.weights, self.classes = rows, labels, weights, classes

    def model(self, strength: float, warm_start: bool = False) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, max_iter=500, warm_start=warm_start)

    def train(self, model: Any, images: np.ndarray) -> None:
        views = self.rows.shape[1]
        model.fit(
            self.rows[images].reshape(len(images) * views, -1),
            np.repeat(self.labels[images], views),
            sample_weight=np.repeat(self.weights[images] / views, views),
        )

    def path(self, images: np.ndarray, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[float, float]:
        """Weighted mean loss on held-out (rows, labels) for each strength, fitted to ``images``."""
        model, losses = self.model(STRENGTHS[0], warm_start=True), {}
        for strength in STRENGTHS:
            model.C = strength
            self.train(model, images)
            coefficients, intercepts = _as_softmax(model.coef_, model.intercept_)
            of_truth = _softmax(rows @ coefficients.T + intercepts)[np.arange(len(rows)), labels]
            losses[strength] = float(np.average(-np.log(np.maximum(of_truth, 1e-30)), weights=weights))
        return losses


def _image_weights(labels: np.ndarray, classes: int, balanced: bool) -> np.ndarray:
    """Weight of each image (N), 1 on average."""
    if not balanced:
        return np.ones(len(labels))
    count = np.bincount(labels, minlength=classes)
    return (len(labels) / (np.count_nonzero(count) * np.maximum(count, 1)))[labels]


def _as_softmax(coefficients: np.ndarray, intercepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For two classes scikit-learn fits the difference alone; half of it, both ways, gives the same probabilities."""
    if len(coefficients) > 1:
        return coefficients, intercepts
    return np.concatenate([-coefficients, coefficients]) / 2, np.concatenate([-intercepts, intercepts]) / 2


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
