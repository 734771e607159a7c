"""Write what a frozen network makes of images into a file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlkit import __version__, config, processes, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.commands.reading import same_for_all, same_network
from tlkit.data.feature_file import Columns, Unfinished, refuse_unwritable, working_folder
from tlkit.data.folders import Samples
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.data.new_images import read_images
from tlkit.errors import TlkitError, UsageError, did_you_mean
from tlkit.evaluation.views import remark, views_named
from tlkit.networks.build import Loaded, build
from tlkit.networks.forward import features_of
from tlkit.networks.frozen_pass import FrozenPass, How
from tlkit.networks.quick import Compute
from tlkit.networks.splitting import CannotSplit, outputs_at
from tlkit.networks.stages import stages
from tlkit.networks.weights import fingerprint

POOLED = "pooled"


def extract_features(
    features: config.Features,
    network: config.Network,
    views: config.Views,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    resume: config.ResumeFile,
    console: Console,
) -> dict[str, Any]:
    """Write features of images; see ``tlkit extract-features --help``."""
    groups: tuple[Any, ...] = (features, network, views, preprocess, compute, passing)
    out = output.out
    if resume.resume is not None:
        out = resume.resume
        if processes.on_first(out.exists):
            if processes.is_first():
                shutil.rmtree(working_folder(out), ignore_errors=True)  # left by a stop in the last moment
            console.line(f"{out} is finished")
            return {"out": str(out)}
        unfinished = working_folder(out)
        recipe = processes.on_first(lambda: run_folder.read_recipe(unfinished))
        features, network, views, preprocess, compute, passing = groups = tuple(
            config.group_from_recipe(type(group), recipe) for group in groups
        )
    if features.data is None:
        raise UsageError("missing argument DATA", where="tlkit extract-features", remedy="give the folder of images")
    if out is None and not output.plan:
        raise UsageError("missing option --out", where="tlkit extract-features", remedy="give --out FILE.parquet")
    processes.on_first(lambda: _refuse(out))
    view, data = views_named(views.tta), features.data
    samples = same_for_all(lambda: read_images(data, progress=console.progress))
    torch.manual_seed(compute.seed)
    loaded = same_network(lambda: build(network.model, network.weights, preprocess, norm=network.norm))
    for line in (*loaded.remarks, *samples.remarks(), remark(view, loaded.preprocessing)):
        if line:
            console.warn(line)
    wanted = _compute(loaded.network, features.stage, views.tta)
    if output.plan or out is None:
        console.line(f"{len(samples)} images, {loaded.title}, weights: {loaded.weights}, {features.stage}, {views.tta}")
        return {"model": loaded.name, "weights": loaded.weights, "plan": {"images": len(samples)}}
    passes = how(compute, console, passing)
    identity = _identity(loaded, samples, features.stage, views.tta, passes)
    recipe = config.effective_recipe("extract-features", groups)
    return _extract(loaded, samples, wanted, identity, out, features.on_error, recipe, passes, console)


def _refuse(out: Path | None) -> None:
    if out is not None:
        run_folder.refuse_existing(out)
        refuse_unwritable(out)


def _compute(network: nn.Module, stage: str, tta: str) -> Compute:
    """What is wanted of the network: its pooled features, or the map of one of its stages."""
    if stage == POOLED:
        return features_of
    maps = {one.name: one.output for one in stages(network) if one.output}
    if stage not in maps:
        names = (POOLED, *maps)
        remedy = did_you_mean(stage, names) or f"choose one of {', '.join(names)}"
        raise TlkitError(f"unknown value '{stage}'", where="--stage", remedy=remedy)
    if tta != "center":
        what = "maps of several views cannot be averaged: their places do not match"
        raise TlkitError(what, where="--tta", remedy=f"leave it out, or give --stage {POOLED}")

    def map_of_stage(network: nn.Module, images: Tensor) -> Tensor:
        try:
            return outputs_at(network, (maps[stage],), images)[0].float()
        except CannotSplit as error:
            raise TlkitError(str(error), where=stage, remedy="choose another --stage") from error

    return map_of_stage


def _identity(loaded: Loaded, samples: Samples, stage: str, tta: str, how: How) -> dict[str, Any]:
    """What the features depend on."""
    return {
        "model": loaded.title,
        "weights": loaded.weights,
        "weights_sha256": fingerprint(loaded.network),
        "preprocessing": loaded.preprocessing.to_dict(),
        "stage": stage,
        "tta": tta,
        "precision": how.accelerator.mixed_precision,
        "device": how.accelerator.device.type,
        "data": str(samples.root.resolve()),
        "version": __version__,
    }


@contextmanager
def _gone_on_with(out: Path, unfinished: Unfinished, console: Console) -> Iterator[None]:
    """What is stopped can be gone on with, and the person is told how; a mistake before any work leaves nothing."""
    try:
        yield
    except BaseException as error:
        if not (unfinished.rows or unfinished.bad):
            shutil.rmtree(unfinished.folder, ignore_errors=True)
        elif not isinstance(error, TlkitError):
            console.warn(f"go on with: tlkit extract-features --resume {out}")
        raise


def _passed(
    loaded: Loaded, samples: Samples, rows: np.ndarray, wanted: Compute, identity: dict[str, Any], how: How
) -> FrozenPass:
    """The pass of some rows of the samples."""
    part = samples.take(rows)
    dataset = ViewDataset(part.root, part.paths, loaded.preprocessing, views_named(identity["tta"]))
    return FrozenPass(loaded.network, dataset, wanted, how, label="features", whole=len(samples))


def _extract(
    loaded: Loaded,
    samples: Samples,
    wanted: Compute,
    identity: dict[str, Any],
    out: Path,
    on_error: str,
    recipe: dict[str, Any],
    how: How,
    console: Console,
) -> dict[str, Any]:
    began = time.monotonic()
    if not processes.is_first():  # the first one writes what comes of it
        for _ in _passed(loaded, samples, processes.on_first(lambda: np.empty(0)), wanted, identity, how):
            pass
        return {}
    with (
        Unfinished(working_folder(out), identity, samples.paths) as unfinished,
        _gone_on_with(out, unfinished, console),
    ):
        if not (unfinished.folder / run_folder.RECIPE).is_file():
            run_folder.write_recipe(unfinished.folder, recipe)
        rows = processes.on_first(unfinished.missing)
        if len(rows) < len(samples):
            console.say(f"going on: {len(samples) - len(rows)} of {len(samples)} images are done")
        passed = _passed(loaded, samples, rows, wanted, identity, how)
        for found, values, bad in passed:
            # the mean over views, as it is usual for pooled features; maps come of a single view
            means = values.mean(1).numpy() if len(found) else np.empty(0, np.float32)
            unread = {int(rows[row]): file for row, file in bad}
            unfinished.add([int(row) for row in rows[found.numpy()]], means, unread)
        seconds = time.monotonic() - began - passed.preparing_seconds
        left_out = [unfinished.bad[row] for row in unfinished.missing().tolist()]
        refuse_bad_files(left_out, len(samples), samples.root, on_error)
        report_skipped(console, left_out)
        names = [samples.classes[label] for label in samples.labels]
        run_folder.refuse_existing(out)  # it may have come while this worked
        unfinished.write(out, Columns(samples.paths, names, samples.splits.tolist()))
    shape, images = unfinished.shape, sum(row >= 0 for row in unfinished.rows)
    rate = len(rows) / max(seconds, 1e-9)
    size = " x ".join(map(str, shape))
    console.line(f"{images} images, {size} numbers each ({loaded.title}, {identity['stage']}): {out}")
    compiling = f", after {passed.compile_seconds:.0f} s of compiling" if passed.compile_seconds else ""
    console.line(f"{rate:.0f} images/s{compiling}")
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "stage": identity["stage"],
        "tta": identity["tta"],
        "images": images,
        "dim": int(np.prod(shape)),
        "shape": list(shape),
        "out": str(out),
        "images_per_second": round(rate, 2),
        "compile_seconds": round(passed.compile_seconds, 3),
        "skipped_files": skipped(left_out),
    }
