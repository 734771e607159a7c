"""What the commands that train share: data, network, phases, results, and going on after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tlkit import config, processes, run_folder
from tlkit.audit.leaks import in_words, shared_files
from tlkit.commands import folding
from tlkit.commands.console import Console
from tlkit.commands.keeping import begin_run, begun, kept_when_stopped, new_run
from tlkit.commands.labelled import stored_split
from tlkit.commands.planning import show_plan
from tlkit.commands.reading import labelled, read, refuse_too_few, seen_before
from tlkit.commands.training import build_network, choosing_images, situation_of, train
from tlkit.data.content import learn_digests
from tlkit.data.folders import Samples
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, weight_bytes
from tlkit.training import strategies
from tlkit.training.checkpoint import read_checkpoint
from tlkit.training.optimizers import check_name
from tlkit.training.tracking import chosen_trackers


@dataclass(frozen=True)
class Options:
    """What a command that trains was asked for.

    Args:
        command: Its name.
        groups: Its option groups as given, for the recipe.
        strategy: Name of the strategy; ``random`` trains everything from random weights.
        model: A timm name, or a run.
        weights: As `tlkit.networks.build.build` takes them.
        stem: ``standard``, ``small`` or ``auto``.
        norm: Another normalisation than the network's own; None for that.
        train_views: Of the images that a linear head is fitted on.
        preset: Augmentation where none is given.
    """

    command: str
    groups: tuple[config.Checked, ...]
    strategy: str
    model: str
    weights: str
    data: config.Data
    training: config.Training
    augmentation: config.Augmentation
    preprocess: config.Preprocess
    compute: config.Compute
    passing: config.Passing = field(default_factory=config.Passing)
    caching: config.Caching = field(default_factory=config.Caching)
    unfreezing: config.Unfreezing = field(default_factory=config.Unfreezing)
    tracking: config.Tracking = field(default_factory=config.Tracking)
    stem: str = "standard"
    norm: str | None = None
    train_views: str = "center"
    preset: Literal["light", "standard"] = "light"

    def __post_init__(self) -> None:
        check_name(self.training.optimizer)
        chosen_trackers(self.tracking.track)
        refuse_idle(self)

    @property
    def recipe(self) -> dict[str, Any]:
        return config.effective_recipe(self.command, self.groups)

    @property
    def name(self) -> str:
        """The strategy's name for people: training everything is full, whatever it starts from."""
        return "full" if self.strategy == "random" else self.strategy

    @property
    def rate(self) -> float:
        """Highest learning rate; 1 where it is to be searched for."""
        given = self.training.lr
        if self.strategy == "probe" or given == "auto":
            return 1.0
        return float(given) if given else strategies.default_rate(self.strategy, self.training.optimizer)


def refuse_idle(options: Options) -> None:
    """Raise where an option was given that would do nothing: nobody should believe that it did.

    Raises:
        TlkitError: Names the option.
    """
    name, training = options.strategy, options.training
    uses_loop = name != "probe"
    schedule = training.schedule
    judges = strategies.uses_solver(name) or strategies.chooses(name, training)
    idle: list[tuple[config.Checked, tuple[str, ...], bool, str]] = [
        (options.unfreezing, ("stages", "epochs_per_stage", "order"), name != "gradual", f"--strategy {name}"),
        (training, tuple(one.name for one in fields(training)), not uses_loop, f"--strategy {name}"),
        (
            options.augmentation,
            ("augment", "mixup", "cutmix", "label_smoothing", "balanced_sampling"),
            not uses_loop,
            f"--strategy {name}",
        ),
        (options.caching, ("cached_views",), name not in ("gradual", "auto"), f"--strategy {options.name}"),
        (options.data, ("val_fraction",), options.data.folds is not None, "--folds, each of which is val in turn"),
        (options.data, ("select_on",), not judges, f"--strategy {options.name}, which chooses nothing"),
        (training, ("epochs",), name == "gradual", "gradual unfreezing: give --epochs-per-stage"),
        (training, ("patience",), name == "auto", "--strategy auto, which judges whole phases"),
        (training, ("layer_decay",), name in ("full", "lp-ft", "random"), f"--strategy {options.name}"),
        (training, ("anchor",), options.weights == "random", "random weights"),
        (training, ("min_lr",), schedule != "cosine", f"--schedule {schedule}"),
        (training, ("step_every", "gamma"), schedule not in ("step", "plateau"), f"--schedule {schedule}"),
        (training, ("warmup",), schedule == "one-cycle", "--schedule one-cycle, which has a rise of its own"),
    ]
    for group, names, is_idle, why in idle:
        defaults = type(group)()
        for option in names:
            if is_idle and getattr(group, option) != getattr(defaults, option):
                flag = config.option_name(option)
                raise TlkitError(f"does nothing with {why}", where=flag, remedy=f"leave {flag} out")
    if options.train_views != "center" and not strategies.uses_solver(name):
        raise TlkitError(f"does nothing with --strategy {name}", where="--train-views", remedy="leave it out")


Make = Callable[..., Options]


def learn(
    make: Make, groups: tuple[Any, ...], output: config.Output, resume: config.Resume, console: Console
) -> dict[str, Any]:
    """Train as the options say, or go on with a run.

    Args:
        make: Options from the command's groups.
        groups: The groups as given.
        output: Where to.
        resume: The run to go on with.
        console: Who is told.
    """
    started = time.monotonic()
    resume = begun(resume, output, make.__module__.rpartition(".")[2], console)
    if resume.resume is not None:
        return _go_on(make, groups, resume, console, started)
    options = make(*groups)
    processes.on_first(lambda: run_folder.refuse_existing(output.out))
    if options.data.folds is not None:
        return folding.begin(options, output, resume, console, started)
    samples = read(options, console.progress)
    loaded = build_network(options, console)
    shared = shared_files(samples)
    if shared:
        console.warn(in_words(shared, int((samples.splits != "train").sum())))
    for remark in (*samples.remarks(), *seen_before(options, samples)):
        console.warn(remark)
    if output.plan:
        return _plan(options, samples, loaded, console)
    copies = 1 if options.strategy == "probe" else 6  # weights, optimiser, best so far: in the stored state
    needed = copies * weight_bytes(loaded.network)
    run = processes.on_first(lambda: new_run(output.out, options.command, needed))
    with kept_when_stopped(run, options.command, console, keep_state=resume.keep_state):
        processes.on_first(lambda: begin_run(run, options.recipe, samples))
        return train(options, samples, loaded, run, resume, None, console, started).summary


def _go_on(
    make: Make, groups: tuple[Any, ...], resume: config.Resume, console: Console, started: float
) -> dict[str, Any]:
    run = resume.resume
    assert run is not None
    recipe, command = processes.on_first(lambda: run_folder.read_recipe(run)), make.__module__.rpartition(".")[2]
    if recipe.get("command") != command:
        raise TlkitError(f"this is a run of '{recipe.get('command')}'", where=run, remedy="resume it with that command")
    if processes.on_first((run / run_folder.SUMMARY).is_file):
        console.line(f"{run} is finished; its report is {run / run_folder.REPORT}")
        return processes.on_first(lambda: run_folder.read_json(run / run_folder.SUMMARY))
    options = make(*(config.group_from_recipe(type(group), recipe) for group in groups))
    if options.data.folds is not None:
        return folding.go_on(options, run, resume, console, started)
    stored = processes.on_first(lambda: read_checkpoint(run))
    samples = labelled(options, console.progress)
    learn_digests(samples.root, samples.paths, console.progress)
    samples = stored_split(samples, run)
    samples = samples.take(samples.splits != "")
    refuse_too_few(samples, options)
    loaded = build_network(options, console)
    if processes.is_first():
        if stored is None:
            (run / run_folder.METRICS).unlink(missing_ok=True)
        run_folder.remove_half_written(run)
    with kept_when_stopped(run, command, console, fresh=False, keep_state=resume.keep_state):
        return train(options, samples, loaded, run, resume, stored, console, started).summary


def _plan(options: Options, samples: Samples, loaded: Loaded, console: Console) -> dict[str, Any]:
    chosen_on, choosing = choosing_images(options, samples)
    situation = situation_of(options, samples, choosing, chosen_on, loaded)
    plan = strategies.strategy(options.strategy, situation, options.training, options.unfreezing)
    return show_plan(options, samples, loaded, situation, plan, console)
