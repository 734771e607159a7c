"""Gradual unfreezing: the new head first, then ever more stages with it."""

from __future__ import annotations

from typing import Any

from tlkit import config
from tlkit.commands.console import Console
from tlkit.commands.learning import Options, learn
from tlkit.errors import TlkitError


def unfreeze(
    data: config.Data,
    start: config.StartingRun,
    network: config.Network,
    unfreezing: config.Unfreezing,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.Caching,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
    console: Console,
) -> dict[str, Any]:
    """Unfreeze a network stage by stage; see ``tlkit unfreeze --help``."""
    groups = (data, start, network, unfreezing, training, augmentation, preprocess, compute, passing, caching, tracking)
    return learn(options, groups, output, resume, console)


def options(
    data: config.Data,
    start: config.StartingRun,
    network: config.Network,
    unfreezing: config.Unfreezing,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.Caching,
    tracking: config.Tracking,
) -> Options:
    """What is to be done: ``finetune --strategy gradual``."""
    model, weights = network.model, network.weights
    if start.from_ is not None:
        if network != config.Network():
            remedy = "give --from RUN, or --model and --weights"
            raise TlkitError("a run brings its own model and weights", where="--from", remedy=remedy)
        if not start.from_.is_dir():
            raise TlkitError("there is no such run", where=start.from_, remedy="check the path")
        model = str(start.from_)
    return Options(
        command="unfreeze",
        groups=(
            data,
            start,
            network,
            unfreezing,
            training,
            augmentation,
            preprocess,
            compute,
            passing,
            caching,
            tracking,
        ),
        strategy="gradual",
        model=model,
        weights=weights,
        norm=network.norm,
        data=data,
        training=training,
        unfreezing=unfreezing,
        augmentation=augmentation,
        preprocess=preprocess,
        compute=compute,
        passing=passing,
        caching=caching,
        tracking=tracking,
    )
