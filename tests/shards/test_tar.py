"""What is found in a tar file, whole or broken."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tlkit.shards.tar import BLOCK, Found, members

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
LONG = f"folder/{'long' * 40}.jpg"
FILES = [("a/1.jpg", b"one" * 400), (LONG, b"two" * 4000), ("b/ü.png", b"three"), ("b/empty.cls", b"")]


@pytest.fixture(params=list(FORMATS))
def path(request: pytest.FixtureRequest, tmp_path: Path, make_tar: Any) -> Path:
    files = [file for file in FILES if request.param != "ustar" or file[0] != LONG]
    written: Path = make_tar(tmp_path / "some.tar", files, FORMATS[request.param])
    return written


def named(found: list[Found]) -> list[str]:
    return [one.name for one in found]


def damaged(path: Path, at: int, count: int = 24) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + count] = b"x" * count
    path.write_bytes(content)


def test_places_are_those_of_the_bytes(path: Path) -> None:
    content, wanted = path.read_bytes(), dict(FILES)
    found = list(members(path))
    assert found and all(content[one.offset : one.offset + one.size] == wanted[one.name] for one in found)
    with tarfile.open(path) as archive:
        assert named(found) == archive.getnames()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_follows_a_broken_header_is_found(path: Path, number: int) -> None:
    whole = list(members(path))
    damaged(path, whole[number].offset - BLOCK)
    found = list(members(path))
    assert [one for one in found if one.size >= 0] == whole[:number] + whole[number + 1 :]
    assert [one.size for one in found].count(-1) == 1
    assert found[number].name == "" and found[number].offset < whole[number].offset


def test_one_that_ends_too_early(path: Path) -> None:
    whole = list(members(path))
    path.write_bytes(path.read_bytes()[: whole[1].offset + 2])
    found = list(members(path))
    assert found == whole[:2], "it is listed, for its header is whole"
    path.write_bytes(path.read_bytes()[: whole[1].offset - BLOCK // 2])
    found = list(members(path))
    assert named(found) == [whole[0].name, ""]


@pytest.mark.parametrize("content", [b"", b"no tar file at all" * 1000, b"\0" * BLOCK + b"x" * BLOCK])
def test_what_is_no_tar_file_is_one_broken_place(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "none.tar"
    path.write_bytes(content)
    assert [one.size for one in members(path)] == [-1]


def test_one_without_files(tmp_path: Path, make_tar: Any) -> None:
    assert list(members(make_tar(tmp_path / "empty.tar", []))) == []


def test_folders_and_links_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "others.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere"
            archive.addfile(member)
    assert list(members(path)) == []


def test_parts_joined_end_to_end(tmp_path: Path, make_tar: Any) -> None:
    """As `cat` or ``tar --concatenate`` make them: zeros stand between."""
    one, other = (make_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"x" * 700)]) for number in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + other.read_bytes())
    content = joined.read_bytes()
    assert [(one.name, content[one.offset : one.offset + one.size]) for one in members(joined)] == [
        ("0.jpg", b"x" * 700),
        ("1.jpg", b"x" * 700),
    ]
