"""Digests of what files hold: of the content alone; which files are copies of each other."""

from __future__ import annotations

import time
from pathlib import Path

from tlkit.data.content import copies, digest, digests


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    for name, text in {"a": "x", "b": "x", "c": "y"}.items():
        (tmp_path / name).write_text(text)
    one, two, three, gone = digests(tmp_path, ["a", "b", "c", "gone"])
    assert one == two != three and gone is None
    assert one is not None and len(one) == 32 and int(one, 16)
    (tmp_path / "a").write_text("yy")
    assert digest(tmp_path / "a") != one
    assert digest(tmp_path) is None


def test_a_file_replaced_by_one_of_the_same_size_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    first = digest(path)
    time.sleep(0.02)  # clocks of file systems tick
    path.write_text("y")
    assert digest(path) != first


def test_copies_are_said_by_the_first_of_them() -> None:
    assert copies(["a", "b", "a", None, None, "b", "a"]).tolist() == [0, 1, 0, 3, 4, 1, 0]


def test_hashing_tells_how_far_it_is(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(1200)]
    for name in names:
        (tmp_path / name).write_text(name)
    told: list[tuple[str, int, int]] = []
    assert len(set(digests(tmp_path, names, lambda *now: told.append(now)))) == 1200
    assert told[-1] == ("hashing", 1200, 1200) and len(told) < 50
    told.clear()
    digests(tmp_path, names[:100], lambda *now: told.append(now))
    assert not told
