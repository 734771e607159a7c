"""The report pages in headless Chromium: no script but their own runs, they fit a phone, and are read in any light."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlkit.reports.comparison import Comparison, render_comparison
from tlkit.reports.page import Page, render_page, write_page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")

EVIL = "<img src=x onerror=document.title='pwned'>"
SCHEMES = {"dark": 0, "light": 1}  # what Blink's setting preferredColorScheme calls them

# Stands around the page and looks into it from outside, since the page itself allows no script but its own.
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
function rgba(text) {{ const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; }}
function over(top, under) {{ return [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])); }}
function ground(element, view) {{
  if (!element) return [255, 255, 255];
  return over(rgba(view.getComputedStyle(element).backgroundColor), ground(element.parentElement, view));
}}
function luminance(colour) {{
  const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}}
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
  const contrasts = [];
  for (const element of page.body.querySelectorAll("*")) {{
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const under = ground(element, view), text = over(rgba(view.getComputedStyle(element).color), under);
    const [low, high] = [luminance(under), luminance(text)].sort((a, b) => a - b);
    contrasts.push([(high + 0.05) / (low + 0.05), element.tagName + "." + element.className]);
  }}
  const strokes = [...page.querySelectorAll(".curve path, .whisker path, .fill path")].map(line => {{
    const colours = [ground(line, view), rgba(view.getComputedStyle(line).color)];
    const [low, high] = colours.map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }});
  // Chart text that leaves its drawing, or is smaller on the screen than anyone reads.
  const cut = [], sizes = [];
  for (const text of page.querySelectorAll(".chart text")) {{
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    if (inner.left < outer.left - 0.5 || inner.right > outer.right + 0.5) cut.push(text.textContent);
    sizes.push(parseFloat(view.getComputedStyle(text).fontSize) * text.getScreenCTM().a);
  }}
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth, scrollWidth: page.documentElement.scrollWidth,
    ground: rgba(view.getComputedStyle(page.body).backgroundColor), title: page.title,
    images: [...page.images].map(image => [image.src.slice(0, 22), image.naturalWidth]),
    strokes: [strokes.length, Math.min(...strokes)],
    cut: cut, smallest: Math.min(...sizes), largest: Math.max(...sizes),
    texts: contrasts.length, contrast: contrasts.sort((a, b) => a[0] - b[0])[0],
  }});
}};
</script>"""


PREPROCESSING = {
    **{"size": 224, "crop": 0.875, "crop_mode": "center", "interpolation": "bicubic", "colour_mode": "RGB"},
    **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}


def chromium(profile: Path, url: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", *arguments, url.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """All sections, an evil class name, words too long for a phone, and a matrix wider than it."""
    Image.new("RGB", (300, 200), "tan").save(tmp_path / "1.jpg")
    names = [EVIL, "x" * 120, *(f"Staffordshire bullterrier {k}" for k in range(18))]
    confusion = np.diag(np.arange(20) * 1000) + np.eye(20, k=1, dtype=int)
    metrics = {"images": 20, "top1": 0.95, "top1_ci95": [0.94, 0.96], "top5": 1.0, "balanced_accuracy": 0.9}
    metrics |= {"loss": 0.1, "ece": 0.02, "used_for_selection": True, "macro_f1": 0.9, "macro_f1_ci95": [0.88, 0.93]}
    metrics |= {"auroc": 0.99, "auroc_ci95": [0.98, 1.0], "loss_ci95": [0.09, 0.12], "brier": 0.1}
    path = "/a/folder/" + "long" * 40 + ".jpg"
    summary = {
        "command": "finetune",
        "seconds": 9000.0,
        "model": EVIL,
        "weights": path,
        "metrics": {"val": metrics, "test": metrics},
        "phases": [
            {"stages": ["stem", "stage1", EVIL], "epochs": 3, "trainable_params": 10**9, "seconds": 4000.0},
            {"stages": [EVIL], "rates": {EVIL: 0.1, "x" * 90: 0.2}, "kept": False, "why": path * 3},
        ],
        "decision": path,
        "stopped": EVIL,
        "skipped_files": [{"path": path, "reason": EVIL}],
        "images": {"train": 10**6, "val": 10**5, "test": 10**5},
        "preprocessing": PREPROCESSING,
        "data": {name: {"train": 50, "val": k, EVIL: 3} for k, name in enumerate(names)},
        "tta_audit": {"center_top1": 0.9, "fixed": 1, "broken": 2, "views": 10, "network_seconds": 3.0},
        "calibration": {"temperature": 1.3, "fitted_on": EVIL, "fitted_images": 9, "before": metrics, "after": metrics},
        "cross_validation": {
            "folds": [{"fold": k, "metrics": metrics} for k in (1, 2)],
            "mean": metrics,
            "sd": metrics,
        },
    }
    stages = ["stem", *(f"stage{k}" for k in range(1, 14)), "x" * 90, EVIL]
    history = [
        {
            "phase": 1 + k // 3,
            "epoch": k,
            "losses": {"loss": 1e4 / (k + 1)},
            "rates": {name: 10.0 ** -(15 - i) for i, name in enumerate(stages) if i < 15 - k % 2},
            "choosing": {"loss": 1.0, "top1": 0.991 + k / 10_000},
            "val": {"loss": 5.0, "top1": 0.9915},
        }
        for k in range(12)
    ]
    per_class = [{"class": name, "images": 1000, "precision": 0.5, "recall": 1.0, "f1": None} for name in names]
    truth, predicted = (np.repeat(side, confusion[confusion > 0]) for side in np.nonzero(confusion))
    wrong, count = np.flatnonzero(truth != predicted), len(truth)
    confidence = np.random.default_rng(0).uniform(0.5, 0.9, count)
    confidence[wrong[:2]] = 0.99, 0.95
    probabilities = np.repeat(((1 - confidence) / 19).astype(np.float32)[:, None], 20, axis=1)
    probabilities[np.arange(count), predicted] = confidence
    files, called = [tmp_path / "gone.jpg"] * count, [path] * count
    files[wrong[0]], called[wrong[0]] = tmp_path / "1.jpg", f"val/{EVIL}/1.jpg"
    return Page(
        title="finetune pets",
        summary=summary,
        split="val",
        classes=names,
        per_class=[{**row, "auroc": 0.99} for row in per_class],
        truth=truth,
        probabilities=probabilities,
        files=files,
        names=called,
        recipe=f"data: {path}\n",
        history=history,
        heat=lambda rows: [np.linspace(0, 1, 49).reshape(7, 7) for _ in rows],
    )


@pytest.fixture
def comparison() -> Comparison:
    """Networks of evil and of long names, some much alike."""
    names = [EVIL, "x" * 120, *(f"tf_efficientnet_lite{k}" for k in range(5)), "resnet50"]
    rows = []
    for k, name in enumerate(names):
        test = {"only_best": 9, "only_this": k, "p": 0.01, "p_holm": 0.01 * k} if k else None
        row = {"model": name, "title": name, "images": 10**5, "top1": 0.9 - k / 500, "top1_ci95": [0.8, 0.92]}
        row |= {
            "top5_error": 0.1,
            "balanced_accuracy": 0.9,
            "loss": 0.3,
            "ece": 0.02,
            "params": 10**9,
            "macs": 10**9 + k,
        }
        rows.append(row | {"image_size": 224, "images_per_second": 1234.5, "best": not k, "mcnemar": test})
    summary = {"data": "/a/folder/" + "long" * 40, "split": EVIL, "images": 10**5, "classes": 20, "tta": "center"}
    return Comparison(
        EVIL, summary | {"rows": rows, "left_out": 3, "version": "1", "seconds": 9.0, "command": "compare"}
    )


def test_runs_nothing_even_without_its_content_security_policy(page: Page, tmp_path: Path) -> None:
    bare = re.sub(r"<meta http-equiv[^\n]*\n", "", render_page(page))
    (tmp_path / "page.html").write_text(bare, encoding="utf-8")
    dom = chromium(tmp_path / "profile", tmp_path / "page.html", "--dump-dom")
    assert "<title>finetune pets · tlkit report</title>" in dom
    assert "&lt;img src=x onerror=document.title='pwned'&gt;" in dom
    assert re.findall(r"<img\b[^>]{0,20}", dom) == ['<img src="data:image/jpe', '<img class="heat" src="d']
    assert "</html>" in dom


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [375, 1200])
def test_fits_and_can_be_read(page: Page, tmp_path: Path, width: int, scheme: str) -> None:
    found = look_at(render_page(page), tmp_path, width, scheme)
    assert found["title"] == "finetune pets · tlkit report"
    assert found["images"] == [["data:image/jpeg;base64", 192], ["data:image/png;base64,", 7]]
    assert found["texts"] > 500
    assert found["strokes"][0] > 12 and found["strokes"][1] >= 3  # 1.4.11
    check(found, width, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [375, 1200])
def test_comparison_fits_and_can_be_read(comparison: Comparison, tmp_path: Path, width: int, scheme: str) -> None:
    found = look_at(render_comparison(comparison), tmp_path, width, scheme)
    assert found["title"] == f"{EVIL} · tlkit report"
    assert found["images"] == []
    assert found["texts"] > 100
    check(found, width, scheme)


def look_at(page: str, tmp_path: Path, width: int, scheme: str) -> dict[str, Any]:
    """What the harness sees in a page of this width."""
    harness = HARNESS.format(width=width, page=html.escape(page))
    (tmp_path / "harness.html").write_text(harness, encoding="utf-8")
    setting = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    dom = chromium(tmp_path / "profile", tmp_path / "harness.html", "--window-size=1300,900", setting, "--dump-dom")
    found: dict[str, Any] = json.loads(html.unescape(dom.split('<pre id="found">')[1].split("</pre>")[0]))
    return found


def check(found: dict[str, Any], width: int, scheme: str) -> None:
    """What holds of every page."""
    assert found["scrollWidth"] <= found["width"] <= width
    assert (sum(found["ground"][:3]) < 200) == (scheme == "dark")
    assert found["contrast"][0] >= 4.5, found["contrast"]  # WCAG 2.2 AA, 1.4.3
    assert not found["cut"]
    assert 10 <= found["smallest"] <= found["largest"] <= 16  # pixels


def test_written_page_is_painted(page: Page, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page)
    shot = tmp_path / "shot.png"
    arguments = ("--window-size=1200,900", "--blink-settings=preferredColorScheme=1", f"--screenshot={shot}")
    chromium(tmp_path / "profile", tmp_path / "report.html", *arguments)
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.9 * 1200 * 900


def test_tables_fit_the_paper(page: Page, comparison: Comparison, browser: Any, tmp_path: Path) -> None:
    tab = browser()
    tab.call("Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1, mobile=False)
    tab.call("Emulation.setEmulatedMedia", media="print")  # A4 and Letter have about as many pixels between margins
    tables = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    for html_text in (render_page(page), render_comparison(comparison)):
        (tmp_path / "page.html").write_text(html_text, encoding="utf-8")
        tab.open(tmp_path / "page.html")
        assert max(tab.value(tables)) <= 721
        assert not tab.complaints
