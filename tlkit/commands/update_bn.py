"""Estimate batch norm's statistics anew from images without labels."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from tlkit import __version__, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped, skipped
from tlkit.commands.passing import how
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.data.new_images import find_images
from tlkit.data.transforms import CENTER
from tlkit.networks.build import Loaded, build, save_network, weight_bytes
from tlkit.networks.norm_statistics import estimate_statistics


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
    paths, ignored = find_images(images.paths)
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
        summary = _update(loaded, paths, images.on_error, compute, console)
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


def _update(
    loaded: Loaded, paths: list[Path], on_error: str, computing: config.Compute, console: Console
) -> dict[str, Any]:
    order = np.random.default_rng(computing.seed).permutation(len(paths))  # folders hold one class each
    dataset = ViewDataset(Path(), [str(paths[place]) for place in order], loaded.preprocessing, CENTER)
    found = estimate_statistics(loaded.network, dataset, how(computing, console))
    refuse_bad_files(found.bad, len(paths), Path(), on_error)
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
