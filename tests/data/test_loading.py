"""Batches: the same for any number of workers and any way to start them; bad files reported, never swapped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tlkit.data import loading
from tlkit.data.decode import decode
from tlkit.data.loading import (
    BadFile,
    Batch,
    ViewDataset,
    default_workers,
    load,
    load_in_turns,
    refuse_bad_files,
    unreadable_files,
)
from tlkit.data.transforms import View, center, least_side, resize
from tlkit.errors import TlkitError
from tlkit.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    size=16, crop=0.8, crop_mode="center", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)
UNDECODABLE = os.fsdecode(b"caf\xe9.jpg")
NAMES = ["0.jpg", "1.png", "broken.jpg", "3.jpg", "empty.jpg", UNDECODABLE, "missing.jpg", "7.png", "8.jpg"]
BAD = {2: "broken", 4: "the file is empty", 6: "no such file"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for row, name in enumerate(NAMES):
        if row not in BAD:
            pixels = rng.integers(0, 256, (30 + row, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name, "PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:400])
    (tmp_path / "empty.jpg").touch()
    return tmp_path


def batches(folder: Path, workers: int | str | None, batch_size: int = 4) -> list[Batch]:
    dataset = ViewDataset(folder, NAMES, PREPROCESSING, View(mirrored=True))
    if isinstance(workers, str):
        return list(load_in_turns(dataset, batch_size=batch_size))
    return list(load(dataset, batch_size=batch_size, workers=workers))


@pytest.mark.parametrize("workers", [None, 0, 1, 2, "in turns"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_are_what_decoding_by_hand_gives(workers: int | str | None, batch_size: int, folder: Path) -> None:
    found = batches(folder, workers, batch_size)
    assert len(found) == -(-len(NAMES) // batch_size)
    rows = torch.cat([batch.rows for batch in found]).tolist()
    assert rows == [row for row in range(len(NAMES)) if row not in BAD]
    images = [view for batch in found for view in batch.images]
    for row, views in zip(rows, images, strict=True):
        image = decode(folder / NAMES[row], min_side=least_side(PREPROCESSING))
        assert views.dtype == torch.uint8 and views.shape == (2, 3, 16, 16)
        resized = resize(image, PREPROCESSING)
        assert torch.equal(views, torch.cat([center(resized, 16), center(resized.flip(-1), 16)]))
    bad = dict(pair for batch in found for pair in batch.bad)
    assert {row: file.path for row, file in bad.items()} == {row: NAMES[row] for row in BAD}
    assert all(bad[row].reason.startswith(reason) for row, reason in BAD.items())


def test_a_batch_of_bad_files_alone(folder: Path) -> None:
    (batch,) = load(ViewDataset(folder, ["missing.jpg"], PREPROCESSING, View()), batch_size=4, workers=0)
    assert batch.images.dtype == torch.uint8 and len(batch.images) == len(batch.rows) == 0
    assert batch.bad == [(0, BadFile("missing.jpg", "no such file"))]


def test_no_paths_no_batches(folder: Path) -> None:
    assert list(load(ViewDataset(folder, [], PREPROCESSING, View()), batch_size=4, workers=None)) == []


def test_absolute_paths_stand_by_themselves(folder: Path) -> None:
    dataset = ViewDataset(Path("elsewhere"), [str(folder / "0.jpg")], PREPROCESSING, View())
    assert isinstance(dataset[0][1], torch.Tensor)


def test_an_error_of_ours_is_not_taken_for_a_bad_file(folder: Path) -> None:
    def broken(image: torch.Tensor, size: int) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(load(ViewDataset(folder, NAMES, PREPROCESSING, View(crops=broken)), batch_size=4, workers=0))


def test_a_dataset_and_its_findings_can_be_sent_to_another_process(folder: Path) -> None:
    dataset = pickle.loads(pickle.dumps(ViewDataset(folder, NAMES, PREPROCESSING, View())))
    row, views = dataset[5]
    assert row == 5 and isinstance(views, torch.Tensor), "also with a name that is not valid Unicode"
    assert pickle.loads(pickle.dumps(dataset[4])) == (4, BadFile("empty.jpg", "the file is empty"))


SPAWNED = """
import multiprocessing, pathlib, sys
from tlkit.data.loading import ViewDataset, load
from tlkit.data.transforms import View
from tlkit.preprocessing import Preprocessing

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    like = Preprocessing(16, 0.8, "center", "bilinear", (0.5,) * 3, (0.5,) * 3)
    dataset = ViewDataset(pathlib.Path(sys.argv[1]), sys.argv[2:], like, View())
    for batch in load(dataset, batch_size=4, workers=1):
        print(batch.rows.tolist(), int(batch.images.sum()), [(row, file.path) for row, file in batch.bad])
"""


def test_spawned_workers(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    names = [name for name in NAMES if name != UNDECODABLE]
    done = subprocess.run([sys.executable, script, folder, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dataset = ViewDataset(folder, names, PREPROCESSING, View())
    expected = [
        f"{batch.rows.tolist()} {int(batch.images.sum())} {[(row, file.path) for row, file in batch.bad]}"
        for batch in load(dataset, batch_size=4, workers=0)
    ]
    assert done.stdout.splitlines() == expected


# Threads


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_in_turns_the_batches_are_the_same(count: int, batch_size: int, folder: Path) -> None:
    """Also where images are fewer or more than threads decode at once."""
    dataset = ViewDataset(folder, (NAMES * 5)[:count], PREPROCESSING, View())
    expected = list(load(dataset, batch_size=batch_size, workers=0))
    found = list(load_in_turns(dataset, batch_size=batch_size))
    assert len(found) == len(expected) == -(-count // batch_size)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images) and one.images.dtype == other.images.dtype
        assert one.rows.tolist() == other.rows.tolist() and one.rows.dtype == other.rows.dtype
        assert one.bad == other.bad


class Counted:
    """Whose rows are counted as they are decoded; one of them may fail."""

    preprocessing = PREPROCESSING

    def __init__(self, fails: int | None = None) -> None:
        self.fails, self.decoded = fails, set[int]()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | BadFile]:
        self.decoded.add(row)
        if row == self.fails:
            raise ZeroDivisionError
        return row, torch.zeros(1, 3, 2, 2, dtype=torch.uint8)


def test_threads_decode_a_few_batches_at_once_and_rest_in_between() -> None:
    """So that memory does not grow with the number of images, and nothing is decoded while a network computes."""
    dataset = Counted()
    seen = [len(dataset.decoded) for _ in load_in_turns(dataset, batch_size=5)]
    assert seen == [20] * 4 + [40] * 4 + [60] * 4 + [80] * 4 + [100] * 4


@pytest.mark.parametrize(("row", "before"), [(0, 0), (19, 0), (20, 4), (99, 16)])
def test_an_error_in_a_thread_is_raised(row: int, before: int) -> None:
    found = 0
    with pytest.raises(ZeroDivisionError):
        for _ in load_in_turns(Counted(row), batch_size=5):
            found += 1
    assert found == before, "what was decoded before is handed over"


# How many workers


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(
    ("images", "forked", "spawned"), [(0, 0, 0), (63, 0, 0), (64, 3, 0), (3999, 3, 0), (4000, 3, 3), (10**6, 3, 3)]
)
def test_default_workers(
    images: int, forked: int, spawned: int, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert default_workers(images) == (forked if start_method == "fork" else spawned)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (8, 8), (64, 8), (None, 1)])
def test_default_workers_where_nothing_is_known_of_affinity(
    cores: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_: "fork")
    assert default_workers(10**6) == expected


# Refusing

ONE = [BadFile("a\nb/x.jpg", "the file is empty")]
TWO = [*ONE, BadFile("y.jpg", "no such file")]


def test_one_bad_file_is_named_in_the_line() -> None:
    with pytest.raises(TlkitError) as caught:
        refuse_bad_files(ONE, 10, Path("data"), "fail")
    assert str(caught.value) == (
        "data: 1 of 10 images cannot be read (a b/x.jpg: the file is empty); "
        "remove or mend them, or leave them out with --on-error skip"
    )
    assert caught.value.details == []


def test_several_bad_files_are_all_listed() -> None:
    with pytest.raises(TlkitError, match=r"2 of 10 images cannot be read \(first a b/x.jpg") as caught:
        refuse_bad_files(TWO, 10, Path("data"), "fail")
    assert caught.value.details == ["a\nb/x.jpg: the file is empty", "y.jpg: no such file"]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_nothing_readable_is_always_refused(on_error: str) -> None:
    with pytest.raises(TlkitError, match=r"2 of 2 images cannot be read .*; check the files"):
        refuse_bad_files(TWO, 2, Path("data"), on_error)


def test_what_is_fine() -> None:
    refuse_bad_files(TWO, 10, Path("data"), "skip")
    for on_error in ("fail", "skip"):
        refuse_bad_files([], 10, Path("data"), on_error)
        refuse_bad_files([], 0, Path("data"), on_error)
    loading.silent("images", 1, 2)


# Files that cannot be read, before training


@pytest.mark.parametrize("workers", [None, 0, 1, 2])
def test_unreadable_files_are_those_that_loading_reports(folder: Path, workers: int | None) -> None:
    reported = [file for batch in batches(folder, 0) for _, file in batch.bad]
    found = unreadable_files(folder, NAMES, least_side(PREPROCESSING), workers=workers)
    assert found == reported
    assert [file.path for file in found] == [NAMES[row] for row in BAD]
    assert all(reason in file.reason for file, reason in zip(found, BAD.values(), strict=True))


def test_progress_of_reading_counts_images(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    paths = ["0.jpg"] * 40 + ["missing.jpg"] * 30
    bad = unreadable_files(folder, paths, 8, workers=0, progress=lambda *call: told.append(call))
    assert len(bad) == 30
    assert told == [("reading", done, 70) for done in (32, 64, 70)]


def test_no_paths_none_unreadable(folder: Path) -> None:
    assert unreadable_files(folder, [], 8) == []
    assert unreadable_files(folder, ["0.jpg", "1.png"], 8) == []
