"""Phases: which stages train, on what, for how long, at which rates; and what comes out of one."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One part of a training run, as data.

    Args:
        stages: Names of the stages that train, in the network's order.
        epochs: Passes over the images trained on.
        rates: Highest learning rate of each of these stages; empty where the head is fitted in closed form.
        on_all: Train on all training images; else on those outside the choosing part.
        chooses: The epoch with the lowest loss on the choosing part is kept, and `patience` applies.
        start: Name of remembered weights to start from; by default those that are there.
        remember: Name under which the weights that are there are remembered before anything else.
        seconds: Ends at the first step after this time; None for never.
        trial: It is compared with what was there before, and may be taken back.
        listed: Whether the run's report lists it.
    """

    stages: tuple[str, ...]
    epochs: int = 1
    rates: Mapping[str, float] = field(default_factory=dict)
    on_all: bool = False
    chooses: bool = False
    start: str | None = None
    remember: str | None = None
    seconds: float | None = None
    trial: bool = False
    listed: bool = True

    @property
    def solves(self) -> bool:
        """Whether the head is fitted in closed form on features."""
        return not self.rates


@dataclass(frozen=True)
class Outcome:
    """What came out of a phase.

    Args:
        epochs: Passes that the weights kept have seen.
        seconds: Wall time.
        losses: Negative log-likelihood in nats of each image of the choosing part; empty where there is none.
        stopped: Why it ended before its time, in words, or empty.
    """

    epochs: int
    seconds: float
    losses: tuple[float, ...] = ()
    stopped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        return cls(**{**values, "losses": tuple(values["losses"])})


@dataclass(frozen=True)
class Decision:
    """How a strategy ended.

    Args:
        weights: Name of the remembered weights that the run ends with; by default those that are there.
        verdicts: For each phase that was on trial, by its number (from 1): whether it was kept, and why.
        told: One sentence for a person, where there is something to say.
    """

    weights: str | None = None
    verdicts: Mapping[int, tuple[bool, str]] = field(default_factory=dict)
    told: str = ""


Strategy = Generator[Phase, Outcome, Decision]
"""Yields phases, is sent their outcomes. It is a function of these alone: a run that goes on replays it."""
