"""Transfer a network to a labelled folder."""

from __future__ import annotations

from typing import Any

from tlkit import config
from tlkit.commands.console import Console
from tlkit.commands.learning import Options, learn


def finetune(
    data: config.Data,
    network: config.Network,
    transfer: config.Transfer,
    training: config.Training,
    unfreezing: config.Unfreezing,
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
    """Transfer a network to a labelled folder; see ``tlkit finetune --help``."""
    groups = (
        data,
        network,
        transfer,
        training,
        unfreezing,
        augmentation,
        preprocess,
        compute,
        passing,
        caching,
        tracking,
    )
    return learn(options, groups, output, resume, console)


def options(
    data: config.Data,
    network: config.Network,
    transfer: config.Transfer,
    training: config.Training,
    unfreezing: config.Unfreezing,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.Caching,
    tracking: config.Tracking,
) -> Options:
    """What is to be done."""
    return Options(
        command="finetune",
        groups=(
            data,
            network,
            transfer,
            training,
            unfreezing,
            augmentation,
            preprocess,
            compute,
            passing,
            caching,
            tracking,
        ),
        strategy=transfer.strategy,
        model=network.model,
        weights=network.weights,
        norm=network.norm,
        train_views=transfer.train_views,
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
