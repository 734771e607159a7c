"""How far a run has come, beside its tensors; as JSON in the stored state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tlkit.training.fit import Place
from tlkit.training.phases import Outcome


@dataclass
class PhaseState:
    """How far the present phase has come.

    Args:
        begun: Whether its start weights are in place.
        place: Epoch, step, sums of the losses.
        seconds: Spent in it before this process.
        best: Epoch whose weights are kept so far, 0 for the start; None where none is kept.
        lowest: Its loss.
        waited: Epochs since.
        watched: Loss after each epoch on what it is watched on (the choosing part, val, or else what it trains on).
        losses: Of each image of the choosing part under the weights kept so far.
        top1: Accuracy on what it is watched on, likewise.
        ended: Why it ended before its time, in words, or empty.
        kept: What it trains on in place of images (`tlkit.training.prefix.Form`), empty for images; None before that is
            decided.
    """

    begun: bool = False
    place: Place = field(default_factory=Place)
    seconds: float = 0.0
    best: int | None = None
    lowest: float | None = None
    waited: int = 0
    watched: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    top1: float | None = None
    ended: str = ""
    kept: dict[str, Any] | None = None


@dataclass
class State:
    """How far a run has come.

    Args:
        outcomes: Of the phases that are finished.
        phases: What the report says of them.
        history: One row for each epoch, as in ``metrics.jsonl``.
        phase: The present phase.
        seconds: Spent in the run before this process.
        found_rate: What the search for a learning rate came to, as a factor; None before it.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    phase: PhaseState = field(default_factory=PhaseState)
    seconds: float = 0.0
    found_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        place = self.phase.place
        totals = {name: value.item() for name, value in place.totals.items()}
        plain = {**vars(self.phase), "place": {**vars(place), "totals": totals}}
        return {**vars(self), "outcomes": [asdict(outcome) for outcome in self.outcomes], "phase": plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device: torch.device) -> State:
        """The inverse of `to_dict`; sums of losses are put onto the device."""
        place = values["phase"]["place"]
        totals = {name: torch.tensor(value, device=device) for name, value in place["totals"].items()}
        phase = PhaseState(**{**values["phase"], "place": Place(**{**place, "totals": totals})})
        outcomes = [Outcome.from_dict(outcome) for outcome in values["outcomes"]]
        return cls(**{**values, "outcomes": outcomes, "phase": phase})
