"""Measure a run or a pretrained model on labelled images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import __version__, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import (
    metrics_table,
    report_skipped,
    skipped,
    stored_split,
    write_predictions,
    write_report,
)
from tlkit.commands.passing import how
from tlkit.data.folders import Samples, read_samples
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.errors import TlkitError, UsageError
from tlkit.evaluation.metrics import metrics, per_class
from tlkit.evaluation.predict import collect, predict_batches
from tlkit.evaluation.views import VIEWS
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded, build
from tlkit.networks.frozen_pass import How


@dataclass(frozen=True)
class Aligned:
    """Labelled images in terms of a network's classes.

    Args:
        samples: Images of classes that the network knows; labels index the network's classes.
        unknown: Class folders that the network does not know, with their images.
        missing: Classes of the network that the data does not have.
    """

    samples: Samples
    unknown: dict[str, int]
    missing: list[str]


def evaluate(
    network: config.Trained,
    data: config.EvalData,
    views: config.Views,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Measure a run or a pretrained model; see ``tlkit evaluate --help``."""
    started = time.monotonic()
    run_folder.refuse_existing(output.out)
    samples, part = _read(network.model, data)
    torch.manual_seed(compute.seed)
    loaded = build(network.model, network.weights, preprocess)
    for remark in (*loaded.remarks, *samples.remarks()):
        console.warn(remark)
    aligned = align(samples, loaded)
    for line in _differences(aligned, loaded):
        console.warn(line)
    if output.plan:
        return _plan(aligned, loaded, part, views.tta, console)
    return _measure(loaded, aligned, part, started, (data, views, output), how(compute, console, passing), console)


def _measure(
    loaded: Loaded,
    aligned: Aligned,
    part: str,
    started: float,
    options: tuple[config.EvalData, config.Views, config.Output],
    how: How,
    console: Console,
) -> dict[str, Any]:
    data, views, output = options
    samples = aligned.samples
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, VIEWS[views.tta])
    found = collect(predict_batches(loaded.network, dataset, how))
    refuse_bad_files(found.bad, len(samples), samples.root, data.on_error)
    report_skipped(console, found.bad)
    samples = samples.take(found.rows)
    classes = imagenet.describe(samples.classes)
    figures = metrics(found.probabilities, samples.labels)
    summary = {
        "model": loaded.name,
        "weights": loaded.weights,
        "split": part,
        "tta": views.tta,
        "metrics": figures,
        "per_class": per_class(found.probabilities.argmax(1), samples.labels, samples.classes),
        "unknown_classes": aligned.unknown,
        "missing_classes": aligned.missing,
        "skipped_files": skipped(found.bad),
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(how.accelerator.device),
        "precision": how.accelerator.mixed_precision,
    }
    metrics_table(console, f"{loaded.title} on {samples.root}", {part: figures})
    if output.out is not None:
        folder = run_folder.new_run(output.out, "evaluate")
        summary["run"] = str(folder)
        told = {
            "command": "evaluate",
            "version": __version__,
            "seconds": round(time.monotonic() - started, 3),
        } | summary
        _write(folder, told, samples, found.probabilities, classes)
        console.line(f"report  {folder / run_folder.REPORT}")
    _show_worst(console, summary["per_class"], classes)
    return summary


def _read(model: str, data: config.EvalData) -> tuple[Samples, str]:
    """The images to measure on, and the name of their split; on a run's own data by its stored split."""
    own = _own_data(Path(model))
    folder = data.data if data.data is not None else own
    if folder is None:
        raise UsageError("missing argument DATA", where="tlkit evaluate", remedy="give the folder of labelled images")
    samples = read_samples(folder)
    if own is not None and own.exists() and folder.exists() and own.samefile(folder):
        samples = stored_split(samples, Path(model))
    part = data.split
    if part == "auto":
        part = next((name for name in ("test", "val") if name in samples.splits), "all")
    if part != "all":
        if part not in samples.splits:
            there = ", ".join(sorted(set(samples.splits.tolist()) - {""})) or "none"
            raise TlkitError(f"the data has no split '{part}'", where=folder, remedy=f"it has: {there}; or use all")
        samples = samples.take(samples.splits == part)
    return samples, part


def _own_data(run: Path) -> Path | None:
    """What a run was trained on; None for a model, and for a network that was copied without its recipe."""
    if not run_folder.is_run(run) or not (run / run_folder.RECIPE).is_file():
        return None
    data = run_folder.read_recipe(run).get("data")
    return Path(data) if data else None


def align(samples: Samples, loaded: Loaded) -> Aligned:
    """Say the labels of ``samples`` in the network's classes, by name.

    Raises:
        TlkitError: Nobody knows what the network's outputs mean, or it knows none of the classes.
    """
    if loaded.classes is None:
        raise TlkitError(
            "nobody knows what its outputs mean", where=loaded.name, remedy="evaluate a run, or an ImageNet model"
        )
    index = imagenet.align(samples.classes, loaded.classes)
    labels = index[samples.labels]
    known = labels >= 0
    if not known.any():
        remedy = f"it knows {', '.join(loaded.classes[:4])}{' ...' if len(loaded.classes) > 4 else ''}"
        raise TlkitError("the network knows none of these classes", where=samples.root, remedy=remedy)
    unknown = {name: int((samples.labels == row).sum()) for row, name in enumerate(samples.classes) if index[row] < 0}
    there = set(labels[known].tolist())
    missing = [name for row, name in enumerate(loaded.classes) if row not in there]
    renamed = replace(samples, labels=labels, classes=loaded.classes)
    return Aligned(renamed.take(known), unknown, missing)


def _differences(aligned: Aligned, loaded: Loaded) -> list[str]:
    lines = []
    if aligned.unknown:
        names = ", ".join(f"{name} ({count})" for name, count in list(aligned.unknown.items())[:5])
        count = sum(aligned.unknown.values())
        lines.append(
            f"{count} images of {len(aligned.unknown)} classes that the network does not know are left out: {names}"
        )
    if aligned.missing and loaded.classes:
        names = ", ".join(imagenet.describe(aligned.missing)[:5])
        lines.append(
            f"{len(aligned.missing)} of the network's {len(loaded.classes)} classes have no image here: {names}"
        )
    return lines


def _write(
    folder: Path, summary: dict[str, Any], samples: Samples, probabilities: np.ndarray, names: tuple[str, ...]
) -> None:
    write_predictions(folder, samples, probabilities, summary["skipped_files"])
    title = f"evaluate {samples.root.absolute().name}"
    write_report(folder, title, summary, summary["split"], names, samples, probabilities, "")
    run_folder.write_json(folder / run_folder.SUMMARY, summary)


def _show_worst(console: Console, rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    seen = [(row, name) for row, name in zip(rows, names, strict=True) if row["images"]]
    seen.sort(key=lambda pair: (pair[0]["recall"], pair[1]))
    cells = [[name, row["images"], row["precision"], row["recall"], row["f1"]] for row, name in seen[:10]]
    title = "per class" if len(seen) <= 10 else "the 10 classes of lowest recall"
    console.table(title, ["class", "images", "precision", "recall", "F1"], cells)


def _plan(aligned: Aligned, loaded: Loaded, part: str, tta: str, console: Console) -> dict[str, Any]:
    images = np.bincount(aligned.samples.labels, minlength=len(aligned.samples.classes))
    names = imagenet.describe(aligned.samples.classes)
    counts = {name: int(count) for name, count in zip(names, images, strict=True) if count}
    console.table(f"images of {part}", ["class", "images"], [[name, count] for name, count in counts.items()])
    console.line(
        f"network {loaded.title}, weights: {loaded.weights}, input {loaded.preprocessing.size} px, views: {tta}"
    )
    plan = {"images": {part: counts}, "total": int(images.sum())}
    return {"model": loaded.name, "weights": loaded.weights, "split": part, "tta": tta, "plan": plan}
