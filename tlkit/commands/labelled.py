"""Steps that commands over labelled images share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import processes, run_folder
from tlkit.commands.console import Console
from tlkit.data.content import digests
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile
from tlkit.errors import TlkitError
from tlkit.evaluation.grad_cam import HeatMaps
from tlkit.evaluation.metrics import per_class
from tlkit.reports.page import Page, write_page


def stored_split(samples: Samples, run: Path) -> Samples:
    """Samples with the splits that a run stored; images that it did not have get none.

    Raises:
        TlkitError: The data now lacks images of the run, or labels them otherwise.
    """
    stored = processes.each(lambda: run_folder.read_splits(run))
    if stored is None:
        return samples
    if gone := sorted(set(stored) - set(samples.paths)):
        raise TlkitError(
            f"{len(gone)} images of the run are not there any more, the first is {gone[0]}",
            where=samples.root,
            remedy="put them back, or start a new run",
        )
    for path, label in zip(samples.paths, samples.labels, strict=True):
        if path in stored and stored[path][0] != samples.classes[label]:
            what = f"{path} was of class '{stored[path][0]}' in the run, and is of '{samples.classes[label]}' now"
            raise TlkitError(what, where=samples.root, remedy="start a new run")
    splits = [stored[path][1] if path in stored else "" for path in samples.paths]
    return replace(samples, splits=np.array(splits, dtype="<U5"))


def counts(samples: Samples) -> dict[str, dict[str, int]]:
    """Images of each class and split; of a split that the data does not name, under ``images``."""
    names = [name or "images" for name in samples.splits.tolist()]
    counts: dict[str, dict[str, int]] = {name: {} for name in samples.classes}
    for label, name in zip(samples.labels.tolist(), names, strict=True):
        of_class = counts[samples.classes[label]]
        of_class[name] = of_class.get(name, 0) + 1
    return counts


def write_splits(run: Path, samples: Samples) -> None:
    """Store label, split and content digest of each image, as `run_folder.read_splits` and `trained_on` read them."""
    names = (samples.classes[label] for label in samples.labels)
    files = (file or "" for file in digests(samples.root, samples.paths))
    rows = zip(samples.paths, names, samples.splits.tolist(), files, strict=True)
    run_folder.write_rows(run / run_folder.SPLITS, ("path", "label", "split", "digest"), rows)


def skipped(bad: Sequence[BadFile]) -> list[dict[str, str]]:
    """Files left out, for the summary."""
    return [{"path": file.path, "reason": file.reason} for file in bad]


def report_skipped(console: Console, bad: Sequence[BadFile]) -> None:
    """Name the files that were left out; the first ones, where there are many."""
    for file in bad[:10]:
        console.warn(f"left out {file.path}: {file.reason}")
    if len(bad) > 10:
        console.warn(f"left out {len(bad) - 10} more files that cannot be read")


def metrics_table(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print metrics objects of one network under each other, by name."""
    columns = ["images of", "images", "top-1", "95 % interval", "balanced", "loss", "ECE"]
    cells = []
    for name, figures in rows.items():
        interval = "{:.3f} to {:.3f}".format(*figures["top1_ci95"])
        row = [name, figures["images"], figures["top1"], interval, figures["balanced_accuracy"]]
        cells.append([*row, figures["loss"], figures["ece"], *([figures["top5"]] if "top5" in figures else [])])
    console.table(title, [*columns, "top-5"][: len(cells[0])], cells)


def write_predictions(
    folder: Path, samples: Samples, probabilities: np.ndarray, left_out: Sequence[dict[str, str]]
) -> None:
    """Write ``predictions.csv`` of samples whose labels index the columns (N, K), and ``skipped_files.csv`` if any."""
    predicted, names = probabilities.argmax(1), samples.classes
    rows = [
        (path, names[label], names[guess], f"{row[guess]:.6f}", part)
        for path, label, guess, row, part in zip(
            samples.paths, samples.labels, predicted, probabilities, samples.splits, strict=True
        )
    ]
    run_folder.write_rows(folder / run_folder.PREDICTIONS, ("path", "label", "predicted", "probability", "split"), rows)
    if left_out:
        listed = ((file["path"], file["reason"]) for file in left_out)
        run_folder.write_rows(folder / run_folder.SKIPPED, ("path", "reason"), listed)


def write_report(
    folder: Path,
    title: str,
    summary: dict[str, Any],
    split: str,
    classes: Sequence[str],
    samples: Samples,
    probabilities: np.ndarray,
    recipe: str,
    history: Sequence[dict[str, Any]] = (),
    heat: HeatMaps | None = None,
) -> None:
    """Write ``report.html`` on the given samples, whose labels index ``classes``, as do the columns (N, K)."""
    page = Page(
        title=title,
        summary=summary,
        split=split,
        classes=classes,
        per_class=per_class(probabilities, samples.labels, classes),
        truth=samples.labels,
        probabilities=probabilities,
        files=[samples.root / path for path in samples.paths],
        names=samples.paths,
        recipe=recipe,
        history=history,
        heat=heat,
    )
    write_page(folder / run_folder.REPORT, page)
