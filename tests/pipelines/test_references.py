"""References in values."""

from __future__ import annotations

import pytest

from tlkit.errors import TlkitError
from tlkit.pipelines.references import escaped, field_of, references, replaced

TOLD = {"run": "runs/a", "metrics": {"val": {"top1": 0.5}}, "phases": [{"seconds": 1}, {"seconds": 2}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${a.run}", "runs/a"),
        ("${ a.run }/model.safetensors", "runs/a/model.safetensors"),
        ("${a.metrics.val.top1}", 0.5),
        ("top ${a.metrics.val.top1}", "top 0.5"),
        ("${a.phases.-1.seconds}", 2),
        ("$${a.run}", "${a.run}"),
        ("$a.run {x} $", "$a.run {x} $"),
        (["${a.run}", 3, None], ["runs/a", 3, None]),
        (7, 7),
    ],
)
def test_what_values_become(value: object, expected: object) -> None:
    assert replaced(value, lambda reference: field_of(TOLD, reference)) == expected


def test_all_of_a_matrix_are_items_of_a_list() -> None:
    assert replaced(["x", "${a.*.run}"], lambda _: ["b", "c"]) == ["x", "b", "c"]
    assert replaced("${a.*.run}", lambda _: ["b", "c"]) == ["b", "c"]


@pytest.mark.parametrize("text", ["${a.run}", "$${", "${", "x ${env.HOME} $${b}"])
def test_what_is_escaped_stays_as_it_is(text: str) -> None:
    assert replaced(escaped(text), lambda _: pytest.fail("no reference")) == text
    assert not list(references(escaped([text])))


def test_a_field_that_is_not_there_is_one_line() -> None:
    (reference,) = references("${a.metrics.val.top2}")
    with pytest.raises(TlkitError, match=r"step 'a' has no 'top2' in its result; did you mean 'top1'\?"):
        field_of(TOLD, reference)
