"""The gallery of the report page in headless Chromium: what clicks and keys do, and that nothing else runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlkit.reports.page import Page, render_page, write_page

EVIL = "<img src=x onerror=alert(1)>"
SHOWN = "[...document.querySelectorAll('figure[data-cell]')].filter(f => f.checkVisibility()).map(f => f.dataset.cell)"
STATUS = "document.getElementById('gallery-status').textContent"
HEATS = "[...document.querySelectorAll('.heat')].map(h => h.checkVisibility())"
PREPROCESSING = {
    **{"size": 224, "crop": 0.875, "crop_mode": "center", "interpolation": "bicubic", "colour_mode": "RGB"},
    **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def made_page(folder: Path, counts: list[list[int]], **more: Any) -> Page:
    """A page on noise of 300 x 200 pixels; confidence falls from image to image."""
    confusion = np.array(counts)
    truth, predicted = (np.repeat(side, confusion[confusion > 0]) for side in np.nonzero(confusion))
    count, classes = len(truth), len(counts)
    confidence = np.linspace(0.95, 0.6, count)
    probabilities = np.repeat(((1 - confidence) / (classes - 1)).astype(np.float32)[:, None], classes, axis=1)
    probabilities[np.arange(count), predicted] = confidence
    Image.effect_noise((300, 200), 60).convert("RGB").save(folder / "1.jpg")
    names = [EVIL, *(f"class{k}" for k in range(1, classes))]
    page = Page(
        title="finetune made",
        summary={"command": "finetune", "preprocessing": PREPROCESSING},
        split="val",
        classes=names,
        per_class=[{"class": name, "images": 9, "precision": 0.5, "recall": 0.5, "f1": 0.5} for name in names],
        truth=truth,
        probabilities=probabilities,
        files=[folder / "1.jpg"] * count,
        names=[f"val/{row}.jpg" for row in range(count)],
        recipe="",
        heat=lambda rows: [np.eye(7) for _ in rows],
    )
    return replace(page, **more)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three mistakes one way, one the other way, and nine images of each class that are right."""
    write_page(tmp_path / "report.html", made_page(tmp_path, [[9, 3], [1, 9]]))
    return tmp_path / "report.html"


def test_cells_filter_the_gallery(browser: Any, page: Path) -> None:
    tab = browser()
    tab.open(page)
    assert tab.value(SHOWN) == ["0-1"] * 3 + ["1-0"]
    assert tab.value(STATUS).startswith("All 4 mistakes, the most confident first.")

    tab.click("[data-cell='0-1'][aria-pressed]")
    assert tab.value(SHOWN) == ["0-1"] * 3
    assert tab.value(STATUS) == f"3 images of {EVIL} taken for class1, 3 pictured"
    pressed = "[...document.querySelectorAll('button[aria-pressed=true]')].map(b => b.dataset.cell)"
    assert tab.value(pressed) == ["0-1"]
    assert tab.value("location.hash") == "#cell-0-1"

    tab.press("[data-cell='1-1'][aria-pressed]", "Enter")
    assert tab.value(SHOWN) == ["1-1"] * 2
    assert tab.value(STATUS) == "9 images of class1, rightly taken for class1, 2 pictured"
    assert tab.value("document.activeElement.dataset.cell") == "1-1"

    tab.press("#gallery-reset", "Space")
    assert len(tab.value(SHOWN)) == 4 and tab.value(pressed) == []
    assert not tab.value("document.getElementById('gallery-reset').checkVisibility()")
    tab.press("[data-cell='1-0'][aria-pressed]", "Space")
    assert tab.value(SHOWN) == ["1-0"]
    tab.click("[data-cell='1-0'][aria-pressed]")  # pressed again: let go
    assert len(tab.value(SHOWN)) == 4
    assert not tab.complaints


def test_choice_survives_in_the_address(browser: Any, page: Path) -> None:
    tab = browser()
    tab.open(page, "#cell-1-0")
    assert tab.value(SHOWN) == ["1-0"] and tab.value(STATUS).startswith("1 image of class1 taken for")
    for nonsense in ("#cell-7-7", "#cell-<img>", "#recipe"):
        tab.open(page, nonsense)
        assert len(tab.value(SHOWN)) == 4
    assert not tab.complaints


def test_frequent_confusions_filter_too(browser: Any, tmp_path: Path) -> None:
    counts = (5 * np.eye(26, dtype=int) + 2 * np.eye(26, k=1, dtype=int)).tolist()
    write_page(tmp_path / "report.html", made_page(tmp_path, counts))
    tab = browser()
    tab.open(tmp_path / "report.html")
    assert len(tab.value(SHOWN)) == 24
    tab.press(".confusions button[data-cell='24-25']", "Enter")  # beyond the mistakes shown first
    assert tab.value(SHOWN) == ["24-25"] * 2
    assert tab.value(STATUS) == "2 images of class24 taken for class25, 2 pictured"
    assert not tab.value("document.getElementById('gallery-looks').checkVisibility()")  # there is no map to lay over
    assert not tab.complaints


def test_overlay_lies_where_the_network_looked(browser: Any, page: Path) -> None:
    tab = browser()
    tab.open(page)
    assert tab.value(HEATS) == [False] * 4
    tab.click("figure[data-worst] .look")
    assert tab.value(HEATS) == [True, False, False, False]
    assert tab.value("document.getElementById('gallery-key').checkVisibility()")
    rects = "['.heat', '.box'].map(s => document.querySelector(s).getBoundingClientRect())"
    rects += ".map(r => [r.x, r.y, r.width, r.height])"
    (x, y, width, height), (left, top, across, down) = tab.value(rects)
    assert across / down == pytest.approx(1.5, rel=0.01)
    # 7/8 of the shorter side are cut out of the middle
    assert (width, height) == pytest.approx((0.875 * down, 0.875 * down), abs=1)
    assert (x + width / 2, y + height / 2) == pytest.approx((left + across / 2, top + down / 2), abs=1)
    assert tab.value("document.querySelector('.heat').naturalWidth") == 7

    tab.press("#gallery-looks", "Enter")
    assert tab.value(HEATS) == [True] * 4
    assert tab.value("document.getElementById('gallery-looks').getAttribute('aria-pressed')") == "true"
    tab.press("#gallery-looks", "Space")
    assert tab.value(HEATS) == [False] * 4
    tab.press("figure[data-worst] .look", "Enter")
    assert tab.value(HEATS) == [True, False, False, False]
    assert not tab.complaints


def test_names_stay_text(browser: Any, page: Path) -> None:
    tab = browser()
    tab.open(page)
    tab.click("[data-cell='0-1'][aria-pressed]")
    assert tab.value("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert EVIL in tab.value(STATUS)
    assert tab.value("document.querySelector('.matrix thead .name').textContent") == EVIL
    assert not tab.complaints


def test_only_the_pages_own_script_runs(browser: Any, page: Path) -> None:
    html = page.read_text()
    intruders = "<script>document.title = 'pwned'</script><img src=data:, onerror=\"document.title = 'pwned'\">"
    page.write_text(html.replace("</main>", f"{intruders}</main>"))
    tab = browser()
    tab.open(page)
    assert tab.value("document.title") == "finetune made · tlkit report"
    assert sum("Content Security Policy" in each for each in tab.complaints) >= 2  # and the browser says so
    tab.click("[data-cell='0-1'][aria-pressed]")
    assert tab.value(SHOWN) == ["0-1"] * 3


def test_readable_without_script(browser: Any, page: Path) -> None:
    tab = browser()
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(page)
    assert tab.value(SHOWN) == ["0-1"] * 3 + ["1-0"]
    assert tab.value("[...document.querySelectorAll('.matrix td')].map(c => c.innerText)") == ["9", "3", "1", "9"]
    assert tab.value("[...document.querySelectorAll('.control, .look')].some(b => b.checkVisibility())") is False
    assert tab.value("[...document.querySelectorAll('.matrix button')].every(b => b.disabled)")


def test_buttons_are_not_printed(browser: Any, page: Path) -> None:
    tab = browser()
    tab.open(page)
    visible = "[...document.querySelectorAll('.control, .look')].some(b => b.checkVisibility())"
    assert tab.value(visible)
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert not tab.value(visible)
    assert len(tab.value(SHOWN)) == 4


def test_ten_thousand_images_stay_small_and_quick(browser: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(350):  # detail like that of photos: smooth, with noise on it
        smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 12, (480, 640, 3))
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(tmp_path / f"p{number}.jpg")
    counts = random.integers(1, 6, (25, 25))
    counts[np.arange(25), np.arange(25)] += (10_000 - counts.sum()) // 25
    page = made_page(tmp_path, counts.tolist(), heat=lambda rows: list(random.random((len(rows), 32, 32))))
    total = len(page.truth)
    page = replace(page, files=[tmp_path / f"p{row % 350}.jpg" for row in random.permutation(total)])
    started = time.perf_counter()
    html = render_page(page)
    assert time.perf_counter() - started < 30
    assert total > 9_900
    assert 1_000_000 < len(html.encode()) < 5_000_000
    assert 200 < html.count("data:image/jpeg") <= 300
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    tab = browser()
    tab.open(tmp_path / "report.html")
    assert len(tab.value(SHOWN)) == 24 and len(tab.value(HEATS)) == 24
    tab.click("[data-cell='3-4'][aria-pressed]")
    assert set(tab.value(SHOWN)) <= {"3-4"} and tab.value(STATUS).startswith(f"{counts[3, 4]} image")
    assert not tab.complaints
