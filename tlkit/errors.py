"""The one exception for a user's mistake: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any


class TlkitError(Exception):
    """A mistake in input or data, shown as one line; the process ends with exit code 1.

    Args:
        what: What is wrong, as a phrase without a full stop.
        where: The file, folder, option or name that it concerns.
        remedy: What the user can do about it.
        details: Single findings (for instance one bad file each) that are printed before the line.
        told: What the JSON object holds nevertheless.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = "",
        remedy: str = "",
        details: Iterable[str] = (),
        told: Mapping[str, Any] | None = None,
    ) -> None:
        self.what, self.where, self.remedy, self.details = what, str(where), remedy, list(details)
        self.told = dict(told or {})
        super().__init__(what, self.where, remedy)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line}; {self.remedy}" if self.remedy else line
        return " ".join(line.split())  # a path or a library's message may hold line breaks: one line stays one line

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling
        return _rebuild, (type(self), self.what, self.where, self.remedy, self.details, self.told)


class InputLost(TlkitError):
    """A file that a command had begun to work with cannot be read any more; what was reached until then is kept.

    Args:
        path: The file, as it is called in the data.
        where: The folder of the data.
        reason: Why not, in a few words.
        remedy: What the user can do about it.
    """

    def __init__(
        self, path: str, *, where: object, reason: str, remedy: str = "put it back, and go on with --resume"
    ) -> None:
        super().__init__(f"{path} cannot be read any more: {reason}", where=where, remedy=remedy)
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_lost, (self.path, self.where, self.reason, self.remedy)


class UsageError(TlkitError):
    """A command line that lacks something; exit code 2."""

    exit_code = 2


def _rebuild(
    kind: type[TlkitError], what: str, where: str, remedy: str, details: list[str], told: dict[str, Any]
) -> TlkitError:
    return kind(what, where=where, remedy=remedy, details=details, told=told)


def _rebuild_lost(path: str, where: str, reason: str, remedy: str) -> InputLost:
    return InputLost(path, where=where, reason=reason, remedy=remedy)


def first_line(error: Exception) -> str:
    """What an exception says, in one line, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'finetune'?"`` for a mistyped name, or an empty string where nothing known is close."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.6)
    # of equally close ones, those whose letters have only changed places go first
    close.sort(key=lambda other: (-SequenceMatcher(None, other, name).ratio(), sorted(other) != sorted(name)))
    return f"did you mean {' or '.join(repr(other) for other in close)}?" if close else ""
