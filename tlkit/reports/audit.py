"""The page of an audit: what is wrong in a folder of labelled images, what matters most first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tlkit import __version__
from tlkit.data.folders import SPLIT_FOLDERS, SPLITS
from tlkit.reports.pictures import Thumbnail, thumbnails
from tlkit.reports.sections import CLASSES_SHOWN
from tlkit.reports.template import encodable, template
from tlkit.reports.words import duration, listed, middle, plain, plural
from tlkit.run_folder import write_text

GROUPS, OF_GROUP = 60, 12  # of duplicates, and images of each
SUSPECTS, OF_KIND, ROWS, RARE_NAMED = 120, 40, 200, 10
PICTURE_CHARACTERS = 4_000_000  # of all data URIs
NAME_LENGTH, SHORT_LENGTH = 300, 40  # characters of a path in full, and below its picture


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
# What matters most stands first: so the headline is chosen.
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
        "Training leaves such files out: fetch them again, or remove them.",
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
GRIDS = (
    ("blank", "Blank images", "All but of one colour."),
    ("blurred", "Blurred images", "Sharpness is low without fine detail: out of focus, moved or enlarged."),
    ("odd_aspect", "Odd shapes", "Much longer, or much wider, than the other images."),
    ("small", "Small images", "Much smaller than the other images: thumbnails among photos, perhaps."),
)
FOUND_BY = {
    "content": "the content of the files",
    "hash": "how they look",
    "features": "what a network sees in them",
}
MODES = {
    **{"1": "black and white", "L": "grey", "LA": "grey, transparent", "I;16": "grey, 16 bits", "P": "palette"},
    **{"RGB": "colour", "RGBA": "colour, transparent", "CMYK": "print colours"},
}


@dataclass(frozen=True)
class AuditPage:
    """What an audit's page tells.

    Args:
        title: Command and data, for instance ``check-data hymenoptera_256``.
        summary: The object that ``--json`` prints; what it lacks, the page leaves out.
        root: Folder that paths in the summary are relative to; the page does without a picture where one is unreadable.
    """

    title: str
    summary: Mapping[str, Any]
    root: Path


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


def write_audit(path: Path, page: AuditPage) -> None:
    """Write the page as UTF-8."""
    write_text(path, render_audit(page))


def render_audit(page: AuditPage) -> str:
    """The page as HTML; what UTF-8 cannot hold (an undecodable byte of a file name) is spelt out as an escape."""
    summary = page.summary
    numbers = counts(summary)
    found = [kind for kind in KINDS if numbers.get(kind.key)]
    arranged = tiers(summary)
    html = template("audit.html").render(
        page=page,
        summary=summary,
        version=summary.get("version") or __version__,
        headline=_headline(found, numbers, summary),
        under=found[0].why if found else "",
        looked_at=_looked_at(summary),
        found=[
            (numbers[kind.key], worded(kind.name, numbers[kind.key]), _anchor(kind.key, arranged, summary))
            for kind in found
        ],
        not_found=[worded(kind.name, 0) for kind in KINDS if numbers.get(kind.key) == 0],
        numbers=numbers,
        tiers=arranged,
        groups_shown=sum(len(tier.groups) for tier in arranged),
        grids=[(key, title, hint, (summary.get(key) or [])[:OF_KIND]) for key, title, hint in GRIDS],
        suspects=(summary.get("label_suspects") or [])[:SUSPECTS],
        rows=ROWS,
        classes=classes(summary),
        facts=_facts(summary),
        circumstances=_circumstances(summary),
        pictures=pictures(page, arranged),
        called=called,
        short=lambda path: middle(plain(path), SHORT_LENGTH),
        listed=listed,
    )
    return encodable(html)


def called(path: Any) -> str:
    """A name in full, unless it is longer than anyone reads."""
    return middle(plain(path), NAME_LENGTH)


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


def _headline(found: Sequence[Kind], numbers: Mapping[str, int], summary: Mapping[str, Any]) -> str:
    """What matters most, in plain words."""
    if found:
        return worded(found[0].says, numbers[found[0].key])
    if summary.get("images") == 0:
        return "There are no images"
    return "Nothing was found that should worry you" if numbers else "Nothing was looked for"


def _looked_at(summary: Mapping[str, Any]) -> str:
    """``2,533 images in 10 classes were looked at; 2,530 of them can be read.``"""
    images, readable = summary.get("images"), summary.get("readable")
    if images is None:
        return ""
    number = len(summary.get("classes") or ())
    where = f" in {number:,} class{'' if number == 1 else 'es'}" if number else ""
    said = f"{plural(images, 'image')}{where} {'was' if images == 1 else 'were'} looked at"
    if readable is None or readable == images:
        return f"{said}."
    return f"{said}; {readable:,} of them can be read."


def _anchor(key: str, arranged: Sequence[Tier], summary: Mapping[str, Any]) -> str:
    """Where the page shows findings of this kind; empty where it does not."""
    if key in OF_DUPLICATES:
        shown = {tier.anchor for tier in arranged}
        return key if key in shown else "duplicates"
    if key == "imbalance":  # the smallest classes stand among the others
        return "classes" if summary.get("classes") else ""
    return key


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


def pictures(page: AuditPage, arranged: Sequence[Tier]) -> dict[str, Thumbnail | None]:
    """Thumbnails by path: None where a file cannot be read, nothing where there is no room for more."""
    wanted = Counter(path for path in _wanted(page.summary, arranged) if isinstance(path, str))
    made = thumbnails([page.root / path for path in wanted], PICTURE_CHARACTERS)
    kept: dict[str, Thumbnail | None] = {}
    room = PICTURE_CHARACTERS
    for path, one in zip(wanted, made, strict=False):
        room -= len(one.uri) * wanted[path] if one else 0  # a copy may be a suspect and blurred, too
        if room >= 0:
            kept[path] = one
    return kept


def _wanted(summary: Mapping[str, Any], arranged: Sequence[Tier]) -> Iterator[Any]:
    """What is pictured, the most wanted first: two of each group, the other findings, the rest of the groups."""
    groups = [[one.path for one in group.members] for tier in arranged for group in tier.groups]
    yield from chain.from_iterable(group[:2] for group in groups)
    lists = [("label_suspects", SUSPECTS), *((key, OF_KIND) for key, _, _ in GRIDS)]
    for key, most in lists:
        yield from (entry.get("path") for entry in (summary.get(key) or [])[:most])
    yield from chain.from_iterable(group[2:] for group in groups)


def classes(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Images of each class, the largest class first; where classes are many, the largest and the smallest ones."""
    rows = summary.get("classes") or []
    if not rows:
        return None
    names = dict.fromkeys([*(summary.get("splits") or {}), *SPLITS])
    splits = [split for split in names if any(split in row for row in rows)]
    made = [
        {"class": row.get("class"), "counts": [row.get(split) or 0 for split in splits], "images": _images(row, splits)}
        for row in rows
    ]
    made.sort(key=lambda row: -row["images"])
    largest, smallest = made[0], made[-1]
    left_out = max(len(made) - CLASSES_SHOWN, 0)
    half = CLASSES_SHOWN // 2
    return {
        "splits": splits,
        "largest": made[:half] if left_out else made,
        "smallest": made[-half:] if left_out else [],
        "left_out": left_out,
        "most": max(largest["images"], 1),
        "balance": _balance(largest, smallest, len(made)),
        "rare": listed([called(name) for name in summary.get("imbalance") or []], RARE_NAMED),
        "totals": [sum(row["counts"][at] for row in made) for at in range(len(splits))],
        "images": sum(row["images"] for row in made),
    }


def _images(row: Mapping[str, Any], splits: Sequence[str]) -> int:
    return row["images"] if row.get("images") is not None else sum(row.get(split) or 0 for split in splits)


def _balance(largest: Mapping[str, Any], smallest: Mapping[str, Any], number: int) -> str:
    """How uneven the classes are, in a sentence."""
    if number == 1:
        return "There is a single class: nothing to tell apart."
    if largest["images"] == smallest["images"]:
        return f"All {number:,} classes have as many images."
    if not smallest["images"]:
        return "Some classes have no images."
    times = largest["images"] / smallest["images"]
    return f"The largest class has {times:.3g} times as many images as the smallest."


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the images are, as (name, value)."""
    modes, sizes = summary.get("modes") or {}, summary.get("sizes") or {}
    facts = [
        ("Images", summary.get("images")),
        ("Readable", summary.get("readable")),
        ("Splits", summary.get("splits")),
        *((side.capitalize(), _spread(sizes.get(side) or {})) for side in ("width", "height")),
        ("Formats", summary.get("formats")),
        ("Colours", {f"{mode} ({MODES[mode]})" if mode in MODES else mode: number for mode, number in modes.items()}),
        ("Passed over", summary.get("ignored")),
    ]
    if summary.get("heic_left_out"):
        photos = plural(summary["heic_left_out"], "photo")
        facts.append(("HEIC", f"{photos} left out: pip install 'tlkit[heic]' to read them"))
    return [(name, plain(value)) for name, value in facts if value not in (None, "", {})]


def _spread(side: Mapping[str, Any]) -> str:
    if side.get("min") is None or side.get("max") is None:
        return ""
    ends = plain(side["min"]) if side["min"] == side["max"] else f"{plain(side['min'])} to {plain(side['max'])}"
    median = side.get("median")
    return f"{ends} pixels" + (f", median {plain(median)}" if median is not None and side["min"] != side["max"] else "")


def _circumstances(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was looked, as (name, value)."""
    manifest = summary.get("manifest") or {}
    told = (f"{plain(manifest[key])} {key}" for key in ("kept", "dropped") if manifest.get(key) is not None)
    facts = [
        ("Data", summary.get("data")),
        ("Labels judged", summary.get("labels_judged") or None),
        ("Model", summary.get("model")),
        ("Weights", summary.get("weights")),
        ("Time", duration(summary["seconds"]) if summary.get("seconds") is not None else None),
        ("Cleaned list", ", ".join([plain(manifest.get("path")), *told]) if manifest else None),
    ]
    return [(name, plain(value)) for name, value in facts if value not in (None, "", {})]
