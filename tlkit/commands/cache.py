"""Show and clear what runs keep of frozen layers' outputs, and copies of shards from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tlkit import config
from tlkit.cache_folder import default_folder
from tlkit.commands.console import Console
from tlkit.errors import TlkitError
from tlkit.shards import remote
from tlkit.training.cache import FeatureCache, Stored

UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def cache(action: config.CacheAction, output: config.Output, console: Console) -> dict[str, Any]:
    """Show the cache, or clear it; see ``tlkit cache --help``."""
    if action.older_than is not None and not action.clear:
        raise TlkitError("does nothing without --clear", where="--older-than", remedy="add --clear")
    kept = FeatureCache(default_folder(), budget=0)
    summary: dict[str, Any] = {"folder": str(kept.folder)}
    if action.clear and not output.plan:
        age = config.seconds(action.older_than) if action.older_than is not None else None
        try:
            freed = remote.remove_copies(age or 0.0)
            done = kept.clear(age)
        except OSError as error:
            raise TlkitError(
                f"cannot be cleared ({error.strerror})", where=kept.folder, remedy="check its rights"
            ) from error
        console.line(f"{_megabytes(done.bytes + freed)} removed from {kept.folder}")
        if done.in_use:
            console.line(f"what a run is using stays (in {done.in_use} files)")
        summary |= {"removed_bytes": done.bytes + freed, "removed": done.removed, "in_use": done.in_use}
    entries = kept.entries()
    rows = _rows(entries)
    if rows:
        console.table("", ["model", "what", "views", "rows", "size", "used"], rows)
    copies = remote.copies()
    shards = sum(copy.bytes for copy in copies)
    used = kept.used() + shards
    if copies:
        console.line(
            f"{len(copies)} copies of shards, {_megabytes(shards)}, used {_ago(time.time() - copies[-1].last_used)} ago"
        )
    if not action.clear:
        something = rows or copies
        console.line(f"{_megabytes(used)} in {kept.folder}" if something else f"nothing is kept in {kept.folder}")
    told = [
        {"key": one.key, "images": one.rows, "bytes": one.bytes, "last_used": one.last_used, "in_use": one.in_use}
        for one in entries
    ]
    return summary | {"bytes": used, "entries": told, "shards": {"copies": len(copies), "bytes": shards}}


def _rows(entries: Sequence[Stored]) -> list[list[Any]]:
    """One row for all views of one thing; what was used last comes first."""
    alike: dict[tuple[str, str], list[Stored]] = {}
    for one in entries:
        alike.setdefault((one.key.get("model", ""), one.key.get("what", "")), []).append(one)
    return [
        [
            model,
            what,
            len({one.key.get("view") for one in group}),
            sum(one.rows for one in group),
            _megabytes(sum(one.bytes for one in group)),
            "now" if any(one.in_use for one in group) else f"{_ago(time.time() - group[0].last_used)} ago",
        ]
        for (model, what), group in alike.items()
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _ago(seconds: float) -> str:
    return next((f"{seconds / unit:.0f} {name}" for name, unit in UNITS if seconds >= unit), f"{seconds:.0f} s")
