"""Tables of the report page: from what a run's summary holds to rows and sentences; what it lacks is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlkit.reports.words import METRICS, percent, plural, undefined

CLASSES_SHOWN = 50
SPLITS = ("train", "val", "test")  # the usual order; other splits follow


def phases(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The phases in their order, and which columns any of them fills beyond those that all have."""
    rows = summary.get("phases") or []
    extra = {key for key in ("rates", "kept", "why") if any(row.get(key) not in (None, "", {}) for row in rows)}
    return {"rows": rows, "numbered": len(rows) > 1, "extra": extra}


def cross_validation(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Figures of each fold, their mean and spread, and which of them any fold has."""
    found = summary.get("cross_validation") or {}
    folds = found.get("folds") or []
    if not folds:
        return None
    mean, spread = found.get("mean") or {}, found.get("sd") or {}
    tables = [mean, *(fold.get("metrics") or {} for fold in folds)]
    columns = [(key, name) for key, name, _ in METRICS if any(table.get(key) is not None for table in tables)]
    return {"folds": folds, "mean": mean, "sd": spread, "columns": columns}


def worst_classes(per_class: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All classes in their own order or, where they are many, those of lowest recall (undefined ones last)."""
    if len(per_class) <= CLASSES_SHOWN:
        return per_class

    def recall(row: Mapping[str, Any]) -> float:
        return math.inf if undefined(row.get("recall")) else row["recall"]

    return sorted(per_class, key=recall)[:CLASSES_SHOWN]


def calibration(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a temperature did: figures before and after it."""
    found = summary.get("calibration") or {}
    before, after = found.get("before") or {}, found.get("after") or {}
    if not before or not after:
        return None
    columns = [(key, name) for key, name, _ in METRICS if key in ("ece", "loss", "brier") and key in before]
    return {**dict.fromkeys(("temperature", "fitted_on", "fitted_images")), **found, "columns": columns}


def views(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What test-time views changed against the centre view alone, and a sentence that judges it."""
    audit = summary.get("tta_audit")
    if not audit:
        return None
    fixed, broken = audit.get("fixed") or 0, audit.get("broken") or 0
    center, merged = audit.get("center_top1"), metrics.get("top1")
    if not fixed and not broken:
        verdict = "They did nothing: no image became right or wrong by them. The centre view alone is as good."
    elif broken > fixed and audit.get("p", 0.0) < 0.05:
        verdict = "They did harm: more images were put wrong than right. Leave them out (--tta center)."
    elif broken > fixed:
        verdict = "They gained nothing: more images were put wrong than right, though that may be chance."
    elif broken == fixed:
        verdict = "Nothing was gained on the whole: as many images were put wrong as right."
    else:
        verdict = f"On the whole {plural(fixed - broken, 'image')} more came out right."
    return {
        "fixed": plural(fixed, "image"),
        "broken": plural(broken, "image"),
        "scores": f"{percent(center)} with the centre view alone, {percent(merged)} with all views",
        "harm": broken > fixed,
        "verdict": verdict,
        "views": audit.get("views"),
        "network_seconds": audit.get("network_seconds"),
    }


def data(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Images of each class by split; where classes are many, the largest and the smallest ones."""
    found = summary.get("data") if isinstance(summary.get("data"), Mapping) else None
    if not found:
        return None
    names = dict.fromkeys(split for counts in found.values() for split in counts)
    splits = [split for split in SPLITS if split in names] + [split for split in names if split not in SPLITS]
    rows = [
        {"class": name, "counts": [counts.get(split) or 0 for split in splits]} | {"images": sum(counts.values())}
        for name, counts in found.items()
    ]
    left_out = max(len(rows) - CLASSES_SHOWN, 0)
    totals = [sum(row["counts"][place] for row in rows) for place in range(len(splits))]
    if left_out:
        ranked = sorted(rows, key=lambda row: -row["images"])
        rows = ranked[: CLASSES_SHOWN // 2] + ranked[-(CLASSES_SHOWN // 2) :]
    most = max(row["images"] for row in rows)
    return {"splits": splits, "rows": rows, "most": max(most, 1), "left_out": left_out, "totals": totals}
