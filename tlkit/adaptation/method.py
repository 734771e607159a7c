"""What an adaptation method is: one file in ``methods``, found by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from tlkit import config
from tlkit.errors import TlkitError, did_you_mean


@dataclass(frozen=True)
class Domains:
    """What a network makes of a step's images, in float32.

    Args:
        source: Features of the source's images (S, D): what the classifier sees.
        target: Those of the target's (T, D).
        source_logits: (S, K).
        target_logits: (T, K).
        labels: Classes of the source's images (S).
        progress: Share of the optimiser's steps that are done, in [0, 1): what ramps are functions of.
    """

    source: Tensor
    target: Tensor
    source_logits: Tensor
    target_logits: Tensor
    labels: Tensor
    progress: float


@dataclass(frozen=True)
class Method:
    """An adaptation method; its file in ``methods`` holds one of these, called ``METHOD``.

    Args:
        paper: Where it was published.
        loss: Given the width D of the features and the number of classes K, makes a module that maps `Domains` to a
            loss, which is added to the cross-entropy on the source; its parameters train with the network. None where
            the network does not see the target while it trains.
        weight: What that loss is multiplied by where nothing else is asked for.
        norms: Given the network and batches of the target's inputs, changes what is measured and kept: called with a
            copy after each epoch. None for nothing.
        refuse: Raises `TlkitError` where the part of a network that trains is none that the method can adapt.
    """

    paper: str
    loss: Callable[[int, int], nn.Module] | None = None
    weight: float = 1.0
    norms: Callable[[nn.Module, Callable[[], Iterable[Tensor]]], None] | None = None
    refuse: Callable[[nn.Module], None] | None = None


def method(name: str) -> Method:
    """The method of that name."""
    found: Method = importlib.import_module(f"tlkit.adaptation.methods.{name.replace('-', '_')}").METHOD
    return found


def chosen(text: str) -> list[str]:
    """Names of the methods that ``--method`` asks for: one, several with commas between, or ``all``.

    Raises:
        TlkitError: There is none of that name.
    """
    known = config.METHODS
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, "all"):
            remedy = did_you_mean(name, known) or f"choose of {', '.join(known)}, or all"
            raise TlkitError(f"unknown method '{name}'", where="--method", remedy=remedy)
    if not names:
        raise TlkitError("names no method", where="--method", remedy=f"choose of {', '.join(known)}, or all")
    return list(known) if "all" in names else list(dict.fromkeys(names))
