"""What tells whether the files that a step reads have changed: names, sizes and times of change, as make does."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tlkit.shards.reading import ENDING, expanded
from tlkit.shards.remote import is_url


def fingerprint(text: str, without: Path) -> str:
    """A digest of the file, folder or pattern that ``text`` names; empty where it names nothing here.

    Args:
        text: A path, a pattern, or shards (``name-{000..099}.tar``).
        without: The pipeline's own folder, which changes while it runs.
    """
    paths = [text] if os.path.lexists(text) else sorted(glob.glob(text, recursive=True))  # noqa: PTH207  # takes absolute ones
    if not paths and "{" in text and text.endswith(ENDING) and not is_url(text):
        paths = [path for path in expanded(text) if os.path.lexists(path)]
    without = without.absolute()
    lines = [line for path in paths for line in _lines(Path(path).absolute(), Path(path).absolute(), without)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest() if lines else ""


def _lines(path: Path, top: Path, without: Path) -> Iterator[str]:
    if path == without:
        return
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        yield f"{path.relative_to(top)}/"
        for name in names:
            yield from _lines(path / name, top, without)
        return
    try:
        found = path.stat()
    except OSError:
        yield f"{path.relative_to(top)}: not there"  # a link to nowhere
        return
    yield f"{path.relative_to(top)} {found.st_size} {found.st_mtime_ns}"
