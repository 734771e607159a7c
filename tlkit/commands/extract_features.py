"""Write what a frozen network makes of images into a file, or into one part a process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from tlkit.data.feature_file import Columns, Picked, refuse_unwritable
from tlkit.data.folders import Samples
from tlkit.data.loading import BadFile, ViewDataset, refuse_bad_files
from tlkit.data.new_images import read_images
from tlkit.data.unfinished_features import Unfinished, working_folder
from tlkit.errors import InputLost, TlkitError, UsageError, did_you_mean
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
    # the first one's for all: machines may call the folder of images otherwise
    identity = processes.on_first(lambda: _identity(loaded, samples, features.stage, views.tta, passes))
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
    """What is stopped can be gone on with, and the person is told how."""
    try:
        yield
    except BaseException as error:
        told = isinstance(error, TlkitError) and not isinstance(error, InputLost | processes.PeerLost)
        if not told and unfinished.begun:
            console.warn(f"go on with: tlkit extract-features --resume {out}")
        raise


def _share(images: int, size: int) -> tuple[int, int]:
    """Where this process's images begin and end: whole batches, as a single process would make them."""
    firsts = processes.share(range(0, images, size))
    return (firsts[0], min(firsts[-1] + size, images)) if firsts else (0, 0)


def _columns(samples: Samples) -> Columns:
    splits, numbers = np.unique(samples.splits, return_inverse=True)
    return Columns(samples.paths, Picked(samples.classes, samples.labels), Picked(splits.tolist(), numbers))


def _passed(
    loaded: Loaded, samples: Samples, rows: np.ndarray, wanted: Compute, identity: dict[str, Any], how: How
) -> FrozenPass:
    """The pass of some rows of the samples, which are this process's own."""
    dataset = ViewDataset(samples.root, Picked(samples.paths, rows), loaded.preprocessing, views_named(identity["tta"]))
    several = processes.count()
    label = "features" if several == 1 else f"features, process {processes.rank()} of {several}"
    return FrozenPass(loaded.network, dataset, wanted, how, label=label, whole=len(samples), spread=False)


@dataclass(frozen=True)
class _Share:
    """What one process has done: images, seconds for them, seconds of compiling, what could not be read."""

    images: int
    seconds: float
    compile_seconds: float
    unread: list[BadFile]


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
    with (
        Unfinished(working_folder(out), identity, samples.paths) as unfinished,
        _gone_on_with(out, unfinished, console),
    ):
        if processes.is_first() and not (unfinished.folder / run_folder.RECIPE).is_file():
            run_folder.write_recipe(unfinished.folder, recipe)
        if unfinished.count:
            console.say(f"going on: {unfinished.count} of {len(samples)} images are done")
        first, last = _share(len(samples), how.size)
        rows = unfinished.missing(first, last)
        passed = _passed(loaded, samples, rows, wanted, identity, how)
        for found, values, bad in passed:
            # the mean over views, as it is usual for pooled features; maps come of a single view
            means = values.mean(1).numpy() if len(found) else np.empty(0, np.float32)
            unfinished.add(rows[found.numpy()], means, {int(rows[row]): file for row, file in bad})
            processes.notice_lost()
        seconds = time.monotonic() - began - passed.preparing_seconds
        unread = [unfinished.bad[row] for row in unfinished.missing(first, last).tolist()]
        shares = processes.gathered(_Share(len(rows), seconds, passed.compile_seconds, unread))
        left_out = [file for share in shares for file in share.unread]
        refuse_bad_files(left_out, len(samples), samples.root, on_error)
        report_skipped(console, left_out)
        unfinished.write(out, _columns(samples), first, last)
    shape, images = unfinished.shape, len(samples) - len(left_out)
    rate = sum(share.images for share in shares) / max(1e-9, *(share.seconds for share in shares))
    compile_seconds = max(share.compile_seconds for share in shares)
    size = " x ".join(map(str, shape))
    console.line(f"{images} images, {size} numbers each ({loaded.title}, {identity['stage']}): {out}")
    compiling = f", after {compile_seconds:.0f} s of compiling" if compile_seconds else ""
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
        "compile_seconds": round(compile_seconds, 3),
        "skipped_files": skipped(left_out),
    }
