"""``--plan``: what a command that trains would do, with its time estimated from a few images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import compute
from tlkit.commands.console import Console
from tlkit.data.folders import SPLITS, Samples
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import CENTER
from tlkit.networks.build import Loaded
from tlkit.networks.complexity import noise, stage_costs
from tlkit.networks.forward import BATCH_SIZES, logits_of
from tlkit.networks.frozen_pass import FrozenPass, How
from tlkit.networks.stages import stages
from tlkit.training.phases import Phase, Strategy
from tlkit.training.strategies import BACKWARD, Situation, longest

if TYPE_CHECKING:
    from tlkit.commands.learning import Options


def show_plan(
    options: Options, samples: Samples, loaded: Loaded, situation: Situation, strategy: Strategy, console: Console
) -> dict[str, Any]:
    """Print images, stages, phases with their rates, and the estimated time; returns the same for JSON."""
    counts = {
        name: {part: int(((samples.splits == part) & (samples.labels == label)).sum()) for part in SPLITS}
        for label, name in enumerate(samples.classes)
    }
    sizes = _sizes(loaded, len(samples.classes))
    phases = longest(strategy)
    seconds = _estimate(options, samples, loaded, situation, phases)
    console.table("images", ["class", *SPLITS], [[name, *parts.values()] for name, parts in counts.items()])
    console.table("network", ["stage", "parameters"], [[name, count] for name, count in sizes.items()])
    rows, told = [], []
    for number, phase in enumerate(phases, start=1):
        trained = sum(sizes[name] for name in phase.stages)
        how = "closed form" if phase.solves else f"{phase.epochs}"
        rates = ", ".join(f"{name} {rate:.2g}" for name, rate in reversed(list(phase.rates.items())))
        rows.append([number, ", ".join(phase.stages), trained, how, rates])
        told.append(
            {
                "stages": list(phase.stages),
                "epochs": phase.epochs,
                "rates": dict(phase.rates),
                "trainable_params": trained,
                "trial": phase.trial,
            }
        )
    title = f"phases of {options.name}" + (", at most" if any(phase.trial for phase in phases) else "")
    console.table(title, ["phase", "stages that train", "parameters", "epochs", "highest rates"], rows)
    console.line(f"network {loaded.title}, weights: {loaded.weights}, input {loaded.preprocessing.size} px")
    console.line(f"estimated time {seconds:.0f} s on {compute.accelerator(options.compute).device}")
    plan = {"images": counts, "stages": sizes, "phases": told, "estimated_seconds": round(seconds, 1)}
    return {"model": loaded.name, "weights": loaded.weights, "strategy": options.name, "plan": plan}


def _sizes(loaded: Loaded, classes: int) -> dict[str, int]:
    """Parameters by stage, with a head for the data's classes."""
    cut, network = stages(loaded.network), loaded.network
    sizes = {stage.name: sum(network.get_parameter(name).numel() for name in stage.parameters) for stage in cut}
    if network.num_classes != classes:
        network.reset_classifier(classes)  # type: ignore[operator]
        head = next((stage for stage in stages(network) if stage.name == "head"), None)
        sizes["head"] = sum(network.get_parameter(name).numel() for name in head.parameters) if head else 0
    return sizes


def _estimate(options: Options, samples: Samples, loaded: Loaded, situation: Situation, phases: list[Phase]) -> float:
    """Seconds, from a forward pass over a few images and the share of the network that each phase trains."""
    accelerator = compute.accelerator(options.compute)
    few = np.linspace(0, len(samples) - 1, min(len(samples), 2 * BATCH_SIZES[accelerator.device.type])).astype(int)
    dataset = ViewDataset(samples.root, [samples.paths[row] for row in few], loaded.preprocessing, CENTER)
    costs = stage_costs(loaded.network, noise(loaded.network, loaded.preprocessing))
    started = time.monotonic()
    how = How(accelerator, options.compute.batch_size, workers=0, compile="never")
    for _ in FrozenPass(loaded.network, dataset, logits_of, how):
        pass
    one = (time.monotonic() - started) / len(few)
    passes = float(len(samples))
    for phase in phases:
        images = situation.trained_on + (situation.chosen_on if phase.on_all and situation.choosing_is_apart else 0)
        if not phase.solves:
            passes += phase.epochs * images * (1 + BACKWARD * sum(costs[name] for name in phase.stages))
    return one * passes
