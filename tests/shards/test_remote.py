"""Files elsewhere: fetched whole or not at all, from servers that stall, drop connections, fail or give no parts."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from typing import Any

import fsspec
import pytest

from tlkit.errors import InputLost, TlkitError
from tlkit.shards import remote
from tlkit.shards.remote import copies, describe, local_copy

SIZE = 3 * 2**20 + 17


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def url(served: Any, content: bytes) -> str:
    (served.folder / "a.tar").write_bytes(content)
    return f"{served.url}/a.tar"


def fetched(url: str) -> bytes:
    return local_copy(describe([url])[0], "there").read_bytes()


def test_a_copy_is_made_once(served: Any, url: str, content: bytes) -> None:
    assert fetched(url) == content and fetched(url) == content
    assert served.asked["a.tar"] == 1 and served.sent["a.tar"] == SIZE


def test_a_stream_that_breaks_off_goes_on_where_it_was(served: Any, url: str, content: bytes) -> None:
    """More often than there are attempts: each has brought something."""
    served.drops["a.tar"] = SIZE // 7
    assert fetched(url) == content
    assert served.asked["a.tar"] == 8
    assert served.sent["a.tar"] == SIZE, "no byte comes twice"


def test_a_server_that_gives_no_parts_begins_anew(served: Any, url: str, content: bytes) -> None:
    served.ranges = False
    assert fetched(url) == content
    served.drops["b.tar"] = SIZE // 2
    (served.folder / "b.tar").write_bytes(content)
    with pytest.raises(InputLost, match=r"the connection fails: .* \(3 attempts\)"):
        fetched(url.replace("a.tar", "b.tar"))


def test_a_server_that_does_not_tell_lengths(served: Any, url: str, content: bytes) -> None:
    """What is cut off looks like the end; whether parts are given is seen by what comes."""
    served.vague, served.drops["a.tar"] = True, SIZE // 3
    assert fetched(url) == content
    served.ranges = False
    (served.folder / "b.tar").write_bytes(content)
    served.drops["b.tar"] = SIZE - 5
    with pytest.raises(InputLost, match=rf"\d+ bytes came where {SIZE} were announced \(3 attempts\)"):
        fetched(url.replace("a.tar", "b.tar"))


def test_one_that_recovers(served: Any, url: str, content: bytes) -> None:
    served.failing["a.tar"] = 2
    assert fetched(url) == content


def test_one_that_does_not(served: Any, url: str) -> None:
    served.failing["a.tar"] = -1
    with pytest.raises(InputLost) as caught:
        fetched(url)
    assert str(caught.value) == (
        f"there: {url} cannot be read any more: the server answers 503 Service Unavailable (3 attempts); "
        "see to it, then start again, or go on with --resume"
    )
    assert copies() == [], "nothing half-fetched is left"


@pytest.mark.usefixtures("one_second")
def test_one_that_never_answers(served: Any, url: str) -> None:
    served.silent.add("a.tar")
    began = time.monotonic()
    with pytest.raises(TlkitError) as caught:
        describe([url, f"{served.url}/b.tar"])
    assert str(caught.value) == (
        f"{url}: no answer in 1s (3 attempts); check the address and the connection; TLKIT_TIMEOUT=90s would wait "
        "for longer"
    )
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("one_second")
def test_one_that_stalls_in_the_middle(served: Any, url: str, content: bytes) -> None:
    served.stalls["a.tar"] = 0
    with pytest.raises(InputLost, match=r"no answer in 1s \(3 attempts\)"):
        fetched(url)
    served.stalls["a.tar"] = SIZE // 3  # each attempt brings something
    assert fetched(url) == content


def test_nobody_there() -> None:
    with pytest.raises(TlkitError, match=r"http://127\.0\.0\.1:9/a\.tar: the connection fails: .*check the address"):
        describe(["http://127.0.0.1:9/a.tar"])


def test_what_is_missing_is_named(served: Any, url: str) -> None:
    others = [f"{served.url}/b{number}.tar" for number in range(3)]
    with pytest.raises(TlkitError) as caught:
        describe([url, *others])
    assert str(caught.value).startswith(f"{others[0]}: 3 of 4 shards are missing; ")
    assert caught.value.details == others


def test_what_came_before_a_kill_is_gone_on_with(served: Any, url: str, content: bytes) -> None:
    served.drops["a.tar"], served.failing["a.tar"] = SIZE // 2, 0
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(remote.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fetched(url)
    assert served.sent["a.tar"] == SIZE // 2 and copies() == []
    served.drops.clear()
    assert fetched(url) == content
    assert served.sent["a.tar"] == SIZE


def test_what_a_killed_process_left_behind_goes_with_the_copies(
    served: Any, url: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(url)
    left = copies()[0].path.with_name("other.part")
    left.write_bytes(b"x")
    assert len(copies()) == 1, "somebody may be fetching it"
    monkeypatch.setattr(remote, "LEFT_BEHIND", -1.0)
    assert len(copies()) == 2
    assert remote.remove_copies() == SIZE + 1 and not left.exists()


def test_one_that_has_changed_is_fetched_anew(served: Any, url: str, content: bytes) -> None:
    assert fetched(url) == content
    (served.folder / "a.tar").write_bytes(content[::-1])
    assert fetched(url) == content[::-1]


def test_one_that_goes_in_between(served: Any, url: str) -> None:
    (one,) = describe([url])
    (served.folder / "a.tar").unlink()
    with pytest.raises(InputLost, match="it is no longer there"):
        local_copy(one, "there")


def test_copies_keep_to_their_budget(served: Any, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used longest ago go."""
    monkeypatch.setenv("TLKIT_SHARD_BUDGET", "7MB")
    urls = [f"{served.url}/{number}.tar" for number in range(4)]
    for number in range(4):
        (served.folder / f"{number}.tar").write_bytes(content[::-1] if number % 2 else content)
    found = describe(urls)
    for number in (0, 1, 0, 2, 0, 3, 0):
        assert local_copy(found[number], "there").read_bytes() == (content[::-1] if number % 2 else content)
        time.sleep(0.01)  # a file's time is told in steps
        assert len(copies()) <= 2
    assert [served.asked[f"{number}.tar"] for number in range(4)] == [1, 1, 1, 1]


def test_one_larger_than_the_budget(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLKIT_SHARD_BUDGET", "1MB")
    with pytest.raises(TlkitError, match=r"there: a shard of 0\.0 GB, .*; raise TLKIT_SHARD_BUDGET"):
        fetched(url)


@pytest.mark.parametrize("name", ["TLKIT_TIMEOUT", "TLKIT_TRIES", "TLKIT_SHARD_BUDGET"])
def test_a_setting_that_is_not_understood(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "soon")
    with pytest.raises(TlkitError, match=f"{name}: 'soon' is not understood; write "):
        fetched(url)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked on Unix")
def test_several_processes_fetch_it_once(served: Any, url: str, content: bytes) -> None:
    """Forked ones, as those that decode, from a process that has asked a server itself."""
    describe([url])
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_length, [url] * 3) == [SIZE] * 3
    assert served.asked["a.tar"] == 1


def _length(url: str) -> int:
    return len(fetched(url))


def test_other_protocols_than_http(content: bytes) -> None:
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(content)
    assert fetched("memory://bucket/a.tar") == content
    with pytest.raises(TlkitError, match=r"memory://bucket/b\.tar: no such file"):
        describe(["memory://bucket/b.tar"])


def test_unknown_protocols() -> None:
    with pytest.raises(TlkitError, match="unknown protocol 'nonsense'; use https:// or s3://"):
        describe(["nonsense://a.tar"])


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(TlkitError, match=r"needs a package that is missing .*; pip install 'tlkit\[remote\]'"):
        describe(["http://127.0.0.1:9/a.tar"])
