"""What a finished training run writes and tells."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import __version__, run_folder
from tlkit.audit.leaks import shared_files
from tlkit.commands.console import Console
from tlkit.commands.labelled import counts, metrics_table, write_predictions, write_report
from tlkit.data.folders import SPLITS, Samples
from tlkit.evaluation.grad_cam import heat_maps
from tlkit.evaluation.metrics import measured
from tlkit.networks.build import save_network
from tlkit.training.phases import Decision
from tlkit.training.trainer import Trainer

if TYPE_CHECKING:
    from tlkit.commands.learning import Options


@dataclass(frozen=True)
class CrossValidation:
    """What networks say of the images that each of them was not trained on.

    Args:
        samples: The images (N), in the split ``val``.
        probabilities: Of each by the network of its fold (N, K).
        used_for_selection: Whether they were also used to choose.
        told: Figures of each fold, their mean and spread.
    """

    samples: Samples
    probabilities: np.ndarray
    used_for_selection: bool
    told: dict[str, Any]


def write_results(
    options: Options,
    trainer: Trainer,
    decision: Decision,
    probabilities: np.ndarray,
    chosen_on: str,
    left_out: list[dict[str, str]],
    console: Console,
    started: float,
    crossed: CrossValidation | None = None,
) -> dict[str, Any]:
    """Write what a finished run leaves, and tell it; what cross-validation found stands for val."""
    run, samples, loaded = trainer.run, trainer.samples, trainer.loaded
    phases = trainer.state.phases
    used = {chosen_on} | {phase.get("chosen_on") for phase in phases}
    found = {}
    if crossed is not None:
        figures = measured(crossed.probabilities, crossed.samples.labels)
        found["val"] = figures | {"used_for_selection": crossed.used_for_selection, "cross_validated": True}
    for name in ("val", "test"):
        rows = samples.splits == name
        if rows.any():
            found[name] = measured(probabilities[rows], samples.labels[rows]) | {"used_for_selection": name in used}
    save_network(run, replace(loaded, network=trainer.network, classes=samples.classes))
    stopped = next((phase["stopped"] for phase in phases if phase.get("stopped") == "time limit"), "")
    summary = {
        "run": str(run),
        "model": loaded.name,
        "weights": loaded.weights,
        "strategy": options.name,
        "classes": list(samples.classes),
        "images": {name: int((samples.splits == name).sum()) for name in SPLITS if (samples.splits == name).any()},
        **({"choosing": {"on": chosen_on, "images": int(trainer.choosing.sum())}} if chosen_on else {}),
        "metrics": found,
        **({"cross_validation": crossed.told} if crossed else {}),
        "phases": phases,
        **({"decision": decision.told} if decision.told else {}),
        **({"stopped": stopped} if stopped else {}),
        "data": counts(samples),
        "shared_files": shared_files(samples),
        "skipped_files": left_out,
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(trainer.accelerator.device),
        "precision": trainer.accelerator.mixed_precision,
    }
    told = {
        "command": options.command,
        "version": __version__,
        "seconds": round(time.monotonic() - started, 3),
    } | summary
    reported = next((name for name in ("test", "val") if name in found), "train")
    heat = None
    if crossed is not None:
        rows = np.flatnonzero(samples.splits == "test")
        samples, probabilities = _joined(crossed, samples.take(rows), probabilities[rows])
    write_predictions(run, samples, probabilities, left_out)
    part = samples.splits == reported
    if crossed is None or reported == "test":  # what it is to show is where the network looked that predicted
        network = replace(loaded, network=trainer.network)
        heat = heat_maps(network, samples.take(part), probabilities[part].argmax(1), trainer.how)
    title = f"{options.command} {(options.data.data or run).absolute().name}"
    recipe = (run / run_folder.RECIPE).read_text(encoding="utf-8")
    write_report(
        run,
        title,
        told,
        reported,
        samples.classes,
        samples.take(part),
        probabilities[part],
        recipe,
        trainer.state.history,
        heat,
    )
    run_folder.write_json(run / run_folder.SUMMARY, told)  # last: it says that the run is finished
    _tell(console, summary, loaded.title, run)
    return summary


def _joined(crossed: CrossValidation, tested: Samples, probabilities: np.ndarray) -> tuple[Samples, np.ndarray]:
    """The images of the folds, and those of test with what the last network makes of them."""
    held = crossed.samples
    both = replace(
        held,
        paths=[*held.paths, *tested.paths],
        labels=np.concatenate([held.labels, tested.labels]),
        splits=np.concatenate([held.splits, tested.splits]),
    )
    return both, np.concatenate([crossed.probabilities, probabilities]) if len(tested) else crossed.probabilities


def _tell(console: Console, summary: dict[str, Any], title: str, run: Path) -> None:
    if summary["metrics"]:
        metrics_table(console, f"{title}, {summary['strategy']}", summary["metrics"])
    else:
        console.line("trained on all images: there are none left to measure on (see --val-fraction)")
    if "cross_validation" in summary:
        folds = summary["cross_validation"]
        mean, spread = folds["mean"]["top1"], folds["sd"]["top1"]
        lowest, highest = (end(fold["metrics"]["top1"] for fold in folds["folds"]) for end in (min, max))
        console.line(
            f"{len(folds['folds'])} folds: top-1 {mean:.3f}, standard deviation {spread:.3f}"
            f" ({lowest:.3f} to {highest:.3f}); the run's network was then trained on all of them"
        )
    if "decision" in summary:
        console.line(f"auto    {summary['decision']}")
    if "stopped" in summary:
        console.line(f"stopped by the {summary['stopped']}")
    console.line(f"run     {run}")
    console.line(f"report  {run / run_folder.REPORT}")
    console.line(f"next    tlkit predict {run} PHOTOS")
