"""Files that a network is measured on and was trained on: found by content alone, named, and said in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tlkit.audit.leaks import in_words, shared_files, shared_with
from tlkit.data.content import digest
from tlkit.data.folders import Samples


def written(folder: Path, files: dict[str, str], splits: str) -> Samples:
    """Files by name and content, and their splits."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    none = np.zeros(len(files), dtype=np.int64)
    return Samples(folder, list(files), none, np.array(splits.split() or [""] * len(files), dtype="<U5"), ("a",))


@pytest.mark.parametrize("splits", ["train train val val test", "train train test val test"])
def test_files_on_both_sides(splits: str, tmp_path: Path) -> None:
    data = written(tmp_path, {"1": "x", "2": "y", "3": "x", "4": "z", "5": "y"}, splits)
    split = splits.split()[2]
    assert shared_files(data) == [
        {"path": "3", "split": split, "train_path": "1"},
        {"path": "5", "split": "test", "train_path": "2"},
    ]


@pytest.mark.parametrize(
    ("contents", "splits"),
    [
        ("xyz", "train val test"),
        ("xxy", "train train val"),  # copies within train leak nothing
        ("xyy", "train val test"),  # nor do those of val and test: nothing was trained on them
        ("xxx", ""),
        ("xxx", "val test val"),
        ("", ""),
    ],
)
def test_nothing_on_both_sides(contents: str, splits: str, tmp_path: Path) -> None:
    files = {f"{row}": content for row, content in enumerate(contents)}
    assert shared_files(written(tmp_path, files, splits)) == []


def test_files_that_are_gone_are_the_same_as_nothing(tmp_path: Path) -> None:
    data = written(tmp_path, {"1": "x", "2": "x", "3": "x"}, "train val val")
    (tmp_path / "1").unlink()
    (tmp_path / "2").unlink()
    assert shared_files(data) == []


def test_links_are_the_file_that_they_lead_to(tmp_path: Path) -> None:
    data = written(tmp_path, {"1": "x", "2": "y"}, "train val")
    (tmp_path / "2").unlink()
    (tmp_path / "2").symlink_to("1")
    assert shared_files(data) == [{"path": "2", "split": "val", "train_path": "1"}]


@pytest.mark.parametrize("splits", ["", "train val test"])
def test_files_that_a_run_was_trained_on(splits: str, tmp_path: Path) -> None:
    """Of whatever split they are here."""
    data = written(tmp_path, {"sub/1": "x", "2": "y", "3": "x"}, splits)
    (tmp_path / "other").write_text("x")
    known = digest(tmp_path / "other")
    assert known is not None
    of = splits.split() or ["", "", ""]
    assert shared_with({known: "train/other"}, data) == [
        {"path": "sub/1", "split": of[0], "train_path": "train/other"},
        {"path": "3", "split": of[2], "train_path": "train/other"},
    ]
    assert shared_with({"0" * 32: "train/other"}, data) == []


def test_without_anything_known_no_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    data = written(tmp_path, {"1": "x"}, "val")
    monkeypatch.setattr("tlkit.audit.leaks.digests", refuse)
    assert shared_with({}, data) == []


@pytest.mark.parametrize("count", [1, 2, 30])
def test_in_words(count: int) -> None:
    shared = [{"path": f"val/{row}.jpg", "split": "val", "train_path": f"train/{row}.jpg"} for row in range(count)]
    said = in_words(shared, 100)
    assert said.startswith(f"{count} of the 100 images measured on are training images too, byte for byte: ")
    assert "val/0.jpg is train/0.jpg" in said and "tlkit check-data" in said and "\n" not in said
    assert (f" and {count - 1} more" in said) == (count > 1)
