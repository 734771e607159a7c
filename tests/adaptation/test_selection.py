"""Scores without labels: against their definitions, and that they order what they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from tlkit.adaptation import selection


def predictions(images: int, classes: int, sharpness: float, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((images, classes)) * sharpness
    found: np.ndarray = softmax(logits, axis=1)
    return found


def test_entropy_and_infomax_are_scipys() -> None:
    made = predictions(50, 5, 2.0)
    mean = entropy(made, axis=1).mean()
    assert selection.score("entropy", made, made, np.zeros(50, int), 1) == pytest.approx(-mean)
    wanted = entropy(made.mean(0)) - mean
    assert selection.score("infomax", made, made, np.zeros(50, int), 1) == pytest.approx(wanted)


def test_infomax_does_not_fall_for_a_network_that_calls_everything_by_one_name() -> None:
    varied = np.eye(4)[np.arange(40) % 4] * 0.96 + 0.01
    one = np.eye(4)[np.zeros(40, int)] * 0.999 + 0.00025
    assert selection.mean_entropy(one) < selection.mean_entropy(varied)
    assert selection.infomax(varied) > selection.infomax(one)


@pytest.mark.parametrize("images", [3, 1500])
def test_neighbourhood_density_is_its_definition(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "AT_ONCE", 400)
    made = predictions(images, 6, 3.0)
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    alike = unit @ unit.T / 0.05
    np.fill_diagonal(alike, -np.inf)
    wanted = entropy(softmax(alike, axis=1), axis=1).mean()
    assert selection.neighbourhood_density(made) == pytest.approx(wanted, rel=1e-3)


def test_neighbourhoods_are_dense_where_images_of_a_class_are_alike() -> None:
    dense, sparse = (np.eye(classes)[np.arange(60) % classes] * 0.9 + 0.1 / classes for classes in (3, 20))
    assert selection.neighbourhood_density(dense) > selection.neighbourhood_density(sparse)


def test_the_source_and_the_last_epoch() -> None:
    source, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    wanted = (np.log(0.9) + np.log(0.8)) / 2
    assert selection.score("source-val", source, source, labels, 3) == pytest.approx(wanted)
    assert selection.score("last", source, source, labels, 3) == 3
    with pytest.raises(ValueError, match="nothing"):
        selection.score("nothing", source, source, labels, 3)


def test_predictions_of_zero_and_one_are_no_trouble() -> None:
    sure = np.eye(3)[np.arange(9) % 3]
    for name in ("entropy", "infomax", "snd"):
        assert np.isfinite(selection.score(name, sure, sure, np.arange(9) % 3, 1))
