"""What a finished training run writes and tells."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import __version__, run_folder
from tlkit.commands.console import Console
from tlkit.commands.labelled import metrics_table, write_predictions, write_report
from tlkit.data.folders import SPLITS
from tlkit.evaluation.grad_cam import heat_maps
from tlkit.evaluation.metrics import measured
from tlkit.networks.build import save_network
from tlkit.training.phases import Decision
from tlkit.training.trainer import Trainer

if TYPE_CHECKING:
    from tlkit.commands.learning import Options


def write_results(
    options: Options,
    trainer: Trainer,
    decision: Decision,
    probabilities: np.ndarray,
    chosen_on: str,
    left_out: list[dict[str, str]],
    console: Console,
    started: float,
) -> dict[str, Any]:
    """Write what a finished run leaves, and tell it."""
    run, samples, loaded = trainer.run, trainer.samples, trainer.loaded
    phases = trainer.state.phases
    used = {chosen_on} | {phase.get("chosen_on") for phase in phases}
    found = {}
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
        "phases": phases,
        **({"decision": decision.told} if decision.told else {}),
        **({"stopped": stopped} if stopped else {}),
        "skipped_files": left_out,
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(trainer.accelerator.device),
        "precision": trainer.accelerator.mixed_precision,
    }
    write_predictions(run, samples, probabilities, left_out)
    predicted = probabilities.argmax(1)
    told = {
        "command": options.command,
        "version": __version__,
        "seconds": round(time.monotonic() - started, 3),
    } | summary
    reported = next((name for name in ("test", "val") if name in found), "train")
    part = samples.splits == reported
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
        heat_maps(replace(loaded, network=trainer.network), samples.take(part), predicted[part], trainer.how),
    )
    run_folder.write_json(run / run_folder.SUMMARY, told)  # last: it says that the run is finished
    _tell(console, summary, loaded.title, run)
    return summary


def _tell(console: Console, summary: dict[str, Any], title: str, run: Path) -> None:
    if summary["metrics"]:
        metrics_table(console, f"{title}, {summary['strategy']}", summary["metrics"])
    else:
        console.line("trained on all images: there are none left to measure on (see --val-fraction)")
    if "decision" in summary:
        console.line(f"auto    {summary['decision']}")
    if "stopped" in summary:
        console.line(f"stopped by the {summary['stopped']}")
    console.line(f"run     {run}")
    console.line(f"report  {run / run_folder.REPORT}")
    console.line(f"next    tlkit predict {run} PHOTOS")
