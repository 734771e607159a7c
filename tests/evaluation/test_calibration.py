"""Temperature scaling: known temperatures are recovered, against a grid and scipy; what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from tlkit.evaluation.calibration import LARGEST, fit_temperature, with_temperature
from tlkit.evaluation.metrics import calibration_error


def drawn(count: int, classes: int, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at that temperature is what the labels are drawn from."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2 * temperature, (count, classes))
    true = softmax(logits / temperature, axis=1)
    labels = (true.cumsum(1) < random.random((count, 1))).sum(1).clip(max=classes - 1)
    return logits, labels


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.6, 3.0])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_a_known_temperature_is_recovered(temperature: float, classes: int) -> None:
    logits, labels = drawn(8000, classes, temperature, seed=classes)
    probabilities = softmax(logits, axis=1)
    assert fit_temperature(probabilities, labels) == pytest.approx(temperature, rel=0.06)
    assert fit_temperature(probabilities.astype(np.float32), labels) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_lowest_of_a_grid_and_of_scipys_other_method(seed: int) -> None:
    """Computed from the logits themselves."""
    logits, labels = drawn(60, 4, 0.5 + seed, seed)
    found = fit_temperature(softmax(logits, axis=1), labels)
    grid = np.exp(np.linspace(-3, 3, 2001))
    losses = [loss(logits, labels, temperature) for temperature in grid]
    assert loss(logits, labels, found) <= min(losses) + 1e-9
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.005)
    other = minimize(lambda x: loss(logits, labels, math.exp(x[0])), [0.0], method="BFGS", options={"gtol": 1e-10})
    assert found == pytest.approx(math.exp(other.x[0]), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.2, 0.9, 1.0, 2.5, 10.0])
def test_scaled_probabilities_are_the_softmax_of_scaled_logits(temperature: float) -> None:
    logits, _ = drawn(50, 6, 1, 0)
    probabilities = softmax(logits, axis=1)
    found = with_temperature(probabilities, temperature)
    np.testing.assert_allclose(found, softmax(logits / temperature, axis=1), atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(with_temperature(found, 1 / temperature), probabilities, atol=1e-9)


def test_a_temperature_of_one_changes_nothing() -> None:
    probabilities = softmax(drawn(50, 6, 1, 0)[0], axis=1)
    np.testing.assert_allclose(with_temperature(probabilities, 1), probabilities, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0, 50.0])
def test_labels_stay_the_same(temperature: float) -> None:
    probabilities = softmax(drawn(500, 6, 1, 2)[0], axis=1)
    assert (with_temperature(probabilities, temperature).argmax(1) == probabilities.argmax(1)).all()
    if temperature >= 0.5:
        as_stored = with_temperature(probabilities, temperature).astype(np.float32)
        assert (as_stored.argmax(1) == probabilities.argmax(1)).all()


def test_temperatures_one_after_another_multiply() -> None:
    probabilities = softmax(drawn(50, 3, 1, 0)[0], axis=1)
    twice = with_temperature(with_temperature(probabilities, 1.5), 2)
    np.testing.assert_allclose(twice, with_temperature(probabilities, 3), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_nought_stay_finite(dtype: type) -> None:
    probabilities = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]], dtype=dtype)
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        for temperature in (1 / LARGEST, 0.5, 1, 3, LARGEST):
            found = with_temperature(probabilities, temperature)
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found.sum(1), 1)
        fitted = fit_temperature(probabilities, np.array([0, 2, 1]))
    assert 1 / LARGEST <= fitted <= LARGEST


def test_images_that_are_all_right_ask_for_the_lowest_and_all_wrong_for_the_highest() -> None:
    logits, _ = drawn(100, 3, 1, 0)
    probabilities = softmax(logits, axis=1)
    assert fit_temperature(probabilities, probabilities.argmax(1)) == pytest.approx(1 / LARGEST, rel=0.01)
    assert fit_temperature(probabilities, probabilities.argmin(1)) == pytest.approx(LARGEST, rel=0.01)


def test_an_overconfident_network_is_mended() -> None:
    logits, labels = drawn(4000, 5, 3, 0)
    fitted, others = slice(0, 2000), slice(2000, None)
    probabilities = softmax(logits, axis=1)
    temperature = fit_temperature(probabilities[fitted], labels[fitted])
    both = (probabilities[others], with_temperature(probabilities[others], temperature))
    errors = [calibration_error(found.max(1), found.argmax(1) == labels[others]) for found in both]
    assert errors[0] > 0.15 and errors[1] < 0.04
