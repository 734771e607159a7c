"""Find what is wrong in a folder of images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import __version__, config, run_folder
from tlkit.audit.cleaning import Cleaned, clean
from tlkit.audit.duplicates import Group, find_groups
from tlkit.audit.looks import Look, hashes, look_at, thumbnails
from tlkit.audit.oddities import has_wrong_suffix, is_blank, is_blurred, odd_aspects, rare_classes, small_ones
from tlkit.commands.console import Console
from tlkit.data.folders import SPLITS, Samples
from tlkit.data.loading import BadFile
from tlkit.data.manifest import write_manifest
from tlkit.data.new_images import read_images
from tlkit.errors import TlkitError, did_you_mean
from tlkit.reports.findings import KINDS, worded
from tlkit.shards.folder import Shards

if TYPE_CHECKING:
    from tlkit.audit.deep import Deep
    from tlkit.audit.suspects import Suspect

SHOWN = 10


@dataclass(frozen=True)
class Found:
    """What there is, and what was seen of it.

    Args:
        samples: All images (N).
        rows: Those that could be read (M), ascending.
        looks: At those (M).
        bad: The others.
        groups: Copies; rows are those of ``samples``.
        faults: Of the data as a whole.
        suspects: Rows are those of ``samples``; None where labels were not looked at.
        judged: How many labels were.
    """

    samples: Samples
    rows: np.ndarray
    looks: list[Look]
    bad: list[BadFile]
    groups: list[Group]
    faults: list[TlkitError]
    suspects: list[Suspect] | None
    judged: int


def check_data(
    checking: config.Checking,
    network: config.Network,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Find what is wrong in a folder of images; see ``tlkit check-data --help``."""
    started = time.monotonic()
    ignored = _ignored(checking.ignore)
    _refuse_out(output.out, checking.write_manifest)
    faults: list[TlkitError] = []
    samples = read_images(checking.data, faults.append, console.progress)
    for line in samples.remarks():
        console.warn(line)
    if checking.write_manifest is not None:
        _refuse_unspeakable(samples)
    deep = _deep(network, compute, passing, console) if checking.deep else None
    if output.plan:
        return _plan(samples, deep, console)
    found = _judge(samples, faults, deep, compute, console)
    summary = _summary(found, deep, ignored)
    if checking.write_manifest is not None:
        summary["manifest"] = _write_clean(found, checking.write_manifest)
    _show(console, checking.data, summary)
    if output.out is not None:
        from tlkit.reports.audit import AuditPage, write_audit  # waits for torchvision

        told = {"command": "check-data", "version": __version__, "seconds": round(time.monotonic() - started, 3)}
        title = f"check-data {checking.data.absolute().name}"
        write_audit(output.out, AuditPage(title, told | summary, samples.root))
        summary["out"] = str(output.out)
        console.line(f"page      {output.out}")
    if checking.write_manifest is not None:
        told = summary["manifest"]
        left_out = f", {told['dropped']} left out: {_dropped_file(checking.write_manifest)}" if told["dropped"] else ""
        console.line(f"manifest  {checking.write_manifest}: {told['kept']} images{left_out}")
    failed = checking.strict and any(summary["findings"].values())
    return summary | ({"exit_code": 1} if failed else {})


def _ignored(text: str | None) -> set[str]:
    known = [kind.key.replace("_", "-") for kind in KINDS]
    given = [word.strip() for word in (text or "").split(",") if word.strip()]
    for word in given:
        if word not in known:
            remedy = did_you_mean(word, known) or f"known kinds: {', '.join(known)}"
            raise TlkitError(f"unknown kind '{word}'", where="--ignore", remedy=remedy)
    return {word.replace("-", "_") for word in given}


def _refuse_out(page: Path | None, manifest: Path | None) -> None:
    """Raise before any work where what is asked for could not be written in the end."""
    for path, flag, endings in ((page, "--out", (".html",)), (manifest, "--write-manifest", (".csv", ".parquet"))):
        if path is None:
            continue
        if path.suffix.lower() not in endings:
            what = f"'{path.name}' does not end in {' or '.join(endings)}"
            raise TlkitError(what, where=flag, remedy=f"give FILE{endings[0]}")
        run_folder.refuse_existing(path)
        if not path.absolute().parent.is_dir():
            raise TlkitError("there is no such folder", where=path.parent, remedy="make it first")
    if manifest is not None:
        run_folder.refuse_existing(_dropped_file(manifest))


def _refuse_unspeakable(samples: Samples) -> None:
    """Raise where no manifest could say what the images are."""
    names = {name.strip() for name in samples.classes}
    if isinstance(samples.root, Shards):
        what, remedy = "images in shards are no files that a manifest could name", "clean the folder, then shard it"
        raise TlkitError(what, where="--write-manifest", remedy=remedy)
    try:
        str(samples.root.absolute()).encode()
    except UnicodeEncodeError:
        what, remedy = "the folder's name is not valid UTF-8, which a manifest has to be", "rename the folder"
    else:
        if len(names) == len(samples.classes) and "" not in names:
            return
        labelled = any(samples.classes)
        what = "class folders differ in spaces around their names alone" if labelled else "the images have no labels"
        remedy = "rename them" if labelled else "put the images of each class into a folder of its own, named after it"
    raise TlkitError(what, where="--write-manifest", remedy=remedy)


def _deep(network: config.Network, compute: config.Compute, passing: config.Passing, console: Console) -> Deep:
    """The network to look with; imported here, since a look without one should not wait for it."""
    from tlkit.audit.deep import Deep
    from tlkit.commands.passing import how

    deep = Deep.of(network, compute, how(compute, console, passing))
    for line in deep.loaded.remarks:
        console.warn(line)
    return deep


def _plan(samples: Samples, deep: Deep | None, console: Console) -> dict[str, Any]:
    console.line(f"{len(samples)} images of {len(samples.classes)} classes would be decoded and compared")
    if deep is None:
        return {"plan": {"images": len(samples), "deep": False}}
    console.line(f"and passed through {deep.loaded.title}, weights: {deep.loaded.weights}")
    return {**deep.told, "plan": {"images": len(samples), "deep": True}}


def _judge(
    samples: Samples,
    faults: Sequence[TlkitError],
    deep: Deep | None,
    compute: config.Compute,
    console: Console,
) -> Found:
    """Look at each image, pass it through the network where there is one, and compare."""
    seen = look_at(samples.root, samples.paths, workers=compute.workers, progress=console.progress)
    rows = np.array([row for row, one in enumerate(seen) if isinstance(one, Look)], dtype=np.int64)
    bad = [one for one in seen if isinstance(one, BadFile)]
    features = None
    if deep is not None:
        passed = deep.features(samples.take(rows))
        bad += passed.bad  # gone since they were looked at
        rows, features = rows[passed.rows], passed.values[:, 0]
    looks = [one for row in rows.tolist() if isinstance(one := seen[row], Look)]
    groups = find_groups(
        [one.digest for one in looks],
        hashes(looks),
        thumbnails(looks),
        np.array([is_blank(one) for one in looks], dtype=bool),
        features,
        samples.labels[rows],
    )
    suspects, judged = None, 0
    if deep is not None and features is not None:
        suspects, judged = deep.suspects(features, samples.labels[rows], groups)
        suspects = [replace(one, row=int(rows[one.row])) for one in suspects]
    groups = [Group(tuple(rows[list(group.rows)].tolist()), group.found_by) for group in groups]
    faults = [*faults, *_few_images(samples, bad)]
    return Found(samples, rows, looks, bad, groups, faults, suspects, judged)


def _few_images(samples: Samples, bad: Sequence[BadFile]) -> list[TlkitError]:
    """Classes that nothing can be learnt of."""
    unreadable = {file.path for file in bad}
    readable = np.array([path not in unreadable for path in samples.paths], dtype=bool)
    train = (samples.splits == "train") | (samples.splits == "")
    images = np.bincount(samples.labels[readable & train], minlength=len(samples.classes))
    of = " of train" if samples.splits.any() else ""
    remedy = "add images: each class needs at least two to be learnt"
    return [
        TlkitError(f"class '{name}' has {('no image', 'a single image')[count]}{of}", remedy=remedy)
        for name, count in zip(samples.classes, images.tolist(), strict=True)
        if name and count < 2
    ]


def _summary(found: Found, deep: Deep | None, ignored: set[str]) -> dict[str, Any]:
    samples, looks = found.samples, found.looks
    paths = [samples.paths[row] for row in found.rows.tolist()]
    seen = list(zip(paths, looks, strict=True))
    splits = {name: int((samples.splits == name).sum()) for name in SPLITS if name in samples.splits}
    labelled = any(samples.classes)
    number_of = np.bincount(samples.labels, minlength=len(samples.classes)).tolist()
    images = dict(zip(samples.classes, number_of, strict=True)) if labelled else {}
    duplicates = [_duplicates(samples, group) for group in found.groups]
    summary: dict[str, Any] = {
        "data": str(samples.root),
        "images": len(samples),
        "readable": len(looks),
        "splits": splits,
        "corrupt": [{"path": file.path, "reason": file.reason} for file in found.bad],
        "structure": [{"what": fault.what, "remedy": fault.remedy} for fault in found.faults],
        "duplicates": duplicates,
        "classes": [_class(name, count, samples) for name, count in images.items()],
        "deep": deep is not None,
        "label_suspects": None if found.suspects is None else [_suspect(samples, one) for one in found.suspects],
        "labels_judged": found.judged,
        "imbalance": rare_classes(images),
        "blank": [{"path": path} for path, look in seen if is_blank(look)],
        "blurred": [{"path": path, "sharpness": round(look.sharpness, 4)} for path, look in seen if is_blurred(look)],
        "odd_aspect": _sized(seen, odd_aspects(looks)),
        "small": _sized(seen, small_ones(looks)),
        "wrong_suffix": [
            {"path": path, "format": look.stored.format} for path, look in seen if has_wrong_suffix(path, look)
        ],
        "formats": dict(Counter(look.stored.format for look in looks).most_common()),
        "modes": dict(Counter(look.stored.mode for look in looks).most_common()),
        "sizes": _sizes(looks),
        "ignored": dict(samples.ignored.most_common()),
        "heic_left_out": samples.heic,
    }
    if deep is not None:
        summary |= deep.told
    exact = [one for one in duplicates if one["kind"] == "exact"]
    number = {kind.key: len(summary[kind.key] or []) for kind in KINDS if kind.key in summary} | {
        "across_splits": sum(one["across_splits"] for one in duplicates),
        "across_classes": sum(one["across_classes"] for one in duplicates),
        "exact_duplicates": len(exact),
        "near_duplicates": len(duplicates) - len(exact),
    }
    return summary | {"findings": {kind.key: number[kind.key] for kind in KINDS if kind.key not in ignored}}


def _duplicates(samples: Samples, group: Group) -> dict[str, Any]:
    rows = list(group.rows)
    return {
        "paths": [samples.paths[row] for row in rows],
        "kind": "exact" if group.exact else "near",
        "found_by": group.found_by,
        "across_splits": len(set(samples.splits[rows].tolist())) > 1,
        "across_classes": len(set(samples.labels[rows].tolist())) > 1,
        "splits": samples.splits[rows].tolist(),
        "labels": [samples.classes[label] for label in samples.labels[rows]],
    }


def _class(name: str, count: int, samples: Samples) -> dict[str, Any]:
    own = samples.splits[samples.labels == samples.classes.index(name)]
    return {"class": name, "images": count} | {
        part: int((own == part).sum()) for part in SPLITS if part in samples.splits
    }


def _suspect(samples: Samples, suspect: Suspect) -> dict[str, Any]:
    return {
        "path": samples.paths[suspect.row],
        "label": samples.classes[samples.labels[suspect.row]],
        "suggested": samples.classes[suspect.suggested],
        "probability": round(suspect.probability, 6),
        "suggested_probability": round(suspect.suggested_probability, 6),
    }


def _sized(seen: Sequence[tuple[str, Look]], mask: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"path": path, "width": look.stored.width, "height": look.stored.height}
        for (path, look), odd in zip(seen, mask.tolist(), strict=True)
        if odd
    ]


def _sizes(looks: Sequence[Look]) -> dict[str, dict[str, float]]:
    sides = {name: [getattr(look.stored, name) for look in looks] for name in ("width", "height")}
    return {
        name: {"min": min(values), "median": float(np.median(values)), "max": max(values)}
        for name, values in sides.items()
        if values
    }


def _dropped_file(manifest: Path) -> Path:
    """Where the images that a cleaned manifest leaves out are listed: beside it."""
    return manifest.with_name(f"{manifest.name}.dropped.csv")


def _write_clean(found: Found, path: Path) -> dict[str, Any]:
    samples = found.samples
    cleaned = clean(samples, {file.path: file.reason for file in found.bad}, found.groups)
    dropped = sorted(cleaned.dropped.items())
    write_manifest(path, _columns(samples, cleaned, path))
    rows = ((samples.paths[row], samples.classes[samples.labels[row]], reason) for row, reason in dropped)
    run_folder.write_rows(_dropped_file(path), ("path", "label", "reason"), rows)
    return {"path": str(path), "kept": len(cleaned.rows), "dropped": len(dropped)}


def _columns(samples: Samples, cleaned: Cleaned, manifest: Path) -> dict[str, list[str]]:
    """The columns of a manifest, whose paths are as seen from its folder where they lie below it, else absolute."""
    kept, folder = samples.take(cleaned.rows), manifest.absolute().parent
    assert isinstance(samples.root, Path)
    root = samples.root.absolute()
    root = root.relative_to(folder) if root.is_relative_to(folder) else root
    columns = {
        "path": [_unstripped((root / path).as_posix()) for path in kept.paths],
        "label": [kept.classes[label] for label in kept.labels],
    }
    if kept.splits.any():
        columns["split"] = kept.splits.tolist()
    return columns | ({"group": cleaned.groups} if cleaned.groups else {})


def _unstripped(path: str) -> str:
    """A path that stays what it is where spaces around it are taken away, as they are from values of a manifest."""
    return path if path == path.lstrip() else f"./{path}"


def _show(console: Console, data: Path, summary: Mapping[str, Any]) -> None:
    title = f"{data}: {summary['images']} images"
    if summary["classes"]:
        title += f" of {len(summary['classes'])} classes"
    rows = [
        [count, worded(kind.name, count), _example(kind.key, summary)]
        for kind in KINDS
        if (count := summary["findings"].get(kind.key))
    ]
    if rows:
        console.table(title, ["found", "", "for instance"], rows)
    else:
        console.line(f"{title}, nothing found")
    _show_leaks(console, summary)
    _show_suspects(console, summary)
    _show_classes(console, summary)
    if summary["sizes"]:
        sides = " x ".join(f"{summary['sizes'][side]['median']:.0f}" for side in ("width", "height"))
        kinds = (", ".join(f"{count} {name}" for name, count in summary[key].items()) for key in ("formats", "modes"))
        console.line(f"median size {sides}; {'; '.join(kinds)}")
    if not summary["deep"]:
        console.line("labels, and copies that are cropped or mirrored, are looked at with --deep")


def _example(kind: str, summary: Mapping[str, Any]) -> str:
    """The first of the findings of a kind, in words."""
    groups = summary["duplicates"]
    match kind:
        case "across_splits" | "across_classes":
            return _group_words(next(one for one in groups if one[kind]))
        case "exact_duplicates" | "near_duplicates":
            return _group_words(next(one for one in groups if one["kind"] == kind.partition("_")[0]))
        case "structure":
            return f"{summary[kind][0]['what']}"
        case "imbalance":
            return f"{summary[kind][0]}"
    first = summary[kind][0]
    detail = {
        "corrupt": lambda: f": {first['reason']}",
        "wrong_suffix": lambda: f" is {first['format']}",
        "odd_aspect": lambda: f" ({first['width']} x {first['height']})",
        "small": lambda: f" ({first['width']} x {first['height']})",
        "label_suspects": lambda: f" is {first['label']}, looks like {first['suggested']}",
    }
    return first["path"] + (detail[kind]() if kind in detail else "")


def _group_words(group: Mapping[str, Any]) -> str:
    more = len(group["paths"]) - 2
    return f"{group['paths'][0]} = {group['paths'][1]}" + (f" and {more} more" if more else "")


def _show_leaks(console: Console, summary: Mapping[str, Any]) -> None:
    leaks = [one for one in summary["duplicates"] if one["across_splits"]]
    if leaks and "across_splits" in summary["findings"]:
        rows = [[_group_words(one), one["kind"], one["found_by"]] for one in leaks[:SHOWN]]
        console.table("images that stand in two splits", ["the same", "kind", "found by"], rows)


def _show_suspects(console: Console, summary: Mapping[str, Any]) -> None:
    suspects = summary["label_suspects"] if "label_suspects" in summary["findings"] else None
    if suspects:
        rows = [[one["path"], one["label"], one["suggested"], one["probability"]] for one in suspects[:SHOWN]]
        title = f"labels to look at, of {summary['labels_judged']}, the most suspect first"
        console.table(title, ["image", "label", "looks like", "probability of the label"], rows)


def _show_classes(console: Console, summary: Mapping[str, Any]) -> None:
    classes = sorted(summary["classes"], key=lambda one: one["images"])
    if len(classes) > SHOWN:
        title, half = f"the smallest and the largest of {len(classes)} classes", SHOWN // 2
        classes = [*classes[:half], *classes[-half:]]
    else:
        title = "classes"
    names = ["images", *summary["splits"]]
    if classes:
        console.table(title, ["class", *names], [[one["class"], *(one[name] for name in names)] for one in classes])
