"""The cache of frozen layers' outputs: what goes in comes out, never above the budget, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tlkit.cache_folder import default_folder
from tlkit.training import cache as cache_module
from tlkit.training.cache import FeatureCache, NoRoom

GB = 10**9
ROW = 1000  # bytes
unix = pytest.mark.skipif(sys.platform == "win32", reason="locks and signals are of Unix")

# A process that does something to a cache and then waits, as long as its standard input is open.
PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
from tlkit.training.cache import FeatureCache, NoRoom

what, folder, budget, key = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), {"what": sys.argv[4]}
cache = FeatureCache(folder, budget)
rows = lambda count, fill: np.full((count, 1000), fill, dtype=np.uint8)
if what == "hold":
    entry = cache.open(key)
    assert entry.find([f"{0:032x}"])[0] >= 0
elif what == "write":
    writer = cache.write(key, 20, 1000)
    writer.__enter__()
    writer.add([f"{number:032x}" for number in range(10)], rows(10, 7))
    writer._held.flush()
print("ready", flush=True)
if what == "many":
    for number in range(60):
        try:
            with cache.write({"what": f"{sys.argv[4]} {number}"}, 5, 1000) as writer:
                writer.add([f"{number:032x}"] * 5, rows(5, number))
                time.sleep(0.002)
        except NoRoom:
            pass
    print("done", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(what: str, folder: Path, key: str = "a", budget: int = GB) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready."""
    command = [sys.executable, "-c", PROGRAM, what, str(folder), str(budget), key]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def names(*numbers: int) -> list[str]:
    """Content digests of images."""
    return [f"{number:032x}" for number in numbers]


def values(*numbers: int, each: int = ROW) -> np.ndarray:
    """A row of bytes for each image, which tells them apart."""
    return np.stack([np.random.default_rng(number).integers(0, 256, each, dtype=np.uint8) for number in numbers])


def put(cache: FeatureCache, key: str, *numbers: int, each: int = ROW) -> None:
    with cache.write({"what": key}, len(numbers), each) as writer:
        writer.add(names(*numbers), values(*numbers, each=each))


def there(cache: FeatureCache, key: str, numbers: Sequence[int], each: int = ROW) -> list[int]:
    """Which images are there; each with its own bytes."""
    with cache.open({"what": key}) as entry:
        places = entry.find(names(*numbers))
        found = [number for number, place in zip(numbers, places, strict=True) if place >= 0]
        if found:
            assert np.array_equal(entry.read(places[places >= 0]), values(*found, each=each))
    return found


def aged(cache: FeatureCache, key: str, seconds: float) -> None:
    """As if last used so long ago."""
    for index in cache._of({"what": key}).glob("*.index"):
        os.utime(index, (time.time() - seconds,) * 2)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", GB)


# In and out


@pytest.mark.parametrize("each", [1, 7, 4096, 100_000])
def test_what_goes_in_comes_out(cache: FeatureCache, each: int) -> None:
    put(cache, "a", *range(5), each=each)
    put(cache, "a", 7, 8, each=each)
    put(cache, "b", 1, each=each)
    assert there(cache, "a", [8, 0, 6, 4, 7, 0], each) == [8, 0, 4, 7, 0]
    assert there(cache, "b", range(9), each) == [1]
    assert there(cache, "c", range(9), each) == []


def test_keys_of_any_order_are_the_same_and_any_value_counts(cache: FeatureCache) -> None:
    with cache.write({"a": 1, "b": [2, {"c": "café"}]}, 1, ROW) as writer:
        writer.add(names(3), values(3))
    for key, expected in (
        ({"b": [2, {"c": "café"}], "a": 1}, 0),
        ({"a": 1, "b": [2, {"c": "cafe"}]}, -1),
        ({"a": "1", "b": [2, {"c": "café"}]}, -1),
        ({"a": 1}, -1),
    ):
        with cache.open(key) as entry:
            assert entry.find(names(3)).tolist() == [expected]
    (stored,) = cache.entries()
    assert stored.key == {"a": 1, "b": [2, {"c": "café"}]}


def test_fewer_rows_than_there_was_room_for(cache: FeatureCache) -> None:
    with cache.write({"what": "a"}, 100, ROW) as writer:
        writer.add(names(1, 2), values(1, 2))
    assert there(cache, "a", range(4)) == [1, 2]
    assert cache.used() < 3 * ROW + 4096


def test_no_rows_leave_nothing(cache: FeatureCache) -> None:
    with cache.write({"what": "a"}, 100, ROW):
        pass
    assert there(cache, "a", range(4)) == []
    assert list(cache.folder.glob("*/*.rows")) == []
    put(cache, "b", 1)
    assert [one.key["what"] for one in cache.entries()] == ["b"], "the empty folder is gone"


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_keeps_what_was_added(cache: FeatureCache, kind: type[BaseException]) -> None:
    with pytest.raises(kind), cache.write({"what": "a"}, 10, ROW) as writer:
        writer.add(names(1, 2), values(1, 2))
        writer.add(names(3), values(3))
        raise kind
    assert there(cache, "a", range(9)) == [1, 2, 3]


def test_rows_of_another_length_are_a_mistake(cache: FeatureCache) -> None:
    with pytest.raises(AssertionError), cache.write({"what": "a"}, 2, ROW) as writer:
        writer.add(names(1), values(1, each=ROW - 1))


@pytest.mark.parametrize("many", [1, 500])
def test_entries_of_many_shards(cache: FeatureCache, many: int) -> None:
    for number in range(0, many, 25):
        put(cache, "a", *range(number, min(many, number + 25)), each=10)
    wanted = random.Random(0).sample(range(many), many)
    assert there(cache, "a", wanted, each=10) == wanted


# The budget


def test_what_was_used_longest_ago_goes_first(cache: FeatureCache) -> None:
    for number, key in enumerate("abcd"):
        put(cache, key, *range(10))
        aged(cache, key, 1000 - number)
    assert there(cache, "a", [1]) == [1], "used now"
    small = FeatureCache(cache.folder, cache.used() + 5000)
    put(small, "e", *range(10))
    assert [key for key in "abcde" if there(small, key, [1])] == ["a", "c", "d", "e"]


def test_no_more_goes_than_is_necessary(cache: FeatureCache) -> None:
    for number in range(20):
        put(cache, f"{number}", *range(5))
        aged(cache, f"{number}", 1000 - number)
    used = cache.used()
    small = FeatureCache(cache.folder, used)
    put(small, "new", *range(5))
    left = [number for number in range(20) if there(small, f"{number}", [1])]
    assert left == list(range(20 - len(left), 20)) and len(left) in (17, 18)
    assert small.used() <= used


@pytest.mark.parametrize("budget", [0, 1000, 5000])
def test_what_does_not_fit_is_told_and_nothing_goes_for_it(cache: FeatureCache, budget: int) -> None:
    put(cache, "a", 1, 2)
    small = FeatureCache(cache.folder, budget)
    with pytest.raises(NoRoom, match=r"0 MB are needed, 0 MB of --cache-budget are left"):
        small.write({"what": "b"}, 10, ROW)
    assert there(cache, "a", [1, 2]) == [1, 2]


def test_room_is_taken_at_once(cache: FeatureCache) -> None:
    """A second writer does not get what the first has not yet filled."""
    small = FeatureCache(cache.folder, 160_000)
    with small.write({"what": "a"}, 100, ROW) as writer:
        assert 100_000 <= small.used() <= 160_000
        with pytest.raises(NoRoom):
            small.write({"what": "b"}, 100, ROW)
        writer.add(names(1), values(1))
    put(small, "b", *range(100))
    assert len(there(small, "b", range(100))) == 100


def test_the_disk_keeps_some_room(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "a", *range(10))
    spare = cache_module.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=spare + 2 * 10**6))
    put(cache, "b", *range(10))
    with pytest.raises(NoRoom, match=r"3 MB are needed, 2 MB of (the )?disk"):
        cache.write({"what": "c"}, 3000, ROW)
    assert there(cache, "a", [1]) == [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=spare - 1))
    with pytest.raises(NoRoom, match="disk"):
        cache.write({"what": "c"}, 1000, ROW)


def test_a_disk_that_is_full_after_all(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(NoRoom, match="No space left on device"):
        cache.write({"what": "a"}, 10, ROW)
    monkeypatch.undo()
    put(cache, "b", 1)
    assert [path.suffix for path in cache.folder.glob("*/*.rows")] == [".rows"], "nothing is left of the other"


@pytest.mark.parametrize("seed", range(6))
def test_random_work_never_passes_the_budget(tmp_path: Path, seed: int) -> None:
    """Writers that overlap, break off, are killed (their lock is let go) or find no room; readers; clearing."""
    draw, budget = random.Random(seed), 60_000
    cache = FeatureCache(tmp_path / "cache", budget)
    writers: list[Any] = []
    entries: list[Any] = []
    known: dict[str, set[int]] = {}
    for _ in range(150):
        match draw.choice(["write", "write", "write", "end", "end", "break", "read", "close", "clear"]):
            case "write":
                key, count = draw.choice("abcdef"), draw.randint(1, 20)
                try:
                    writer = cache.write({"what": key}, count, ROW)
                except NoRoom:
                    continue
                writer.__enter__()
                numbers = draw.sample(range(30), draw.randint(0, count))
                if numbers:
                    writer.add(names(*numbers), values(*numbers))
                writers.append(writer)
                known.setdefault(key, set()).update(numbers)
            case "end" if writers:
                writers.pop(draw.randrange(len(writers))).__exit__(None, None, None)
            case "break" if writers:
                writers.pop(draw.randrange(len(writers))).__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
            case "read":
                key = draw.choice("abcdef")
                assert set(there(cache, key, range(30))) <= known.get(key, set())
                entries.append(cache.open({"what": key}))
            case "close" if entries:
                entries.pop(draw.randrange(len(entries))).close()
            case "clear" if draw.random() < 0.2:
                cache.clear()
        assert cache.used() <= budget
    for writer in writers:
        writer.__exit__(None, None, None)
    for entry in entries:
        entry.close()
    assert cache.used() <= budget
    cache.clear()
    assert cache.entries() == [] and list(cache.folder.glob("*/*")) == []


# Other processes


@unix
def test_two_processes_at_once_never_pass_the_budget(tmp_path: Path) -> None:
    folder, budget, most = tmp_path / "cache", 100_000, 0
    cache = FeatureCache(folder, budget)
    with another("many", folder, "a", budget) as one, another("many", folder, "b", budget) as two:
        ended = threading.Event()

        def wait() -> None:
            for process in (one, two):
                assert process.stdout is not None
                process.stdout.readline()
            ended.set()

        threading.Thread(target=wait).start()
        while not ended.is_set():
            most = max(most, cache.used())
            time.sleep(0.001)
    assert budget / 2 < most <= budget
    assert cache.entries() and {one.key["what"][0] for one in cache.entries()} <= {"a", "b"}


@unix
def test_what_a_killed_writer_leaves_is_never_served_and_goes_with_the_next(cache: FeatureCache) -> None:
    with another("write", cache.folder) as process:
        assert there(cache, "a", range(10)) == []
        put(cache, "b", 1)
        assert len(list(cache.folder.glob("*/*.rows"))) == 2, "it is still at work"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert there(cache, "a", range(10)) == []
    (left,) = (data for data in cache.folder.glob("*/*.rows") if not data.with_suffix(".index").exists())
    put(cache, "c", 1)
    assert not left.exists() and not left.parent.exists()
    assert there(cache, "b", [1]) == there(cache, "c", [1]) == [1]


@unix
def test_a_writer_killed_before_its_index_was_whole(cache: FeatureCache) -> None:
    put(cache, "a", 1)
    folder = cache._of({"what": "a"})
    (folder / f"0123-{ROW}.rows").write_bytes(bytes(2 * ROW))
    (folder / f"0123-{ROW}.part").write_text("".join(f"{name}\n" for name in names(5, 6))[:-9])
    assert there(cache, "a", range(9)) == [1]
    put(cache, "b", 1)
    assert sorted(path.suffix for path in folder.iterdir()) == [".index", ".json", ".rows"]


@unix
@pytest.mark.parametrize("what", ["hold", "write"])
def test_what_a_process_uses_is_neither_evicted_nor_cleared(cache: FeatureCache, what: str) -> None:
    if what == "hold":
        put(cache, "a", *range(10))
        aged(cache, "a", 1000)
    put(cache, "b", *range(10))
    with another(what, cache.folder):
        aged(cache, "a", 1000)
        assert {one.key["what"]: one.in_use for one in cache.entries()} == {"a": True, "b": False}
        small = FeatureCache(cache.folder, cache.used() + 5000)
        put(small, "c", *range(10))
        assert there(small, "b", [1]) == [], "though it was used later"
        with pytest.raises(NoRoom):
            small.write({"what": "d"}, 25, ROW)
        done = cache.clear()
        assert {one.key["what"] for one in cache.entries()} == {"a"}
        assert done.removed == 1 and done.in_use == (what == "hold")
        if what == "hold":
            assert there(cache, "a", range(10)) == list(range(10))
    assert {one.in_use for one in cache.entries()} <= {False}
    cache.clear()
    assert cache.entries() == []


def test_an_open_entry_is_not_removed_by_its_own_process(cache: FeatureCache) -> None:
    put(cache, "a", 1, 2)
    with cache.open({"what": "a"}) as entry:
        assert cache.clear().in_use == 1
        assert np.array_equal(entry.read(entry.find(names(2, 1))), values(2, 1))
    assert cache.clear().removed == 1


# Broken shards


def cut_rows(index: Path) -> None:
    data = index.with_suffix(".rows")
    data.write_bytes(data.read_bytes()[:-1])


def cut_whole_row(index: Path) -> None:
    data = index.with_suffix(".rows")
    data.write_bytes(data.read_bytes()[:-ROW])


def longer_rows(index: Path) -> None:
    data = index.with_suffix(".rows")
    data.write_bytes(data.read_bytes() * 2)


def no_rows(index: Path) -> None:
    index.with_suffix(".rows").unlink()


def empty_rows(index: Path) -> None:
    index.with_suffix(".rows").write_bytes(b"")


def cut_index(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:-1])


def shorter_index(index: Path) -> None:
    index.write_bytes(index.read_bytes()[: -cache_module.LINE])


def empty_index(index: Path) -> None:
    index.write_bytes(b"")


def binary_index(index: Path) -> None:
    index.write_bytes(b"\xff" * index.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [cut_rows, cut_whole_row, longer_rows, no_rows, empty_rows, cut_index, shorter_index, empty_index, binary_index],
)
def test_a_broken_shard_is_never_served_and_removed(cache: FeatureCache, damage: Any) -> None:
    put(cache, "a", 1, 2)
    put(cache, "a", 3, 4)
    index = next(index for index in cache._of({"what": "a"}).glob("*.index") if names(1)[0] in index.read_text())
    damage(index)
    assert there(cache, "a", range(6)) == [3, 4]
    assert not index.exists() and not index.with_suffix(".rows").exists()
    put(cache, "a", 1, 2)
    assert there(cache, "a", range(6)) == [1, 2, 3, 4]


def test_what_is_no_shard_is_left_out(cache: FeatureCache) -> None:
    put(cache, "a", 1)
    folder = cache._of({"what": "a"})
    for name in ("notes.txt", "strange.index", "strange.rows"):
        (folder / name).write_text("mine")
    (cache.folder / "file").write_text("mine")
    assert there(cache, "a", [1]) == [1]
    put(cache, "b", 1)
    assert len(cache.entries()) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "é"])
def test_a_broken_description_hides_nothing_else(cache: FeatureCache, text: str) -> None:
    put(cache, "a", 1)
    put(cache, "b", 1)
    (cache._of({"what": "a"}) / "about.json").write_text(text)
    assert [one.key for one in cache.entries() if isinstance(one.key, dict)] == [{"what": "b"}]
    assert there(cache, "a", [1]) == [1]


# Clearing


def test_clearing_what_is_old(cache: FeatureCache) -> None:
    for key, age in {"a": 1000, "b": 100, "c": 0}.items():
        put(cache, key, *range(3))
        aged(cache, key, age)
    before = cache.used()
    done = cache.clear(older_than=500)
    assert (done.removed, done.in_use) == (1, 0) and done.bytes == before - cache.used() > 3 * ROW
    assert [one.key["what"] for one in cache.entries()] == ["c", "b"], "what was used last comes first"
    assert cache.clear(older_than=5000).removed == 0
    assert cache.clear().removed == 2
    assert [path.name for path in cache.folder.iterdir()] == [".lock"] and cache.clear().removed == 0


def test_clearing_nothing_makes_nothing(tmp_path: Path) -> None:
    done = FeatureCache(tmp_path / "nowhere", GB).clear()
    assert (done.bytes, done.removed, done.in_use) == (0, 0, 0)
    assert not (tmp_path / "nowhere").exists()
    assert FeatureCache(tmp_path / "nowhere", GB).used() == 0
    assert FeatureCache(tmp_path / "nowhere", GB).entries() == []


def test_entries_are_told(cache: FeatureCache) -> None:
    put(cache, "a", 1, 2)
    put(cache, "a", 3)
    aged(cache, "a", 100)
    (stored,) = cache.entries()
    assert (stored.key, stored.rows, stored.in_use) == ({"what": "a"}, 3, False)
    assert stored.bytes == sum(path.stat().st_size for path in cache._of(stored.key).iterdir())
    assert stored.bytes >= 3 * (ROW + cache_module.LINE) and cache.used() >= stored.bytes
    assert time.time() - stored.last_used == pytest.approx(100, abs=5)


# Folders


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_folder_that_cannot_be_made_is_no_room(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" if place == "a file" else tmp_path / "file" / "cache"
    cache = FeatureCache(folder, GB)
    with pytest.raises(NoRoom, match="cannot be written"):
        cache.write({"what": "a"}, 1, ROW)
    assert there(cache, "a", [1]) == []
    assert cache.used() == 0 and cache.entries() == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with a cache, which may only be read; root, who may write anywhere, gets a file system of that kind."""
    folder = tmp_path / "read only"
    folder.mkdir()
    if os.name == "nt":
        pytest.skip("folders cannot be protected so")
    if os.geteuid() != 0:
        put(FeatureCache(folder / "cache", GB), "a", 1, 2)
        inside = [folder, *folder.rglob("*")]
        for path in inside:
            path.chmod(0o500 if path.is_dir() else 0o400)
        yield folder / "cache"
        for path in inside:
            path.chmod(0o700)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        put(FeatureCache(folder / "cache", GB), "a", 1, 2)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True)
        yield folder / "cache"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_may_only_be_read(read_only: Path) -> None:
    cache = FeatureCache(read_only, GB)
    assert there(cache, "a", range(4)) == [1, 2]
    with pytest.raises(NoRoom, match="cannot be written"):
        cache.write({"what": "b"}, 1, ROW)
    with pytest.raises(OSError):
        cache.clear()
    assert there(cache, "a", range(4)) == [1, 2]
    assert len(cache.entries()) == 1


def test_where_it_is_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("TLKIT_CACHE")
    assert default_folder().name == "tlkit"
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert default_folder() == tmp_path / "xdg" / "tlkit"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_folder() == Path.home() / ".cache" / "tlkit"


def test_the_description_is_json_for_people(cache: FeatureCache) -> None:
    put(cache, "a", 1)
    (about,) = cache.folder.glob("*/about.json")
    assert json.loads(about.read_text()) == {"what": "a"}
