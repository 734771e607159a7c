"""The linear head against scikit-learn's logistic regression, done by hand on the same standardised features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict

from tlkit.data.splits import folds
from tlkit.training import probe
from tlkit.training.probe import (
    DEFAULT_STRENGTH,
    SHRINKAGE,
    STRENGTHS,
    Head,
    HeldOut,
    choose_strength,
    fit_head,
    held_out,
)

Data = tuple[np.ndarray, np.ndarray]


def cancer(count: int) -> Data:
    """Two classes, 30 features of very different scales."""
    features, labels = load_breast_cancer(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(labels))[:count]
    return features[rows], labels[rows]


def five_digits(count: int) -> Data:
    """Five classes, 64 features; many hardly vary, some not at all."""
    features, labels = load_digits(n_class=5, return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(labels))[:count]
    return features[rows], labels[rows]


DATA = {
    "2 classes, more images than features": cancer(120),
    "2 classes, fewer images than features": cancer(20),
    "5 classes, more images than features": five_digits(150),
    "5 classes, fewer images than features": five_digits(40),
}


def by_hand(features: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray | None = None) -> Any:
    """scikit-learn's answer for features (N, D): a function of raw features, and its parts.

    For two classes it fits the difference of the two rows of weights alone, and penalises that: half as much as both.
    """
    variance = features.var(0)
    mean, scale = features.mean(0), np.sqrt(variance + SHRINKAGE * variance.mean())
    strength = 2 * strength if labels.max() == 1 else strength
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000)
    model.fit((features - mean) / scale, labels, sample_weight=weights)
    return lambda new: model.predict_proba((new - mean) / scale)


def fitted(data: Data, **options: Any) -> Head:
    features, labels = data
    return fit_head(features[:, None], labels, int(labels.max()) + 1, **{"seed": 0} | options)


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("name", DATA)
def test_probabilities_are_scikit_learns(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standardised, fitted and folded back into one map of raw features, in float64."""
    monkeypatch.setattr(probe, "STRENGTHS", (strength,))
    features, labels = DATA[name]
    head = fitted(DATA[name])
    assert head.strength == strength
    assert head.weight.shape == (labels.max() + 1, features.shape[1])
    assert (head.weight.dtype, head.bias.dtype) == (np.float64, np.float64)
    expected = by_hand(features, labels, strength)(features)
    np.testing.assert_allclose(head.probabilities(features), expected, atol=5e-6)


@pytest.mark.parametrize("name", DATA)
def test_balanced_weights_are_scikit_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "STRENGTHS", (0.01,))
    features, labels = DATA[name]
    keep = (labels != 1) | (np.arange(len(labels)) % 3 == 0)  # a class with a third of its images
    features, labels = features[keep], labels[keep]
    count = np.bincount(labels)
    weights = len(labels) / (len(count) * count[labels])  # scikit-learn's class_weight="balanced"
    head = fitted((features, labels), balanced=True)
    np.testing.assert_allclose(
        head.probabilities(features), by_hand(features, labels, 0.01, weights)(features), atol=5e-6
    )
    plain = fitted((features, labels))
    assert head.probabilities(features)[:, 1].mean() > plain.probabilities(features)[:, 1].mean()


@pytest.mark.parametrize("balanced", [False, True], ids=["", "balanced"])
def test_views_of_an_image_weigh_together_what_one_does(balanced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "STRENGTHS", (0.01,))
    features, labels = DATA["5 classes, more images than features"]
    random = np.random.default_rng(1)
    views = np.stack([features, features + random.normal(0, 1, features.shape)], axis=1)
    head = fit_head(views, labels, 5, seed=0, balanced=balanced)
    count = np.bincount(labels)
    weights = len(labels) / (5 * count[labels]) if balanced else np.ones(len(labels))
    expected = by_hand(views.reshape(-1, 64), labels.repeat(2), 0.01, (weights / 2).repeat(2))(features)
    np.testing.assert_allclose(head.probabilities(features), expected, atol=5e-6)
    twice = fit_head(np.stack([features, features], axis=1), labels, 5, seed=0, balanced=balanced)
    once = fit_head(features[:, None], labels, 5, seed=0, balanced=balanced)
    np.testing.assert_allclose(twice.probabilities(features), once.probabilities(features), atol=5e-6)


@pytest.mark.parametrize("name", DATA)
def test_losses_are_those_of_cross_validation_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: scikit-learn fitted and scored fold by fold, standardised as the whole training set is."""
    features, labels = DATA[name]
    numbers = np.arange(len(labels))

    def every_fifth(_: np.ndarray, groups: np.ndarray, __: int) -> list[np.ndarray]:
        return [np.flatnonzero(groups.astype(int) % 5 == first) for first in range(5)]

    monkeypatch.setattr(probe, "folds", every_fifth)
    head = fitted(DATA[name], groups=numbers.astype(str))
    assert head.chosen_on == "5-fold cross-validation in train"
    assert tuple(head.losses) == STRENGTHS
    variance = features.var(0)
    rows = (features - features.mean(0)) / np.sqrt(variance + SHRINKAGE * variance.mean())
    for strength in (1e-4, 1e-2, 1.0):
        of_truth = np.empty(len(labels))
        for first in range(5):
            part, rest = numbers % 5 == first, numbers % 5 != first
            model = LogisticRegression(C=strength * (2 if labels.max() == 1 else 1), tol=1e-8, max_iter=10_000)
            found = model.fit(rows[rest], labels[rest]).predict_proba(rows[part])
            of_truth[part] = found[np.arange(part.sum()), labels[part]]
        assert head.losses[strength] == pytest.approx(-np.log(of_truth).mean(), rel=5e-3)


@pytest.mark.parametrize("name", DATA)
def test_the_strength_is_the_smallest_that_is_as_good_as_the_best(name: str) -> None:
    head = fitted(DATA[name])
    best = min(head.losses, key=lambda strength: head.losses[strength])
    assert head.strength in head.losses
    assert head.strength <= best
    assert head.losses[head.strength] < head.losses[STRENGTHS[0]]


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("seed", range(5))
def test_the_rule_of_one_standard_error(seed: int, weighted: bool) -> None:
    """Against a loop over strengths and images, and where the answer is plain."""
    random = np.random.default_rng(seed)
    count = 30
    losses = random.gamma(2, 0.2, (len(STRENGTHS), count)) + np.linspace(0.3, 0, len(STRENGTHS))[:, None] ** 2
    weights = random.uniform(0.5, 2, count) if weighted else np.ones(count)
    means = [sum(w * v for w, v in zip(weights, row, strict=True)) / weights.sum() for row in losses]
    best = int(np.argmin(means))
    expected = None
    for row in range(len(STRENGTHS)):
        excess = [losses[row, i] - losses[best, i] for i in range(count)]
        mean = means[row] - means[best]
        error = sum((weights[i] * (excess[i] - mean)) ** 2 for i in range(count)) ** 0.5 / weights.sum()
        if mean <= error:
            expected = STRENGTHS[row]
            break
    assert choose_strength(losses, weights) == expected


def test_a_clear_winner_is_chosen() -> None:
    losses = np.full((len(STRENGTHS), 10), 1.0) + np.arange(10) * 0.01
    for best in range(len(STRENGTHS)):
        clear = losses.copy()
        clear[best] -= 0.5
        assert choose_strength(clear, np.ones(10)) == STRENGTHS[best]
    assert choose_strength(losses, np.ones(10)) == STRENGTHS[0], "all alike: the strongest penalty"


@pytest.mark.parametrize("name", ["2 classes, more images than features", "5 classes, fewer images than features"])
def test_what_is_held_out_decides_where_it_is_given(name: str) -> None:
    features, labels = DATA[name]
    new = (cancer if labels.max() == 1 else five_digits)(400)
    unseen = (new[0][-200:], new[1][-200:])
    head = fitted(DATA[name], held_out=unseen)
    assert head.chosen_on == "val"
    for strength in (1e-4, 1e-2, 1.0):
        expected = log_loss(unseen[1], by_hand(features, labels, strength)(unseen[0]))
        assert head.losses[strength] == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_images_of_one_group_are_held_out_together() -> None:
    """Ten images each of 16 things whose label is chance: only who has seen the thing can know it."""
    random = np.random.default_rng(0)
    things, labels = random.normal(size=(16, 40)), np.arange(16) % 2
    groups = np.repeat(np.arange(16).astype(str), 10)
    features = things.repeat(10, axis=0) + random.normal(0, 0.01, (160, 40))
    known = fitted((features, labels.repeat(10)))
    assert known.losses[1.0] < 0.1, "without groups it looks like perfect knowledge"
    kept_apart = fitted((features, labels.repeat(10)), groups=groups)
    assert kept_apart.losses[1.0] > np.log(2), "worse than chance, as it is"
    assert kept_apart.strength < known.strength


@pytest.mark.parametrize("weight_of", ["constant", "nearly constant"])
def test_a_feature_that_hardly_varies_does_not_explode(weight_of: str) -> None:
    """It was all but constant while training; a new image may have any value."""
    features, labels = (part.copy() for part in DATA["2 classes, more images than features"])
    spread = features.var(0).mean() ** 0.5
    features[:, 3] = 5.0
    if weight_of == "nearly constant":
        features[0, 3] += 1e-6 * spread
    head = fitted((features, labels))
    assert np.isfinite(head.weight).all()
    new = features.copy()
    new[:, 3] += spread
    shift = np.abs(head.probabilities(new) - head.probabilities(features)).max()
    assert shift < (1e-9 if weight_of == "constant" else 1e-2)


def test_features_that_tell_nothing_give_the_shares_of_the_classes() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 3)
    head = fitted((np.full((12, 8), 3.0), labels))
    np.testing.assert_allclose(head.probabilities(np.full((1, 8), 3.0)), [[0.5, 0.25, 0.25]], atol=1e-4)


@pytest.mark.parametrize("classes", [2, 5])
def test_two_images_a_class_are_enough(classes: int) -> None:
    features, labels = five_digits(400)
    rows = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(classes)])
    head = fitted((features[rows], labels[rows]))
    assert (head.probabilities(features[rows]).argmax(1) == labels[rows]).all()
    assert "cross-validation" in head.chosen_on


@pytest.mark.parametrize("kind", ["one group", "each class in a group of its own"])
def test_groups_that_allow_no_cross_validation(kind: str) -> None:
    features, labels = DATA["5 classes, more images than features"]
    head = fitted((features, labels), groups=labels.astype(str) if "each" in kind else np.full(len(labels), "all"))
    assert head.losses == {}
    assert head.strength == DEFAULT_STRENGTH
    assert head.chosen_on.startswith("nothing") and "0.1" in head.chosen_on
    assert (head.probabilities(features).argmax(1) == labels).mean() > 0.9


def test_a_class_in_one_group_is_no_reason_to_know_nothing() -> None:
    """Held out whole it cannot be known, whatever the strength: that must not count for the strongest penalty."""
    features, labels = DATA["5 classes, more images than features"]
    groups = np.where(labels == 2, "same", np.arange(len(labels)).astype(str))
    head = fitted((features, labels), groups=groups)
    assert (head.probabilities(features).argmax(1) == labels).mean() > 0.9
    assert head.strength >= 1e-3


@pytest.mark.parametrize(("large", "told"), [(64 * 5 * 60, "60 of its 150 images"), (64 * 5 * 10, "nothing")])
def test_a_large_problem_is_searched_in_part_and_says_so(
    large: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LARGE", large)
    head = fitted(DATA["5 classes, more images than features"])
    assert told in head.chosen_on
    assert (head.strength == DEFAULT_STRENGTH) == (told == "nothing")


def test_the_same_again() -> None:
    first, second = (fitted(DATA["5 classes, more images than features"]) for _ in range(2))
    assert first.weight.tobytes() == second.weight.tobytes()
    assert (first.bias.tobytes(), first.strength) == (second.bias.tobytes(), second.strength)


def test_single_precision_features_will_do() -> None:
    features, labels = DATA["5 classes, more images than features"]
    double, single = fitted((features, labels)), fitted((features.astype(np.float32), labels))
    np.testing.assert_allclose(single.probabilities(features), double.probabilities(features), atol=1e-4)


# What was held out


def held_out_by_hand(data: Data, strength: float, parts: list[np.ndarray]) -> np.ndarray:
    """scikit-learn's cross-validated probabilities (N, K) on features that all images standardise."""
    features, labels = data
    variance = features.var(0)
    standard = (features - features.mean(0)) / np.sqrt(variance + SHRINKAGE * variance.mean())
    model = LogisticRegression(C=2 * strength if labels.max() == 1 else strength, tol=1e-10, max_iter=100_000)
    cuts = [(np.delete(np.arange(len(labels)), part), part) for part in parts]
    return np.asarray(cross_val_predict(model, standard, labels, cv=cuts, method="predict_proba"))


@pytest.mark.parametrize("strength", [0.003, 0.3])
@pytest.mark.parametrize("name", DATA)
def test_held_out_probabilities_are_scikit_learns(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = DATA[name]
    monkeypatch.setattr(probe, "_cross_validate", lambda *_: (np.ones((1, 1)), np.ones(1), ""))
    monkeypatch.setattr(probe, "choose_strength", lambda *_: strength)
    parts = folds(labels, (), seed=3)
    expected = held_out_by_hand((features, labels), strength, parts)
    found = held_out(features, labels, int(labels.max()) + 1, parts, seed=0)
    assert found.own == pytest.approx(expected[np.arange(len(labels)), labels], abs=2e-3)
    assert found.probability == pytest.approx(expected.max(1), abs=2e-3)
    surer = np.sort(expected, axis=1)[:, -1] - np.sort(expected, axis=1)[:, -2] > 0.01
    assert (found.best == expected.argmax(1))[surer].all()
    sane(found)
    assert (found.own[found.best == labels] == found.probability[found.best == labels]).all()


@pytest.mark.parametrize("width", [np.float64, np.float32])
def test_the_strength_is_chosen_as_for_a_head(width: type) -> None:
    features, labels = DATA["2 classes, fewer images than features"]
    parts = folds(labels, (), seed=3)
    expected = held_out_by_hand((features, labels), fitted((features, labels)).strength, parts)
    found = held_out(features.astype(width), labels, 2, parts, seed=0)
    assert found.own == pytest.approx(expected[np.arange(len(labels)), labels], abs=2e-3)


def sane(found: HeldOut) -> None:
    """Probabilities: that of the label is the best one, or leaves room for it."""
    own, best = (values[~np.isnan(found.own)] for values in (found.own, found.probability))
    assert (own >= 0).all() and (own <= best).all() and (found.probability <= 1 + 1e-12).all()
    assert (own[own < best] + best[own < best] <= 1 + 1e-12).all()


def test_a_few_images_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = DATA["2 classes, fewer images than features"]
    whole = held_out(features, labels, 2, folds(labels, (), seed=0), seed=0)
    monkeypatch.setattr(probe, "PROBABILITIES", 3)  # one or two images of two classes
    found = held_out(features, labels, 2, folds(labels, (), seed=0), seed=0)
    np.testing.assert_allclose(found.own, whole.own, atol=1e-12)
    assert (found.best == whole.best).all() and found.probability == pytest.approx(whole.probability)


def test_nothing_of_an_image_is_in_the_head_that_judges_it() -> None:
    """A label that is changed changes no probability of a class to the same image."""
    features, labels = DATA["5 classes, more images than features"]
    parts = folds(labels, (), seed=0)
    other = labels.copy()
    other[7] = (labels[7] + 1) % 5
    found = [held_out(features, given, 5, parts, seed=0) for given in (labels, other)]
    assert found[1].best[7] == found[0].best[7]
    assert found[1].probability[7] == pytest.approx(found[0].probability[7], abs=0.02), "but for the strength"
    assert found[1].own[7] < 0.1 < 0.7 < found[0].own[7]


def test_a_class_that_is_held_out_whole_is_not_judged() -> None:
    features, labels = DATA["5 classes, more images than features"]
    only = np.flatnonzero(labels == 4)
    parts = [*folds(np.delete(labels, only), (), seed=0)]
    parts = [np.delete(np.arange(len(labels)), only)[part] for part in parts] + [only]
    found = held_out(features, labels, 5, parts, seed=0)
    assert np.isnan(found.own[only]).all() and not np.isnan(np.delete(found.own, only)).any()
    assert not (found.best[only] == 4).any(), "nobody knew of it"
    sane(found)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_too_few_images_to_choose_the_strength_by(count: int) -> None:
    features, labels = np.eye(count), np.arange(count) % 2
    found = held_out(features, labels, 2, [np.array([row]) for row in range(count)], seed=0)
    alone = np.bincount(labels)[labels] == 1
    assert np.isnan(found.own).tolist() == alone.tolist()
    sane(found)


def test_no_parts_judge_nothing() -> None:
    features, labels = DATA["2 classes, fewer images than features"]
    assert np.isnan(held_out(features, labels, 2, [], seed=0).own).all()
