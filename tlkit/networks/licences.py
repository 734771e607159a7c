"""Where the weights of a network came from at first, and the licence that they have from there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tlkit import run_folder
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded


class Origin(NamedTuple):
    """Where weights came from.

    Args:
        weights: ``package NAME``, ``hub``, ``random``, a file, or ``unknown``.
        licence: Of these weights, as timm knows it (``apache-2.0``); None where nobody knows.
    """

    weights: str
    licence: str | None


def origin(loaded: Loaded) -> Origin:
    """Where the weights came from, back through the runs that they were trained in."""
    weights, seen = loaded.weights, set()
    while weights.startswith("run ") and weights not in seen:
        seen.add(weights)
        try:
            summary = run_folder.read_json(Path(weights.removeprefix("run ")) / run_folder.SUMMARY)
            weights = str(summary.get("weights", "unknown"))
        except TlkitError:  # a network that was copied without its summary, or an earlier run that is gone
            weights = "unknown"
    public = weights == "hub" or weights.startswith("package ")
    config = getattr(loaded.network, "pretrained_cfg", None) or {}
    return Origin(weights, config.get("license") if public else None)
