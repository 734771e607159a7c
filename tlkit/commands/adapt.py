"""Adapt a network from labelled images of one domain to unlabelled ones of another."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from tlkit import config, processes, run_folder
from tlkit.adaptation.method import chosen
from tlkit.commands.adapted import write_adapted
from tlkit.commands.adapting import Asked, Trainings, prepare
from tlkit.commands.console import Console
from tlkit.commands.domains import read_domains, split_source, write_domains
from tlkit.commands.keeping import begun, kept_when_stopped, new_run
from tlkit.errors import TlkitError, UsageError
from tlkit.networks.build import weight_bytes
from tlkit.training.optimizers import check_name
from tlkit.training.tracking import chosen_trackers


def adapt(
    domains: config.Domains,
    adaptation: config.Adaptation,
    network: config.Network,
    optimisation: config.Optimisation,
    variation: config.Variation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.CacheBudget,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
    console: Console,
) -> dict[str, Any]:
    """Adapt a network to another domain; see ``tlkit adapt --help``."""
    started = time.monotonic()
    groups = (domains, adaptation, network, optimisation, variation, preprocess, compute, passing, caching, tracking)
    resume = begun(resume, output, "adapt", console)
    if resume.resume is not None:
        return _go_on(groups, resume, console, started)
    asked = Asked(*groups)
    _check(asked)
    processes.on_first(lambda: run_folder.refuse_existing(output.out))
    pair = split_source(read_domains(domains, console), domains, compute.seed, console)
    trainings = prepare(asked, pair, console)
    if output.plan:
        return _plan(trainings, console)
    copies = 6 * len(trainings.methods) * adaptation.seeds  # weights, optimiser, best: until the end
    needed = copies * weight_bytes(trainings.loaded.network)
    run = processes.on_first(lambda: new_run(output.out, "adapt", needed))

    def begin() -> None:
        write_domains(run, pair)
        run_folder.write_recipe(run, config.effective_recipe("adapt", groups))

    with kept_when_stopped(run, "adapt", console, keep_state=resume.keep_state):
        processes.on_first(begin)
        return _carry_out(trainings, run, resume, console, started)


def _carry_out(
    trainings: Trainings, run: Path, resume: config.Resume, console: Console, started: float
) -> dict[str, Any]:
    results = trainings.carry_out(run, resume.checkpoint_every, console.warn)
    if not processes.is_first():
        for _ in results:  # the first process writes them
            pass
        return {}
    return write_adapted(trainings, results, run, console, started)


def _go_on(groups: tuple[Any, ...], resume: config.Resume, console: Console, started: float) -> dict[str, Any]:
    run = resume.resume
    assert run is not None
    recipe = processes.on_first(lambda: run_folder.read_recipe(run))
    if recipe.get("command") != "adapt":
        raise TlkitError(f"this is a run of '{recipe.get('command')}'", where=run, remedy="resume it with that command")
    if processes.on_first((run / run_folder.SUMMARY).is_file):
        console.line(f"{run} is finished; its report is {run / run_folder.REPORT}")
        return processes.on_first(lambda: run_folder.read_json(run / run_folder.SUMMARY))
    asked = Asked(*(config.group_from_recipe(type(group), recipe) for group in groups))
    pair = split_source(read_domains(asked.domains, console), asked.domains, asked.compute.seed, console, run)
    if processes.is_first():
        run_folder.remove_half_written(run)
    with kept_when_stopped(run, "adapt", console, fresh=False, keep_state=resume.keep_state):
        return _carry_out(prepare(asked, pair, console), run, resume, console, started)


def _check(asked: Asked) -> None:
    """Raise where something is missing, cannot be, or would do nothing."""
    for name in ("source", "target"):
        if getattr(asked.domains, name) is None:
            raise UsageError(f"missing option --{name}", where="tlkit adapt", remedy=f"give --{name} FOLDER")
    chosen(asked.adaptation.method)
    check_name(asked.optimisation.optimizer)
    chosen_trackers(asked.tracking.track)
    if asked.optimisation.lr == "auto":
        what = "no range test is made in adaptation, whose losses work against each other"
        raise TlkitError(what, where="--lr", remedy="give --lr NUMBER, or leave it out")
    probe, schedule = asked.strategy == "probe", asked.optimisation.schedule
    idle: list[tuple[config.Checked, tuple[str, ...], bool, str]] = [
        (asked.optimisation, ("layer_decay",), asked.strategy != "differential", f"--strategy {asked.strategy}"),
        (asked.optimisation, ("bn",), probe, "--strategy probe"),
        (asked.optimisation, ("min_lr",), schedule != "cosine", f"--schedule {schedule}"),
        (asked.optimisation, ("step_every", "gamma"), schedule not in ("step", "plateau"), f"--schedule {schedule}"),
        (asked.optimisation, ("warmup",), schedule == "one-cycle", "--schedule one-cycle, which has a rise of its own"),
        (asked.variation, ("augment",), probe, "--strategy probe, whose features are computed once"),
        (asked.adaptation, ("stages",), probe, "--strategy probe, which trains the head alone"),
    ]
    for group, names, is_idle, why in idle:
        defaults = {field.name: field.default for field in fields(group)}  # type: ignore[arg-type]
        for option in names:
            if is_idle and getattr(group, option) != defaults[option]:
                flag = config.option_name(option)
                raise TlkitError(f"does nothing with {why}", where=flag, remedy=f"leave {flag} out")


def _plan(trainings: Trainings, console: Console) -> dict[str, Any]:
    pair, asked = trainings.pair, trainings.asked
    console.line(f"{trainings.loaded.title}, weights: {trainings.loaded.weights}, strategy {asked.strategy}")
    console.line(pair.told())
    trains = ", ".join(f"{name} {rate:.2g}" for name, rate in trainings.plan.rates.items())
    console.line(f"{trainings.epochs} epochs of {trainings.steps} steps, each {trainings.plan.each} images a domain")
    console.line(f"stages that train, with their highest rates: {trains}")
    console.line(f"methods: {', '.join(trainings.methods)}; seeds: {', '.join(map(str, trainings.seeds))}")
    plan = {
        "methods": trainings.methods,
        "seeds": list(trainings.seeds),
        "epochs": trainings.epochs,
        "steps": trainings.steps,
        "images_per_domain_and_step": trainings.plan.each,
        "rates": dict(trainings.plan.rates),
        "images": pair.images(),
    }
    return {"model": trainings.loaded.name, "weights": trainings.loaded.weights, "strategy": asked.strategy} | {
        "plan": plan
    }
