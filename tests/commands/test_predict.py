"""``tlkit predict`` through the real command line: what is labelled, what is left out, what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

Tlkit = Callable[..., Any]
CLASSES = {"disc", "square", "triangle"}


@pytest.fixture(scope="module")
def photos(make_shapes: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """Six images in folders inside folders, one broken, one empty, three that are no images. Read only."""
    folder = Path(tmp_path_factory.mktemp("new")) / "photos"
    make_shapes(folder / "2024" / "summer", images=2, seed=4)
    (folder / "2024" / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 100)
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not an image")
    (folder / "film.mp4").write_bytes(b"x")
    (folder / "._photo.jpg").write_bytes(b"what macOS leaves on foreign disks")
    return folder


BAD = ["empty.png", "2024/broken.jpg"]


def test_json_is_one_object_with_the_contracts_fields(tlkit: Tlkit, trained: Path, photos: Path) -> None:
    done = tlkit("predict", trained, photos, "--json")
    assert done.out.count("\n") == 1
    told = done.json
    assert set(told) >= {"command", "version", "seconds", "predictions", "skipped_files"}
    assert told["command"] == "predict"
    assert len(told["predictions"]) == 6
    for row in told["predictions"]:
        assert set(row) == {"path", "label", "probability", "top"}
        assert Path(row["path"]).is_file()
        labels, probabilities = zip(*row["top"], strict=True)
        assert (row["label"], row["probability"]) == (labels[0], probabilities[0])
        assert set(labels) == CLASSES
        assert list(probabilities) == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_bad_files_are_counted_and_named_and_other_files_passed_over(tlkit: Tlkit, trained: Path, photos: Path) -> None:
    done = tlkit("predict", trained, photos, "--json")
    assert [file["path"] for file in done.json["skipped_files"]] == [str(photos / name) for name in BAD]
    assert all(file["reason"] for file in done.json["skipped_files"])
    for name in BAD:
        assert f"left out {photos / name}: " in done.err
    assert "files are not images and were ignored" in done.err


def test_bad_files_can_be_refused(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    done = tlkit("predict", trained, photos, "--on-error", "fail", "--out", tmp_path / "labels.csv")
    assert done.code == 1
    for name in BAD:
        assert f"tlkit: {photos / name}: " in done.err, "each bad file has a line of its own"
    assert "2 of 8 images cannot be read" in done.error and str(photos) in done.error
    assert not (tmp_path / "labels.csv").exists()


def test_nothing_but_bad_files_is_an_error(tlkit: Tlkit, trained: Path, photos: Path) -> None:
    done = tlkit("predict", trained, photos / "empty.png")
    assert done.code == 1
    assert "the file is empty" in done.error and str(photos / "empty.png") in done.error


def test_files_and_folders_may_be_mixed(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    odd = tmp_path / "photo.without-a-known-ending"
    shutil.copy(photos / "2024" / "summer" / "disc" / "00.png", odd)
    arguments = (photos / "2024" / "summer" / "square", photos / "2024" / "summer" / "disc" / "01.jpg", odd)
    told = tlkit("predict", trained, *arguments, "--json").json
    summer = photos / "2024" / "summer"
    assert [row["path"] for row in told["predictions"]] == [
        *(str(summer / "square" / name) for name in ("00.png", "01.jpg")),
        str(summer / "disc" / "01.jpg"),
        str(odd),
    ]


def test_one_image_alone_gets_the_label_that_it_gets_among_others(tlkit: Tlkit, trained: Path, photos: Path) -> None:
    options = ("--precision", "fp32", "--json", "--quiet")
    together = tlkit("predict", trained, photos, *options).json["predictions"]
    for row in together:
        (alone,) = tlkit("predict", trained, row["path"], *options).json["predictions"]
        assert alone["label"] == row["label"]
        assert alone["probability"] == pytest.approx(row["probability"], abs=1e-4)


def test_a_runs_own_images_get_the_labels_that_it_stored(
    tlkit: Tlkit, trained: Path, shapes: Path, read_csv: Any
) -> None:
    stored = {row["path"]: row for row in read_csv(trained / "predictions.csv")}
    for row in tlkit("predict", trained, shapes, "--precision", "fp32", "--json").json["predictions"]:
        own = stored[Path(row["path"]).relative_to(shapes).as_posix()]
        assert row["label"] == own["predicted"]
        assert row["probability"] == pytest.approx(float(own["probability"]), abs=2e-3)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (3, 3), (50, 3)])
def test_top_k(tlkit: Tlkit, trained: Path, photos: Path, asked: int, given: int) -> None:
    told = tlkit("predict", trained, photos, "--top-k", asked, "--json").json
    assert {len(row["top"]) for row in told["predictions"]} == {given}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_what_is_written_reads_back(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path, read_csv: Any, ending: str
) -> None:
    out = tmp_path / f"labels{ending}"
    told = tlkit("predict", trained, photos, "--out", out, "--top-k", 2, "--json").json
    assert told["out"] == str(out)
    expected = told["predictions"]
    if ending == ".jsonl":
        assert read_jsonl(out) == expected
        return
    rows = read_csv(out) if ending.lower() == ".csv" else pyarrow.parquet.read_table(out).to_pylist()
    assert list(rows[0]) == ["path", "label", "probability", "label2", "probability2"]
    for row, other in zip(rows, expected, strict=True):
        assert (row["path"], row["label"], row["label2"]) == (other["path"], other["label"], other["top"][1][0])
        assert (float(row["probability"]), float(row["probability2"])) == (other["probability"], other["top"][1][1])
    assert {path.name for path in tmp_path.iterdir()} == {out.name}, "nothing half-written is left"


@pytest.mark.parametrize(
    ("name", "told"),
    [("labels.xlsx", ".csv, .jsonl, .parquet"), ("labels", ".csv"), ("no/such/folder/a.csv", "no such folder")],
)
def test_what_cannot_be_written_is_said_before_the_work(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path, name: str, told: str
) -> None:
    done = tlkit("predict", trained, photos, "--out", tmp_path / name)
    assert done.code == 1
    assert told in done.error
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_overwritten(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("mine")
    done = tlkit("predict", trained, photos, "--out", tmp_path / "labels.csv")
    assert done.code == 1
    assert "exists already" in done.error
    assert (tmp_path / "labels.csv").read_text() == "mine"


def test_a_plan_labels_nothing(tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path) -> None:
    done = tlkit("predict", trained, photos, "--out", tmp_path / "labels.csv", "--plan", "--json")
    assert done.json["plan"] == {"images": 8}
    assert list(tmp_path.iterdir()) == []


def test_a_person_sees_the_first_labels(
    tlkit: Tlkit, make_shapes: Callable[..., Path], trained: Path, tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("one",), 25)
    done = tlkit("predict", trained, data)
    assert "25 images" in done.out and "and 5 more: --out FILE.csv or --json has them all" in done.out
    assert tlkit("predict", trained, data, "--quiet").err == ""


@pytest.mark.parametrize("tag", ["", "weights of a run"])
def test_a_network_whose_outputs_mean_nothing_is_refused(tlkit: Tlkit, trained: Path, photos: Path, tag: str) -> None:
    if tag:
        told = tlkit("predict", "test_resnet", photos, "--weights", trained, "--json").json
        assert {row["label"] for row in told["predictions"]} <= CLASSES
    else:
        done = tlkit("predict", "test_resnet", photos, "--weights", "random")
        assert done.code == 1
        assert "nobody knows what its outputs mean" in done.error


def test_the_network_in_the_install_says_imagenet_names(tlkit: Tlkit, photos: Path, packaged: None) -> None:
    told = tlkit("predict", "tf_efficientnet_lite0", photos / "2024" / "summer" / "disc", "--top-k", 5, "--json").json
    for row in told["predictions"]:
        assert len(row["top"]) == 5
        assert not any(label.startswith("n0") for label, _ in row["top"])
