"""Figures in words: how the report pages write shares, durations, counts and whatever a summary holds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tlkit.reports import curves
from tlkit.reports.tables import short

ABSENT = "–"

# What a metrics object may hold, in the order of the page: key, name, what it says in plain words.
METRICS = (
    ("top1", "Top-1 accuracy", "share of images whose likeliest class is right"),
    ("top5", "Top-5 accuracy", "share of images with the right class among the five likeliest"),
    ("balanced_accuracy", "Balanced accuracy", "mean recall: each class counts the same"),
    ("macro_f1", "Macro F1", "mean F1: each class counts the same"),
    ("auroc", "AUROC", "how well each class is ranked above the rest; 0.5 is chance"),
    ("loss", "Loss", "mean negative log-likelihood, in nats"),
    ("brier", "Brier score", "mean squared error of the probabilities, 0 to 2"),
    ("ece", "Calibration error", "mean gap between confidence and accuracy (ECE)"),
)
FRACTIONS = {"top1", "top5", "balanced_accuracy", "macro_f1"}
IN_UNIT = FRACTIONS | {"auroc", "ece"}
"""Figures between 0 and 1, whose intervals can be drawn on a bar."""


def undefined(value: float | None) -> bool:
    """Whether there is no number: None or not a number."""
    return value is None or math.isnan(value)


def points(fraction: float) -> str:
    """Percentage points with one decimal; what is not quite all or nothing is not rounded to it."""
    number = 100 * fraction
    if 1e-9 < number < 100 - 1e-9:  # but what rounding errors keep from all or nothing is that
        number = min(max(number, 0.1), 99.9)
    return f"{number:.1f}"


def percent(fraction: float | None) -> str:
    """``94.1 %``."""
    return ABSENT if fraction is None or undefined(fraction) else f"{points(fraction)} %"


def metric(value: float | None, key: str) -> str:
    """A figure of merit as is usual for its key."""
    if value is None or undefined(value):
        return ABSENT
    return percent(value) if key in FRACTIONS else f"{value:.3f}"


def interval(ends: tuple[float, float], key: str) -> str:
    """``89.1 to 96.9`` or ``0.150 to 0.210``."""
    low, high = ends
    return f"{points(low)} to {points(high)}" if key in FRACTIONS else f"{metric(low, key)} to {metric(high, key)}"


def duration(seconds: float | None) -> str:
    """``3.2 s``, ``1 min 05 s`` or ``2 h 30 min``."""
    if seconds is None or undefined(seconds):
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def rates(values: Mapping[str, float] | None) -> str:
    """Learning rates by stage; a single one where all stages have the same."""
    known = {plain(name): curves.rate_text(rate) for name, rate in (values or {}).items() if not undefined(rate)}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    # The space that does not break keeps a rate with its stage.
    return ", ".join(f"{name}\N{NO-BREAK SPACE}{rate}" for name, rate in known.items()) or ABSENT


def curve(value: float, key: str) -> str:
    """A value of a learning curve."""
    return curves.rate_text(value) if key == "rate" else metric(value, key)


def brief(number: float | None) -> str:
    """Three digits and a decimal prefix: 4089184256 is ``4.09 G``."""
    if number is None or undefined(number):
        return ABSENT
    digits, _, prefix = short(number).partition(" ")
    return f"{float(digits):.3g} {prefix}".strip()


def plural(number: int, noun: str) -> str:
    """``1 image``, ``1,234 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """``a``, ``a and b``, ``a, b and c``; of more than ``most`` the first ones and how many others."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1:,} more"]
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def middle(text: str, length: int) -> str:
    """The text in at most ``length`` characters, with an ellipsis for its middle: a path tells most at its ends."""
    head = length // 3
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - head - 1) :]}"


def plain(value: Any) -> str:
    """A value in words; a control character, such as the line break in a file's name, is spelt out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(key)} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ABSENT if value is None else str(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)
