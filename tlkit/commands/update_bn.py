"""Estimate batch norm's statistics anew from images without labels."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import __version__, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.data.new_images import find_images, in_shards_named
from tlkit.data.transforms import CENTER
from tlkit.networks.build import Loaded, build, save_network, weight_bytes
from tlkit.networks.norm_statistics import estimate_statistics
from tlkit.shards.folder import Folder


def update_bn(
    network: config.Trained,
    images: config.Unlabelled,
    preprocess: config.Preprocess,
    compute: config.Compute,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Write a run with statistics of these images; see ``tlkit update-bn --help``."""
    started = time.monotonic()
    run_folder.refuse_existing(output.out)
    root, paths, ignored = _find(images.paths, console)
    loaded = build(network.model, network.weights, preprocess)
    for remark in loaded.remarks:
        console.warn(remark)
    if ignored:
        console.say(f"{ignored.total()} files are not images and were ignored")
    if output.plan:
        console.line(f"{len(paths)} images, {loaded.title}, weights: {loaded.weights}")
        return {"model": loaded.name, "weights": loaded.weights, "plan": {"images": len(paths)}}
    run_folder.require_space(output.out, weight_bytes(loaded.network))
    run = run_folder.new_run(output.out, "update-bn")
    try:
        summary = _update(loaded, root, paths, images.on_error, compute, console)
        if loaded.classes is None:
            console.warn("nobody knows what this network's outputs mean: the run is for finetune, not for predict")
        save_network(run, loaded)
        run_folder.write_recipe(run, config.effective_recipe("update-bn", (network, images, preprocess, compute)))
        told = {"command": "update-bn", "version": __version__, "seconds": round(time.monotonic() - started, 3)}
        run_folder.write_json(run / run_folder.SUMMARY, told | {"run": str(run)} | summary)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)  # nothing in it could be gone on with
        raise
    console.line(f"run     {run}")
    return {"run": str(run)} | summary


def _find(named: Sequence[Path], console: Console) -> tuple[Folder, Sequence[str], Counter[str]]:
    """What the images lie in, their paths there, and what was ignored."""
    if (samples := in_shards_named(named, console.progress)) is not None:
        return samples.root, samples.paths, samples.ignored
    found, ignored = find_images(named)
    return Path(), list(map(str, found)), ignored


def _update(
    loaded: Loaded,
    root: Folder,
    paths: Sequence[str],
    on_error: str,
    computing: config.Compute,
    console: Console,
) -> dict[str, Any]:
    order = np.random.default_rng(computing.seed).permutation(len(paths))  # folders hold one class each
    dataset = ViewDataset(root, [paths[place] for place in order.tolist()], loaded.preprocessing, CENTER)
    found = estimate_statistics(loaded.network, dataset, how(computing, console))
    refuse_bad_files(found.bad, len(paths), root, on_error)
    report_skipped(console, found.bad)
    rows = [[name, f"{shift:.3f}"] for name, shift in found.shifts.items()]
    console.table(f"batch norm of {loaded.title}, {found.images} images", ["layer", "mean moved by"], rows)
    console.line("moved by: average over channels, in standard deviations that the layer had before")
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "images": found.images,
        "shifts": found.shifts,
        "skipped_files": skipped(found.bad),
    }
