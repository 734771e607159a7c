"""``tlkit cache``: what runs keep, as a table and as JSON, and clearing it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlkit.training.cache import FeatureCache

Tlkit = Callable[..., Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    """The cache that commands use here; nothing is in it."""
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))
    return FeatureCache(tmp_path / "cache", 10**9)


@pytest.fixture
def filled(cache: FeatureCache) -> FeatureCache:
    """Two views of one thing, used two hours and three days ago, and another thing, used now."""
    entries = (
        ("output of stage3", "0", 2 * 3600),
        ("output of stage3", "center", 3 * 86400),
        ("pooled features", "c", 0),
    )
    for what, view, age in entries:
        key = {"model": "resnet18", "what": what, "view": view}
        with cache.write(key, 20, 100_000) as writer:
            writer.add([f"{number:032x}" for number in range(20)], np.zeros((20, 100_000), dtype=np.uint8))
        for index in cache._of(key).glob("*.index"):
            os.utime(index, (time.time() - age - 1,) * 2)
    return cache


@pytest.mark.parametrize("options", [(), ("--clear",)])
def test_nothing_is_kept(tlkit: Tlkit, cache: FeatureCache, options: tuple[str, ...]) -> None:
    done = tlkit("cache", *options)
    assert done.code == 0, done.err
    assert str(cache.folder) in done.out and ("nothing is kept" in done.out or "0.0 MB removed" in done.out)
    assert not cache.folder.exists()
    told = tlkit("cache", *options, "--json").json
    assert (told["folder"], told["bytes"], told["entries"]) == (str(cache.folder), 0, [])


def test_the_table_puts_views_of_one_thing_together(tlkit: Tlkit, filled: FeatureCache) -> None:
    done = tlkit("cache")
    assert done.code == 0
    rows = [line for line in done.out.splitlines() if "resnet18" in line]
    assert len(rows) == 2
    first, second = rows
    assert all(word in first for word in ("pooled features", "1", "20", "2.0 MB", "s ago"))
    assert all(word in second for word in ("output of stage3", "2", "40", "4.0 MB", "2 h ago"))
    assert f"6.0 MB in {filled.folder}" in done.out


def test_json_tells_each_entry(tlkit: Tlkit, filled: FeatureCache) -> None:
    told = tlkit("cache", "--json").json
    assert told["folder"] == str(filled.folder)
    assert told["bytes"] == filled.used()
    assert [entry["key"]["view"] for entry in told["entries"]] == ["c", "0", "center"], "what was used last comes first"
    for entry in told["entries"]:
        assert entry["images"] == 20 and entry["bytes"] > 2_000_000 and entry["in_use"] is False
        assert entry["key"]["model"] == "resnet18"
    ages = [time.time() - entry["last_used"] for entry in told["entries"]]
    assert ages == pytest.approx([0, 7200, 3 * 86400], abs=30)


def test_it_is_shown_without_being_used(tlkit: Tlkit, filled: FeatureCache) -> None:
    before = {path: path.stat().st_mtime_ns for path in filled.folder.rglob("*.index")}
    assert tlkit("cache").code == 0
    assert {path: path.stat().st_mtime_ns for path in filled.folder.rglob("*.index")} == before


@pytest.mark.parametrize(("older_than", "left"), [(None, 0), ("1h", 1), ("1d", 2), ("30d", 3)])
def test_clearing(tlkit: Tlkit, filled: FeatureCache, older_than: str | None, left: int) -> None:
    before = filled.used()
    told = tlkit("cache", "--clear", *(("--older-than", older_than) if older_than else ()), "--json").json
    assert (told["removed"], told["in_use"], len(told["entries"])) == (3 - left, 0, left)
    assert told["bytes"] == filled.used() and told["removed_bytes"] == before - filled.used()
    assert len(filled.entries()) == left


def test_what_is_in_use_stays(tlkit: Tlkit, filled: FeatureCache) -> None:
    with filled.open({"model": "resnet18", "what": "pooled features", "view": "c"}):
        assert [entry["in_use"] for entry in tlkit("cache", "--json").json["entries"]] == [True, False, False]
        assert "now" in next(line for line in tlkit("cache").out.splitlines() if "pooled features" in line)
        done = tlkit("cache", "--clear")
        assert done.code == 0
        assert f"4.0 MB removed from {filled.folder}" in done.out
        assert "what a run is using stays (in 1 files)" in done.out
    assert len(filled.entries()) == 1


def test_a_plan_clears_nothing(tlkit: Tlkit, filled: FeatureCache) -> None:
    assert tlkit("cache", "--clear", "--plan").code == 0
    assert len(filled.entries()) == 3


def test_older_than_alone_is_refused(tlkit: Tlkit, filled: FeatureCache) -> None:
    done = tlkit("cache", "--older-than", "1d")
    assert done.code == 1
    assert done.error == "--older-than: does nothing without --clear; add --clear"
    assert len(filled.entries()) == 3


@pytest.mark.parametrize("text", ["soon", "3", "-1d"])
def test_a_duration_that_is_not_understood_is_told(tlkit: Tlkit, filled: FeatureCache, text: str) -> None:
    done = tlkit("cache", "--clear", "--older-than", text)
    assert done.code != 0
    assert "--older-than" in done.err and "Traceback" not in done.err
    assert len(filled.entries()) == 3


def test_a_folder_that_is_a_file_is_told(tlkit: Tlkit, cache: FeatureCache) -> None:
    cache.folder.write_text("x")
    for options in ((), ("--clear",)):
        done = tlkit("cache", *options)
        assert "Traceback" not in done.err
        assert done.code == 0, done.err
    assert cache.folder.read_text() == "x"


def test_what_a_run_keeps_is_shown(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], cache: FeatureCache, tmp_path: Path
) -> None:
    options = ("--stages", 2, "--epochs-per-stage", 2, "--patience", 0, "--precision", "fp32", "--quiet")
    assert tlkit("unfreeze", shapes, *small, *options, "--out", tmp_path / "run").code == 0
    told = tlkit("cache", "--json").json["entries"]
    kept = {(entry["key"]["what"], entry["key"]["view"].rpartition(", ")[2]): entry["images"] for entry in told}
    train, val = 30, 6
    assert kept == {
        ("pooled features", "center"): train + val,
        ("output of stage3", "number 0"): train,
        ("output of stage3", "number 1"): train,
        ("output of stage3", "center"): val,
    }
    assert all(entry["key"]["model"] == "test_resnet" and not entry["in_use"] for entry in told)
