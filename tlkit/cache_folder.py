"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SHARDS = "shards"
"""Folder in there for copies of shards from elsewhere, which have a budget of their own."""


def default_folder() -> Path:
    """``TLKIT_CACHE``, or the folder where the system keeps caches."""
    if given := os.environ.get("TLKIT_CACHE"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tlkit"
    variable, otherwise = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / otherwise) / "tlkit"
