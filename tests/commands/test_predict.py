"""``tlkit predict`` through the real command line: what is labelled, what is left out, what is written."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tlkit.data import prediction_file
from tlkit.data.loading import BadFile
from tlkit.evaluation.predict import Predictions

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


@pytest.fixture(scope="module")
def good(photos: Path) -> Path:
    """The part of `photos` that is sound: six images in three folders."""
    return photos / "2024" / "summer"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``piped(b"a.jpg\\n")`` puts bytes into stdin."""

    def put(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    return put


def paths_of(told: dict[str, Any]) -> list[str]:
    return [row["path"] for row in told["predictions"]]


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
    assert read_csv(tmp_path / f"{out.name}.skipped.csv") == told["skipped_files"]
    assert [Path(file["path"]) for file in told["skipped_files"]] == [photos / name for name in BAD]
    if ending == ".jsonl":
        assert read_jsonl(out) == expected
        return
    rows = read_csv(out) if ending.lower() == ".csv" else pyarrow.parquet.read_table(out).to_pylist()
    assert list(rows[0]) == ["path", "label", "probability", "label2", "probability2"]
    for row, other in zip(rows, expected, strict=True):
        assert (row["path"], row["label"], row["label2"]) == (other["path"], other["label"], other["top"][1][0])
        assert (float(row["probability"]), float(row["probability2"])) == (other["probability"], other["top"][1][1])
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.skipped.csv"}, "nothing half-written"


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


# Which images


def test_patterns_are_expanded(tlkit: Tlkit, trained: Path, good: Path) -> None:
    told = tlkit("predict", trained, good / "**" / "*.jpg", "--json").json
    assert paths_of(told) == [str(good / name / "01.jpg") for name in sorted(CLASSES)]
    done = tlkit("predict", trained, good, good / "**" / "*.webp")
    assert done.code == 1 and done.err.count("\n") == 1
    assert str(good / "**" / "*.webp") in done.error and "nothing matches this pattern" in done.error


def test_a_file_of_that_very_name_goes_before_the_pattern(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path
) -> None:
    for name in ("a[1].png", "a1.png", "*.png", "{ä}?.png"):
        shutil.copy(good / "disc" / "00.png", tmp_path / name)
    for name in ("a[1].png", "*.png", "{ä}?.png"):
        assert paths_of(tlkit("predict", trained, tmp_path / name, "--json").json) == [str(tmp_path / name)]
    assert len(paths_of(tlkit("predict", trained, tmp_path / "a*.png", "--json").json)) == 2


def test_an_empty_folder_is_an_error_unless_something_else_is_there(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path
) -> None:
    done = tlkit("predict", trained, tmp_path)
    assert done.code == 1 and done.err.count("\n") == 1
    assert f"{tmp_path}: no images" in done.error
    assert len(paths_of(tlkit("predict", trained, tmp_path, good, "--json").json)) == 6


def test_an_image_named_twice_is_labelled_once(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(good / "disc", tmp_path / "disc")
    (tmp_path / "link").symlink_to("disc")
    (tmp_path / "disc" / "alias.png").symlink_to("00.png")  # another name: the user may want a row for it
    monkeypatch.chdir(tmp_path)
    again = ("disc/01.jpg", tmp_path / "disc" / "01.jpg", "./disc/../disc/00.png", "link", "disc")
    done = tlkit("predict", trained, *again, "--json")
    assert paths_of(done.json) == ["disc/01.jpg", "disc/../disc/00.png", "link/alias.png"]
    assert "note: 6 images were named more than once, and are labelled once" in done.err
    assert "more than once" not in tlkit("predict", trained, "disc", "--json").err


def test_names_that_are_not_unicode_survive(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path, read_csv: Any
) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    names = [os.fsdecode(b"\xe4.png"), "a\nb.png", "ä, “ö”.png"]
    for name in names:
        shutil.copy(good / "disc" / "00.png", folder / name)
    (folder / os.fsdecode(b"bad\xfe.jpg")).touch()
    expected = [str(folder / name) for name in sorted(names)]
    for ending in ("csv", "jsonl", "parquet"):
        out = folder / f"labels.{ending}"
        done = tlkit("predict", trained, folder, "--out", out, "--json")
        assert paths_of(done.json) == expected
        (bad,) = read_csv(folder / f"labels.{ending}.skipped.csv")
        assert bad["path"] == str(folder / os.fsdecode(b"bad\xfe.jpg"))
    assert [row["path"] for row in read_csv(folder / "labels.csv")] == expected
    assert [row["path"] for row in read_jsonl(folder / "labels.jsonl")] == expected
    with (folder / "labels.parquet").open("rb") as file:
        written = pyarrow.parquet.read_table(file)["path"].to_pylist()
    assert written == [path.encode(errors="backslashreplace").decode() for path in expected]


# A list on stdin


@pytest.mark.parametrize("end", [b"\n", b"\0", b"\r\n"])
def test_a_list_on_stdin(
    tlkit: Tlkit, trained: Path, good: Path, monkeypatch: pytest.MonkeyPatch, piped: Any, end: bytes
) -> None:
    monkeypatch.chdir(good)
    names = ["./triangle/00.png", "disc", "square/01.jpg"]
    piped(b"".join(name.encode() + end for name in names) + end)
    done = tlkit("predict", trained, "square/00.png", "-", "disc/00.png", "--json")
    assert paths_of(done.json) == ["square/00.png", "./triangle/00.png", "disc/00.png", "disc/01.jpg", "square/01.jpg"]
    assert "reading a list of paths from stdin" in done.err
    assert "1 images were named more than once" in done.err


def test_a_listed_path_that_is_not_there_is_a_bad_file(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path, piped: Any
) -> None:
    text = f"{good}/disc/00.png\n{good}/gone.jpg\n{good}/*.jpg\n{'x' * 5000}\n{good}/square/00.png\n".encode()
    piped(text)
    done = tlkit("predict", trained, "-", "--json")
    assert paths_of(done.json) == [f"{good}/disc/00.png", f"{good}/square/00.png"]
    assert done.json["skipped_files"] == [
        {"path": f"{good}/gone.jpg", "reason": "no such file"},
        {"path": f"{good}/*.jpg", "reason": "no such file"},
        {"path": "x" * 5000, "reason": "file name too long"},
    ]
    piped(text)
    done = tlkit("predict", trained, "-", "--on-error", "fail", "--out", tmp_path / "labels.csv")
    assert done.code == 1 and f"tlkit: {good}/gone.jpg: no such file" in done.err
    assert "stdin: 3 of 5 images cannot be read" in done.error
    assert list(tmp_path.iterdir()) == []
    done = tlkit("predict", trained, good, good / "gone.jpg")
    assert done.code == 1 and done.err.count("\n") == 1, "given as an argument it is a mistake, told at once"
    assert f"{good}/gone.jpg: no such file or folder" in done.error


@pytest.mark.parametrize("text", [b"", b"\n\n", b" \r\n", b"\0\0"])
def test_an_empty_list_is_told(tlkit: Tlkit, trained: Path, good: Path, piped: Any, text: bytes) -> None:
    for others in ((), (good,)):
        piped(text)
        done = tlkit("predict", trained, "-", *others, "--quiet")
        assert done.code == 1 and done.err.count("\n") == 1
        assert "stdin: the list of paths is empty" in done.error and "tlkit predict RUN -" in done.error


def test_nothing_is_waited_for_where_nothing_is_piped(
    tlkit: Tlkit, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyboard, screen = os.openpty()
    with os.fdopen(keyboard, "rb"), os.fdopen(screen, "r") as terminal:
        for stdin in (terminal, None):  # None where the shell closed it: <&-
            monkeypatch.setattr(sys, "stdin", stdin)
            done = tlkit("predict", trained, "-")
            assert done.code == 1 and done.err.count("\n") == 1
            assert "stdin: nothing is piped into it" in done.error


def test_a_pipe_of_names_that_are_not_unicode(trained: Path, good: Path, tmp_path: Path) -> None:
    names = [b"\xe4.png", "ä.png".encode(), b"two words.png"]
    for name in names:
        shutil.copy(good / "disc" / "00.png", tmp_path / os.fsdecode(name))
    command = [sys.executable, "-m", "tlkit", "predict", str(trained), "-", "--json", "--quiet"]
    done = subprocess.run(command, input=b"\0".join(names), capture_output=True, cwd=tmp_path, check=True)
    assert done.stderr == b"" and done.stdout.isascii() is False
    assert [os.fsencode(row["path"]) for row in json.loads(done.stdout)["predictions"]] == names


# Unsure


def test_labels_below_a_threshold_are_unsure(
    tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path, read_csv: Any
) -> None:
    options = ("--precision", "fp32", "--json")
    plain = tlkit("predict", trained, good, *options).json
    assert "unsure" not in plain
    probabilities = sorted(row["probability"] for row in plain["predictions"])
    threshold = probabilities[2]
    below = sum(value < threshold for value in probabilities)
    assert 0 < below < 6
    out = tmp_path / "labels.csv"
    told = tlkit("predict", trained, good, "--unsure-below", threshold, "--out", out, *options).json
    for row, other in zip(told["predictions"], plain["predictions"], strict=True):
        assert row["label"] == ("unsure" if other["probability"] < threshold else other["label"])
        assert {name: row[name] for name in ("path", "probability", "top")} == {
            name: other[name] for name in ("path", "probability", "top")
        }
    assert told["unsure"] == below == told["labels"]["unsure"]
    assert [row["label"] for row in read_csv(out)] == [row["label"] for row in told["predictions"]]
    human = tlkit("predict", trained, good, "--unsure-below", threshold, "--precision", "fp32").out
    assert f"{below} of 6 images are unsure: no probability reaches {threshold:g}" in human
    assert sum(" unsure " in line for line in human.splitlines()[1:-1]) == below


@pytest.mark.parametrize(("threshold", "unsure"), [(0, 0), (1, 6)])
def test_the_ends_of_the_threshold(tlkit: Tlkit, trained: Path, good: Path, threshold: float, unsure: int) -> None:
    told = tlkit("predict", trained, good, "--unsure-below", threshold, "--json").json
    assert max(row["probability"] for row in told["predictions"]) < 1
    assert told["unsure"] == unsure


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan"])
def test_a_threshold_is_a_probability(tlkit: Tlkit, trained: Path, good: Path, threshold: str) -> None:
    done = tlkit("predict", trained, good, f"--unsure-below={threshold}")
    assert done.code == 1 and "--unsure-below" in done.error


def test_a_class_called_unsure_is_not_mixed_up(tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    stored = (run / "config.json").read_text().replace('"disc"', '"unsure"')
    (run / "config.json").write_text(stored)
    done = tlkit("predict", run, good, "--unsure-below", 0.5, "--plan")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "--unsure-below: the network has a class that is called 'unsure'" in done.error
    told = tlkit("predict", run, good, "--json").json
    assert {label for label, _ in told["predictions"][0]["top"]} == {"unsure", "square", "triangle"}


# Views


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of nothing, about which views differ. Read only."""
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(3)
    for number in range(12):
        small = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        small.resize((96, 64), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    return folder


def distribution(row: dict[str, Any]) -> np.ndarray:
    """Probabilities in the order of the class names."""
    return np.array([probability for _, probability in sorted(row["top"])])


@pytest.mark.parametrize("merge", ["mean", "geometric", "max"])
def test_views_are_merged(tlkit: Tlkit, trained: Path, noise: Path, tmp_path: Path, merge: str) -> None:
    for path in noise.iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / path.name)
    # the network's input as wide as the resized picture is high, so that the centre mirrored is the mirror's centre
    options = ("--precision", "fp32", "--crop", 1, "--json")
    seen, mirrored = (tlkit("predict", trained, folder, *options).json["predictions"] for folder in (noise, tmp_path))
    merged = tlkit("predict", trained, noise, "--tta", "flip", "--merge", merge, *options).json["predictions"]
    for one, other, both in zip(seen, mirrored, merged, strict=True):
        views = np.stack([distribution(one), distribution(other)])
        expected = {"mean": views.mean(0), "geometric": np.sqrt(views.prod(0)), "max": views.max(0)}[merge]
        assert distribution(both) == pytest.approx(expected / expected.sum(), abs=3e-3)


def test_labels_that_views_change_are_counted(tlkit: Tlkit, trained: Path, noise: Path) -> None:
    options = ("--precision", "fp32", "--crop", 0.6)
    center = tlkit("predict", trained, noise, *options, "--json").json
    assert "tta_changed" not in center
    views = ("--tta", "multi-scale+ten-crop")
    told = tlkit("predict", trained, noise, *options, *views, "--json").json
    pairs = zip(center["predictions"], told["predictions"], strict=True)
    changed = sum(one["label"] != other["label"] for one, other in pairs)
    assert told["tta_changed"] == changed > 0
    human = tlkit("predict", trained, noise, *options, *views, "--unsure-below", 1).out
    line = f"multi-scale+ten-crop: {changed} of 12 labels are not those that the centre alone gives"
    assert line in human, "unsure ones, too, are compared by their most probable class"


def test_an_unknown_view_is_told_before_the_work(tlkit: Tlkit, trained: Path, photos: Path) -> None:
    done = tlkit("predict", trained, photos, "--tta", "flop")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "there is no view 'flop'" in done.error and "did you mean 'flip'" in done.error


# Many images


def pretended(monkeypatch: pytest.MonkeyPatch, classes: int = 3, size: int = 50) -> dict[str, int]:
    """Predictions at no cost, the k-th image of class k modulo 3; returns the most memory that was taken meanwhile."""
    taken: dict[str, int] = {}

    def batches(network: Any, dataset: Any, how: Any, merge: str) -> Iterator[Predictions]:
        tracemalloc.start()
        try:
            for first in range(0, len(dataset), size):
                rows = np.arange(first, min(first + size, len(dataset)))
                probabilities = np.full((len(rows), classes), 0.2, np.float32)
                probabilities[np.arange(len(rows)), rows % 3] = 0.6
                yield Predictions(rows, probabilities, rows % 3, [], 0.0)
            taken["peak"] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr("tlkit.commands.predict.predict_batches", batches)
    return taken


def many(count: int) -> bytes:
    return b"".join(b"%d.jpg\n" % number for number in range(count))


@pytest.mark.parametrize("name", [None, "labels.csv", "labels.jsonl", "labels.parquet"])
def test_memory_does_not_grow_with_the_images(
    tlkit: Tlkit,
    trained: Path,
    tmp_path: Path,
    piped: Any,
    monkeypatch: pytest.MonkeyPatch,
    read_csv: Any,
    name: str | None,
) -> None:
    monkeypatch.setattr(prediction_file, "CELLS", 1000)
    taken = pretended(monkeypatch)
    arguments = ("--out", tmp_path / name) if name else ()
    piped(many(6000))
    assert tlkit("predict", trained, "-", *arguments, "--quiet").code == 0
    streamed = taken["peak"]
    piped(many(6000))
    assert len(tlkit("predict", trained, "-", "--json", "--quiet").json["predictions"]) == 6000
    assert streamed < taken["peak"] / 5, "the JSON object has to hold all rows, a file does not"
    if name is None:
        return
    if name.endswith(".parquet"):
        written = pyarrow.parquet.ParquetFile(tmp_path / name)
        sizes = [written.metadata.row_group(group).num_rows for group in range(written.metadata.num_row_groups)]
        assert sizes == [142] * 42 + [36], "groups of up to 1000 values in 7 columns"
        rows = written.read().to_pylist()
    else:
        rows = read_csv(tmp_path / name) if name.endswith(".csv") else read_jsonl(tmp_path / name)
    assert [row["path"] for row in rows] == [f"{number}.jpg" for number in range(6000)]
    assert [row["label"] for row in rows[:4]] == ["disc", "square", "triangle", "disc"]


def test_a_person_sees_how_many_images_have_which_label(
    tlkit: Tlkit, trained: Path, piped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(monkeypatch)
    for arguments in ((), ("--out", tmp_path / "labels.csv")):
        piped(many(25))
        lines = tlkit("predict", trained, "-", *arguments).out.splitlines()
        start = lines.index("images by label")
        table = [(line.split()[0], line.split()[-1]) for line in lines[start + 3 :]]
        assert table == [("disc", "9"), ("square", "8"), ("triangle", "8")]
    piped(many(20))
    assert "images by label" not in tlkit("predict", trained, "-").out


def test_rare_ones_of_many_labels_are_summed_up(
    tlkit: Tlkit, trained: Path, piped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(monkeypatch)
    monkeypatch.setattr("tlkit.commands.predict.SHOWN", 2)
    piped(many(25))
    out = tlkit("predict", trained, "-").out
    assert "and 1 more labels of 8 images" in out and "and 23 more: --out" in out


def test_more_labels_are_asked_for_than_there_are_classes(
    tlkit: Tlkit, trained: Path, piped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_csv: Any
) -> None:
    pretended(monkeypatch, classes=10_000)
    names = tuple(f"class {number}" for number in range(10_000))
    monkeypatch.setattr("tlkit.commands.predict.imagenet.describe", lambda classes: names)
    for ending in ("csv", "parquet"):
        piped(many(8))
        out = tmp_path / f"labels.{ending}"
        assert tlkit("predict", trained, "-", "--top-k", 20_000, "--out", out).code == 0
        rows = read_csv(out) if ending == "csv" else pyarrow.parquet.read_table(out).to_pylist()
        assert len(rows) == 8 and len(rows[7]) == 1 + 2 * 10_000
        ranked = [rows[7]["label"], *(rows[7][f"label{rank}"] for rank in range(2, 10_001))]
        assert ranked[:3] == ["class 1", "class 0", "class 2"], "the best, then equal ones in the network's order"
        assert set(ranked) == set(names)


# What is left behind


def test_no_list_of_skipped_files_where_there_are_none(tlkit: Tlkit, trained: Path, good: Path, tmp_path: Path) -> None:
    done = tlkit("predict", trained, good, "--out", tmp_path / "labels.csv")
    assert done.out == f"6 predictions written to {tmp_path / 'labels.csv'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_a_person_is_told_where_skipped_files_are_listed(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path
) -> None:
    out = tlkit("predict", trained, photos, "--out", tmp_path / "labels.csv").out
    assert f"2 files that cannot be read listed in {tmp_path / 'labels.csv.skipped.csv'}" in out


def test_an_existing_list_of_skipped_files_is_never_overwritten(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv.skipped.csv").write_text("mine")
    done = tlkit("predict", trained, photos, "--out", tmp_path / "labels.csv")
    assert done.code == 1 and "labels.csv.skipped.csv: exists already" in done.error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def stop_after_a_batch(error: BaseException, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    from tlkit.commands import predict

    real = predict.predict_batches

    def batches(*arguments: Any) -> Iterator[Predictions]:
        yield from (part for part, _ in zip(real(*arguments), range(1), strict=False))
        before()
        raise error

    monkeypatch.setattr(predict, "predict_batches", batches)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left on the disk"),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_nothing_half_written_remains(
    tlkit: Tlkit,
    trained: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    error: BaseException,
    code: int,
    told: str,
) -> None:
    written: list[str] = []
    stop_after_a_batch(error, monkeypatch, lambda: written.extend(path.name for path in tmp_path.iterdir()))
    done = tlkit("predict", trained, photos, "--batch-size", 2, "--out", tmp_path / f"labels.{ending}")
    assert done.code == code and told in done.error
    assert Counter(name.startswith(".tlkit-") for name in written) == {True: 1}, "rows go into a file beside it"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    synced: list[set[str]] = []

    def fsync(number: int) -> None:
        synced.append({path.name for path in tmp_path.iterdir()})
        if len(synced) == 2:  # the list of skipped files was the first
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tlkit.run_folder.os.fsync", fsync)
    done = tlkit("predict", trained, photos, "--out", tmp_path / f"labels.{ending}")
    assert done.code == 1 and "no space left on the disk" in done.error
    assert f"labels.{ending}.skipped.csv" in synced[1]
    assert list(tmp_path.iterdir()) == []


def test_what_came_meanwhile_is_not_overwritten(
    tlkit: Tlkit, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "labels.csv"
    monkeypatch.setattr(prediction_file, "write_skipped", lambda path, bad: path.write_text("mine"))
    done = tlkit("predict", trained, photos, "--out", out)
    assert done.code == 1 and "exists already" in done.error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_labels_that_are_not_unicode_are_written(tmp_path: Path, read_csv: Any) -> None:
    label = os.fsdecode(b"\xe4")
    row = {"path": "a.jpg", "label": label, "probability": 0.5, "top": [[label, 0.5], ["b", 0.25]]}
    for ending in ("csv", "jsonl", "parquet"):
        with prediction_file.writing(tmp_path / f"x.{ending}", 2) as write:
            write([row])
    assert read_csv(tmp_path / "x.csv")[0]["label"] == label
    assert read_jsonl(tmp_path / "x.jsonl") == [row]
    (stored,) = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    expected = {"path": "a.jpg", "label": "\\udce4", "probability": 0.5, "label2": "b", "probability2": 0.25}
    assert stored == expected


def test_no_rows_are_a_file_with_its_columns(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        with prediction_file.writing(tmp_path / f"x.{ending}", 1):
            pass
        prediction_file.write_skipped(tmp_path / f"x.{ending}", [])
    prediction_file.write_skipped(tmp_path / "y.csv", [BadFile("a,b.jpg", "no such file")])
    assert (tmp_path / "x.csv").read_bytes() == b"path,label,probability\r\n"
    assert (tmp_path / "x.jsonl").read_bytes() == b""
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet").column_names == ["path", "label", "probability"]
    assert (tmp_path / "y.csv.skipped.csv").read_text() == 'path,reason\n"a,b.jpg",no such file\n'
