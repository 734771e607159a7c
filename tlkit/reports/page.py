"""The report page of a run: one self-contained HTML file that opens anywhere, offline and on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import __version__
from tlkit.reports import confidence, curves, pictures, sections
from tlkit.reports.outcome import Cell, Outcome, frequent_confusions, matrix
from tlkit.reports.template import encodable, script, script_source, template
from tlkit.reports.words import duration, percent, points
from tlkit.run_folder import write_text
from tlkit.shards.folder import File

MATRIX_CLASSES = 25  # a larger confusion matrix is read as a list of its largest cells
SKIPPED_SHOWN = 100


@dataclass(frozen=True)
class Page:
    """What a report page tells.

    Args:
        title: Command and data, for instance ``finetune hymenoptera_256``.
        summary: The object that ``--json`` prints; what it lacks, the page leaves out.
        split: Which images the page reports on: ``val``, ``test``, ``all`` ...
        classes: K class names.
        per_class: One ``{class, images, precision, recall, f1}`` for each class, and ``auroc`` where it is known; what
            is undefined is None.
        truth: True class of each image of the split (N).
        probabilities: Of each class for each image (N, K).
        files: The image files (N); the page does without a picture where one cannot be read.
        names: How each file is called in the data (N), for instance ``val/ants/1.jpg``.
        recipe: The effective recipe, as YAML text.
        history: Rows of ``metrics.jsonl``, one for each epoch of each phase; without them there are no learning curves.
        heat: Gives for chosen rows a map (h, w) in [0, 1] of where the network looked, or None; called once, if at all.
    """

    title: str
    summary: Mapping[str, Any]
    split: str
    classes: Sequence[str]
    per_class: Sequence[Mapping[str, Any]]
    truth: np.ndarray
    probabilities: np.ndarray
    files: Sequence[File]
    names: Sequence[str]
    recipe: str
    history: Sequence[Mapping[str, Any]] = ()
    heat: pictures.Heat | None = None


def write_page(path: Path, page: Page) -> None:
    """Write the page as UTF-8."""
    write_text(path, render_page(page))


def render_page(page: Page) -> str:
    """The page as HTML; what UTF-8 cannot hold (an undecodable byte of a file name) is spelt out as an escape."""
    outcome = Outcome.of(page.truth, page.probabilities)
    images, right = len(outcome.truth), int(outcome.right.sum())
    per_class = sections.worst_classes(page.per_class)
    rows = matrix(outcome, page.classes) if len(page.classes) <= MATRIX_CLASSES else None
    confusions, confusions_in_all = frequent_confusions(outcome, page.classes)
    cells = [cell for row in rows for cell in row if cell.images] if rows is not None else confusions
    metrics = _metrics(page.summary, page.split)
    skipped = page.summary.get("skipped_files") or []
    kind = "held-out" if metrics.get("cross_validated") else page.split
    html = template("page.html").render(
        page=page,
        summary=page.summary,
        version=page.summary.get("version") or __version__,
        script=script(),
        script_source=script_source(script()),
        images_of="images" if kind == "all" else f"{kind} images",
        headline=_headline(metrics, kind, images, right),
        metrics=metrics,
        all_metrics=_all_metrics(page.summary),
        facts=_facts(page),
        phases=sections.phases(page.summary),
        folds=sections.cross_validation(page.summary),
        charts=curves.charts(page.history),
        matrix=rows,
        confusions=confusions,
        confusions_left_out=confusions_in_all - len(confusions),
        per_class=per_class,
        ranked=any(row.get("auroc") is not None for row in page.per_class),
        classes_left_out=len(page.per_class) - len(per_class),
        gallery=_gallery(page, outcome, cells),
        reliability=confidence.reliability(outcome),
        coverage=confidence.coverage(outcome),
        calibration=sections.calibration(page.summary),
        views=sections.views(page.summary, metrics),
        data=sections.data(page.summary),
        images=images,
        wrong=images - right,
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_left_out=len(skipped[SKIPPED_SHOWN:]),
    )
    return encodable(html)


def _gallery(page: Page, outcome: Outcome, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The pictures with what is said below them."""
    chosen = [(cell.truth, cell.predicted) for cell in cells]
    found = pictures.gallery(outcome, chosen, page.files, page.heat, page.summary.get("preprocessing"))
    return [
        {
            "picture": picture,
            "name": page.names[picture.row],
            "label": page.classes[outcome.truth[picture.row]],
            "predicted": page.classes[outcome.predicted[picture.row]],
            "probability": float(outcome.confidence[picture.row]),
        }
        for picture in found
    ]


def _all_metrics(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics objects by split; empty where the summary holds a single one, as that of evaluate does."""
    metrics = summary.get("metrics") or {}
    return {split: figures for split, figures in metrics.items() if isinstance(figures, Mapping)}


def _metrics(summary: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    by_split = _all_metrics(summary)
    return by_split.get(split, {}) if by_split else summary.get("metrics") or {}


def _headline(metrics: Mapping[str, Any], kind: str, images: int, right: int) -> dict[str, str]:
    """``144 of 153 val images right:``, ``94.1 %``, ``(95 % interval 89.1 to 96.9)``."""
    noun = ("image" if images == 1 else "images") if kind == "all" else f"{kind} image{'' if images == 1 else 's'}"
    if not images:
        return {"counts": f"There are no {noun} to report on", "share": "", "interval": ""}
    top1, interval = metrics.get("top1"), metrics.get("top1_ci95")
    return {
        "counts": f"{right:,} of {images:,} {noun} right:",
        "share": percent(right / images if top1 is None else top1),
        "interval": f"(95 % interval {points(interval[0])} to {points(interval[1])})" if interval else "",
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
        ("Time", duration(summary["seconds"]) if summary.get("seconds") is not None else None),
        ("Stopped by", summary.get("stopped")),
        ("Run", summary.get("run")),
    ]
    return [(name, value) for name, value in facts if value not in (None, "", {})]
