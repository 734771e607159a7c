"""``tlkit check-data`` through the real command line: each kind of finding planted, told, counted and left alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from tlkit.audit.suspects import Suspect
from tlkit.data.folders import read_samples

Tlkit = Callable[..., Any]
Photo = Callable[..., Image.Image]
TINY = ("--model", "test_resnet", "--weights", "random", "--device", "cpu")
KINDS = {
    *("corrupt", "structure", "across_splits", "across_classes", "exact_duplicates", "near_duplicates"),
    *("label_suspects", "imbalance", "blank", "blurred", "odd_aspect", "small", "wrong_suffix"),
}


@pytest.fixture(scope="module")
def photos(photo: Photo) -> list[Image.Image]:
    """40 pictures, no two of which are alike."""
    return [photo(seed, 160, 128) for seed in range(40)]


def write(image: Image.Image, path: Path, *arguments: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, *arguments, **options)
    return path


def fill(folder: Path, photos: list[Image.Image], classes: str = "ab", images: int = 4, first: int = 0) -> Path:
    """So many images in each of some class folders, all different."""
    for number in range(len(classes) * images):
        write(photos[first + number], folder / classes[number % len(classes)] / f"{first + number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def planted(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with train and val, and in them one finding or more of each kind. Read only."""
    data = tmp_path_factory.mktemp("planted") / "data"
    fill(data / "train", photos, ("ant", "bee"), 12)  # type: ignore[arg-type]
    fill(data / "val", photos, ("ant", "bee"), 4, 24)  # type: ignore[arg-type]
    write(photos[32], data / "train/cow/1.png")
    train, val = data / "train", data / "val"
    (train / "ant/notes.txt").touch()
    (train / "ant/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    shutil.copy(train / "ant/00.png", train / "ant/copy.png")
    shutil.copy(train / "ant/02.png", train / "bee/wrong.png")
    shutil.copy(train / "bee/01.png", val / "bee/leak.png")
    write(photos[4].resize((112, 90), Image.Resampling.BICUBIC), train / "ant/near.png")
    write(photos[6].crop((3, 3, 157, 125)), val / "ant/near leak.png")
    write(Image.new("RGB", (160, 128), "white"), train / "bee/blank.png")
    write(photos[33].filter(ImageFilter.GaussianBlur(4)), train / "bee/blurred.png")
    write(photos[34].resize((600, 120)), train / "bee/long.png")
    write(photos[35].resize((40, 32), Image.Resampling.LANCZOS), train / "ant/small.png")
    write(photos[36], train / "ant/really.png", "JPEG", quality=95)
    return data


FINDINGS = {
    "corrupt": 1,
    "structure": 2,  # val lacks cow, and cow has a single image
    "across_splits": 2,
    "across_classes": 1,
    "exact_duplicates": 3,
    "near_duplicates": 2,
    "label_suspects": 0,
    "imbalance": 1,
    "blank": 1,
    "blurred": 1,
    "odd_aspect": 1,
    "small": 1,
    "wrong_suffix": 1,
}


@pytest.fixture(scope="module")
def told(tlkit: Tlkit, planted: Path, contents: Any) -> Any:
    """What is told of the planted folder."""
    before = contents(planted)
    done = tlkit("check-data", planted, "--json", "--quiet")
    assert contents(planted) == before, "nothing is ever changed"
    assert done.out.count("\n") == 1
    return done.json


def strict(done: Any) -> Any:
    """The JSON object of a command that ends with 1, printed whole all the same."""
    assert done.code == 1 and "error" not in done.err and done.out.count("\n") == 1
    return json.loads(done.out)


# What is found


def test_each_kind_of_finding(told: dict[str, Any]) -> None:
    assert told["findings"] == FINDINGS and set(FINDINGS) == KINDS
    for kind, number in told["findings"].items():
        if kind in told:
            assert len(told[kind] or []) == number, kind
    groups = told["duplicates"]
    for kind in ("across_splits", "across_classes"):
        assert told["findings"][kind] == sum(group[kind] for group in groups)
    for kind in ("exact", "near"):
        assert told["findings"][f"{kind}_duplicates"] == sum(group["kind"] == kind for group in groups)


def test_findings_are_named(told: dict[str, Any]) -> None:
    (broken,) = told["corrupt"]
    assert broken["path"] == "train/ant/broken.jpg" and broken["reason"]
    assert "val lacks class folders that train has: cow" in told["structure"][0]["what"]
    assert told["structure"][1]["what"] == "class 'cow' has a single image of train"
    assert all(fault["remedy"] for fault in told["structure"])
    assert told["imbalance"] == ["cow"]
    assert told["blank"] == [{"path": "train/bee/blank.png"}]
    assert [one["path"] for one in told["blurred"]] == ["train/bee/blurred.png"]
    assert told["odd_aspect"] == [{"path": "train/bee/long.png", "width": 600, "height": 120}]
    assert told["small"] == [{"path": "train/ant/small.png", "width": 40, "height": 32}]
    assert told["wrong_suffix"] == [{"path": "train/ant/really.png", "format": "JPEG"}]
    assert told["ignored"] == {".txt": 1}


def test_copies_are_told_with_what_they_cross(told: dict[str, Any]) -> None:
    fields = ("kind", "found_by", "across_splits", "across_classes")
    found = {tuple(group["paths"]): tuple(group[name] for name in fields) for group in told["duplicates"]}
    assert found == {
        ("train/ant/00.png", "train/ant/copy.png"): ("exact", "content", False, False),
        ("train/ant/02.png", "train/bee/wrong.png"): ("exact", "content", False, True),
        ("train/bee/01.png", "val/bee/leak.png"): ("exact", "content", True, False),
        ("train/ant/04.png", "train/ant/near.png"): ("near", "hash", False, False),
        ("train/ant/06.png", "val/ant/near leak.png"): ("near", "hash", True, False),
    }


def test_counts(told: dict[str, Any], planted: Path) -> None:
    images = [path for path in planted.rglob("*.*") if path.suffix != ".txt"]
    assert (told["images"], told["readable"]) == (len(images), len(images) - 1)
    splits = {name: sum(path.is_relative_to(planted / name) for path in images) for name in ("train", "val")}
    assert told["splits"] == splits
    assert told["classes"] == [
        {"class": name, **{key: sum(path.parent.match(at) for path in images) for key, at in parts.items()}}
        for name in ("ant", "bee", "cow")
        for parts in [{"images": f"*/{name}", "train": f"train/{name}", "val": f"val/{name}"}]
    ]
    assert told["formats"] == {"PNG": told["readable"] - 1, "JPEG": 1}
    assert told["modes"] == {"RGB": told["readable"]}
    assert told["sizes"]["width"] == {"min": 40, "median": 160, "max": 600}


TYPES: dict[str, Any] = {
    **{"command": str, "version": str, "seconds": float, "data": str, "images": int, "readable": int, "splits": dict},
    **{"corrupt": list, "structure": list, "duplicates": list, "classes": list, "deep": bool, "labels_judged": int},
    **{"label_suspects": type(None), "imbalance": list, "blank": list, "blurred": list, "odd_aspect": list},
    **{"small": list, "wrong_suffix": list, "formats": dict, "modes": dict, "sizes": dict, "ignored": dict},
    **{"heic_left_out": int, "findings": dict},
}


def test_fields_and_their_types(told: dict[str, Any]) -> None:
    assert {name: type(value) for name, value in told.items()} == TYPES
    for group in told["duplicates"]:
        assert set(group) >= {"paths", "kind", "found_by", "across_splits", "across_classes"}
        assert group["splits"] == [path.split("/")[0] for path in group["paths"]]
        assert group["labels"] == [path.split("/")[1] for path in group["paths"]]
    assert told["command"] == "check-data" and told["label_suspects"] is None, "not looked at"


def test_a_person_reads_the_same(tlkit: Tlkit, planted: Path) -> None:
    done = tlkit("check-data", planted, "--quiet")
    assert done.code == 0 and done.err.count("\n") == 1 and "1 files" in done.err, (
        "what was ignored is told all the same"
    )
    for words in (
        *("train/ant/broken.jpg: ", "train/ant/06.png = val/ant/near leak.png", "train/bee/01.png = val/bee/leak.png"),
        *("train/ant/really.png is JPEG", "train/bee/long.png (600 x 120)", "train/ant/00.png = train/ant/copy.png"),
        *("val lacks class folders", "train/bee/blurred.png", "median size 160 x 128", "--deep", "cow"),
    ):
        assert words in done.out, words
    assert "looks like" not in done.out, "nobody looked at labels"


def test_workers_change_nothing(tlkit: Tlkit, planted: Path, told: dict[str, Any]) -> None:
    again = tlkit("check-data", planted, "--json", "--quiet", "--workers", 2).json
    assert again | {"seconds": 0} == told | {"seconds": 0}


def test_progress_is_told_unless_quiet(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    data = fill(tmp_path / "data", photos)
    assert "looking: 8/8" in tlkit("check-data", data, "--json").err
    assert tlkit("check-data", data, "--json", "--quiet").err == ""


def test_nothing_found(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    data = fill(tmp_path / "data", photos)
    done = tlkit("check-data", data, "--strict")
    assert done.code == 0 and "8 images of 2 classes, nothing found" in done.out
    assert not any(tlkit("check-data", data, "--json").json["findings"].values())


def test_links_are_copies(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    data = fill(tmp_path / "data", photos)
    (data / "a/link.png").symlink_to("../b/01.png")
    told = tlkit("check-data", data, "--json").json
    assert [(group["paths"], group["across_classes"]) for group in told["duplicates"]] == [
        (["a/link.png", "b/01.png"], True)
    ]


# What counts


def test_strict_ends_with_1_after_printing_all(tlkit: Tlkit, planted: Path, told: dict[str, Any]) -> None:
    found = strict(tlkit("check-data", planted, "--json", "--quiet", "--strict"))
    assert found | {"seconds": 0} == told | {"seconds": 0}
    done = tlkit("check-data", planted, "--strict", "--quiet")
    assert done.code == 1 and "train/ant/broken.jpg" in done.out and "error" not in done.err


@pytest.mark.parametrize(
    ("ignored", "code"),
    [
        (KINDS, 0),
        (KINDS - {"label_suspects"}, 0),  # there are none
        (KINDS - {"corrupt"}, 1),
        (KINDS - {"near_duplicates"}, 1),
        (set(), 1),
    ],
    ids=lambda value: f"{len(value)}" if isinstance(value, set) else f"{value}",
)
def test_kinds_that_are_ignored(
    tlkit: Tlkit, planted: Path, told: dict[str, Any], ignored: set[str], code: int
) -> None:
    words = " , ".join(sorted(kind.replace("_", "-") for kind in ignored))
    done = tlkit("check-data", planted, "--json", "--quiet", "--strict", "--ignore", words)
    assert done.code == code
    found = json.loads(done.out)
    assert found["findings"] == {kind: number for kind, number in FINDINGS.items() if kind not in ignored}
    assert found["duplicates"] == told["duplicates"], "what is ignored does not count, but is listed"


def test_what_is_ignored_is_no_row_of_the_table(tlkit: Tlkit, planted: Path) -> None:
    done = tlkit("check-data", planted, "--quiet", "--ignore", "blurred,across-splits,small")
    for word in ("blurred.png", "small.png", "leak.png"):
        assert word not in done.out
    assert "train/bee/long.png" in done.out and "train/ant/04.png" in done.out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("blured", ["unknown kind 'blured'", "did you mean 'blurred'?"]),
        ("blurred,near-duplicate", ["'near-duplicate'", "did you mean 'near-duplicates'"]),
        ("xyz", ["'xyz'", "known kinds: ", "corrupt", "near-duplicates"]),
        ("odd_aspect", ["did you mean 'odd-aspect'?"]),
    ],
)
def test_an_unknown_kind_is_refused(tlkit: Tlkit, planted: Path, given: str, words: list[str]) -> None:
    done = tlkit("check-data", planted, "--ignore", given)
    assert done.code == 1 and done.out == "" and "--ignore" in done.error
    assert all(word in done.error for word in words)


def test_a_recipe(tlkit: Tlkit, planted: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("command: check-data\nstrict: true\nignore: corrupt,structure\n")
    found = strict(tlkit("check-data", planted, "--recipe", tmp_path / "r.yaml", "--json", "--quiet"))
    assert set(found["findings"]) == KINDS - {"corrupt", "structure"}


def test_the_recipe_for_batch_jobs(tlkit: Tlkit, planted: Path, photos: list[Image.Image], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes/check-data/nightly.yaml"
    found = strict(tlkit("check-data", planted, "--recipe", recipe, "--json", "--quiet"))
    assert set(found["findings"]) == {"corrupt", "structure", "across_splits", "across_classes"}
    data = fill(tmp_path / "data", photos)
    write(Image.new("RGB", (99, 99)), data / "a/blank.png")
    shutil.copy(data / "a/00.png", data / "a/copy.png")
    assert tlkit("check-data", data, "--recipe", recipe, "--quiet").code == 0


# What is written


def test_the_page(tlkit: Tlkit, planted: Path, contents: Any, tmp_path: Path) -> None:
    before, out = contents(planted), tmp_path / "found.html"
    told = tlkit("check-data", planted, "--out", out, "--json", "--quiet").json
    assert told["out"] == str(out) and told["findings"] == FINDINGS
    html = out.read_text(encoding="utf-8")
    assert html.lstrip().lower().startswith("<!doctype html>") and "near leak.png" in html and "broken.jpg" in html
    assert contents(planted) == before and [path.name for path in tmp_path.iterdir()] == ["found.html"]


def refuse_to_look(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
@pytest.mark.parametrize(
    ("flag", "name", "what"),
    [
        ("--out", "there.html", "exists already"),
        ("--out", "new.htm", "does not end in .html"),
        ("--out", "new", "does not end in .html"),
        ("--out", "nowhere/new.html", "no such folder"),
        ("--write-manifest", "there.csv", "exists already"),
        ("--write-manifest", "listed.csv", "exists already"),
        ("--write-manifest", "new.tsv", "does not end in .csv or .parquet"),
        ("--write-manifest", "nowhere/new.parquet", "no such folder"),
    ],
)
def test_what_could_not_be_written_is_refused_before_any_work(
    tlkit: Tlkit,
    planted: Path,
    contents: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flag: str,
    name: str,
    what: str,
    as_json: bool,
) -> None:
    for there in ("there.html", "there.csv", "listed.csv.dropped.csv"):
        (tmp_path / there).write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr("tlkit.commands.check_data.look_at", refuse_to_look)
    done = tlkit("check-data", planted, flag, tmp_path / name, *(["--json"] if as_json else []))
    assert done.code == 1 and what in done.error and done.out.count("\n") == as_json
    assert contents(tmp_path) == before


@pytest.mark.parametrize("ending", ["csv", "parquet", "CSV"])
def test_the_cleaned_manifest(tlkit: Tlkit, planted: Path, contents: Any, ending: str, read_csv: Any) -> None:
    """Beside the folder, so that its paths can be relative."""
    before, manifest = contents(planted), planted.parent / f"clean.{ending}"
    dropped = Path(f"{manifest}.dropped.csv")
    try:
        told = tlkit("check-data", planted, "--write-manifest", manifest, "--json", "--quiet").json
        samples, rows = read_samples(manifest), read_csv(dropped)
    finally:
        manifest.unlink(missing_ok=True)
        dropped.unlink(missing_ok=True)
    assert contents(planted) == before
    reasons = {row["path"]: row["reason"] for row in rows}
    assert {path: reason for path, reason in reasons.items() if path != "train/ant/broken.jpg"} == {
        "train/ant/copy.png": "the same file as train/ant/00.png",
        "train/ant/02.png": "the same file is labelled ant and bee",
        "train/bee/wrong.png": "the same file is labelled ant and bee",
        "train/bee/01.png": "the same file as val/bee/leak.png",
        "train/ant/06.png": "nearly the same as val/ant/near leak.png of val",
    }
    assert reasons["train/ant/broken.jpg"] == told["corrupt"][0]["reason"]
    assert {row["path"]: row["label"] for row in rows} == {path: path.split("/")[1] for path in reasons}
    images = {path for path, held in before.items() if held is not None and not path.endswith(".txt")}
    assert {path.removeprefix("data/") for path in samples.paths} == images - set(reasons)
    for path, label, split in zip(samples.paths, samples.labels, samples.splits, strict=True):
        assert path.split("/")[1:3] == [split, samples.classes[label]]
    groups = dict(zip(samples.paths, samples.groups.tolist(), strict=True))
    assert groups["data/train/ant/04.png"] == groups["data/train/ant/near.png"]
    assert len(set(groups.values())) == len(groups) - 1, "all others stand alone"
    assert told["manifest"] == {"path": str(manifest), "kept": len(images) - 6, "dropped": 6}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_was_cleaned_is_clean_and_can_be_learnt_from(
    tlkit: Tlkit, photos: list[Image.Image], small: tuple[str, ...], tmp_path: Path, ending: str
) -> None:
    data, manifest = fill(tmp_path / "data", photos, images=6), tmp_path / "elsewhere" / f"clean.{ending}"
    manifest.parent.mkdir()
    for number in range(5):
        shutil.copy(data / "a/00.png", data / f"a/copy{number}.png")
    shutil.copy(data / "a/02.png", data / "b/wrong.png")
    write(photos[4].resize((112, 90)), data / "a/near.png")
    assert tlkit("check-data", data, "--write-manifest", manifest, "--quiet").code == 0
    again = tlkit("check-data", manifest, "--json").json
    assert {kind: number for kind, number in again["findings"].items() if number} == {"near_duplicates": 1}
    done = tlkit("finetune", manifest, *small, "--plan", "--json", "--quiet")
    assert done.code == 0, done.err
    assert "byte for byte" not in done.err
    counts = (
        [sum(parts.values()) for parts in done.json["plan"]["data"].values()] if "data" in done.json["plan"] else []
    )
    assert counts in ([], [6, 6])
    assert len(read_samples(manifest)) == 12


def test_a_manifest_of_nothing_left_is_said(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    """Each image stands in both classes."""
    for name in "ab":
        write(photos[0], tmp_path / "data" / name / "1.png")
    told = tlkit("check-data", tmp_path / "data", "--write-manifest", tmp_path / "m.csv", "--json", "--quiet").json
    assert (told["manifest"]["kept"], told["manifest"]["dropped"]) == (0, 2)


# Data of other shapes


def test_a_folder_without_labels(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    for number in range(6):
        write(photos[number % 5], tmp_path / "data" / f"{number}.png")
    told = tlkit("check-data", tmp_path / "data", "--json", "--quiet").json
    assert told["images"] == 6 and told["classes"] == [] and told["splits"] == {} and told["structure"] == []
    assert [group["paths"] for group in told["duplicates"]] == [["0.png", "5.png"]]
    done = tlkit("check-data", tmp_path / "data", "--quiet")
    assert "6 images\n" in done.out and "0.png = 5.png" in done.out


def test_a_folder_without_labels_makes_no_manifest_that_nobody_can_read(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path
) -> None:
    """A manifest needs labels: without, there is nothing to write, and that is said."""
    for number in range(4):
        write(photos[number], tmp_path / "data" / f"{number}.png")
    done = tlkit("check-data", tmp_path / "data", "--write-manifest", tmp_path / "m.csv", "--json", "--quiet")
    if done.code == 0:
        assert len(read_samples(tmp_path / "m.csv")) == 4
    else:
        assert done.code == 1 and "label" in done.error and not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"a": 4}, []),
        ({"a": 4, "b": 1}, ["class 'b' has a single image"]),
        ({"a": 4, "b": 0}, ["class 'b' has no image"]),
        ({"a": 1}, ["class 'a' has a single image"]),
        ({"a": 1, "b": 0, "c": 2}, ["class 'a' has a single image", "class 'b' has no image"]),
    ],
    ids=str,
)
def test_few_classes_and_few_images(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, images: dict[str, int], said: list[str]
) -> None:
    paths = iter(photos)
    for name, count in images.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            write(next(paths), tmp_path / "data" / name / f"{number}.png")
    told = tlkit("check-data", tmp_path / "data", "--json", "--quiet").json
    assert [fault["what"] for fault in told["structure"]] == said
    assert {one["class"]: one["images"] for one in told["classes"]} == images
    assert told["duplicates"] == [] and told["images"] == sum(images.values())


def test_nothing_that_can_be_read(tlkit: Tlkit, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/3.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("no image")
    out = ("--write-manifest", tmp_path / "m.csv", "--out", tmp_path / "page.html")
    told = strict(tlkit("check-data", tmp_path / "data", "--json", "--quiet", "--strict", *out))
    assert (told["images"], told["readable"], len(told["corrupt"])) == (3, 0, 3)
    assert told["duplicates"] == [] and told["sizes"] == {} and told["formats"] == {}
    assert (tmp_path / "page.html").is_file() and told["manifest"]["kept"] == 0
    assert tlkit("check-data", tmp_path / "data", "--quiet").code == 0
    deep = tlkit("check-data", tmp_path / "data", "--json", "--quiet", "--deep", *TINY).json
    assert deep["label_suspects"] == [] and deep["labels_judged"] == 0


@pytest.mark.parametrize("name", ["nowhere", "empty", "texts"])
def test_nothing_there(tlkit: Tlkit, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts/a").mkdir(parents=True)
    (tmp_path / "texts/a/1.txt").touch()
    done = tlkit("check-data", tmp_path / name, "--json")
    assert done.code == 1 and name in done.error


def listed(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_manifest(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    """A file listed twice, with two labels; a file that is not there; a label not in train; a group torn apart."""
    fill(tmp_path / "data", photos)
    manifest = listed(
        tmp_path / "m.csv",
        "path,label,split,group",
        "data/a/00.png,a,train,g",
        "data/a/00.png,b,train,g",
        "data/a/02.png,a,train,",
        "data/a/04.png,a,val,",
        "data/b/01.png,b,train,",
        "data/b/03.png,b,train,h",
        "data/b/05.png,b,val,h",
        "data/b/07.png,c,val,",
        "data/b/gone.png,b,val,",
    )
    told = tlkit("check-data", manifest, "--json", "--quiet").json
    assert told["corrupt"] == [{"path": "data/b/gone.png", "reason": "no such file"}]
    faults = [fault["what"] for fault in told["structure"]]
    assert faults == [
        "labels that no row of train has: c",
        "images of group 'h' stand in train and in val",
        "class 'c' has no image of train",
    ]
    (group,) = told["duplicates"]
    assert group["paths"] == ["data/a/00.png"] * 2 and group["across_classes"] and not group["across_splits"]
    assert told["images"] == 9 and told["splits"] == {"train": 5, "val": 4}


def test_splits_with_differing_classes(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    fill(tmp_path / "data/train", photos)
    fill(tmp_path / "data/val", photos, "ac", 2, first=10)
    told = tlkit("check-data", tmp_path / "data", "--json", "--quiet").json
    assert [fault["what"] for fault in told["structure"]] == [
        "val has class folders that train has not: c",
        "val lacks class folders that train has: b",
        "class 'c' has no image of train",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path) -> None:
    data = fill(tmp_path / "data", photos)
    write(photos[20], data / "a/locked/1.png")
    (data / "a/locked").chmod(0)
    try:
        told = tlkit("check-data", data, "--json", "--quiet").json
    finally:
        (data / "a/locked").chmod(0o755)
    assert told["images"] == 8
    assert len(told["structure"]) == 1 and "cannot be read" in told["structure"][0]["what"]


NAMES = [
    "line\nbreak.png",
    "🐜 größe.png",
    "quo\"te'd,.png",
    "=1+1.png",
    " spaces .png",
    "<b>&amp;.png",
    "x" * 251 + ".png",
]
UNDECODABLE = os.fsdecode(b"caf\xe9.png")


def test_names(tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, read_csv: Any) -> None:
    """In JSON, the table, the page and the manifest."""
    data = tmp_path / "data"
    for number, name in enumerate([*NAMES, UNDECODABLE, "plain.png"]):
        write(photos[number], data / "a" / name)
        write(photos[number], data / "b" / f"{number}.png")
    out = ("--write-manifest", tmp_path / "m.csv", "--out", tmp_path / "page.html")
    done = tlkit("check-data", data, "--json", "--quiet", *out)
    told = json.loads(done.out)
    assert {group["paths"][0] for group in told["duplicates"]} == {
        f"a/{name}" for name in [*NAMES, UNDECODABLE, "plain.png"]
    }
    assert {row["path"] for row in read_csv(tmp_path / "m.csv.dropped.csv")} >= {f"a/{name}" for name in NAMES}
    table = tlkit("check-data", data, "--quiet")
    assert table.code == 0 and table.out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_names_in_the_manifest(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, ending: str, read_csv: Any
) -> None:
    data, manifest = tmp_path / "data", tmp_path / f"m.{ending}"
    for number, name in enumerate([*NAMES, UNDECODABLE]):
        write(photos[number], data / "ab"[number % 2] / name)
    told = tlkit("check-data", data, "--json", "--quiet", "--write-manifest", manifest).json
    assert told["manifest"]["dropped"] == 1
    samples = read_samples(manifest)
    assert all((tmp_path / path).is_file() for path in samples.paths)
    assert {Path(path).name for path in samples.paths} == set(NAMES)
    (row,) = read_csv(tmp_path / f"m.{ending}.dropped.csv")
    assert row["path"].endswith(UNDECODABLE) and "not valid UTF-8" in row["reason"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("folder", [" data", "data ", "größe, \n"], ids=ascii)
def test_names_of_folders_in_the_manifest(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, folder: str, ending: str
) -> None:
    data, manifest = fill(tmp_path / folder, photos), tmp_path / f"m.{ending}"
    assert tlkit("check-data", data, "--json", "--quiet", "--write-manifest", manifest).json["manifest"]["kept"] == 8
    samples = read_samples(manifest)
    assert len(samples) == 8 and all((tmp_path / path).is_file() for path in samples.paths)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_folder_that_a_manifest_cannot_name_is_said(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, ending: str
) -> None:
    """No path in such a folder is valid UTF-8, as manifests have to be; nothing is written that cannot be read."""
    data, manifest = fill(tmp_path / os.fsdecode(b"\xff"), photos), tmp_path / f"m.{ending}"
    assert tlkit("check-data", data, "--json", "--quiet").code == 0
    done = tlkit("check-data", data, "--json", "--quiet", "--write-manifest", manifest)
    assert done.code == 1 and "UTF-8" in done.error and not manifest.exists()


# Without and with a network


def test_a_plan_looks_at_nothing(tlkit: Tlkit, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlkit.commands.check_data.look_at", refuse_to_look)
    told = tlkit("check-data", planted, "--plan", "--json", "--quiet").json
    assert told["plan"] == {"images": 44, "deep": False}
    done = tlkit("check-data", planted, "--plan", "--deep", *TINY)
    assert done.code == 0 and "44 images of 3 classes" in done.out and "test_resnet" in done.out


def test_without_deep_no_weights_are_needed(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, offline: None
) -> None:
    data = fill(tmp_path / "data", photos)
    assert tlkit("check-data", data, "--model", "resnet18", "--json").json["deep"] is False
    done = tlkit("check-data", data, "--model", "resnet18", "--deep", "--json")
    assert done.code == 1 and "no network and no weights" in done.error


def test_a_network_tells_of_labels(tlkit: Tlkit, shapes: Path, tmp_path: Path, contents: Any) -> None:
    before = contents(shapes)
    done = tlkit("check-data", shapes, "--deep", *TINY, "--json", "--quiet", "--out", tmp_path / "page.html")
    told, names = done.json, ["disc", "square", "triangle"]
    assert told["deep"] is True and (told["model"], told["weights"]) == ("test_resnet", "random")
    assert 0 <= told["labels_judged"] <= 36 and told["findings"]["label_suspects"] == len(told["label_suspects"])
    probabilities = [one["probability"] for one in told["label_suspects"]]
    assert probabilities == sorted(probabilities)
    for one in told["label_suspects"]:
        assert one["path"].split("/")[0] == one["label"] != one["suggested"] and one["suggested"] in names
        assert 0 <= one["probability"] <= one["suggested_probability"] <= 1
    assert contents(shapes) == before


def test_suspects_are_named_right_beside_files_that_cannot_be_read(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is shown fewer images than there are: here it suspects the first and the last that it saw."""
    data = fill(tmp_path / "data", photos)
    for name in ("a/00 broken.png", "a/01 broken.png", "b/02.png"):
        (data / name).touch()

    def suspect(features: np.ndarray, labels: np.ndarray, *_: Any, **__: Any) -> tuple[list[Suspect], int]:
        assert len(features) == len(labels) == 8 and labels.tolist() == [0] * 4 + [1] * 4
        return [Suspect(7, 0.1, 0, 0.9), Suspect(0, 0.2, 1, 0.8)], 8

    monkeypatch.setattr("tlkit.audit.deep.label_suspects", suspect)
    told = tlkit("check-data", data, "--deep", *TINY, "--json", "--quiet").json
    assert [(one["path"], one["label"], one["suggested"]) for one in told["label_suspects"]] == [
        ("b/07.png", "b", "a"),
        ("a/00.png", "a", "b"),
    ]
    assert told["findings"]["label_suspects"] == 2 and told["labels_judged"] == 8
    done = tlkit("check-data", data, "--deep", *TINY, "--quiet")
    assert "labels to look at, of 8" in done.out and "b/07.png is b, looks like a" in done.out


def test_a_network_sees_copies_that_are_mirrored(tlkit: Tlkit, tmp_path: Path, packaged: None, offline: None) -> None:
    for name in ("china", "flower"):  # scikit-learn's two photos, in pieces
        whole = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for number in range(24):
            left, top = number % 6 * 100, number // 6 * 100
            write(whole.crop((left, top, left + 100, top + 100)), tmp_path / "data" / name / f"{number:02d}.png")
    for number in (4, 15):
        image = Image.open(tmp_path / f"data/flower/{number:02d}.png")
        write(ImageOps.mirror(image), tmp_path / f"data/china/mirrored {number}.png")
    told = tlkit("check-data", tmp_path / "data", "--deep", "--json", "--quiet").json
    groups = [set(group["paths"]) for group in told["duplicates"] if group["found_by"] == "features"]
    for number in (4, 15):
        assert any({f"china/mirrored {number}.png", f"flower/{number:02d}.png"} <= group for group in groups)
    assert max(map(len, groups)) < 10, "not whatever is green"
    assert tlkit("check-data", tmp_path / "data", "--json", "--quiet").json["duplicates"] == [], "not seen by hashes"


@pytest.mark.parametrize("network", [TINY, pytest.param((), marks=pytest.mark.slow)], ids=["untrained", "Lite0"])
def test_a_planted_wrong_label_is_ranked_first(
    tlkit: Tlkit,
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    network: tuple[str, ...],
) -> None:
    """A red disc among the green squares, each class of which has fewer images than a crowd."""
    if not network:
        request.getfixturevalue("packaged")
    data = make_shapes(tmp_path / "data", images=12)
    other = make_shapes(tmp_path / "other", ("disc",), 1, seed=99)
    shutil.copy(other / "disc/00.png", data / "square/wrong.png")
    told = tlkit("check-data", data, "--deep", *network, "--json", "--quiet").json
    assert told["labels_judged"] == 37
    assert [(one["path"], one["suggested"]) for one in told["label_suspects"][:1]] == [("square/wrong.png", "disc")]


def test_without_labels_a_network_looks_for_copies_alone(
    tlkit: Tlkit, photos: list[Image.Image], tmp_path: Path
) -> None:
    for number in range(3):
        write(photos[number], tmp_path / "data" / f"{number}.png")
    (tmp_path / "data/broken.png").touch()
    told = tlkit("check-data", tmp_path / "data", "--deep", *TINY, "--json", "--quiet").json
    assert told["label_suspects"] == [] and told["labels_judged"] == 0 and told["readable"] == 3


# What finetune, evaluate and compare say of copies


def test_finetune_warns_of_files_on_both_sides(
    tlkit: Tlkit, photos: list[Image.Image], small: tuple[str, ...], tmp_path: Path
) -> None:
    data = fill(tmp_path / "data/train", photos, images=5).parent
    fill(data / "val", photos, images=2, first=20)
    arguments = ("finetune", data, *small, "--strategy", "probe", "--quiet")
    done = tlkit(*arguments, "--plan")
    assert done.code == 0 and "byte for byte" not in done.err
    shutil.copy(data / "train/a/00.png", data / "val/a/leak.png")
    shutil.copy(data / "train/b/03.png", data / "val/b/leak.png")
    done = tlkit(*arguments, "--out", tmp_path / "run", "--json")
    shared = [
        {"path": "val/a/leak.png", "split": "val", "train_path": "train/a/00.png"},
        {"path": "val/b/leak.png", "split": "val", "train_path": "train/b/03.png"},
    ]
    assert done.json["shared_files"] == shared
    assert json.loads((tmp_path / "run/summary.json").read_text())["shared_files"] == shared
    warnings = [line for line in done.err.splitlines() if "byte for byte" in line]
    assert (
        len(warnings) == 1 and "2 of the 6 images" in warnings[0] and "val/a/leak.png is train/a/00.png" in warnings[0]
    )


@pytest.fixture(scope="module")
def copied(
    tlkit: Tlkit, photos: list[Image.Image], small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Any]:
    """Data without splits, half of it copies under other names; a run on it with val and test, and what that told."""
    folder = tmp_path_factory.mktemp("copied")
    data = fill(folder / "data", photos, images=8)
    for path in sorted(data.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    arguments = ("--strategy", "probe", "--test-fraction", 0.25, "--out", folder / "run", "--json", "--quiet")
    done = tlkit("finetune", data, *small, *arguments)
    assert done.code == 0, done.err
    return data, folder / "run", done


def test_unsplit_data_is_split_with_its_copies(copied: tuple[Path, Path, Any], read_csv: Any) -> None:
    _, run, done = copied
    assert done.json["shared_files"] == [] and "byte for byte" not in done.err
    home: dict[str, set[str]] = {}
    for row in read_csv(run / "splits.csv"):
        home.setdefault(Path(row["path"]).name.removeprefix("copy of "), set()).add(row["split"])
        assert len(row["digest"]) == 32
    assert len(home) == 16 and all(len(splits) == 1 for splits in home.values())
    assert set.union(*home.values()) == {"train", "val", "test"}


def test_folds_hold_copies_out_together(
    tlkit: Tlkit, copied: tuple[Path, Path, Any], small: tuple[str, ...], tmp_path: Path, read_csv: Any
) -> None:
    data, arguments = copied[0], ("--strategy", "probe", "--folds", 2, "--out", tmp_path / "run", "--json", "--quiet")
    done = tlkit("finetune", data, *small, *arguments)
    assert done.code == 0, done.err
    assert "byte for byte" not in done.err
    folds = [read_csv(path) for path in sorted((tmp_path / "run").glob("folds/*/splits.csv"))]
    assert len(folds) == 2
    for rows in folds:
        splits = {row["path"]: row["split"] for row in rows}
        assert set(splits.values()) >= {"train"} and len(set(splits.values())) == 2
        for path, split in splits.items():
            assert splits[str(Path(path).with_name(f"copy of {Path(path).name.removeprefix('copy of ')}"))] == split


@pytest.fixture(scope="module")
def elsewhere(copied: tuple[Path, Path, Any], photos: list[Image.Image], read_csv: Any) -> tuple[Path, list[str]]:
    """Another folder with new images and two training images of the run under other names; these names."""
    data, run, _ = copied
    other = fill(data.parent / "other", photos, images=3, first=30)
    trained = {row["label"]: row["path"] for row in read_csv(run / "splits.csv") if row["split"] == "train"}
    for label, path in trained.items():
        shutil.copy(data / path, other / label / "seen.png")
    return other, [f"{label}/seen.png" for label in sorted(trained)]


@pytest.fixture(scope="module")
def old(copied: tuple[Path, Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it was before runs stored digests."""
    run = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(copied[1], run)
    with (run / "splits.csv").open(newline="") as file:
        rows = [row[:3] for row in csv.reader(file)]
    with (run / "splits.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return run


def measured(command: str, run: Path, twin: Path, data: Path | None) -> list[Any]:
    """The words that measure a run, beside another one to compare, by default on the run's own data."""
    if command == "evaluate":
        return ["evaluate", run, *([data] if data else []), "--json", "--quiet"]
    return ["compare", run, twin, *(["--data", data] if data else []), "--json", "--quiet"]


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_images_that_a_run_was_trained_on_are_known_under_other_names(
    tlkit: Tlkit, copied: tuple[Path, Path, Any], elsewhere: tuple[Path, list[str]], old: Path, command: str
) -> None:
    (data, run, _), (other, names) = copied, elsewhere
    done = tlkit(*measured(command, run, old, other))
    shared = done.json["shared_files"]
    assert [one["path"] for one in shared] == names
    assert all((data / one["train_path"]).read_bytes() == (other / one["path"]).read_bytes() for one in shared)
    assert done.err.count("byte for byte") == 1 and "2 of the 8 images" in done.err


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_runs_of_old_say_nothing_of_copies(
    tlkit: Tlkit, elsewhere: tuple[Path, list[str]], old: Path, command: str, tmp_path: Path
) -> None:
    shutil.copytree(old, tmp_path / "twin")
    done = tlkit(*measured(command, old, tmp_path / "twin", elsewhere[0]))
    assert done.json["shared_files"] == [] and "byte for byte" not in done.err


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_its_own_split_shares_nothing(tlkit: Tlkit, copied: tuple[Path, Path, Any], old: Path, command: str) -> None:
    done = tlkit(*measured(command, copied[1], old, None))
    assert done.json["shared_files"] == [] and "byte for byte" not in done.err


# Real images


@pytest.mark.shared_data
def test_the_copies_of_office_caltech(tlkit: Tlkit, shared_data: Path) -> None:
    """18 groups of the same file: 17 in amazon, one in caltech10; against comparing all bytes."""
    folder = shared_data / "office_caltech10_256"
    for domain, count in {"amazon": 17, "caltech10": 1, "dslr": 0, "webcam": 0}.items():
        known: dict[bytes, set[str]] = {}
        for path in (folder / domain).rglob("*.*"):
            known.setdefault(path.read_bytes(), set()).add(path.relative_to(folder / domain).as_posix())
        expected = sorted(sorted(paths) for paths in known.values() if len(paths) > 1)
        told = tlkit("check-data", folder / domain, "--json", "--quiet").json
        groups = [group["paths"] for group in told["duplicates"] if group["kind"] == "exact"]
        assert sorted(map(sorted, groups)) == expected and len(expected) == count
        assert told["images"] == len(list((folder / domain).rglob("*.*"))) and not told["corrupt"]


def pairs(groups: list[list[str]]) -> set[frozenset[str]]:
    return {frozenset((one, other)) for group in groups for one in group for other in group if one != other}


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_near_copies_of_real_photos(tlkit: Tlkit, shared_data: Path, tmp_path: Path, seed: int) -> None:
    """Of 100 of 1000 photos one resized to 0.7, one as a JPEG of quality 50, one with 2 % cut off each side."""
    originals = sorted((shared_data / "imagenet_sample_256").rglob("*.*"))
    chosen = np.random.default_rng(seed).choice(len(originals), 100, replace=False).tolist()
    planted: list[list[str]] = []
    for number, path in enumerate(originals):
        folder = tmp_path / "data" / f"{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").symlink_to(path)
        if number in chosen:
            image = Image.open(path).convert("RGB")
            (width, height), cut = image.size, [round(0.02 * side) for side in image.size]
            smaller = image.resize((round(0.7 * width), round(0.7 * height)), Image.Resampling.BICUBIC)
            write(smaller, folder / f"{number}r.jpg", quality=90)
            write(image, folder / f"{number}q.jpg", quality=50)
            cropped = image.crop((cut[0], cut[1], width - cut[0], height - cut[1]))
            write(cropped, folder / f"{number}c.jpg", quality=90)
            planted.append([f"{folder.name}/{number}{which}.jpg" for which in ("", "r", "q", "c")])
    told = tlkit("check-data", tmp_path / "data", "--json", "--quiet").json
    expected, found = pairs(planted), pairs([group["paths"] for group in told["duplicates"]])
    assert told["images"] == 1300 and len(expected) == 600
    assert len(expected & found) / len(expected) >= 0.95, "recall"
    assert len(expected & found) / len(found) >= 0.95, "precision"


@pytest.mark.slow
@pytest.mark.shared_data
def test_flipped_labels_of_real_photos(
    tlkit: Tlkit, shared_data: Path, tmp_path: Path, packaged: None, offline: None
) -> None:
    """A tenth of the labels of 244 ants and bees flipped: most of them are among the first 12 % of the suspects."""
    paths = sorted((shared_data / "hymenoptera_256/train").rglob("*.jpg"))
    shares = []
    for seed in range(5):
        wrong = set(np.random.default_rng(seed).choice(len(paths), round(0.1 * len(paths)), replace=False).tolist())
        rows = [
            (path, {"ants": "bees", "bees": "ants"}[path.parent.name] if row in wrong else path.parent.name)
            for row, path in enumerate(paths)
        ]
        manifest = tmp_path / f"{seed}.csv"
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
        told = tlkit("check-data", manifest, "--deep", "--json", "--quiet").json
        assert told["labels_judged"] == 244 and 0.08 * 244 < len(wrong) < 0.12 * 244
        first = {one["path"] for one in told["label_suspects"][:29]}
        shares.append(len(first & {str(paths[row]) for row in wrong}) / len(wrong))
    assert np.mean(shares) >= 0.6, shares
