"""Intervals of figures of merit against the normal approximation and brute-force bootstraps; odd cases."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from tlkit.evaluation.metrics import (
    brier_scores,
    calibration_error,
    confusion_matrix,
    coverage,
    image_losses,
    measured,
    per_class,
    reliability,
    wilson,
)

BOOTSTRAPPED = ("balanced_accuracy", "macro_f1", "loss", "brier", "ece")


def made(count: int, classes: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    logits = random.normal(0, 1, (count, classes))
    logits[np.arange(count), labels] += sharpness
    shifted = np.exp(logits)
    return shifted / shifted.sum(1, keepdims=True), labels


def brute_force(
    probabilities: np.ndarray, labels: np.ndarray, figure: Callable[[np.ndarray, np.ndarray], float], times: int = 1000
) -> list[float]:
    """Percentiles of the figure over resampled images."""
    random = np.random.default_rng(99)
    drawn = []
    for _ in range(times):
        rows = random.integers(len(labels), size=len(labels))
        drawn.append(figure(probabilities[rows], labels[rows]))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return [float(low), float(high)]


@pytest.mark.parametrize("seed", range(4))
def test_intervals_of_means_are_the_normal_ones(seed: int) -> None:
    """Of 2,000 images: mean plus and minus 1.96 standard errors, to what 1,000 resamples can tell."""
    probabilities, labels = made(2000, 5, seed)
    found = measured(probabilities, labels)
    for name, values in {
        "loss": image_losses(probabilities, labels),
        "brier": brier_scores(probabilities, labels),
    }.items():
        half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
        low, high = found[f"{name}_ci95"]
        assert found[name] == pytest.approx(values.mean())
        assert low == pytest.approx(values.mean() - half, abs=0.2 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.2 * half)


FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "balanced_accuracy": lambda p, y: float(balanced_accuracy_score(y, p.argmax(1))),
    "macro_f1": lambda p, y: float(f1_score(y, p.argmax(1), average="macro", zero_division=0)),
    "ece": lambda p, y: calibration_error(p.max(1), p.argmax(1) == y),
    "loss": lambda p, y: float(image_losses(p, y).mean()),
    "brier": lambda p, y: float(brier_scores(p, y).mean()),
    "auroc": lambda p, y: float(np.mean([roc_auc_score(y == k, p[:, k]) for k in range(p.shape[1])])),
}


@pytest.mark.parametrize(("count", "classes", "seed"), [(150, 3, 0), (300, 2, 1)])
@pytest.mark.parametrize("name", FIGURES)
def test_intervals_are_those_of_a_brute_force_bootstrap(name: str, count: int, classes: int, seed: int) -> None:
    probabilities, labels = made(count, classes, seed)
    expected = brute_force(probabilities, labels, FIGURES[name], times=500 if name in ("auroc", "macro_f1") else 1000)
    found = measured(probabilities, labels)[f"{name}_ci95"]
    assert found == pytest.approx(expected, abs=0.2 * (expected[1] - expected[0]))


def test_the_auroc_of_a_single_pair_of_classes_has_hanley_and_mcneils_spread() -> None:
    """Scores that are exponential on both sides: Hanley and McNeil 1982, formula for the standard error."""
    random = np.random.default_rng(3)
    labels = np.repeat([0, 1], [300, 300])
    scores = random.exponential(np.where(labels == 1, 3.0, 1.0))
    scores = scores / (1 + scores)
    found = measured(np.stack([1 - scores, scores], 1), labels)
    area = found["auroc"]
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = math.sqrt((area * (1 - area) + 299 * (q1 - area**2) + 299 * (q2 - area**2)) / 300**2)
    low, high = found["auroc_ci95"]
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert (low + high) / 2 == pytest.approx(area, abs=0.2 * error)


@pytest.mark.parametrize(("count", "classes"), [(40, 3), (200, 8), (1000, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_their_figure(count: int, classes: int, seed: int) -> None:
    """But for the calibration error, which resampling biases upwards, and macro F1, which it biases downwards."""
    found = measured(*made(count, classes, seed))
    names = {"top1", "balanced_accuracy", "loss", "brier", *({"top5"} & set(found)), *({"auroc"} & set(found))}
    for name in names:
        low, high = found[f"{name}_ci95"]
        assert 0 <= low <= found[name] <= high, name
        assert name in ("loss", "brier") or high <= 1, name
    assert {f"{name}_ci95" for name in found if f"{name}_ci95" in found} == {n for n in found if n.endswith("_ci95")}


def test_intervals_are_seeded() -> None:
    probabilities, labels = made(60, 3, 0)
    assert measured(probabilities, labels) == measured(probabilities, labels) == measured(probabilities, labels, 0)
    other = measured(probabilities, labels, seed=1)
    for name in BOOTSTRAPPED:
        assert other[name] == measured(probabilities, labels)[name]
        assert other[f"{name}_ci95"] != measured(probabilities, labels)[f"{name}_ci95"]


def test_intervals_shrink_with_the_root_of_the_images() -> None:
    few, many = made(200, 4, 0), made(3200, 4, 0)
    for name in ("top1", "balanced_accuracy", "loss", "brier", "auroc"):
        low, high = measured(*few)[f"{name}_ci95"]
        lower, higher = measured(*many)[f"{name}_ci95"]
        assert (high - low) / (higher - lower) == pytest.approx(4, rel=0.3), name


def test_top5_has_wilsons_interval() -> None:
    probabilities, labels = made(83, 9, 0, sharpness=0.5)
    found = measured(probabilities, labels)
    hits = round(found["top5"] * 83)
    assert 0 < hits < 83
    assert found["top5_ci95"] == wilson(hits, 83) and found["top1_ci95"] == wilson(round(found["top1"] * 83), 83)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[labels]


ODD: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "one image, two classes, right": (one_hot(np.array([1]), 2), np.array([1])),
    "one image, two classes, wrong": (one_hot(np.array([0]), 2), np.array([1])),
    "one image, a thousand classes": (np.full((1, 1000), 1e-3, np.float32), np.array([999])),
    "one class alone": (np.ones((12, 1), np.float32), np.zeros(12, dtype=np.int64)),
    "images of one class alone": (np.full((30, 3), 1 / 3, np.float32), np.full(30, 2)),
    "a thousand classes with an image each": (one_hot(np.arange(1000), 1000), np.arange(1000)),
    "all wrong": (one_hot((np.arange(40) + 1) % 4, 4), np.arange(40) % 4),
    "all right": (one_hot(np.arange(40) % 4, 4), np.arange(40) % 4),
    "all the same": (np.full((40, 4), 0.25, np.float32), np.arange(40) % 4),
}


def only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(name) is str and only_plain(kept) for name, kept in value.items())
    if isinstance(value, list):
        return all(only_plain(kept) for kept in value)
    return type(value) in (int, float, str, type(None))


@pytest.mark.parametrize("case", ODD)
def test_odd_cases_give_plain_finite_numbers_without_a_warning(case: str) -> None:
    probabilities, labels = ODD[case]
    classes = probabilities.shape[1]
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        told = {
            "metrics": measured(probabilities, labels),
            "per_class": per_class(probabilities, labels, [f"{label}" for label in range(classes)]),
            "reliability": reliability(confidence, predicted == labels),
            "coverage": coverage(confidence, predicted == labels),
            "confusion_matrix": confusion_matrix(predicted, labels, classes).tolist(),
        }
    assert only_plain(told)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["metrics"]["images"] == len(labels)
    assert told["metrics"]["top1"] == pytest.approx((predicted == labels).mean())


def test_certain_figures_have_intervals_without_width() -> None:
    """Nothing varies between the images: every resample says the same. Top-1 knows better (Wilson)."""
    found = measured(*ODD["all right"])
    assert found["macro_f1_ci95"] == found["balanced_accuracy_ci95"] == found["auroc_ci95"] == [1, 1]
    assert found["loss_ci95"] == found["brier_ci95"] == found["ece_ci95"] == [0, 0]
    assert found["top1_ci95"] == pytest.approx([40 / (40 + 1.959964**2), 1])
