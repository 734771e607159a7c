"""The kinds of findings of an audit, the gravest first: what they are called, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of finding; `worded` fills its texts in.

    Args:
        key: In the summary's ``findings``.
        name: What it is called, beside its number.
        says: It as a sentence that holds the number.
        why: What follows from it.
    """

    key: str
    name: str
    says: str
    why: str


COPIES = "Copies count more than other images do, and come apart when somebody divides the data into splits."
LEAK = "A network looks better than it is where it is tested on what it has learnt: leave each image in one split."
BASE = "The folders say which image belongs where, and everything else rests on that."
RARE = "Accuracy says little about classes of few images: look at the balanced accuracy, or add images."


KINDS = (
    Kind("across_splits", "image{s} in more than one split", "{n} image{s} {stand} in more than one split", LEAK),
    Kind("structure", "fault{s} of the folders", "{n} thing{s} {are} wrong with the folders", BASE),
    Kind(
        "across_classes",
        "image{s} in more than one class",
        "{n} image{s} {stand} in more than one class",
        "At most one of the labels can be right.",
    ),
    Kind(
        "corrupt",
        "unreadable file{s}",
        "{n} file{s} cannot be read",
        "Training stops at such files, or leaves them out (--on-error skip): fetch them again, or remove them.",
    ),
    Kind(
        "label_suspects",
        "label{s} to look at",
        "{n} label{s} may be wrong",
        "These are candidates to look at, not errors.",
    ),
    Kind("exact_duplicates", "group{s} of exact copies", "{n} image{s} {are} there more than once", COPIES),
    Kind("near_duplicates", "group{s} of near copies", "{n} image{s} {have} near copies", COPIES),
    Kind("imbalance", "rare class{es}", "{n} class{es} {have} far fewer images than the largest", RARE),
    Kind(
        "wrong_suffix",
        "wrong file ending{s}",
        "{n} file{s} {have} a wrong ending",
        "Programs that trust a file’s name may fail to read it.",
    ),
    Kind(
        "blank",
        "blank image{s}",
        "{n} image{s} {are} blank",
        "From such an image nothing can be learnt but its colour.",
    ),
    Kind(
        "blurred",
        "blurred image{s}",
        "{n} image{s} {are} blurred",
        "Whether its class can be told from such an image is for you to judge.",
    ),
    Kind(
        "odd_aspect",
        "odd shape{s}",
        "{n} image{s} {are} much longer than the others",
        "What a square cut from the middle of such an image shows is little.",
    ),
    Kind(
        "small",
        "small image{s}",
        "{n} image{s} {are} much smaller than the others",
        "Enlarged to what a network takes, such an image shows little.",
    ),
)


OF_DUPLICATES = ("exact_duplicates", "near_duplicates", "across_splits", "across_classes")


def counts(summary: Mapping[str, Any]) -> dict[str, int]:
    """How many of each kind were found; a kind that was not looked for, or is to be ignored, is missing."""
    listed_in = {kind.key: summary[kind.key] for kind in KINDS if isinstance(summary.get(kind.key), list | tuple)}
    numbers = {key: len(entries) for key, entries in listed_in.items()}
    if summary.get("duplicates") is not None:
        groups = summary["duplicates"]
        exact = sum(group.get("kind") == "exact" for group in groups)
        numbers |= {"exact_duplicates": exact, "near_duplicates": len(groups) - exact}
        numbers |= {key: sum(bool(group.get(key)) for group in groups) for key in ("across_splits", "across_classes")}
    if summary.get("findings") is not None:
        numbers = {key: number for key, number in summary["findings"].items() if number is not None}
    return {key: number for key, number in numbers.items() if number or key not in _not_looked_for(summary)}


def _not_looked_for(summary: Mapping[str, Any]) -> set[str]:
    """Kinds of which nothing can have been found."""
    kinds = {"label_suspects"} if summary.get("label_suspects") is None else set()
    if not summary.get("splits", True):
        kinds.add("across_splits")
    if not summary.get("classes", True):
        kinds |= {"across_classes", "imbalance", "label_suspects"}
    return kinds


def worded(text: str, number: int) -> str:
    """A text of a `Kind` for as many."""
    one = {"s": "", "es": "", "are": "is", "have": "has", "stand": "stands"}
    many = {"s": "s", "es": "es", "are": "are", "have": "have", "stand": "stand"}
    return text.format(n=f"{number:,}", **(one if number == 1 else many))
