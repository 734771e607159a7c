"""The report page of a run: one self-contained HTML file that opens anywhere, offline and on a phone."""

from __future__ import annotations

import base64
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from tlkit import __version__
from tlkit.data.decode import UnreadableImage, decode
from tlkit.reports import curves
from tlkit.run_folder import write_text

MATRIX_CLASSES = 25  # a larger confusion matrix is read as a list of its largest cells
CONFUSIONS_SHOWN = 30
CLASSES_SHOWN = 50
MISTAKES_SHOWN = 24
SKIPPED_SHOWN = 100
THUMBNAIL_SIDE = 192  # longest side, in pixels
ABSENT = "–"

# What a metrics object may hold, in the order of the page: key, name, what it says in plain words.
METRICS = (
    ("top1", "Top-1 accuracy", "share of images whose likeliest class is right"),
    ("top5", "Top-5 accuracy", "share of images with the right class among the five likeliest"),
    ("balanced_accuracy", "Balanced accuracy", "mean recall: each class counts the same"),
    ("loss", "Loss", "mean negative log-likelihood, in nats"),
    ("ece", "Calibration error", "mean gap between confidence and accuracy (ECE)"),
)
FRACTIONS = {"top1", "top5", "balanced_accuracy"}


@dataclass(frozen=True)
class Mistake:
    """An image whose predicted class is wrong.

    Args:
        path: The image file; the page does without a picture where it cannot be read.
        name: How the file is called in the data, for instance ``val/ants/1.jpg``.
        label: Its true class.
        predicted: The class that it was given.
        probability: Probability of the predicted class, in [0, 1].
    """

    path: Path
    name: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Page:
    """What a report page tells.

    Args:
        title: Command and data, for instance ``finetune hymenoptera_256``.
        summary: The object that ``--json`` prints; what it lacks, the page leaves out.
        split: Which images the page reports on: ``val``, ``test``, ``all`` ...
        classes: K class names.
        per_class: One ``{class, images, precision, recall, f1}`` for each class; what is undefined is None.
        truth: True class of each image of the split (N).
        predicted: Predicted class of each (N).
        mistakes: Wrong predictions, most confident first; the page pictures the first ones.
        recipe: The effective recipe, as YAML text.
        history: Rows of ``metrics.jsonl``, one for each epoch of each phase; without them there are no learning curves.
    """

    title: str
    summary: Mapping[str, Any]
    split: str
    classes: Sequence[str]
    per_class: Sequence[Mapping[str, Any]]
    truth: np.ndarray
    predicted: np.ndarray
    mistakes: Sequence[Mistake]
    recipe: str
    history: Sequence[Mapping[str, Any]] = ()


def write_page(path: Path, page: Page) -> None:
    """Write the page as UTF-8."""
    write_text(path, render_page(page))


def render_page(page: Page) -> str:
    """The page as HTML; what UTF-8 cannot hold (an undecodable byte of a file name) is spelt out as an escape."""
    images, right = len(page.truth), int((page.truth == page.predicted).sum())
    per_class = _worst_classes(page.per_class)
    confusions, confusions_in_all = _frequent_confusions(page)
    metrics = _metrics(page.summary, page.split)
    skipped = page.summary.get("skipped_files") or []
    html = _template().render(
        page=page,
        summary=page.summary,
        version=page.summary.get("version") or __version__,
        images_of="images" if page.split == "all" else f"{page.split} images",
        headline=_headline(metrics, page.split, images, right),
        metrics=metrics,
        all_metrics=_all_metrics(page.summary),
        metric_names=METRICS,
        facts=_facts(page),
        phases=_phases(page.summary),
        charts=curves.charts(page.history),
        matrix=_matrix(page) if len(page.classes) <= MATRIX_CLASSES else None,
        confusions=confusions,
        confusions_left_out=confusions_in_all - len(confusions),
        per_class=per_class,
        classes_left_out=len(page.per_class) - len(per_class),
        mistakes=[(mistake, _thumbnail(mistake.path)) for mistake in page.mistakes[:MISTAKES_SHOWN]],
        images=images,
        wrong=images - right,
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_left_out=len(skipped[SKIPPED_SHOWN:]),
    )
    return html.encode(errors="backslashreplace").decode()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (("percent", _percent), ("points", _points), ("metric", _metric), ("duration", _duration))
    environment.filters |= dict((*filters, ("plain", _plain), ("rates", _rates), ("curve", _curve)))
    environment.filters["short"] = curves.shorten
    return environment.get_template("page.html")


# Figures


def _all_metrics(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics objects by split; empty where the summary holds a single one, as that of evaluate does."""
    metrics = summary.get("metrics") or {}
    return {split: figures for split, figures in metrics.items() if isinstance(figures, Mapping)}


def _metrics(summary: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    by_split = _all_metrics(summary)
    return by_split.get(split, {}) if by_split else summary.get("metrics") or {}


def _headline(metrics: Mapping[str, Any], split: str, images: int, right: int) -> dict[str, str]:
    """``144 of 153 val images right:``, ``94.1 %``, ``(95 % interval 89.1 to 96.9)``."""
    noun = ("image" if images == 1 else "images") if split == "all" else f"{split} image{'' if images == 1 else 's'}"
    if not images:
        return {"counts": f"There are no {noun} to report on", "share": "", "interval": ""}
    top1, interval = metrics.get("top1"), metrics.get("top1_ci95")
    return {
        "counts": f"{right:,} of {images:,} {noun} right:",
        "share": _percent(right / images if top1 is None else top1),
        "interval": f"(95 % interval {_points(interval[0])} to {_points(interval[1])})" if interval else "",
    }


def _facts(page: Page) -> list[tuple[str, Any]]:
    """What the page says of the model and its data, as (name, value); the empty ones are left out."""
    summary, names = page.summary, page.classes
    images = summary.get("images")
    facts = [
        ("Model", summary.get("model")),
        ("Weights", summary.get("weights")),
        ("Strategy", summary.get("strategy")),
        ("Method", summary.get("method")),
        ("Classes", f"{len(names):,}: {', '.join(names)}" if len(names) <= 10 else f"{len(names):,}"),
        ("Images", images),
        ("Views", summary.get("tta")),
        ("Device", summary.get("device")),
        ("Precision", summary.get("precision")),
        ("Time", _duration(summary["seconds"]) if summary.get("seconds") is not None else None),
        ("Stopped by", summary.get("stopped")),
        ("Run", summary.get("run")),
    ]
    return [(name, value) for name, value in facts if value not in (None, "", {})]


def _phases(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The phases in their order, and which columns any of them fills beyond those that all have."""
    rows = summary.get("phases") or []
    extra = {key for key in ("rates", "kept", "why") if any(row.get(key) not in (None, "", {}) for row in rows)}
    return {"rows": rows, "numbered": len(rows) > 1, "extra": extra}


def _matrix(page: Page) -> list[tuple[str, list[tuple[int, float]]]]:
    """The confusion matrix by row: (true class, [(count, shade in [0, 1]) for each predicted class])."""
    classes = len(page.classes)
    counts = np.bincount(page.truth * classes + page.predicted, minlength=classes**2).reshape(classes, classes)
    # The square root of a cell's share of its row: a single mistake among 100 images is still seen.
    shades = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).round(3)
    rows = zip(page.classes, counts.tolist(), shades.tolist(), strict=True)
    return [(name, list(zip(cells, shade, strict=True))) for name, cells, shade in rows]


def _frequent_confusions(page: Page) -> tuple[list[tuple[str, str, int]], int]:
    """The most frequent (true, predicted, count) that are wrong, and how many different ones there are in all."""
    wrong = page.truth != page.predicted
    pairs, counts = np.unique(np.stack([page.truth[wrong], page.predicted[wrong]]), axis=1, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:CONFUSIONS_SHOWN]
    return [(page.classes[pairs[0, i]], page.classes[pairs[1, i]], int(counts[i])) for i in largest], len(counts)


def _worst_classes(per_class: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All classes in their own order or, where they are many, those of lowest recall (undefined ones last)."""
    if len(per_class) <= CLASSES_SHOWN:
        return per_class

    def recall(row: Mapping[str, Any]) -> float:
        return math.inf if _undefined(row.get("recall")) else row["recall"]

    return sorted(per_class, key=recall)[:CLASSES_SHOWN]


def _thumbnail(path: Path) -> str | None:
    """The image as a small JPEG in a data URI; None where the file has vanished or cannot be read."""
    try:
        image = decode(path, min_side=THUMBNAIL_SIDE)
    except UnreadableImage:
        return None
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


# Words


def _undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _points(fraction: float) -> str:
    """Percentage points with one decimal; what is not quite all or nothing is not rounded to it."""
    points = 100 * fraction
    if 0 < points < 100:
        points = min(max(points, 0.1), 99.9)
    return f"{points:.1f}"


def _percent(fraction: float | None) -> str:
    return ABSENT if fraction is None or _undefined(fraction) else f"{_points(fraction)} %"


def _metric(value: float | None, key: str) -> str:
    if value is None or _undefined(value):
        return ABSENT
    return _percent(value) if key in FRACTIONS else f"{value:.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None or _undefined(seconds):
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _rates(rates: Mapping[str, float] | None) -> str:
    """Learning rates by stage; a single one where all stages have the same."""
    known = {_plain(name): curves.rate_text(rate) for name, rate in (rates or {}).items() if not _undefined(rate)}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    # The space that does not break keeps a rate with its stage.
    return ", ".join(f"{name}\N{NO-BREAK SPACE}{rate}" for name, rate in known.items()) or ABSENT


def _curve(value: float, key: str) -> str:
    return curves.rate_text(value) if key == "rate" else _metric(value, key)


def _plain(value: Any) -> str:
    """A value in words; a control character, such as the line break in a file's name, is spelt out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(key)} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ABSENT if value is None else str(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)
