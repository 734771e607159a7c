"""Transfer a network to a labelled folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit import __version__, compute, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.keeping import kept_when_stopped
from tlkit.commands.labelled import (
    metrics_table,
    report_skipped,
    skipped,
    stored_split,
    write_predictions,
    write_report,
)
from tlkit.data.folders import SPLITS, Samples, read_samples
from tlkit.data.loading import ViewDataset, refuse_bad_files
from tlkit.data.splits import split, with_groups
from tlkit.data.transforms import center, center_and_mirror
from tlkit.errors import TlkitError, UsageError
from tlkit.evaluation.metrics import metrics
from tlkit.networks.build import Loaded, build, save_network, weight_bytes
from tlkit.networks.forward import BATCH_SIZES, classify, set_classifier, splits_at_head
from tlkit.networks.stages import freeze, stages, trainable_parameters
from tlkit.training.features import Features, extract
from tlkit.training.probe import Head, fit_head

TRAIN_VIEWS = {"center": center, "flip": center_and_mirror}


@dataclass(frozen=True)
class Options:
    """The option groups of the command."""

    data: config.Data
    network: config.Network
    transfer: config.Transfer
    preprocess: config.Preprocess
    compute: config.Compute

    @property
    def recipe(self) -> dict[str, Any]:
        groups = (self.data, self.network, self.transfer, self.preprocess, self.compute)
        return config.effective_recipe("finetune", groups)


def finetune(
    data: config.Data,
    network: config.Network,
    transfer: config.Transfer,
    preprocess: config.Preprocess,
    compute: config.Compute,
    output: config.Output,
    resume: config.Resume,
    console: Console,
) -> dict[str, Any]:
    """Transfer a network to a labelled folder; see ``tlkit finetune --help``."""
    started = time.monotonic()
    if resume.resume is not None:
        return _resume(resume.resume, console, started)
    options = Options(data, network, transfer, preprocess, compute)
    run_folder.refuse_existing(output.out)
    samples = _read(options)
    loaded = _build(options, samples, console)
    for remark in samples.remarks():
        console.warn(remark)
    if output.plan:
        return _plan(options, samples, loaded, console)
    run_folder.require_space(output.out, weight_bytes(loaded.network))
    run = run_folder.new_run(output.out, "finetune")
    with kept_when_stopped(run, "finetune", console):
        rows = zip(samples.paths, (samples.classes[label] for label in samples.labels), samples.splits, strict=True)
        run_folder.write_rows(run / run_folder.SPLITS, ("path", "label", "split"), rows)
        run_folder.write_recipe(run, options.recipe)  # after the splits: who finds it can resume
        return _probe(options, samples, loaded, run, console, started)


def _resume(run: Path, console: Console, started: float) -> dict[str, Any]:
    recipe = run_folder.read_recipe(run)
    if recipe.get("command") != "finetune":
        raise TlkitError(f"this is a run of '{recipe.get('command')}'", where=run, remedy="resume it with that command")
    if (run / run_folder.SUMMARY).is_file():
        console.line(f"{run} is finished; its report is {run / run_folder.REPORT}")
        return run_folder.read_json(run / run_folder.SUMMARY)
    options = Options(*(config.group_from_recipe(group, recipe) for group in _GROUPS))
    samples = stored_split(_labelled(options), run)
    samples = samples.take(samples.splits != "")
    _refuse_too_few(samples, options)
    loaded = _build(options, samples, console)
    (run / run_folder.METRICS).unlink(missing_ok=True)
    with kept_when_stopped(run, "finetune", console, fresh=False):
        return _probe(options, samples, loaded, run, console, started)


_GROUPS = (config.Data, config.Network, config.Transfer, config.Preprocess, config.Compute)


def _read(options: Options) -> Samples:
    """The images with labels and splits, checked for what training needs."""
    data, samples = options.data, _labelled(options)
    if not samples.splits.any():
        samples = split(samples, val=data.val_fraction, test=data.test_fraction, seed=options.compute.seed)
    _refuse_too_few(samples, options)
    return samples


def _labelled(options: Options) -> Samples:
    """The images with labels, groups, and the splits that the data brings."""
    data = options.data
    if data.data is None:
        raise UsageError("missing argument DATA", where="tlkit finetune", remedy="give the folder of images")
    samples = read_samples(data.data)
    if len(samples.classes) < 2:
        what = f"only one class ({samples.classes[0]})" if samples.classes else "no classes"
        raise TlkitError(what, where=data.data, remedy="a classifier needs at least two class folders")
    return with_groups(samples, data.group_regex) if data.group_regex is not None else samples


def _refuse_too_few(samples: Samples, options: Options, which: str = "") -> None:
    of_train = np.bincount(samples.labels[samples.splits == "train"], minlength=len(samples.classes))
    if (of_train < 2).any():
        few = int(of_train.argmin())
        images = {0: "no training image", 1: "a single training image"}[int(of_train[few])]
        remedy = "each class needs at least two: add images, or remove the class"
        raise TlkitError(f"class '{samples.classes[few]}' has {images}{which}", where=options.data.data, remedy=remedy)
    if options.data.select_on == "val" and "val" not in samples.splits:
        raise TlkitError("there is no val split to choose on", where="--select-on", remedy="leave it out")


def _build(options: Options, samples: Samples, console: Console) -> Loaded:
    torch.manual_seed(options.compute.seed)
    loaded = build(options.network.model, options.network.weights, options.preprocess)
    for remark in loaded.remarks:
        console.warn(remark)
    if not loaded.network.num_classes:  # some backbones (DINOv2, CLIP) come without a classifier
        loaded.network.reset_classifier(len(samples.classes))  # type: ignore[operator]
    return loaded


def _probe(
    options: Options, samples: Samples, loaded: Loaded, run: Path, console: Console, started: float
) -> dict[str, Any]:
    """Features of the frozen backbone, a linear head on them, folded into the network."""
    console.say(f"{loaded.name}, weights: {loaded.weights}; {_counts(samples)}")
    accelerator = compute.accelerator(options.compute)
    phase_started = time.monotonic()
    view = TRAIN_VIEWS[options.transfer.train_views]
    features = extract(
        loaded.network,
        ViewDataset(samples.root, samples.paths, loaded.preprocessing, view),
        accelerator=accelerator,
        batch_size=options.compute.batch_size,
        workers=options.compute.workers,
        progress=console.progress,
    )
    refuse_bad_files(features.bad, len(samples), samples.root, options.data.on_error)
    report_skipped(console, features.bad)
    samples = samples.take(features.rows)
    _refuse_too_few(samples, options, " that can be read")
    head = _fit(options, samples, features)
    _fold(loaded, head, features)
    probabilities = head.probabilities(features.values[:, 0].astype(np.float64))
    seconds = time.monotonic() - phase_started

    found = _metrics(samples, probabilities, head)
    freeze(loaded.network, [stage.name for stage in stages(loaded.network) if stage.name != "head"])
    phase = {
        "stages": ["head"],
        "epochs": 1,
        "trainable_params": sum(tensor.numel() for _, tensor in trainable_parameters(loaded.network)),
        "seconds": round(seconds, 3),
        "val_top1": found["val"]["top1"] if "val" in found else None,
        "strength": head.strength,
        "chosen_on": head.chosen_on,
    }
    done = replace(loaded, classes=samples.classes)
    save_network(run, done)
    run_folder.append_metrics(
        run, {"phase": 1, "epoch": 1, "losses": {f"{c:g}": v for c, v in head.losses.items()}, **phase}
    )
    summary = {
        "run": str(run),
        "model": loaded.name,
        "weights": loaded.weights,
        "strategy": options.transfer.strategy,
        "classes": list(samples.classes),
        "images": {name: int((samples.splits == name).sum()) for name in SPLITS if (samples.splits == name).any()},
        "metrics": found,
        "phases": [phase],
        "skipped_files": skipped(features.bad),
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
    }
    _write_results(options, samples, probabilities, run, summary, started)
    _tell(console, summary, run)
    return summary


def _fit(options: Options, samples: Samples, features: Features) -> Head:
    train = samples.splits == "train"
    val = samples.splits == "val"
    on_val = options.data.select_on == "val" and val.any()
    return fit_head(
        features.values[train],
        samples.labels[train],
        len(samples.classes),
        seed=options.compute.seed,
        groups=samples.groups[train] if len(samples.groups) else (),
        balanced=options.transfer.class_weights == "balanced",
        held_out=(features.values[val, 0], samples.labels[val]) if on_val else None,
    )


def _fold(loaded: Loaded, head: Head, features: Features) -> None:
    """Make the head the network's own classifier, and make sure that it is."""
    set_classifier(loaded.network, torch.from_numpy(head.weight), torch.from_numpy(head.bias))
    some = features.values[:64, 0]
    with torch.no_grad():
        device = next(loaded.network.parameters()).device
        through_network = classify(loaded.network, torch.from_numpy(some).to(device)).softmax(-1).cpu().numpy()
    channels, size = len(loaded.preprocessing.mean), loaded.preprocessing.size
    noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    same = np.allclose(through_network, head.probabilities(some.astype(np.float64)), atol=1e-3)
    if not (same and splits_at_head(loaded.network, noise)):
        raise TlkitError(
            "the head does not fit into its classifier", where=loaded.name, remedy="choose another network"
        )


def _metrics(samples: Samples, probabilities: np.ndarray, head: Head) -> dict[str, Any]:
    found = {}
    for name in ("val", "test"):
        rows = samples.splits == name
        if rows.any():
            found[name] = metrics(probabilities[rows], samples.labels[rows])
            found[name]["used_for_selection"] = head.chosen_on == name
    return found


def _write_results(
    options: Options, samples: Samples, probabilities: np.ndarray, run: Path, summary: dict[str, Any], started: float
) -> None:
    write_predictions(run, samples, probabilities, summary["skipped_files"])
    told = {"command": "finetune", "version": __version__, "seconds": round(time.monotonic() - started, 3)} | summary
    reported = next((name for name in ("test", "val") if name in summary["metrics"]), "train")
    part = samples.splits == reported
    title = f"finetune {(options.data.data or run).absolute().name}"
    recipe = (run / run_folder.RECIPE).read_text(encoding="utf-8")
    write_report(run, title, told, reported, samples.classes, samples.take(part), probabilities[part], recipe)
    run_folder.write_json(run / run_folder.SUMMARY, told)  # last: it says that the run is finished


def _tell(console: Console, summary: dict[str, Any], run: Path) -> None:
    if summary["metrics"]:
        metrics_table(console, f"{summary['model']}, {summary['strategy']}", summary["metrics"])
    else:
        console.line("trained on all images: there are none left to measure on (see --val-fraction)")
    console.line(f"run     {run}")
    console.line(f"report  {run / run_folder.REPORT}")
    console.line(f"next    tlkit predict {run} PHOTOS")


def _counts(samples: Samples) -> str:
    parts = [f"{(samples.splits == name).sum()} {name}" for name in SPLITS if (samples.splits == name).any()]
    return f"{len(samples.classes)} classes, images: {', '.join(parts)}"


def _plan(options: Options, samples: Samples, loaded: Loaded, console: Console) -> dict[str, Any]:
    """What a run would do, with its time estimated from a few images."""
    accelerator = compute.accelerator(options.compute)
    few = np.linspace(0, len(samples) - 1, min(len(samples), 2 * BATCH_SIZES[accelerator.device.type])).astype(int)
    view = TRAIN_VIEWS[options.transfer.train_views]
    dataset = ViewDataset(samples.root, [samples.paths[row] for row in few], loaded.preprocessing, view)
    started = time.monotonic()
    extract(loaded.network, dataset, accelerator=accelerator, batch_size=options.compute.batch_size, workers=0)
    estimate = (time.monotonic() - started) / len(few) * len(samples)
    counts = {
        name: {part: int(((samples.splits == part) & (samples.labels == label)).sum()) for part in SPLITS}
        for label, name in enumerate(samples.classes)
    }
    cut = stages(loaded.network)
    classes, width = len(samples.classes), loaded.network.head_hidden_size
    size = {stage.name: sum(loaded.network.get_parameter(name).numel() for name in stage.parameters) for stage in cut}
    size["head"] = classes * (int(width) + 1)  # type: ignore[arg-type]
    console.table("images", ["class", *SPLITS], [[name, *parts.values()] for name, parts in counts.items()])
    console.table(
        f"phase 1: {options.transfer.strategy}",
        ["stage", "parameters", "trains"],
        [[name, count, "yes" if name == "head" else "frozen"] for name, count in size.items()],
    )
    console.line(f"network {loaded.name}, weights: {loaded.weights}, input {loaded.preprocessing.size} px")
    console.line(f"estimated time {estimate:.0f} s on {accelerator.device}")
    phase = {"stages": ["head"], "rates": {}, "trainable_params": size["head"]}
    plan = {"images": counts, "stages": size, "phases": [phase], "estimated_seconds": round(estimate, 1)}
    return {"model": loaded.name, "weights": loaded.weights, "strategy": options.transfer.strategy, "plan": plan}
