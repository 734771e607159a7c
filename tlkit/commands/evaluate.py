"""Measure a run or a pretrained model on labelled images."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import __version__, config, processes, run_folder
from tlkit.audit.leaks import in_words
from tlkit.commands.calibrating import calibrate, choose_parts, refuse_unfit, write_calibrated
from tlkit.commands.console import Console
from tlkit.commands.labelled import counts, report_skipped, skipped, write_predictions, write_report
from tlkit.commands.measuring import (
    Aligned,
    align,
    differences,
    learnt_from,
    part_named,
    places,
    predictions,
    read_labelled,
    shared_with_training,
)
from tlkit.commands.passing import how
from tlkit.commands.reading import same_for_all, same_network
from tlkit.data.folders import Samples
from tlkit.evaluation.comparison import mcnemar
from tlkit.evaluation.grad_cam import heat_maps
from tlkit.evaluation.metrics import confusion_matrix, coverage, measured, per_class, reliability
from tlkit.evaluation.predict import Predictions
from tlkit.evaluation.views import remark, views_named
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded
from tlkit.networks.exported import Exported, build_or_read
from tlkit.networks.frozen_pass import How

MATRIX_CLASSES = 100
"""Up to so many classes the whole confusion matrix is in the JSON object; ``confusions.csv`` has it for any number."""
CONFUSIONS = "confusions.csv"
SHOWN = 10


def evaluate(
    network: config.TrainedOrExported,
    data: config.EvalData,
    views: config.Views,
    merging: config.Merging,
    calibration: config.Calibration,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Measure a run or a pretrained model; see ``tlkit evaluate --help``."""
    started = time.monotonic()
    processes.on_first(lambda: run_folder.refuse_existing(output.out))
    view = views_named(views.tta)
    samples = same_for_all(lambda: read_labelled([network.model], data.data, "evaluate", console.progress))
    part, mask = part_named(samples, data.split)
    fitted_on = ""
    if calibration.calibrate:
        fitted_on, samples, mask = choose_parts(samples, part, mask, views.tta, compute.seed)
    torch.manual_seed(compute.seed)
    loaded = same_network(lambda: build_or_read(network.model, network.weights, preprocess))
    remarks = [*loaded.remarks, *samples.remarks(), learnt_from([network.model], data.data, samples, mask)]
    shared = shared_with_training([network.model], data.data, samples.take(mask), console.progress)
    if shared:
        remarks.append(in_words(shared, int(mask.sum())))
    if calibration.calibrate:
        refuse_unfit(loaded)
    aligned = align(samples.take(mask), loaded)
    for line in (*remarks, remark(view, loaded.preprocessing), *differences(aligned, loaded)):
        if line:
            console.warn(line)
    if output.plan:
        return _plan(aligned, loaded, part, views.tta, console)
    if isinstance(loaded.network, Exported):  # whatever is asked for
        if part == "all":
            console.warn("an ONNX file does not know which images it was trained on: name others to measure on")
        compute = replace(compute, device="cpu", precision="fp32")
    passes = how(compute, console, passing)
    read, found = predictions(loaded, aligned.samples, view, merging.merge, data.on_error, passes)
    if not processes.is_first():
        return {}
    report_skipped(console, found.bad)
    told: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights, "split": part, "tta": views.tta}
    rate = len(found.rows) / max(found.network_seconds, 1e-9)
    calibrated = None
    if calibration.calibrate:
        calibrated = calibrate(found, read, fitted_on, part)
        read, found = calibrated.samples, calibrated.predictions
        told |= {"calibration": calibrated.told}
    summary = told | _figures(read, found, views, merging, view.count(loaded.preprocessing))
    summary |= {
        "network_images_per_second": round(rate, 2),
        "unknown_classes": aligned.unknown,
        "missing_classes": aligned.missing,
        "data": counts(samples),
        "shared_files": shared,
        "skipped_files": skipped(found.bad),
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(passes.accelerator.device),
        "precision": passes.accelerator.mixed_precision,
    }
    classes = imagenet.describe(read.classes)
    cells = _cells(read.labels, found.probabilities.argmax(1))
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    _show(console, f"{loaded.title} on {read.root}", summary, classes, wrong)
    if output.out is not None or calibrated is not None:
        folder = run_folder.new_run(output.out, "evaluate")
        summary["run"] = str(folder)
        groups = (network, data, views, merging, calibration, preprocess, compute, passing)
        recipe = config.effective_recipe("evaluate", groups) | places([network.model], data.data)
        if calibrated is not None:
            write_calibrated(folder, loaded, calibrated, samples)
        _write(folder, loaded, summary, read, found, classes, recipe, passes, started)
        console.line(f"report  {folder / run_folder.REPORT}")
        if calibrated is not None:
            console.line(f"next    tlkit predict {folder} PHOTOS")
    return summary


def _figures(
    samples: Samples, found: Predictions, views: config.Views, merging: config.Merging, count: int
) -> dict[str, Any]:
    """What the predictions say of the network, for people who look at it from several sides."""
    probabilities, labels = found.probabilities, samples.labels
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = predicted == labels
    out: dict[str, Any] = {
        "merge": merging.merge,
        "metrics": measured(probabilities, labels),
        "per_class": per_class(probabilities, labels, samples.classes),
        "reliability": reliability(confidence, right),
        "coverage": coverage(confidence, right),
        "network_seconds": round(found.network_seconds, 3),
    }
    if len(samples.classes) <= MATRIX_CLASSES:
        out["confusion_matrix"] = confusion_matrix(predicted, labels, len(samples.classes)).tolist()
    if views.tta != "center":
        center = found.center == labels
        test = mcnemar(right, center)
        out["tta_audit"] = {
            "center_top1": float(center.mean()),
            "fixed": test["only_first"],
            "broken": test["only_second"],
            "p": test["p"],
            "views": count,
            "network_seconds": round(found.network_seconds, 3),
        }
    return out


def _write(
    folder: Path,
    loaded: Loaded,
    summary: dict[str, Any],
    samples: Samples,
    found: Predictions,
    names: tuple[str, ...],
    recipe: dict[str, Any],
    how: How,
    started: float,
) -> None:
    text = run_folder.write_recipe(folder, recipe)
    write_predictions(folder, samples, found.probabilities, summary["skipped_files"])
    predicted = found.probabilities.argmax(1)
    rows = [
        (samples.classes[true], samples.classes[guess], count)
        for true, guess, count in _cells(samples.labels, predicted)
    ]
    run_folder.write_rows(folder / CONFUSIONS, ("class", "predicted", "images"), rows)
    told = {"command": "evaluate", "version": __version__, "seconds": round(time.monotonic() - started, 3)} | summary
    title = f"evaluate {samples.root.absolute().name}"
    # gradients do not flow through what another program runs
    heat = None if isinstance(loaded.network, Exported) else heat_maps(loaded, samples, predicted, how)
    write_report(folder, title, told, summary["split"], names, samples, found.probabilities, text, heat=heat)
    run_folder.write_json(folder / run_folder.SUMMARY, told)


def _cells(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """The cells of the confusion matrix that hold any images: true class, predicted class, images."""
    cells, images = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    return list(zip(*cells.tolist(), images.tolist(), strict=True))


FIGURES = (
    ("top1", "top-1 accuracy"),
    ("top5", "top-5 accuracy"),
    ("balanced_accuracy", "balanced accuracy"),
    ("macro_f1", "macro F1"),
    ("auroc", "AUROC, one against the rest"),
    ("loss", "loss (nats)"),
    ("brier", "Brier score"),
    ("ece", "calibration error (ECE)"),
)


def _show(
    console: Console,
    title: str,
    summary: dict[str, Any],
    names: tuple[str, ...],
    confusions: list[tuple[int, int, int]],
) -> None:
    figures, part = summary["metrics"], summary["split"]
    cells = [
        [name, figures[key], "{:.3f} to {:.3f}".format(*figures[f"{key}_ci95"])]
        for key, name in FIGURES
        if key in figures
    ]
    console.table(title, [f"{figures['images']} images of {part}", "", "95 % interval"], cells)
    _show_views(console, summary)
    _show_calibration(console, summary)
    _show_coverage(console, summary)
    _show_worst(console, summary["per_class"], names)
    if confusions:
        cells = [[names[true], names[guess], count] for true, guess, count in confusions[:SHOWN]]
        console.table("what was most often taken for what", ["class", "predicted", "images"], cells)


def _show_views(console: Console, summary: dict[str, Any]) -> None:
    if "tta_audit" not in summary:
        return
    audit, top1, count = summary["tta_audit"], summary["metrics"]["top1"], summary["tta_audit"]["views"]
    seconds = audit["network_seconds"]
    console.line(
        f"{summary['tta']}: top-1 {top1:.3f}, the centre alone {audit['center_top1']:.3f};"
        f" {audit['fixed']} put right, {audit['broken']} put wrong (p {audit['p']:.2g})"
    )
    console.line(f"{count} views: the network took {seconds:.1f} s, about {seconds / count:.1f} s of it for the centre")
    if audit["broken"] > audit["fixed"] and audit["p"] < 0.05:
        console.warn(f"--tta {summary['tta']} hurts here: leave it out")
    elif audit["broken"] >= audit["fixed"]:
        console.warn(f"--tta {summary['tta']} gains nothing here, for {count} times the work")


def _show_calibration(console: Console, summary: dict[str, Any]) -> None:
    if "calibration" not in summary:
        return
    told = summary["calibration"]
    title = f"temperature {told['temperature']:.3f}, fitted on {told['fitted_images']} images ({told['fitted_on']})"
    cells = [
        [name, told["before"][key], told["after"][key]]
        for key, name in (("ece", "calibration error (ECE)"), ("loss", "loss (nats)"), ("brier", "Brier score"))
    ]
    console.table(title, [f"the {told['after']['images']} others", "before", "after"], cells)


def _show_coverage(console: Console, summary: dict[str, Any]) -> None:
    rows = [
        [f"{row['threshold']:.2f}", row["images"], row["coverage"], row["accuracy"], _interval(row["accuracy_ci95"])]
        for row in summary["coverage"]
    ]
    columns = ["confidence at least", "images kept", "share", "right", "95 % interval"]
    console.table("where less confident predictions are rejected", columns, rows)


def _interval(ends: list[float] | None) -> str:
    return "{:.3f} to {:.3f}".format(*ends) if ends else "-"


def _show_worst(console: Console, rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    seen = [(row, name) for row, name in zip(rows, names, strict=True) if row["images"]]
    seen.sort(key=lambda pair: (pair[0]["recall"], pair[1]))
    cells = [
        [name, row["images"], row["precision"], row["recall"], row["f1"], row["auroc"]] for row, name in seen[:SHOWN]
    ]
    title = "per class" if len(seen) <= SHOWN else f"the {SHOWN} classes of lowest recall"
    console.table(title, ["class", "images", "precision", "recall", "F1", "AUROC"], cells)


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
