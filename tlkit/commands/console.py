"""What a command may say while it works: the console as the commands see it, without importing the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Console(Protocol):
    """Prints for one command: remarks and progress on stderr, the human result on stdout (none with ``--json``)."""

    json: bool

    def say(self, line: str) -> None:
        """One remark for the person who waits; not part of the result."""

    def warn(self, line: str) -> None:
        """A remark that changes how the result is to be read: shown even when quiet."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Tell how far a piece of work is, in images; ``done == total`` ends it."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of the result; numbers stand on the right."""

    def text(self, text: str) -> None:
        """The result in a form for other programs, which nothing is added to."""

    def line(self, text: str = "") -> None:
        """A line of the human result."""
