"""Figures of merit against scikit-learn, published values, closed forms and plain loops."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    top_k_accuracy_score,
)

from tlkit.evaluation.metrics import (
    BINS,
    RANKED_FROM,
    THRESHOLDS,
    brier_scores,
    calibration_error,
    class_aurocs,
    confusion_matrix,
    coverage,
    image_losses,
    measured,
    metrics,
    per_class,
    reliability,
    wilson,
)


def made(count: int, classes: int, seed: int, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) that are right more often than not, and labels of which some may be missing."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, count, p=random.dirichlet(np.ones(classes)))
    logits = random.normal(0, 1, (count, classes))
    logits[np.arange(count), labels] += sharpness
    shifted = np.exp(logits)
    return shifted / shifted.sum(1, keepdims=True), labels


CASES = [(1, 2, 0), (7, 2, 1), (50, 3, 2), (200, 5, 3), (200, 6, 4), (500, 40, 5)]


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_metrics_are_scikit_learns(count: int, classes: int, seed: int, dtype: Any) -> None:
    probabilities, labels = made(count, classes, seed)
    found = metrics(probabilities.astype(dtype), labels)
    predicted = probabilities.argmax(1)
    assert found["images"] == count
    assert found["top1"] == pytest.approx(accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predicted classes that do not occur
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    # of all classes that occur or were predicted: scikit-learn's default choice
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0), abs=1e-6)
    assert found["brier"] == pytest.approx(((probabilities - np.eye(classes)[labels]) ** 2).sum(1).mean(), abs=1e-6)
    assert found["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(classes)), rel=1e-5)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes)))
    assert all(isinstance(value, int | float | list) for value in found.values()), "plain values, for JSON"


def test_ties_are_no_merit() -> None:
    """A network that says nothing is not right among its five best, as an unstable sort would have it."""
    found = metrics(np.full((100, 10), 0.1), np.arange(100) % 10)
    assert found["top5"] == 0
    assert found["loss"] == pytest.approx(math.log(10))


def test_a_probability_of_nought_is_a_large_loss_not_an_infinite_one() -> None:
    found = metrics(np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32), np.array([0, 1]))
    assert math.isfinite(found["loss"])
    assert found["loss"] > 40


# Interval

# Newcombe, Two-sided confidence intervals for the single proportion, Statist. Med. 17 (1998), table I, method 3
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("hits", "count", "low", "high"), NEWCOMBE)
def test_the_interval_is_the_published_one(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize("count", [1, 5, 153, 10_000])
def test_the_interval_at_its_ends_is_the_closed_form(count: int) -> None:
    """No hit: [0, z^2 / (n + z^2)]; all hits: its mirror image."""
    z2 = 1.959964**2
    assert wilson(0, count) == pytest.approx([0, z2 / (count + z2)])
    assert wilson(count, count) == pytest.approx([count / (count + z2), 1])
    assert all(0 <= end <= 1 for hits in (0, count) for end in wilson(hits, count))


@pytest.mark.parametrize(("hits", "count"), [(1, 3), (144, 153), (9, 10), (5000, 10_000)])
def test_the_interval_solves_its_equation(hits: int, count: int) -> None:
    """Its ends are the p for which |hits / n - p| = z sqrt(p (1 - p) / n)."""
    for end in wilson(hits, count):
        assert abs(hits / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-9)


# Calibration


def ece_by_loop(confidence: np.ndarray, right: np.ndarray) -> float:
    """Equation 3 of Guo et al. 2017, bin by bin: B_m holds what lies in ((m - 1) / M, m / M]."""
    total = 0.0
    for number in range(1, BINS + 1):
        inside = [i for i, value in enumerate(confidence) if (number - 1) / BINS < value <= number / BINS]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            sure = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sure)
    return total


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
def test_the_calibration_error_is_that_of_a_loop(count: int, classes: int, seed: int) -> None:
    probabilities, labels = made(count, classes, seed)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = ece_by_loop(confidence, right)
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert metrics(probabilities, labels)["ece"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("confidence", "right", "expected"),
    [
        ([1.0] * 4, [True] * 4, 0),
        ([1.0] * 4, [False] * 4, 1),
        ([0.8] * 5, [True] * 4 + [False], 0),
        ([0.9, 0.9, 0.6, 0.6], [True, True, False, False], 0.35),
        ([0.75, 0.65], [True, False], 0.45),  # two bins: 0.25 and 0.65, half each
    ],
)
def test_plain_cases_of_calibration(confidence: list[float], right: list[bool], expected: float) -> None:
    assert calibration_error(np.array(confidence), np.array(right)) == pytest.approx(expected, abs=1e-9)


# Per class


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
def test_per_class_figures_are_scikit_learns(count: int, classes: int, seed: int) -> None:
    probabilities, labels = made(count, classes, seed)
    predicted, names = probabilities.argmax(1), [f"class {label}" for label in range(classes)]
    found = per_class(probabilities, labels, names)
    expected = precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=np.nan)
    assert [row["class"] for row in found] == names
    for name, column in zip(("precision", "recall"), expected, strict=False):
        values = [math.nan if row[name] is None else row[name] for row in found]
        np.testing.assert_allclose(values, column)
    assert [row["images"] for row in found] == expected[3].tolist()
    for row, f1 in zip(found, expected[2], strict=True):
        assert row["f1"] is None or row["f1"] == pytest.approx(np.nan_to_num(f1))
        assert (row["f1"] is None) == (row["images"] == 0 and row["precision"] is None)


def test_what_is_undefined_is_null() -> None:
    """Class b is predicted and never there, c is there and never predicted, d is neither."""
    rows = per_class(np.eye(4)[[0, 0, 1, 0]], np.array([0, 0, 0, 2]), ["a", "b", "c", "d"])
    assert [row.pop("auroc") for row in rows] == [None] * 4, "no class has ten images"
    a, b, c, d = rows
    assert a == {"class": "a", "images": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert b == {"class": "b", "images": 0, "precision": 0.0, "recall": None, "f1": 0.0}
    assert c == {"class": "c", "images": 1, "precision": None, "recall": 0.0, "f1": 0.0}
    assert d == {"class": "d", "images": 0, "precision": None, "recall": None, "f1": None}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_losses_of_images_are_those_of_scikit_learn_one_by_one(dtype: Any) -> None:
    probabilities, labels = made(30, 4, 0)
    losses = image_losses(probabilities.astype(dtype), labels)
    assert losses.shape == (30,) and losses.dtype == np.float64
    one_by_one = [
        log_loss([label], row[None], labels=range(4)) for label, row in zip(labels, probabilities, strict=True)
    ]
    assert losses == pytest.approx(one_by_one, rel=1e-2 if dtype == np.float16 else 1e-5)
    assert metrics(probabilities, labels)["loss"] == pytest.approx(image_losses(probabilities, labels).mean())


def test_losses_of_images_are_finite() -> None:
    found = image_losses(np.array([[1.0, 0.0], [0.0, 1.0], [1e-300, 1.0]]), np.array([1, 1, 0]))
    assert found == pytest.approx([-math.log(np.finfo(np.float32).tiny), 0.0, -math.log(np.finfo(np.float32).tiny)])
    assert len(image_losses(np.empty((0, 3)), np.empty(0, dtype=int))) == 0


# Brier


@pytest.mark.parametrize("seed", range(5))
def test_the_brier_score_of_two_classes_is_twice_scikit_learns(seed: int) -> None:
    probabilities, labels = made(60, 2, seed)
    expected = 2 * sklearn.metrics.brier_score_loss(labels, probabilities[:, 1])
    assert brier_scores(probabilities, labels).mean() == pytest.approx(expected, abs=1e-6)
    assert metrics(probabilities.astype(np.float32), labels)["brier"] == pytest.approx(expected, abs=1e-6)


def test_the_brier_score_in_closed_form() -> None:
    """Nothing for certainty that is right, 2 for certainty that is wrong, (K - 1) / K for saying nothing."""
    sure, told = np.eye(4)[[0, 1]], np.array([0, 2])
    assert brier_scores(sure, told).tolist() == [0, 2]
    assert brier_scores(np.full((1, 4), 0.25), np.array([3])) == pytest.approx([0.75])


# AUROC


def auroc_by_pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs in order, ties half, pair by pair."""
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    return float(np.mean(pairs))


@pytest.mark.parametrize(("count", "classes", "seed"), [*CASES, (60, 2, 6), (400, 12, 7), (23, 3, 8)])
@pytest.mark.parametrize("decimals", [None, 1], ids=["", "ties"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_aurocs_are_scikit_learns(count: int, classes: int, seed: int, decimals: int | None, dtype: Any) -> None:
    probabilities, labels = made(count, classes, seed)
    if decimals is not None:
        probabilities = probabilities.round(decimals)
    probabilities = probabilities.astype(dtype)
    found, images = class_aurocs(probabilities, labels), np.bincount(labels, minlength=classes)
    assert [row["auroc"] for row in per_class(probabilities, labels, [""] * classes)] == found
    expected = []
    for label in range(classes):
        if images[label] < RANKED_FROM or images[label] == count:
            assert found[label] is None
            continue
        expected.append(roc_auc_score(labels == label, probabilities[:, label]))
        assert found[label] == pytest.approx(expected[-1], abs=1e-6)
        assert found[label] == pytest.approx(auroc_by_pairs(probabilities[:, label], labels == label), abs=1e-6)
    told = measured(probabilities, labels)
    assert ("auroc" in told) == ("auroc_ci95" in told) == bool(expected)
    if expected:
        assert told["auroc"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_aurocs_of_classes_of_ten_images_are_told_of_nine_are_not() -> None:
    probabilities, _ = made(30, 3, 0)
    labels = np.repeat([0, 1, 2], [9, 10, 11])
    found = class_aurocs(probabilities, labels)
    assert found[0] is None and found[1] is not None and found[2] is not None
    assert measured(probabilities, labels)["auroc"] == pytest.approx((found[1] + found[2]) / 2)


def test_a_class_that_has_all_images_has_no_rest_to_be_ranked_above() -> None:
    probabilities, _ = made(40, 3, 0)
    assert class_aurocs(probabilities, np.full(40, 1)) == [None, None, None]
    assert "auroc" not in measured(probabilities, np.full(40, 1))


def test_aurocs_at_their_ends() -> None:
    labels = np.repeat([0, 1], 10)
    assert class_aurocs(np.eye(2)[labels], labels) == [1, 1]
    assert class_aurocs(np.eye(2)[1 - labels], labels) == [0, 0]
    assert class_aurocs(np.full((20, 2), 0.5), labels) == [0.5, 0.5]


# Tables


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
def test_the_confusion_matrix_is_scikit_learns(count: int, classes: int, seed: int) -> None:
    probabilities, labels = made(count, classes, seed, sharpness=0.5)
    predicted = probabilities.argmax(1)
    found = confusion_matrix(predicted, labels, classes)
    assert found.tolist() == sklearn.metrics.confusion_matrix(labels, predicted, labels=range(classes)).tolist()


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_reliability_is_that_of_a_loop(count: int, classes: int, seed: int, dtype: Any) -> None:
    probabilities, labels = made(count, classes, seed)
    confidence, right = probabilities.max(1).astype(dtype), probabilities.argmax(1) == labels
    found = reliability(confidence, right)
    place = 0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [i for i, value in enumerate(confidence.astype(float)) if low < value <= high]
        if not inside:
            continue
        assert (found[place]["low"], found[place]["high"]) == (pytest.approx(low), pytest.approx(high))
        assert found[place]["images"] == len(inside)
        assert found[place]["accuracy"] == pytest.approx(sum(bool(right[i]) for i in inside) / len(inside))
        assert found[place]["confidence"] == pytest.approx(sum(float(confidence[i]) for i in inside) / len(inside))
        place += 1
    assert place == len(found)
    error = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in found) / count
    assert calibration_error(confidence, right) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("count", "classes", "seed"), CASES)
def test_coverage_is_that_of_a_loop(count: int, classes: int, seed: int) -> None:
    probabilities, labels = made(count, classes, seed)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    found = coverage(confidence, right)
    assert [row["threshold"] for row in found] == list(THRESHOLDS)
    for row in found:
        kept = [i for i, value in enumerate(confidence) if value >= row["threshold"]]
        assert row["images"] == len(kept)
        assert row["coverage"] == pytest.approx(len(kept) / count)
        if kept:
            assert row["accuracy"] == pytest.approx(sum(bool(right[i]) for i in kept) / len(kept))
            assert row["accuracy_ci95"] == wilson(sum(bool(right[i]) for i in kept), len(kept))
        else:
            assert row["accuracy"] is None and row["accuracy_ci95"] is None
    assert found[0]["accuracy"] == pytest.approx(metrics(probabilities, labels)["top1"])


def test_nothing_kept_and_all_kept() -> None:
    rows = {row["threshold"]: row for row in coverage(np.array([0.5, 0.9], np.float32), np.array([False, True]))}
    assert (rows[0.5]["images"], rows[0.5]["accuracy"]) == (2, 0.5)
    assert (rows[0.6]["images"], rows[0.6]["coverage"], rows[0.6]["accuracy"]) == (1, 0.5, 1.0)
    assert (rows[0.99]["images"], rows[0.99]["coverage"], rows[0.99]["accuracy"]) == (0, 0.0, None)
