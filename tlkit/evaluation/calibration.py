"""Temperature scaling: probabilities that mean what they say."""

from __future__ import annotations

import math

import numpy as np

LARGEST = 100.0
"""Temperatures are looked for from its inverse to it: images that are all right, or all wrong, have none at all."""


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T whose ``softmax(logits / T)`` has the lowest negative log-likelihood (Guo et al. 2017, 4.2).

    Args:
        probabilities: ``softmax(logits)`` (N, K): logits enter by their differences alone, which these keep.
        labels: True class of each row (N).

    Returns:
        T in [1 / `LARGEST`, `LARGEST`]; at an end of it, the images do not determine one.
    """
    from scipy.optimize import minimize_scalar

    # The loss is convex in 1 / T and hence has one lowest point over log T too.
    found = minimize_scalar(
        lambda log: _loss(probabilities, labels, math.exp(log)),
        bounds=(-math.log(LARGEST), math.log(LARGEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(math.exp(found.x))


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """``softmax(logits / temperature)`` of ``softmax(logits)`` (N, K), in float64."""
    scaled = _log(probabilities) / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def _loss(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    scaled = _log(probabilities) / temperature
    peak = scaled.max(1)
    normaliser = peak + np.log(np.exp(scaled - peak[:, None]).sum(1))
    return float((normaliser - scaled[np.arange(len(labels)), labels]).mean())


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
