"""Labelled images that networks are measured on: which ones, and in terms of whose classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tlkit import config, run_folder
from tlkit.audit.leaks import shared_with
from tlkit.commands.labelled import stored_split
from tlkit.data.folders import SPLITS, Samples, is_same, read_samples
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.data.transforms import View
from tlkit.errors import TlkitError, UsageError
from tlkit.evaluation.predict import Predictions, predict_all
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded
from tlkit.networks.frozen_pass import How
from tlkit.networks.names import is_onnx
from tlkit.progress import Progress


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


def read_labelled(models: Sequence[str], data: Path | None, command: str, progress: Progress) -> Samples:
    """All images of DATA, with the splits that it has, or that the runs on it stored.

    Of several runs on the same data, an image counts as ``train`` where any of them was trained on it, and as ``val``
    where any of them may have been chosen by it.

    Args:
        models: Runs and model names.
        data: By default what the first run was trained on.
        command: Who asks.
        progress: Told of shards that are gone through.
    """
    folder, runs = _runs_on(models, data)
    if folder is None:
        argument = "argument DATA" if command == "evaluate" else "option --data"
        remedy = "give the folder of labelled images"
        raise UsageError(f"missing {argument}", where=f"tlkit {command}", remedy=remedy)
    samples = read_samples(folder, progress=progress)
    of_runs = [stored_split(samples, run).splits for run in runs]
    if not of_runs:
        return samples
    splits = of_runs[0].copy()
    for name in reversed(SPLITS):  # what it was used for, from the least to the most
        splits[np.any([stored == name for stored in of_runs], axis=0)] = name
    return replace(samples, splits=splits)


def learnt_from(models: Sequence[str], data: Path | None, samples: Samples, mask: np.ndarray) -> str | None:
    """What to say where the images to be measured on (mask, N) are some that a run was trained on."""
    seen, runs = int((samples.splits[mask] == "train").sum()), _runs_on(models, data)[1]
    if not seen or not runs:
        return None
    return f"{seen} of the {int(mask.sum())} images were trained on: expect fewer right on new ones"


def shared_with_training(
    models: Sequence[str], data: Path | None, samples: Samples, progress: Progress
) -> list[dict[str, str]]:
    """Images to be measured on that a run was trained on by another path: the same bytes elsewhere.

    Those that stand in train of the runs' own data are left out, which `learnt_from` counts.
    """
    own = bool(_runs_on(models, data)[1])
    trained: dict[str, str] = {}
    for model in models:
        if run_folder.is_run(model):
            trained |= run_folder.trained_on(Path(model))
    return shared_with(trained, samples.take(samples.splits != "train") if own else samples, progress)


def places(models: Sequence[str], data: Path | None) -> dict[str, str]:
    """``model`` and ``data`` for a recipe that means the same from any working folder."""
    folder, model = _runs_on(models, data)[0], models[0]
    found = {"model": str(Path(model).resolve()) if run_folder.is_run(model) or is_onnx(model) else model}
    return found | ({"data": config.plain(folder)} if folder is not None else {})


def _runs_on(models: Sequence[str], data: Path | None) -> tuple[Path | None, list[Path]]:
    """The folder of images, by default what the first run was trained on, and which of the models are runs on it."""
    owners = {Path(model): own for model in models if (own := own_data(Path(model))) is not None}
    folder = data if data is not None else next(iter(owners.values()), None)
    return folder, [run for run, own in owners.items() if folder is not None and is_same(own, folder)]


def own_data(run: Path) -> Path | None:
    """What a run was trained on; None for a model, and for a network that was copied without its recipe."""
    if not run_folder.is_run(run) or not (run / run_folder.RECIPE).is_file():
        return None
    data = run_folder.read_recipe(run).get("data")
    return Path(data) if data else None


def part_named(samples: Samples, split: str) -> tuple[str, np.ndarray]:
    """The name of the split that is to be measured on, and its mask (N).

    Raises:
        TlkitError: The data has no such split.
    """
    if split == "auto":
        split = next((name for name in ("test", "val") if name in samples.splits), "all")
    if split == "all":
        return split, np.ones(len(samples), dtype=bool)
    if split not in samples.splits:
        there = ", ".join(sorted(set(samples.splits.tolist()) - {""})) or "none"
        remedy = f"it has: {there}; or use all"
        raise TlkitError(f"the data has no split '{split}'", where=samples.root, remedy=remedy)
    return split, samples.splits == split


def align(samples: Samples, loaded: Loaded) -> Aligned:
    """Say the labels of ``samples`` in the network's classes, by name.

    Raises:
        TlkitError: Nobody knows what the network's outputs mean, or it knows none of the classes.
    """
    if loaded.classes is None:
        raise TlkitError(
            "nobody knows what its outputs mean", where=loaded.name, remedy="use a run, or an ImageNet model"
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
    return Aligned(renamed.take(known), {name: count for name, count in unknown.items() if count}, missing)


def differences(aligned: Aligned, loaded: Loaded) -> list[str]:
    """What a person should know of classes that the data or the network lacks."""
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


def predictions(
    loaded: Loaded, samples: Samples, view: View, merge: str, on_error: str, how: How
) -> tuple[Samples, Predictions]:
    """What the network makes of the images, and those that could be read."""
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, view)
    found = predict_all(loaded.network, dataset, how, merge)
    refuse_bad_files(found.bad, len(samples), samples.root, on_error)
    return samples.take(found.rows), found
