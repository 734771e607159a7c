"""McNemar's exact test and Holm's adjustment against closed forms and worked examples."""

from __future__ import annotations

from itertools import pairwise, permutations
from math import comb

import numpy as np
import pytest

from tlkit.evaluation.comparison import holm, mcnemar


def both(only_first: int, only_second: int, agreed: int = 10, neither: int = 5) -> tuple[np.ndarray, np.ndarray]:
    counts = (only_first, only_second, agreed, neither)
    return np.repeat([True, False, True, False], counts), np.repeat([False, True, True, False], counts)


@pytest.mark.parametrize("more", range(0, 30, 3))
@pytest.mark.parametrize("fewer", range(0, 12, 2))
def test_p_is_twice_the_binomial_tail(more: int, fewer: int) -> None:
    """Two-sided of a fair coin: twice the smaller tail, at most 1."""
    count = more + fewer
    tail = sum(comb(count, hits) for hits in range(min(more, fewer) + 1)) / 2**count
    for arguments, expected in (((more, fewer), (more, fewer)), ((fewer, more), (fewer, more))):
        found = mcnemar(*both(*arguments))
        assert (found["only_first"], found["only_second"]) == expected
        assert found["p"] == pytest.approx(min(1, 2 * tail), rel=1e-9)


PUBLISHED = [
    (121, 59, 4.434e-06),  # Wikipedia, McNemar's test, first example: exact p of 59 and 121
    (5, 15, 0.041389),  # of 20 in which they differ, 5: 2 * pbinom(5, 20, 0.5) in any table
    (1, 9, 0.021484),
]


@pytest.mark.parametrize(("only_first", "only_second", "p"), PUBLISHED)
def test_examples_from_tables(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(*both(only_first, only_second))["p"] == pytest.approx(p, rel=1e-3)


def test_images_that_both_are_right_or_wrong_about_say_nothing() -> None:
    assert mcnemar(*both(7, 2, agreed=0, neither=0)) == mcnemar(*both(7, 2, agreed=1000, neither=300))
    assert mcnemar(*both(0, 0)) == {"only_first": 0, "only_second": 0, "p": 1.0}
    assert [type(value) for value in mcnemar(*both(3, 4)).values()] == [int, int, float]


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1 made to rise: the textbook's 0.04, 0.06, 0.06, 0.06."""
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_of_ties_and_of_large_ones() -> None:
    assert holm([]) == []
    assert holm([0.3]) == [0.3]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])
    assert holm([0.5, 0.9, 1.0]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni(seed: int) -> None:
    values = np.random.default_rng(seed).random(4) ** 3
    found = holm(values.tolist())
    for value, adjusted in zip(values, found, strict=True):
        assert value <= adjusted <= min(1, 4 * value)
    ranked = [found[place] for place in np.argsort(values)]
    assert all(first <= second for first, second in pairwise(ranked))
    for order in permutations(range(4)):
        assert holm(values[list(order)].tolist()) == [found[place] for place in order]
