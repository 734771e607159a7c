"""Figures of results, their mean and spread."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from tlkit.pipelines.figures import in_short, table


@pytest.mark.parametrize(
    ("told", "short"),
    [
        ({"metrics": {"val": {"top1": 0.5}, "test": {"top1": 0.75, "top1_ci95": [0, 1]}}}, "0.750 test top-1"),
        ({"metrics": {"top1": 0.5, "images": 3}}, "0.500 top-1"),
        ({"metrics": {"source_val": {"top1": 0.5}}}, "0.500 source val top-1"),
        ({"images": 3, "findings": {"blurred": 1, "corrupt": 2}}, "3 findings"),
        ({"images": 3}, "3 images"),
        ({"checks": []}, "-"),
        ({"metrics": {}}, "-"),
    ],
)
def test_in_a_few_words(told: dict[str, Any], short: str) -> None:
    assert in_short(told) == short


def test_mean_and_spread_over_seeds() -> None:
    def cell(lr: float, seed: int) -> Any:
        return SimpleNamespace(step=SimpleNamespace(name="finetune"), setting={"lr": lr, "seed": seed})

    tops = {(0.1, 0): 0.5, (0.1, 1): 0.7, (0.1, 2): 0.6, (0.2, 0): 0.9}
    rows = table((cell(*key), {"metrics": {"val": {"top1": top, "images": 3}}}) for key, top in tops.items())
    assert [(row["step"], row["setting"], row["n"], row["main"]) for row in rows] == [
        ("finetune", {"lr": 0.1}, 3, "val.top1"),
        ("finetune", {"lr": 0.2}, 1, "val.top1"),
    ]
    values = [0.5, 0.7, 0.6]
    assert rows[0]["mean"]["val.top1"] == pytest.approx(statistics.mean(values))
    assert rows[0]["sd"]["val.top1"] == pytest.approx(0.1)
    assert rows[1]["sd"]["val.top1"] is None
