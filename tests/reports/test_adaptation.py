"""The page of an adaptation: what it says first and what it does not claim, what it leaves out, and its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlkit.reports import adaptation
from tlkit.reports.adaptation import AdaptationPage, Cloud, Picture, render_adaptation, write_adaptation
from tlkit.reports.curves import WIDTH

EVIL = "<img src=x onerror=document.title='pwned'>"
HOSTILE = (EVIL, '" onload="alert(1)', "</style></title><script>alert(1)</script>", "{{ 7 * 7 }}", "a\nb\0c", "🐜")
METHODS = ("source-only", "adabn", "cdan", "coral", "dann", "jmmd", "mcc", "mmd")


def measured(top1: float | None, images: int = 295) -> dict[str, Any]:
    ends = None if top1 is None else [top1 - 0.03, top1 + 0.02]
    return {"images": images, "top1": top1, "top1_ci95": ends, "balanced_accuracy": top1, "loss": 0.3, "ece": 0.04}


def result(
    method: str = "mcc", seed: int = 0, top1: float = 0.932, labelled: bool = True, **more: Any
) -> dict[str, Any]:
    """One training as adapt tells it."""
    metrics = {"source_val": measured(0.96, 192)}
    if labelled:
        metrics |= {"target": measured(top1), "target_last": measured(top1 - 0.01)}
        metrics |= {"target_oracle": measured(top1 + 0.01), "target_source_only": measured(0.781)}
    told: dict[str, Any] = {"method": method, "seed": seed, "selected_epoch": 2, "epochs": 3, "seconds": 9.1}
    told |= {"metrics": metrics, "a_distance": {"before": 1.9, "after": 0.8}}
    told["mmd2"] = {"before": 0.12, "after": 0.01, "p_before": 0.001, "p_after": 0.2}
    if labelled:
        told["oracle_epoch"] = 3
    if labelled and method != "source-only":
        told["paired"] = {"only_adapted": 47, "only_source_only": 3, "p": 1e-6}
    return told | more


def summary(*results: dict[str, Any], word: str = "webcam", **more: Any) -> dict[str, Any]:
    """What --json prints; the word stands wherever a name may."""
    labelled = any("target" in one["metrics"] for one in results)
    return {
        **{"command": "adapt", "version": word, "seconds": 81.2, "run": word, "model": word, "weights": word},
        **{"strategy": word, "select": "infomax", "device": word, "precision": word, "classes": [word, "mug"]},
        **{"only_in_source": [word], "only_in_target": [word, "tape"], "results": list(results)},
        "source": {"data": "amazon", "images": {"train": 766, "val": 192}},
        "target": {"data": f"/data/{word}", "images": 301, "labelled": labelled, "reported": 295},
        "skipped_files": [{"path": word, "reason": word}],
        **more,
    }


def history(method: str = "mcc", seed: int = 0, epochs: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "seed": seed,
            "epoch": epoch,
            "epochs": epochs,
            "score": 2 - 1 / epoch,
            "rates": {"head": 0.01},
        }
        | {"losses": {"loss": 3 / epoch, "task": 2 / epoch, "transfer": 1 / epoch}}
        | {"source_val": {"loss": 0.2, "top1": 0.9}, "target": {"loss": 0.5, "top1": 0.8 + 0.01 * epoch}}
        for epoch in range(1, epochs + 1)
    ]


def cloud(labels: Sequence[str] = ("mug", "bike", "mug", "")) -> Cloud:
    points = np.random.default_rng(0).standard_normal((len(labels), 2))
    return Cloud(points, np.arange(len(labels)) < len(labels) / 2, labels)


def page(told: dict[str, Any], **more: Any) -> str:
    parts: dict[str, Any] = {"history": history(), "pictures": [], "per_class": [], "recipe": "method: mcc\n"}
    return render_adaptation(AdaptationPage("adapt amazon to webcam", told, **{**parts, **more}))


def words(html: str) -> str:
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


class Outline(HTMLParser):
    """Every start tag with the names of its attributes, ids, where links lead, and that each end closes its start."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sound(html: str) -> Outline:
    """The outline of a page whose ids are its own, whose links lead somewhere and whose figures are numbers."""
    found = Outline(html)
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert not re.search(r"\b(nan|None|inf)\b", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return found


# What it says


def test_one_training_is_told_with_its_interval_and_its_test() -> None:
    text = words(page(summary(result())))
    assert "93.2 % of 295 webcam images right with mcc (95 % interval 90.2 to 95.2)" in text
    assert "Source-only, the same network without adaptation: 78.1 %." in text
    assert "47 images are right only with adaptation, 3 only without: clearly better (p &lt; 0.001, McNemar’s" in text
    assert "best epoch by the labels that a real target does not have: not a result" in text
    assert "mcc 1 93.2 % 92.2 % 94.2 % 78.1 % 96.0 % &lt; 0.001 9.1 s" in text
    assert "Each training" not in text and "Which method is best" not in text


@pytest.mark.parametrize(
    ("won", "lost", "p", "verdict"),
    [
        (20, 3, 0.0005, "20 images are right only with adaptation, 3 only without: clearly better (p &lt; 0.001"),
        (3, 20, 0.01, "it did harm: clearly worse (p = 0.010"),
        (1, 0, 1.0, "1 image is right only with adaptation, 0 only without: that may be chance (p = 1.000"),
    ],
)
def test_the_paired_test_in_words(won: int, lost: int, p: float, verdict: str) -> None:
    told = summary(result(paired={"only_adapted": won, "only_source_only": lost, "p": p}))
    assert verdict in page(told).replace("&#39;", "'")


def test_several_methods_have_no_winner() -> None:
    results = [result(name, seed, 0.8 + 0.01 * k + 0.001 * seed) for k, name in enumerate(METHODS) for seed in range(3)]
    html = page(summary(*results), history=history("source-only") + history("adabn", 0))
    text = words(html)
    assert "7 methods, 3 seeds: 81.1 to 87.1 % of 295 webcam images right" in text
    assert "Source-only, the same network without adaptation: 78.1 %." in text
    assert "whoever picks one by the target column below has used them" in text
    assert "mmd 3 87.1 % ± 0.1 86.1 % ± 0.1 88.1 % ± 0.1 78.1 % ± 0.0 96.0 % ± 0.0" in text
    assert text.count("&lt; 0.001") == 7 * 3  # of trainings: no test is of a mean
    assert "winner" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert "Of adabn , seed 0, epoch by epoch" in text
    sound(html)


def test_the_table_given_counts() -> None:
    row = {"method": "mcc", "seeds": 3, "target": {"mean": 0.9, "sd": 0.02}, "target_last": {"mean": 0.5, "sd": None}}
    text = words(page(summary(*(result(seed=seed) for seed in range(3)), table=[row])))
    assert "90.0 % of 295 webcam images right with mcc (mean of 3 seeds, ± 2.0 points)" in text
    assert "mcc 3 90.0 % ± 2.0 50.0 % 94.2 % ± 0.0 78.1 %" in text


def test_without_labels_nothing_is_said_of_accuracy() -> None:
    html = page(summary(result(labelled=False)))
    text = words(html)
    assert (
        "301 images of webcam were adapted to; the target has no labels, so nothing can be said of accuracy"
        " 1 method, 1 seed: mcc. The squared MMD of the two domains’ features went from 0.1200 to 0.0100."
    ) in text
    assert "told apart perfectly) went from 1.90 to 0.80." in text
    assert "A permutation test no longer finds a difference afterwards (p = 0.200)." in text
    assert "mcc 1 96.0 %" in text and "Oracle" not in text and "right with" not in text
    many = words(page(summary(*(result(name, labelled=False) for name in METHODS))))
    assert "8 methods, 1 seed: source-only, adabn" in many and "Which method is best" not in many


def test_source_only_alone_is_what_must_be_beaten() -> None:
    text = words(page(summary(result("source-only", top1=0.781)), history=history("source-only")))
    assert "78.1 % of 295 webcam images right with source-only" in text and "never saw the target" in text


def test_classes_of_one_domain() -> None:
    told = summary(result(), only_in_source=["mug"], only_in_target=[f"c{k}" for k in range(10_000)])
    text = words(page(told))
    assert "1 class is only in the source: mug. The network may still take a target image for it" in text
    assert "10,000 classes are only in the target: c0, c1" in text and "c18 and 9,981 more" in text
    assert "295 of 301 target images are reported on; all are adapted to." in text
    assert "Classes of one domain" not in page(summary(result(), only_in_source=[], only_in_target=[]))


def test_distances_by_training_and_as_means() -> None:
    text = words(page(summary(result(a_distance={"before": 1.9, "after": -0.001}))))
    assert "mcc 0.1200 0.001 0.0100 0.200 1.90 0.00" in text
    means = adaptation.gap_means([result(seed=0), result(seed=1, mmd2={"before": 0.14, "after": None})])
    assert means[0]["mmd2"] == {"before": pytest.approx(0.13), "after": 0.01}
    assert adaptation.gap_means([result("mcc"), result("mmd")]) == []


# What may be missing


@pytest.mark.parametrize("key", list(summary(result())))
def test_what_is_absent_is_left_out(key: str) -> None:
    full = summary(result())
    for told in ({name: value for name, value in full.items() if name != key}, {key: full[key]}, {**full, key: None}):
        sound(page(told))


@pytest.mark.parametrize("key", list(result()))
def test_trainings_may_lack_anything(key: str) -> None:
    bare = {name: value for name, value in result().items() if name != key}
    for one in (bare, {"method": "mcc", key: result()[key]}, result(**{key: None}), {}):
        sound(page({"results": [one]}, history=[]))
        sound(page({"results": [one, result("mmd"), result("source-only")]}))


def test_figures_may_be_no_numbers() -> None:
    nan = float("nan")
    gap = {"mmd2": {"before": nan, "after": nan, "p_before": nan, "p_after": nan}, "a_distance": {"before": nan}}
    one = result(paired={"only_adapted": 1, "only_source_only": 0, "p": nan}, **gap)
    one["metrics"]["target"] |= {"loss": nan, "ece": None, "top1_ci95": None}
    rows = [{"class": "a", "images": 0, "precision": nan, "recall": None, "f1": nan, "auroc": nan}]
    broken = [{"method": "mcc", "seed": 0, "epoch": 1, "losses": {"task": nan}, "score": float("inf"), "target": None}]
    sound(page(summary(one), history=broken, per_class=rows, pictures=[Picture("mcc", 0, "PCA", cloud(), cloud())]))
    table = [{"method": "mcc", "seeds": 1, "target": {"mean": nan, "sd": nan}, "seconds": {}}]
    sound(page(summary(one, table=table), history=[{}]))


# Curves


def test_curves_mark_the_selected_epoch() -> None:
    drawn = adaptation.charts(history(epochs=20), {"method": "mcc", "seed": 0, "selected_epoch": 12}, "infomax")
    assert [chart.key for chart in drawn] == ["loss", "top1", "score"]
    assert [line.names for chart in drawn for line in chart.lines] == [
        *(("task loss",), ("transfer loss",), ("source val",), ("target",), ("infomax",)),
    ]
    loss, top1, score = drawn
    assert not loss.rules and top1.rules == score.rules == [score.lines[0].dots[11].x]
    assert score.phases[0].text == "epoch 12 selected"
    assert [value.value for value in score.lines[0].values][:2] == [1.0, 1.5]


def test_curves_are_of_one_training_and_of_what_is_known() -> None:
    rows = [*history("mcc"), *history("mcc", 1), {**history("mcc")[-1], "losses": {"task": 7.0}}]
    loss, *_ = adaptation.charts(rows, result(), "infomax")
    assert [value.value for value in loss.lines[0].values] == [2.0, 1.0, 7.0]  # what was run again counts
    assert [chart.key for chart in adaptation.charts(history(), result(), "last")] == ["loss", "top1"]
    alone = [{"epoch": 1, "losses": {"loss": 2.0}, "source_val": {"top1": 0.5}}]
    assert [chart.lines[0].names for chart in adaptation.charts(alone, {}, "")] == [("loss",), ("source val",)]
    assert adaptation.charts([], result(), "infomax") == []
    assert "Learning curves" not in page(summary(result()), history=[])
    sound(page(summary(result(epochs=1, selected_epoch=1)), history=history(epochs=1)))


@pytest.mark.parametrize("selected", [1, 500, 1000])
def test_the_mark_stays_in_the_chart(selected: int) -> None:
    drawn = adaptation.charts(history(epochs=1000), result(selected_epoch=selected), "infomax")[-1]
    half = len(drawn.phases[0].text) * 7.4 / 2
    assert half <= drawn.phases[0].place <= WIDTH - half + 0.1 and not drawn.lines[0].dots


# Pictures


def test_domains_differ_in_shape_and_few_classes_in_colour() -> None:
    drawn = adaptation.scatter(cloud(["mug", "bike", "mug", "bike", "mug", ""]))
    assert drawn is not None
    assert [group.name for group in drawn.groups] == [
        *("source: bike", "source: mug", "target: class unknown", "target: bike", "target: mug"),
    ]
    assert all("a2.2" in group.path for group in drawn.groups[:2])
    assert all("l2.6" in group.path and "a2.2" not in group.path for group in drawn.groups[2:])
    assert drawn.groups[1].path.count("M") == 2 and drawn.counts == (3, 3)
    assert set(drawn.hues) == {"bike", "mug"} and drawn.groups[2].hue is None
    many = adaptation.scatter(cloud([f"class {k}" for k in range(11)]))
    assert many is not None and not many.hues


def test_first_picture_is_open_and_each_point_is_named() -> None:
    pictures = [Picture(name, 0, how, cloud(), cloud()) for name, how in (("source-only", "PCA"), ("mcc", "t-SNE"))]
    html = page(summary(result("source-only"), result()), pictures=pictures)
    sound(html)
    assert "mcc, seed 0 t-SNE Before After source, amazon 2 images target, webcam 2 images bike mug" in words(html)
    at = html.index('id="pictures"')
    assert html.index("mcc, seed 0", at) < html.index("<details>", at) < html.index("source-only, seed 0", at)
    assert html.count("<title>target: class unknown</title>") == 4
    assert "Before and after" not in words(page(summary(result())))


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((4, 2)),
        np.full((4, 2), 1e30),
        np.array([[0, 0], [np.nan, 1], [np.inf, 1], [5, 0]]),
        np.array([[-1e6, 0], [1e6, 1e-9], [0, 0], [3, 4.0]]),
    ],
)
def test_points_stay_inside(points: np.ndarray) -> None:
    drawn = adaptation.scatter(Cloud(points, np.array([True, True, False, False]), ["", "a", "b", ""]))
    assert drawn is not None
    marks = re.findall(r"M(\S+) (\S+?)[al]", "".join(group.path for group in drawn.groups))
    assert len(marks) == np.isfinite(points).all(1).sum()
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= drawn.height for x, y in marks)


def test_no_points_and_too_many() -> None:
    nothing = Cloud(np.zeros((0, 2)), np.zeros(0, bool), [])
    assert adaptation.scatter(nothing) is None
    html = page(summary(result()), pictures=[Picture("mcc", 0, "PCA", nothing, nothing)])
    assert "There are no points." in html
    sound(html)
    drawn = adaptation.scatter(cloud([""] * 9000))
    assert drawn is not None and sum(drawn.counts) == adaptation.POINTS_SHOWN


# Any input


@pytest.mark.parametrize("word", HOSTILE)
def test_all_text_is_escaped(word: str) -> None:
    def made(one: str) -> list[tuple[str, list[str]]]:
        results = [result(one), result("mmd", 0)]
        told = summary(*results, word=one, select=one, source={"data": one, "images": {one: 3}})
        rows = [{"class": one, "images": 3, "precision": 0.5, "recall": 0.5, "f1": 0.5}]
        pictures = [Picture(one, 0, one, cloud([one, "b"] * 2), cloud())]
        parts = {"history": history(one), "pictures": pictures, "per_class": rows, "recipe": one}
        return sound(render_adaptation(AdaptationPage(one, told, **parts))).tags  # type: ignore[arg-type]

    assert made(word) == made("x")


def test_undecodable_names(tmp_path: Path) -> None:
    told = summary(result(), word="\udcff")
    pictures = [Picture("mcc", 0, "PCA", cloud(["\udcff", "a"] * 2), cloud())]
    write_adaptation(tmp_path / "page.html", AdaptationPage("\udcff", told, history(), pictures, [], "a: \udcff"))
    assert r"/data/\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_many_classes_and_files() -> None:
    names = [f"class {k}" for k in range(10_000)]
    rows = [{"class": name, "images": 1, "precision": 1.0, "recall": 0.5, "f1": 0.7} for name in names]
    files = [{"path": name, "reason": "empty"} for name in names]
    told = summary(result(), classes=names, only_in_source=names, skipped_files=files)
    html = page(told, per_class=rows, pictures=[Picture("mcc", 0, "PCA", cloud(names[:1000]), cloud(names[:1000]))])
    text = words(html)
    assert "50 classes of lowest recall; 9,950 others are left out" in text
    assert "9,900 more are listed in skipped_files.csv" in text
    assert len(html) < 400_000


def test_runs_and_fetches_nothing() -> None:
    html = page(summary(result()), pictures=[Picture("mcc", 0, "PCA", cloud(), cloud())])
    assert "<script" not in html and "script-src" not in html and "default-src 'none'" in html
    assert not re.search(r"https?://|\burl\(|@import|<link|<iframe", html)
