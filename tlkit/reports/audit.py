"""The page of an audit: what is wrong in a folder of labelled images, what matters most first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tlkit import __version__
from tlkit.data.folders import SPLITS
from tlkit.reports.copies import SHORT_LENGTH, Tier, called, tiers
from tlkit.reports.findings import KINDS, OF_DUPLICATES, Kind, counts, worded
from tlkit.reports.pictures import Thumbnail, thumbnails
from tlkit.reports.sections import CLASSES_SHOWN
from tlkit.reports.template import encodable, template
from tlkit.reports.words import duration, listed, middle, plain, plural
from tlkit.run_folder import write_text
from tlkit.shards.folder import Folder

SUSPECTS, OF_KIND, ROWS, RARE_NAMED = 120, 40, 200, 10
PICTURE_CHARACTERS = 4_000_000  # of all data URIs


# What matters most stands first: so the headline is chosen.
GRIDS = (
    ("blank", "Blank images", "All but of one colour."),
    ("blurred", "Blurred images", "Sharpness is low without fine detail: out of focus, moved or enlarged."),
    ("odd_aspect", "Odd shapes", "Much longer, or much wider, than the other images."),
    ("small", "Small images", "Much smaller than the other images: thumbnails among photos, perhaps."),
)
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
    root: Folder


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
