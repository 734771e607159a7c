"""Label new images."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import config, processes
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.commands.reading import same_network
from tlkit.data import prediction_file
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files
from tlkit.data.new_images import images_at, images_listed, in_shards_named, refuse_no_images
from tlkit.data.prediction_file import Row
from tlkit.errors import TlkitError
from tlkit.evaluation.predict import Predictions, predict_batches
from tlkit.evaluation.views import remark, views_named
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded
from tlkit.networks.exported import build_or_read
from tlkit.shards.folder import Folder

SHOWN = 20
UNSURE = "unsure"
STDIN = Path("-")


@dataclass
class Labelled:
    """What is remembered of the labels, so that memory does not grow with the number of images.

    Args:
        keep: How many rows are kept; all where None.
        rows: The first rows.
        labels: Images by label.
        changed: Images whose first label is not the one that the central view alone gives.
        bad: Files that could not be read.
    """

    keep: int | None
    rows: list[Row] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    bad: list[BadFile] = field(default_factory=list)

    def add(
        self, part: Predictions, names: Sequence[str], paths: Sequence[str], top: int, unsure_below: float | None
    ) -> list[Row]:
        """Rows of a batch, with the ``top`` most probable labels of each image, which are counted."""
        self.bad += part.bad
        if not len(part.rows):
            return []
        best = np.argsort(-part.probabilities, axis=1, kind="stable")[:, :top]
        rows = list(_rows(part, best, paths, names, unsure_below))
        self.labels.update(row["label"] for row in rows)
        self.changed += int((best[:, 0] != part.center).sum())
        self.rows += rows[: None if self.keep is None else max(0, self.keep - len(self.rows))]
        return rows

    def __len__(self) -> int:
        return self.labels.total()


def predict(
    network: config.TrainedOrExported,
    images: config.NewImages,
    views: config.Views,
    merging: config.Merging,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Label new images; see ``tlkit predict --help``."""
    view = views_named(views.tta)

    def find() -> tuple[Folder, Sequence[str]]:
        prediction_file.refuse(output.out)
        return _find(images.paths, console)

    root, paths = processes.on_first(find)
    torch.manual_seed(compute.seed)
    loaded = same_network(lambda: build_or_read(network.model, network.weights, preprocess))
    names = _names(loaded, images.unsure_below)
    for line in (*loaded.remarks, remark(view, loaded.preprocessing)):
        if line:
            console.warn(line)
    told: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights, "tta": views.tta}
    if output.plan:
        console.line(f"{len(paths)} images, {loaded.name}, weights: {loaded.weights}, views: {views.tta}")
        return told | {"plan": {"images": len(paths)}}
    found = Labelled(None if output.json else SHOWN)
    dataset = ViewDataset(root, paths, loaded.preprocessing, view)
    parts = predict_batches(loaded.network, dataset, how(compute, console, passing), merging.merge)
    top = min(images.top_k, len(names))
    if not processes.is_first():
        for _ in parts:  # the first process writes them
            pass
        return {}
    with prediction_file.writing(output.out, top) if output.out else nullcontext(_write_nothing) as write:
        for part in parts:
            write(found.add(part, names, paths, top, images.unsure_below))
        refuse_bad_files(found.bad, len(paths), _named(images.paths), images.on_error)
        if output.out is not None:
            prediction_file.write_skipped(output.out, found.bad)
    report_skipped(console, found.bad)
    _show(found, images.unsure_below, views.tta, output.out, console)
    told |= {"predictions": found.rows, "labels": dict(found.labels.most_common()), "skipped_files": skipped(found.bad)}
    if images.unsure_below is not None:
        told["unsure"] = found.labels[UNSURE]
    if views.tta != "center":
        told["tta_changed"] = found.changed
    return told | {"out": str(output.out) if output.out else None}


def _write_nothing(rows: Sequence[Row]) -> None:
    """Where there is no file to write."""


def _find(arguments: Sequence[Path], console: Console) -> tuple[Folder, Sequence[str]]:
    """The images that the arguments stand for, in their order, each once, and what they lie in.

    Raises:
        TlkitError: An argument names nothing, or there are no images.
    """
    if (samples := in_shards_named(arguments, console.progress)) is not None:
        return samples.root, samples.paths
    listed = _read_stdin(console) if STDIN in arguments else b""
    paths: list[str] = []
    ignored: Counter[str] = Counter()
    for argument in arguments:
        found, others = images_listed(listed) if argument == STDIN else images_at(argument)
        paths += map(str, found)
        ignored += others
    refuse_no_images(paths, [_named(arguments)])
    if ignored:
        console.say(f"{ignored.total()} files are not images and were ignored")
    once = _once(paths)
    if len(once) < len(paths):
        console.warn(f"{len(paths) - len(once)} images were named more than once, and are labelled once")
    return Path(), once


def _named(arguments: Sequence[Path]) -> Path:
    """What an error that concerns all images says it is about."""
    if len(arguments) > 1:
        return Path()
    return Path("stdin") if arguments[0] == STDIN else arguments[0]


def _read_stdin(console: Console) -> bytes:
    """The list of paths on stdin.

    Raises:
        TlkitError: There is none.
    """
    remedy = "pipe a list of paths into it, such as: find photos -name '*.jpg' | tlkit predict RUN -"
    if sys.stdin is None or sys.stdin.isatty():
        raise TlkitError("nothing is piped into it", where="stdin", remedy=remedy)
    console.say("reading a list of paths from stdin")
    text = sys.stdin.buffer.read()
    if not text.strip(b"\0\r\n\t "):
        raise TlkitError("the list of paths is empty", where="stdin", remedy=remedy)
    return text


def _once(paths: Sequence[str]) -> list[str]:
    """The paths without those that name, perhaps in other words, a file of the same folder again."""
    folder_of = cache(os.path.realpath)
    seen: set[tuple[str, str]] = set()
    kept = []
    for path in paths:
        folder, name = os.path.split(path)
        file = (folder_of(folder), name)
        if file not in seen:
            seen.add(file)
            kept.append(path)
    return kept


def _names(loaded: Loaded, unsure_below: float | None) -> tuple[str, ...]:
    """What the network's outputs are called.

    Raises:
        TlkitError: Nobody knows, or a class is called what images without a sure label are to be called.
    """
    if loaded.classes is None:
        remedy = "use a run, or an ImageNet model"
        raise TlkitError("nobody knows what its outputs mean", where=loaded.name, remedy=remedy)
    names = imagenet.describe(loaded.classes)
    if unsure_below is not None and UNSURE in names:
        what, remedy = f"the network has a class that is called '{UNSURE}'", "leave the option out"
        raise TlkitError(what, where="--unsure-below", remedy=remedy)
    return names


def _rows(
    part: Predictions, best: np.ndarray, paths: Sequence[str], names: Sequence[str], unsure_below: float | None
) -> Iterator[Row]:
    """Rows of the images of a batch (B), whose most probable classes are given in order (B, top)."""
    for row, probabilities, classes in zip(part.rows, part.probabilities, best, strict=True):
        top = [[names[label], round(float(probabilities[label]), 6)] for label in classes]
        label, probability = top[0]
        # the rounded figure decides, so that nobody finds 0.7 called unsure below 0.7
        sure = unsure_below is None or probability >= unsure_below
        yield {"path": paths[row], "label": label if sure else UNSURE, "probability": probability, "top": top}


def _show(found: Labelled, unsure_below: float | None, tta: str, out: Path | None, console: Console) -> None:
    if out is not None:
        console.line(f"{len(found)} predictions written to {out}")
        if found.bad:
            console.line(f"{len(found.bad)} files that cannot be read listed in {prediction_file.skipped_file(out)}")
    else:
        shown = [[row["path"], row["label"], row["probability"]] for row in found.rows[:SHOWN]]
        console.table(f"{len(found)} images", ["image", "label", "probability"], shown)
        if len(found) > SHOWN:
            console.line(f"and {len(found) - SHOWN} more: --out FILE.csv or --json has them all")
    if len(found) > SHOWN:
        labels = sorted(found.labels.items(), key=lambda item: (-item[1], item[0]))
        console.table("images by label", ["label", "images"], labels[:SHOWN])
        if len(labels) > SHOWN:
            rest = sum(count for _, count in labels[SHOWN:])
            console.line(f"and {len(labels) - SHOWN} more labels of {rest} images")
    if tta != "center":
        console.line(f"{tta}: {found.changed} of {len(found)} labels are not those that the centre alone gives")
    if unsure_below is not None:
        unsure = found.labels[UNSURE]
        console.line(f"{unsure} of {len(found)} images are unsure: no probability reaches {unsure_below:g}")
