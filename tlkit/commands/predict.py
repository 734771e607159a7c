"""Label new images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.data.folders import find_images
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files
from tlkit.errors import TlkitError
from tlkit.evaluation.predict import predict_batches
from tlkit.evaluation.views import VIEWS
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded, build
from tlkit.networks.frozen_pass import How

SHOWN = 20


def predict(
    network: config.Trained,
    images: config.NewImages,
    views: config.Views,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Label new images; see ``tlkit predict --help``."""
    run_folder.refuse_existing(output.out)
    write = _writer(output.out)
    paths, ignored = find_images(images.paths)
    torch.manual_seed(compute.seed)
    loaded = build(network.model, network.weights, preprocess)
    for remark in loaded.remarks:
        console.warn(remark)
    if ignored:
        console.say(f"{ignored.total()} files are not images and were ignored")
    if output.plan:
        console.line(f"{len(paths)} images, {loaded.name}, weights: {loaded.weights}, views: {views.tta}")
        return {"model": loaded.name, "weights": loaded.weights, "tta": views.tta, "plan": {"images": len(paths)}}
    rows, bad = _label(loaded, paths, images.top_k, views, how(compute, console, passing))
    refuse_bad_files(bad, len(paths), images.paths[0] if len(images.paths) == 1 else Path(), images.on_error)
    report_skipped(console, bad)
    if output.out is not None:
        write(rows)
        console.line(f"{len(rows)} predictions written to {output.out}")
    else:
        shown = [[row["path"], row["label"], row["probability"]] for row in rows[:SHOWN]]
        console.table(f"{len(rows)} images", ["image", "label", "probability"], shown)
        if len(rows) > SHOWN:
            console.line(f"and {len(rows) - SHOWN} more: --out FILE.csv or --json has them all")
    summary = {"model": loaded.name, "weights": loaded.weights, "tta": views.tta, "predictions": rows}
    return summary | {"skipped_files": skipped(bad), "out": str(output.out) if output.out else None}


def _label(
    loaded: Loaded, paths: list[Path], top_k: int, views: config.Views, how: How
) -> tuple[list[dict[str, Any]], list[BadFile]]:
    if loaded.classes is None:
        raise TlkitError(
            "nobody knows what its outputs mean", where=loaded.name, remedy="use a run, or an ImageNet model"
        )
    names = imagenet.describe(loaded.classes)
    dataset = ViewDataset(Path(), [str(path) for path in paths], loaded.preprocessing, VIEWS[views.tta])
    rows: list[dict[str, Any]] = []
    bad: list[BadFile] = []
    for part in predict_batches(loaded.network, dataset, how):
        bad += part.bad
        for row, probabilities in zip(part.rows, part.probabilities, strict=True):
            best = np.argsort(-probabilities, kind="stable")[:top_k]
            top = [[names[label], round(float(probabilities[label]), 6)] for label in best]
            rows.append({"path": str(paths[row]), "label": top[0][0], "probability": top[0][1], "top": top})
    return rows, bad


def _writer(out: Path | None) -> Callable[[list[dict[str, Any]]], None]:
    """What writes the predictions in the format that the file's ending asks for.

    Raises:
        TlkitError: No such format.
    """
    if out is None:
        return lambda rows: None
    writers = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if out.suffix.lower() not in writers:
        raise TlkitError(f"cannot write '{out.suffix}' files", where=out, remedy=f"use {', '.join(writers)}")
    if not out.absolute().parent.is_dir():
        raise TlkitError("there is no such folder", where=out.parent, remedy="make it first")
    chosen = writers[out.suffix.lower()]

    def write(rows: list[dict[str, Any]]) -> None:
        with run_folder.atomically(out) as part:
            chosen(part, rows)

    return write


def _flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One column for each of the further labels: ``label2``, ``probability2``, ..."""
    flat = []
    for row in rows:
        more: dict[str, Any] = {}
        for rank, (label, probability) in enumerate(row["top"][1:], start=2):
            more |= {f"label{rank}": label, f"probability{rank}": probability}
        flat.append({"path": row["path"], "label": row["label"], "probability": row["probability"]} | more)
    return flat


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    flat = _flat(rows)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, flat[0] if flat else ["path", "label", "probability"])
        writer.writeheader()
        writer.writerows(flat)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    flat = [row | {"path": row["path"].encode(errors="backslashreplace").decode()} for row in _flat(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), path)  # text in it must be Unicode
