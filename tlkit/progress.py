"""How whoever does a long piece of work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told ``(label, done, total)``."""


def silent(label: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""
