"""Copies of images as an audit's page shows them: in groups, those across splits and classes first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tlkit.data.folders import SPLIT_FOLDERS, SPLITS
from tlkit.reports.words import listed, middle, plain

NAME_LENGTH, SHORT_LENGTH = 300, 40  # characters of a path in full, and below its picture


def called(path: Any) -> str:
    """A name in full, unless it is longer than anyone reads."""
    return middle(plain(path), NAME_LENGTH)


GROUPS, OF_GROUP = 60, 12  # of duplicates, and images of each


FOUND_BY = {
    "content": "the content of the files",
    "hash": "how they look",
    "features": "what a network sees in them",
}


class Part(NamedTuple):
    """A piece of a path, and whether it sets the image apart from the others of its group."""

    text: str
    differs: bool


class Member(NamedTuple):
    """An image of a group and the pieces of its path."""

    path: str
    parts: list[Part]


class Group(NamedTuple):
    """Images that are copies of each other.

    Args:
        what: Copies of which kind, and where.
        how: What told so.
        members: Those that are shown.
        left_out: How many are not.
    """

    what: str
    how: str
    members: list[Member]
    left_out: int


class Tier(NamedTuple):
    """Groups that matter alike."""

    anchor: str
    title: str
    groups: list[Group]


class Place(NamedTuple):
    """Where a path lies: its folder of a split and which split that is, its folder of a class, and the rest."""

    folder: str
    split: str
    label: str
    rest: str


def tiers(summary: Mapping[str, Any]) -> list[Tier]:
    """Groups of duplicates: those across splits, then those across classes, then the rest."""
    groups = sorted(summary.get("duplicates") or [], key=_tier)[:GROUPS]
    names = {row.get("class") for row in summary.get("classes") or []}
    titles = {"across_splits": "In more than one split", "across_classes": "In more than one class"}
    anchors = {0: "across_splits", 1: "across_classes", 2: "within"}
    made: list[Tier] = []
    for rank, anchor in anchors.items():
        chosen = [_group(group, bool(summary.get("splits")), names) for group in groups if _tier(group) == rank]
        title = titles.get(anchor) or ("Others" if made else "Within one class" if names else "Groups")
        made += [Tier(anchor, title, chosen)] if chosen else []
    return made


def _tier(group: Mapping[str, Any]) -> int:
    return 0 if group.get("across_splits") else 1 if group.get("across_classes") else 2


def _group(group: Mapping[str, Any], in_splits: bool, names: set[Any]) -> Group:
    paths = [str(path) for path in group.get("paths") or []]
    places = [place(path, in_splits, names) for path in paths]
    splits = dict.fromkeys(one.split for one in places if one.split)
    labels = dict.fromkeys(one.label for one in places if one.label)
    known = {"splits": splits, "classes": labels}
    apart = [bool(group.get(f"across_{of}")) and len(found) > 1 for of, found in known.items()]
    what, said = "Exact copies" if group.get("kind") == "exact" else "Near copies", []
    if group.get("across_splits"):
        said.append(
            f"in {listed([split for split in SPLITS if split in splits])}" if apart[0] else "in more than one split"
        )
    if group.get("across_classes"):
        named = [middle(plain(label), SHORT_LENGTH) for label in labels]
        said.append(f"labelled {listed(named)}" if apart[1] else "with more than one label")
    members = [Member(path, _parts(lies, *apart)) for path, lies in zip(paths[:OF_GROUP], places, strict=False)]
    return Group(f"{what} {', '.join(said)}".strip(), _how(group.get("found_by")), members, len(paths[OF_GROUP:]))


def _how(found_by: Any) -> str:
    return f"found by {FOUND_BY.get(str(found_by)) or called(found_by)}" if found_by else ""


def place(path: str, in_splits: bool, names: set[Any]) -> Place:
    """Takes a path apart.

    Args:
        path: With forward slashes.
        in_splits: Whether the data has splits, so that the first folder may be that of one.
        names: Classes; where they are unknown, any folder may be one.
    """
    *folders, _ = path.split("/")
    folder = folders[0] if in_splits and folders and folders[0].lower() in SPLIT_FOLDERS else ""
    below = folders[1:] if folder else folders
    label = below[0] if below and (not names or below[0] in names) else ""
    taken = sum(len(part) + 1 for part in (folder, label) if part)
    return Place(folder, SPLIT_FOLDERS.get(folder.lower(), ""), label, path[taken:])


def _parts(lies: Place, splits_differ: bool, labels_differ: bool) -> list[Part]:
    whole = [(lies.folder, splits_differ), (lies.label, labels_differ), (lies.rest, False)]
    return [Part(middle(plain(text), SHORT_LENGTH), differs) for text, differs in whole if text]
