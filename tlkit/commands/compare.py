"""Measure several networks on the same images, side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import __version__, config, run_folder
from tlkit.audit.leaks import in_words
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.measuring import (
    align,
    differences,
    learnt_from,
    part_named,
    predictions,
    read_labelled,
    shared_with_training,
)
from tlkit.commands.passing import how
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile
from tlkit.data.transforms import View
from tlkit.errors import TlkitError
from tlkit.evaluation.comparison import holm, mcnemar
from tlkit.evaluation.metrics import measured
from tlkit.evaluation.predict import Predictions
from tlkit.evaluation.views import remark, views_named
from tlkit.networks.build import build
from tlkit.networks.complexity import complexity, noise
from tlkit.networks.frozen_pass import How
from tlkit.reports.comparison import Comparison, write_comparison
from tlkit.reports.tables import Table, as_markdown, short

FORMATS = {".json": "json", ".md": "markdown", ".html": "html", ".txt": "markdown"}


@dataclass(frozen=True)
class Candidate:
    """A network and what it makes of the images that it knows the classes of.

    Args:
        row: What is told of it whatever the images.
        samples: The images.
        found: Its predictions.
    """

    row: dict[str, Any]
    samples: Samples
    found: Predictions


def compare(
    compared: config.Compared,
    views: config.Views,
    merging: config.Merging,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Measure several networks on the same images; see ``tlkit compare --help``."""
    started = time.monotonic()
    form = _form(compared, output, console)
    names = _titles(compared.models)
    view = views_named(views.tta)
    samples = read_labelled(compared.models, compared.data, "compare", console.progress)
    part, mask = part_named(samples, compared.split)
    for line in (*samples.remarks(), learnt_from(compared.models, compared.data, samples, mask)):
        if line:
            console.warn(line)
    samples = samples.take(mask)
    shared = shared_with_training(compared.models, compared.data, samples, console.progress)
    if shared:
        console.warn(in_words(shared, len(samples)))
    if output.plan:
        console.table("would be compared", ["network"], [[name] for name in names])
        console.line(f"on {len(samples)} images of {part}, views: {views.tta}")
        return {"plan": {"models": names, "images": len(samples), "split": part}}
    passes = how(compute, console, passing)
    candidates, bad = [], []
    for model, name in zip(compared.models, names, strict=True):
        candidate = _measure(model, name, samples, view, merging.merge, compared.on_error, passes, console)
        bad += [file for file in candidate.found.bad if file not in bad]
        candidates.append(candidate)
    report_skipped(console, bad)
    summary = _summary(candidates, samples, part, views.tta, bad, passes) | {"shared_files": shared}
    if summary["left_out"]:
        console.warn(f"{summary['left_out']} images are left out: some network does not know their class")
    told = {"command": "compare", "version": __version__, "seconds": round(time.monotonic() - started, 3)} | summary
    _show(form, told, output.out, console)
    return summary


def _form(compared: config.Compared, output: config.Output, console: Console) -> str:
    run_folder.refuse_existing(output.out)
    if len(compared.models) < 2:
        raise TlkitError("one network alone", where="tlkit compare", remedy="name two or more, or use 'tlkit evaluate'")
    out = output.out
    if out is not None and compared.format is None and out.suffix.lower() not in FORMATS:
        raise TlkitError(f"cannot write '{out.suffix}' files", where=out, remedy=f"use {', '.join(FORMATS)}")
    if out is not None and not out.absolute().parent.is_dir():
        raise TlkitError("there is no such folder", where=out.parent, remedy="make it first")
    form = compared.format or (FORMATS[out.suffix.lower()] if out else "table")
    if form == "html" and out is None:
        raise TlkitError("a page is written to a file", where="--format html", remedy="give --out FILE.html")
    console.json = console.json or (form == "json" and out is None)
    return form


def _titles(models: Sequence[str]) -> list[str]:
    """What to call the networks: folders of runs by their name, or where that is not enough by their path."""
    names = [Path(model).absolute().name if run_folder.is_run(model) else model for model in models]
    names = [model if names.count(name) > 1 else name for model, name in zip(models, names, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TlkitError("named twice", where=twice, remedy="name each network once")
    return names


def _measure(
    model: str, name: str, samples: Samples, view: View, merge: str, on_error: str, how: How, console: Console
) -> Candidate:
    torch.manual_seed(0)
    loaded = build(model, "default")
    aligned = align(samples, loaded)
    for line in (*loaded.remarks, remark(view, loaded.preprocessing), *differences(aligned, loaded)):
        if line:
            console.warn(f"{name}: {line}")
    counted = complexity(loaded.network, noise(loaded.network, loaded.preprocessing)).whole
    console.say(name)
    read, found = predictions(loaded, aligned.samples, view, merge, on_error, how)
    row = {
        "model": loaded.name,
        "title": name,
        "weights": loaded.weights,
        "image_size": loaded.preprocessing.size,
        "params": counted.params,
        "macs": counted.macs,
        "images_per_second": round(len(read) / max(found.network_seconds, 1e-9), 2),
    }
    return Candidate(row, read, found)


def _summary(
    candidates: Sequence[Candidate], samples: Samples, part: str, tta: str, bad: list[BadFile], how: How
) -> dict[str, Any]:
    common = set.intersection(*(set(candidate.samples.paths) for candidate in candidates))
    if not common:
        what = "no image is of a class that all networks know"
        raise TlkitError(what, where=samples.root, remedy="compare networks of the same classes")
    unread = {file.path for file in bad}
    rows, right = [], []
    for candidate in candidates:
        kept = np.array([path in common for path in candidate.samples.paths])
        probabilities, labels = candidate.found.probabilities[kept], candidate.samples.labels[kept]
        figures = measured(probabilities, labels)
        right.append(probabilities.argmax(1) == labels)
        if "top5" in figures:
            figures["top5_error"] = 1 - figures["top5"]
        rows.append(candidate.row | figures)
    best = min(range(len(rows)), key=lambda place: (-rows[place]["top1"], rows[place]["loss"]))
    others = [place for place in range(len(rows)) if place != best]
    tests = {place: mcnemar(right[best], right[place]) for place in others}
    adjusted = dict(zip(others, holm([tests[place]["p"] for place in others]), strict=True))
    for place, row in enumerate(rows):
        row["best"] = place == best
        row["mcnemar"] = None
        if place != best:
            test = tests[place]
            named = {"only_best": test["only_first"], "only_this": test["only_second"], "p": test["p"]}
            row["mcnemar"] = named | {"p_holm": adjusted[place]}
    return {
        "data": str(samples.root),
        "split": part,
        "images": len(common),
        "classes": len({samples.labels[row] for row, path in enumerate(samples.paths) if path in common}),
        "tta": tta,
        "rows": rows,
        "left_out": sum(path not in common and path not in unread for path in samples.paths),
        "skipped_files": skipped(bad),
        "device": str(how.accelerator.device),
        "precision": how.accelerator.mixed_precision,
    }


def _show(form: str, summary: dict[str, Any], out: Path | None, console: Console) -> None:
    if form == "html" and out is not None:
        write_comparison(out, Comparison(f"compare on {Path(summary['data']).absolute().name}", summary))
        console.line(f"{len(summary['rows'])} networks compared: {out}")
        return
    table = _table(summary)
    if form == "table" and out is None:
        console.table(table.title, table.columns, table.rows)
        for note in table.notes:
            console.line(note)
        return
    if form == "json":
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        text = f"**{table.title}**\n\n{as_markdown(table)}" + "".join(f"\n{note}\n" for note in table.notes)
    if out is None:
        console.text(text if form != "json" else "")
        return
    run_folder.write_text(out, text)
    console.line(f"{len(summary['rows'])} networks compared: {out}")


def _table(summary: dict[str, Any]) -> Table:
    with_top5 = any("top5_error" in row for row in summary["rows"])
    columns = ["network", "top-1", "95 %", *["top-5 error"] * with_top5, "params", "MACs", "img/s", "p"]
    rows = []
    for row in sorted(summary["rows"], key=lambda row: (not row["best"], -row["top1"])):
        interval = "{:.3f}–{:.3f}".format(*row["top1_ci95"])
        error = [f"{row['top5_error']:.3f}" if "top5_error" in row else "-"] * with_top5
        against = "best" if row["best"] else f"{row['mcnemar']['p_holm']:.2g}"
        speed = f"{row['images_per_second']:.0f}"
        sizes = [short(row["params"]), short(row["macs"])]
        rows.append([row["title"], f"{row['top1']:.3f}", interval, *error, *sizes, speed, against])
    notes = [
        "p: McNemar's exact test against the best, adjusted for several (Holm): how likely so large a difference"
        " is where both are equally good.",
        f"img/s: the network alone, views {summary['tta']}, {summary['device']}, {summary['precision']}.",
    ]
    return Table(f"{summary['images']} images of {summary['split']}, {summary['data']}", columns, rows, notes)
