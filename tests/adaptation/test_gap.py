"""Distances of domains: known cases, the permutation test's level, and what must not change them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from tlkit.adaptation import gap
from tlkit.adaptation.kernels import gaussian, mmd2, squared_distances


def normal(rows: int, columns: int, seed: int, shift: float = 0.0) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(seed).standard_normal((rows, columns)) + shift
    return found.astype(np.float32)


def test_domains_far_apart_are_told_apart() -> None:
    source, target = normal(120, 8, 0), normal(90, 8, 1, shift=4)
    found = gap.measure(source, target, gap.bandwidth(source, target), seed=0)
    assert found.mmd2 > 0.1
    assert found.p == pytest.approx(0.001)
    assert found.a_distance > 1.8


def test_two_samples_of_one_domain_are_not() -> None:
    source, target = normal(150, 8, 0), normal(150, 8, 1)
    found = gap.measure(source, target, gap.bandwidth(source, target), seed=0)
    assert abs(found.mmd2) < 0.01
    assert found.p > 0.05
    assert found.a_distance < 0.5


def test_the_permutation_test_keeps_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing differs, p is as often below a tenth as above nine tenths."""
    monkeypatch.setattr(gap, "PERMUTATIONS", 99)
    found = []
    for seed in range(200):
        both = torch.from_numpy(normal(30, 3, seed).astype(np.float64))
        kernel = gaussian(squared_distances(both), 3.0)
        found.append(gap.permutation_p(kernel, 12, float(mmd2(kernel, 12)), seed))
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.065)
    assert np.mean(found) == pytest.approx(0.5, abs=0.065)


def test_permuted_values_are_those_of_permuted_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "PERMUTATIONS", 20)
    both = torch.from_numpy(normal(25, 3, 0).astype(np.float64))
    kernel, random = gaussian(squared_distances(both), 3.0), np.random.default_rng(5)
    values = []
    for _ in range(20):
        chosen = random.permutation(25)[:11]
        order = np.concatenate([chosen, np.setdiff1d(np.arange(25), chosen)])
        values.append(float(mmd2(kernel[order][:, order], 11)))
    value = float(np.median(values)) + 1e-9
    assert gap.permutation_p(kernel, 11, value, 5) == pytest.approx((np.sum(np.array(values) >= value) + 1) / 21)


def test_scale_alone_brings_nothing_together() -> None:
    source, target = normal(60, 5, 0), normal(60, 5, 1, shift=1)
    variance = gap.bandwidth(source, target)
    once, again = (gap.measure(factor * source, factor * target, variance, 0) for factor in (1, 0.01))
    assert once.mmd2 == pytest.approx(again.mmd2, rel=1e-4)
    assert once.a_distance == again.a_distance


def test_few_images_are_no_trouble() -> None:
    source, target = normal(2, 4, 0), normal(2, 4, 1)
    found = gap.measure(source, target, gap.bandwidth(source, target), 0)
    assert 0 < found.p <= 1
    assert 0 <= found.a_distance <= 2
    assert gap.project(source[:1], "pca", 0).shape == (1, 2)


def test_no_more_images_than_agreed_are_measured_on() -> None:
    rows = gap.sampled(5000, 0)
    assert len(rows) == 2000
    assert (np.diff(rows) > 0).all()
    assert gap.sampled(30, 0).tolist() == list(range(30))


@pytest.mark.parametrize("how", ["pca", "tsne"])
def test_a_picture_keeps_what_is_apart_apart(how: Literal["pca", "tsne"]) -> None:
    both = np.concatenate([normal(40, 10, 0), normal(40, 10, 1, shift=5)])
    points = gap.project(both, how, 0)
    assert points.shape == (80, 2)
    centres = points[:40].mean(0), points[40:].mean(0)
    spread = max(points[:40].std(), points[40:].std())
    assert np.linalg.norm(centres[0] - centres[1]) > spread
    assert (gap.project(both, how, 0) == points).all()
