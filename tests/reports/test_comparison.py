"""The comparison page: what it concludes, that everything is escaped, and that names stay apart in its charts."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tlkit.reports import comparison
from tlkit.reports.comparison import Comparison, render_comparison, write_comparison
from tlkit.reports.curves import CHARACTER, LINE_HEIGHT, WIDTH

EVIL = "<img src=x onerror=alert(1)>"


def network(name: str, top1: float, p_holm: float | None, macs: int | None = 10**9, **more: Any) -> dict[str, Any]:
    """A row of compare; the best one has no test."""
    test = None if p_holm is None else {"only_best": 12, "only_this": 3, "p": p_holm / 2, "p_holm": p_holm}
    row = {"model": name, "title": name, "images": 153, "top1": top1, "top1_ci95": [top1 - 0.05, top1 + 0.03]}
    row |= {"balanced_accuracy": top1, "loss": 0.25, "ece": 0.03, "params": 11_689_512, "macs": macs, "image_size": 224}
    return row | {"images_per_second": 123.4, "best": p_holm is None, "mcnemar": test} | more


def page(*rows: dict[str, Any], **more: Any) -> str:
    summary = {"command": "compare", "data": "/data/pets", "split": "val", "images": 153, "classes": 2, "tta": "center"}
    return render_comparison(
        Comparison("compare pets", {**summary, "rows": rows, "left_out": 0, "seconds": 3.0, **more})
    )


def words(html: str) -> str:
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_says_which_is_best_and_whether_that_is_clear() -> None:
    text = words(
        page(network("b", 0.9, 0.04), network("a", 0.95, None), network("c", 0.94, 0.05), network("d", 0.8, 1e-9))
    )
    assert "a is right most often on 153 val images: 95.0 % (95 % interval 90.0 to 98.0)" in text
    assert "It is clearly better than b and d." in text
    assert "It is not clearly better than c: what sets them apart on these images may be chance." in text
    assert "d 80.0 % 75.0 to 83.0 12 3 &lt; 0.001 11.7 M 1 G 224 123 80.0 % 0.250 0.030" in text
    assert text.index("a 95.0 %") < text.index("c 94.0 %") < text.index("b 90.0 %")


def test_one_network_has_nothing_to_be_compared_with() -> None:
    text = words(page(network("a", 0.95, None)))
    assert "a is right on 153 val images: 95.0 %" in text
    assert "better" not in text and "Only best –" not in text
    assert "There is no network to compare" in words(page())


def test_columns_only_where_known() -> None:
    assert "Top-5 error" not in page(network("a", 0.9, None))
    assert "Top-5 error" in page(network("a", 0.9, None, top5_error=0.1))
    html = page(network("a", 0.9, None, macs=None), network("b", 0.8, 0.5, macs=None))
    assert "MACs" not in words(html) and "scatter" not in html
    assert "2 images left out" in words(page(network("a", 0.9, None), left_out=2))


@pytest.mark.parametrize(
    "word", [EVIL, '" onload="alert(1)', "</style></title><script>alert(1)</script>", "{{ 7 * 7 }}"]
)
def test_all_text_is_escaped(word: str) -> None:
    made, harmless = (
        outline(page(network(each, 0.9, None), network(each, 0.8, 0.01), data=each, split=each, tta=each, version=each))
        for each in (word, "x" * len(word))
    )
    assert made == harmless


def outline(html: str) -> list[tuple[str, list[str]]]:
    """Every start tag and the names of its attributes."""
    found: list[tuple[str, list[str]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, [name for name, _ in attrs]))

    Reader().feed(html)
    return found


def test_runs_and_fetches_nothing(tmp_path: Path) -> None:
    write_comparison(tmp_path / "page.html", Comparison("compare", {"rows": [network("a", 0.9, None)]}))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in html and "script-src" not in html and "default-src 'none'" in html
    assert not re.search(r"https?://|\burl\(|@import|<link|<iframe", html)


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("name", ["net", "a_rather_long_name_of_a_network"])
def test_names_in_the_scatter_stay_apart(count: int, name: str) -> None:
    rows = [network(f"{name}{k}", 0.9 - k / 1000, 0.5 if k else None, macs=10**9 * (1 + k % 3)) for k in range(count)]
    drawn = comparison.scatter(rows)
    assert drawn is not None
    labels = [point.label for point in drawn.points if point.label]
    assert drawn.points[0].label and len(labels) >= min(count, 5)
    for one, other in itertools.combinations(labels, 2):
        reach = (len(one.text) + len(other.text)) * CHARACTER * 0.85 / 2
        assert abs(one.x - other.x) >= reach - 0.2 or abs(one.y - other.y) >= LINE_HEIGHT - 0.2
    for label in labels:
        assert label.x + len(label.text) * CHARACTER * 0.85 / 2 <= WIDTH


def test_work_is_on_a_logarithmic_axis() -> None:
    rows = [network("a", 0.9, None, 10**8), network("b", 0.8, 0.1, 10**9), network("c", 0.85, 0.1, 10**10)]
    drawn = comparison.scatter(rows)
    assert drawn is not None
    assert [tick.text for tick in drawn.plot.x.marks] == ["100 M", "1 G", "10 G"]
    first, second, third = (point.x for point in drawn.points)
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert (first, third) == (drawn.plot.left, drawn.plot.right)
    assert comparison.scatter(rows[:1]) is None
