"""Train a network from random weights."""

from __future__ import annotations

from typing import Any

from tlkit import config
from tlkit.commands.console import Console
from tlkit.commands.learning import Options, learn


def pretrain(
    data: config.Data,
    network: config.NewNetwork,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
    console: Console,
) -> dict[str, Any]:
    """Train a network from random weights; see ``tlkit pretrain --help``."""
    groups = (data, network, training, augmentation, preprocess, compute, tracking)
    return learn(options, groups, output, resume, console)


def options(
    data: config.Data,
    network: config.NewNetwork,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    tracking: config.Tracking,
) -> Options:
    """What is to be done."""
    return Options(
        command="pretrain",
        groups=(data, network, training, augmentation, preprocess, compute, tracking),
        strategy="random",
        model=network.model,
        weights="random",
        stem=network.stem,
        norm=network.norm,
        preset="standard",
        data=data,
        training=training,
        augmentation=augmentation,
        preprocess=preprocess,
        compute=compute,
        tracking=tracking,
    )
