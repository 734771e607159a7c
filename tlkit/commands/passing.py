"""How a command passes images through a network, from its options."""

from __future__ import annotations

from tlkit import compute, config
from tlkit.commands.console import Console
from tlkit.networks.frozen_pass import How


def how(computing: config.Compute, console: Console, passing: config.Passing | None = None) -> How:
    """Device, precision, processes and form, with the console told of progress."""
    return How(
        compute.accelerator(computing),
        batch_size=computing.batch_size,
        workers=computing.workers,
        compile=(passing or config.Passing()).compile,
        say=console.say,
        progress=console.progress,
    )
