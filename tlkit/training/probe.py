"""A regularised linear head on frozen features: multinomial logistic regression, its strength chosen by data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlkit.data.splits import folds

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Values of C, the inverse strength of the penalty: what is minimised is sum(nll) + |W|^2 / (2 C)."""
DEFAULT_STRENGTH = 0.1
SHRINKAGE = 0.1
"""Part of the mean variance that is added to each feature's before dividing by its root. A feature that is all but
constant on a few training images would otherwise be blown up on new ones."""
SMALL = 2e8
"""Images x features x classes below which several threads do not pay."""
PROBABILITIES = 10_000_000
"""At once, of held-out images: N x K of them."""
LARGE = 2e9
"""Images x features x classes up to which the strength is searched for on all images: about a minute on two cores."""


@dataclass(frozen=True)
class Head:
    """A linear classifier of raw features, and how it was found.

    Args:
        weight: (K, D).
        bias: (K).
        strength: The C that was used.
        losses: Mean negative log-likelihood in nats of what was held out, for each C tried; empty if none was tried.
        chosen_on: In words.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    losses: dict[float, float]
    chosen_on: str

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, D) to (N, K)."""
        logits = features @ self.weight.T + self.bias
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)


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
    with _threads_that_pay(features.size * classes):
        return _fit_head(features, labels, classes, seed, groups, balanced, held_out)


@dataclass(frozen=True)
class HeldOut:
    """What a head makes of images that it was not fitted to.

    Args:
        own: Probability of the label that the image has (N); NaN where no other image of its class was fitted to.
        best: The most probable class (N).
        probability: Of that (N).
    """

    own: np.ndarray
    best: np.ndarray
    probability: np.ndarray


def held_out(
    features: np.ndarray, labels: np.ndarray, classes: int, parts: Sequence[np.ndarray], *, seed: int
) -> HeldOut:
    """Probabilities of each image from a head fitted to all images but those of its part, at one common strength.

    Args:
        features: (N, D).
        labels: Class of each image (N), in [0, K).
        classes: K.
        parts: Disjoint rows that together are all N.
        seed: Of the folds that the strength is chosen by.
    """
    count = len(labels)
    found = HeldOut(np.full(count, np.nan), np.zeros(count, dtype=np.int64), np.zeros(count))
    with _threads_that_pay(features.size * classes):
        problem = _posed(features[:, None], labels, classes, False)[0]
        losses, weights, _ = _cross_validate(problem, (), seed)
        strength = choose_strength(losses, weights) if losses.size else DEFAULT_STRENGTH
        for part in parts:
            rest = np.delete(np.arange(count), part)
            head = problem.solve(torch.from_numpy(rest), strength, None, tolerance=1e-5)
            for rows in np.array_split(part, -(-len(part) * classes // PROBABILITIES)):
                shares = (problem.rows[rows, 0] @ head[:, :-1].T + head[:, -1]).softmax(1)
                best = shares.max(1)
                found.own[rows] = shares[torch.arange(len(rows)), problem.labels[rows]]
                found.best[rows], found.probability[rows] = best.indices, best.values
            found.own[part[~np.isin(labels[part], labels[rest])]] = np.nan
    return found


@contextmanager
def _threads_that_pay(multiplications: int) -> Iterator[None]:
    """Compute small problems in one thread.

    Splitting a millisecond's work gains little, and on a machine that is busy with something else the threads wait for
    each other at every step: ten times slower was measured.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if multiplications > SMALL else 1)
        yield
    finally:
        torch.set_num_threads(before)


def _fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    seed: int,
    groups: Sequence[str] | np.ndarray,
    balanced: bool,
    held_out: tuple[np.ndarray, np.ndarray] | None,
) -> Head:
    count = len(labels)
    problem, mean, scale, basis = _posed(features, labels, classes, balanced)
    if held_out is not None:
        unseen = _expressed(torch.from_numpy((held_out[0] - mean) / scale).to(problem.rows.dtype), basis)
        weights = _image_weights(held_out[1], classes, balanced)
        losses = problem.path(torch.arange(count), unseen, torch.from_numpy(held_out[1]))
        chosen_on = "val"
    else:
        losses, weights, chosen_on = _cross_validate(problem, groups, seed)
    strength = choose_strength(losses, weights) if losses.size else DEFAULT_STRENGTH
    tried = (
        dict(zip(STRENGTHS, np.average(losses, axis=1, weights=weights).tolist(), strict=True)) if losses.size else {}
    )
    found = problem.solve(torch.arange(count), strength, None)
    weight = (found[:, :-1] if basis is None else found[:, :-1] @ basis).numpy().astype(np.float64) / scale
    return Head(weight, found[:, -1].numpy() - weight @ mean, strength, tried, chosen_on)


def _posed(
    features: np.ndarray, labels: np.ndarray, classes: int, balanced: bool
) -> tuple[_Problem, np.ndarray, np.ndarray, Tensor | None]:
    """The problem on standardised features (N, V, D), their mean (D) and scale (D), and the basis it is said in."""
    count, views, width = features.shape
    rows = features.reshape(count * views, width).astype(np.float64 if features.size < 5e7 else np.float32)
    mean, variance = rows.mean(0), rows.var(0)
    scale = np.sqrt(variance + SHRINKAGE * variance.mean() + 1e-12)
    standardised = torch.from_numpy((rows - mean) / scale)
    basis = _basis(standardised)
    problem = _Problem(
        _expressed(standardised, basis).view(count, views, -1),
        torch.from_numpy(labels),
        torch.from_numpy(_image_weights(labels, classes, balanced)).to(standardised.dtype),
        classes,
    )
    return problem, mean, scale, basis


def choose_strength(losses: np.ndarray, weights: np.ndarray) -> float:
    """The strongest penalty whose loss is within one paired standard error of the best one's.

    The one-standard-error rule (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 7.10): where the
    data cannot tell two penalties apart, the stronger is the safer.

    Args:
        losses: Of each image for each of `STRENGTHS`, ascending in C (S, N).
        weights: Of each image (N).
    """
    best = losses[np.average(losses, axis=1, weights=weights).argmin()]
    worse = losses - best
    mean = np.average(worse, axis=1, weights=weights)
    spread = np.sqrt((weights**2 * (worse - mean[:, None]) ** 2).sum(1)) / weights.sum()
    return STRENGTHS[int(np.argmax(mean <= spread))]


def _basis(rows: Tensor) -> Tensor | None:
    """Orthonormal basis (R, D) of the space that the rows (N, D) span; None where there are more rows than features.

    The best weights lie in that space, since the penalty is on their length alone, so the problem can be solved in R
    instead of D dimensions without changing its solution (the representer theorem): with few images, many times faster.
    """
    if len(rows) >= rows.shape[1]:
        return None
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > values[0] * 1e-10]


def _expressed(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis.T


def _image_weights(labels: np.ndarray, classes: int, balanced: bool) -> np.ndarray:
    """Weight of each image (N), 1 on average."""
    if not balanced:
        return np.ones(len(labels))
    count = np.bincount(labels, minlength=classes)
    return (len(labels) / (np.count_nonzero(count) * np.maximum(count, 1)))[labels]


def _cross_validate(
    problem: _Problem, groups: Sequence[str] | np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Loss of each image held out for each strength (S, N), weights of these images (N), and where from, in words."""
    labels = problem.labels.numpy()
    count, size = len(labels), problem.rows.shape[-1] * problem.classes
    some = np.random.default_rng(seed).permutation(count)[: max(int(LARGE / size), 1)]
    parts = folds(labels[some], np.asarray(groups)[some] if len(groups) else groups, seed)
    if len(parts) < 2 or len(some) < 5 * problem.classes < count:
        why = "too few images" if len(parts) < 2 else "too many classes"
        return np.empty((0, 0)), np.empty(0), f"nothing ({why}): C = {DEFAULT_STRENGTH:g}"
    losses, of = [], []
    for part in parts:
        rest = np.delete(some, part)
        held_out = some[part][np.isin(labels[some[part]], labels[rest])]  # a class held out whole tells nothing of C
        losses.append(problem.path(torch.from_numpy(rest), problem.rows[held_out, 0], problem.labels[held_out]))
        of.append(held_out)
    weights = problem.weights.numpy()[np.concatenate(of)]
    if not len(weights):
        return np.empty((0, 0)), np.empty(0), f"nothing (each class is in a group of its own): C = {DEFAULT_STRENGTH:g}"
    on = "" if len(some) == count else f", {len(some)} of its {count} images"
    return np.concatenate(losses, axis=1), weights, f"{len(parts)}-fold cross-validation in train{on}"


@dataclass(frozen=True)
class _Problem:
    """Standardised rows (N, V, R), labels (N), weight of each image (N), number of classes K."""

    rows: Tensor
    labels: Tensor
    weights: Tensor
    classes: int

    def path(self, images: Tensor, rows: Tensor, labels: Tensor) -> np.ndarray:
        """Loss of held-out (rows, labels) under what is fitted to ``images``, for each strength (S, M).

        In single precision and to a looser tolerance: only the differences between strengths matter here.
        """
        loose = replace(self, rows=self.rows.float(), weights=self.weights.float())
        losses, found = [], None
        for strength in STRENGTHS:
            found = loose.solve(images, strength, found, tolerance=1e-4)
            logits = rows.float() @ found[:, :-1].T + found[:, -1]
            losses.append(F.cross_entropy(logits, labels, reduction="none").double().numpy())
        return np.stack(losses)

    def solve(self, images: Tensor, strength: float, start: Tensor | None, tolerance: float = 1e-7) -> Tensor:
        """Weights and biases (K, R + 1) that fit ``images`` best, by L-BFGS from ``start``.

        ``tolerance`` is the largest component of the mean loss's gradient at which it ends.
        """
        views = self.rows.shape[1]
        rows = self.rows[images].flatten(0, 1)
        labels = self.labels[images].repeat_interleave(views)
        weights = (self.weights[images] / views).repeat_interleave(views)
        whole = weights.sum()
        found = rows.new_zeros(self.classes, rows.shape[1] + 1) if start is None else start.clone()
        found.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [found], max_iter=500, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            nll = F.cross_entropy(rows @ found[:, :-1].T + found[:, -1], labels, reduction="none")
            value = ((nll * weights).sum() + found[:, :-1].square().sum() / (2 * strength)) / whole
            value.backward()
            return value

        optimizer.step(loss)
        return found.detach()
