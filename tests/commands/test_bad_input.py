"""A mistake in the input is one line with what, where and the remedy, exit code 1, and nothing left behind."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import struct
import zlib
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from tlkit import run_folder

Tlkit = Callable[..., Any]


@dataclass(frozen=True)
class Ground:
    """What a case of bad input is made from."""

    folder: Path
    shapes: Callable[..., Path]
    trained: Path

    def data(self, classes: tuple[str, ...] = ("disc", "square"), images: int | tuple[int, ...] = 4) -> Path:
        return self.shapes(self.folder / "data", classes, images)

    def file(self, content: bytes, name: str = "bad.jpg") -> Path:
        """A good folder with one file in it that is not."""
        (self.data() / "disc" / name).write_bytes(content)
        return self.folder / "data"


@pytest.fixture
def ground(tmp_path: Path, make_shapes: Callable[..., Path], trained: Path) -> Ground:
    return Ground(tmp_path, make_shapes, trained)


def made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def pixel_bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60000 x 60000 pixels: 10 GB once decoded."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def other_splits(ground: Ground, classes: tuple[str, ...]) -> Path:
    ground.shapes(ground.folder / "data" / "train", ("disc", "square", "triangle"), 3)
    return ground.shapes(ground.folder / "data" / "val", classes, 2).parent


def file_of_weights(ground: Ground, model: str, name: str = "weights.safetensors") -> Path:
    safetensors.torch.save_file(timm.create_model(model).state_dict(), ground.folder / name)
    return ground.folder / name


def pickled(ground: Ground) -> Path:
    torch.save({"network": timm.create_model("test_resnet")}, ground.folder / "whole.pth")
    return ground.folder / "whole.pth"


def one_image_of_a_class_left(ground: Ground) -> Path:
    data = ground.data(("disc", "square"), (4, 2))
    next((data / "square").iterdir()).write_bytes(b"")
    return data


def manifest(ground: Ground, *rows: tuple[str, ...]) -> Path:
    ground.data()
    with (ground.folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return ground.folder / "list.csv"


Made = tuple[list[Any], str, str, str]
"""Arguments of ``finetune`` (DATA first), and words that tell what is wrong, where, and what to do."""

CASES: dict[str, Callable[[Ground], Made]] = {
    # folders
    "missing folder": lambda g: ([g.folder / "nowhere"], "no such f", "nowhere", "check the path"),
    "empty folder": lambda g: ([made(g.folder / "data")], "no images", "data", "a folder of its own"),
    "empty class folders": lambda g: ([made(g.folder / "data" / "disc").parent], "no images", "data", "folder"),
    "loose images": lambda g: ([g.data() / "disc"], "4 images, but no class folders", "disc", "a folder of its own"),
    "one class": lambda g: ([g.data(("disc",))], "only one class (disc)", "data", "at least two"),
    "a class with one image": lambda g: (
        [g.data(images=(4, 1))],
        "'square' has a single training image",
        "data",
        "add",
    ),
    "an empty class": lambda g: ([g.data(images=(4, 0))], "class 'square'", "data", "add images, or remove the class"),
    "nothing to train on": lambda g: (
        [g.data(), "--val-fraction", 0.5, "--test-fraction", 0.5],
        *("leave nothing to train on", "data", "less than 1"),
    ),
    # files
    "an empty file": lambda g: ([g.file(b"")], "1 of 9 images cannot be read", "disc/bad.jpg", "--on-error skip"),
    "a corrupt file": lambda g: ([g.file(b"\xff\xd8\xff\xe0" + b"x" * 99)], "cannot be read", "disc/bad.jpg", "remove"),
    "a truncated file": lambda g: (
        [g.file(next(g.shapes(g.folder / "x", ("a",), 2).rglob("*.jpg")).read_bytes()[:-200])],
        *("cannot be read", "disc/bad.jpg", "remove"),
    ),
    "a web page called .jpg": lambda g: ([g.file(b"<html>404</html>")], "not an image", "disc/bad.jpg", "remove"),
    "a pixel bomb": lambda g: ([g.file(pixel_bomb(), "bad.png")], "claims", "disc/bad.png", "remove"),
    "too few that can be read": lambda g: (
        [one_image_of_a_class_left(g), "--on-error", "skip", "--val-fraction", 0],
        *("a single training image", "square", "add"),
    ),
    # splits
    "val lacks a class": lambda g: ([other_splits(g, ("disc", "square"))], "val lacks", "triangle", "add them"),
    "val has a class more": lambda g: (
        [other_splits(g, ("disc", "square", "triangle", "bar"))],
        *("val has class folders that train has not: bar", "data", "remove"),
    ),
    "val has a class misspelt": lambda g: (
        [other_splits(g, ("disc", "square", "triangel"))],
        *("triangel", "data", "did you mean 'triangle'?"),
    ),
    "no val to choose on": lambda g: (
        [g.data(), "--select-on", "val", "--val-fraction", 0],
        *("no val split", "--select-on", "leave it out"),
    ),
    # manifests
    "a manifest without labels": lambda g: (
        [manifest(g, ("path", "lable"), ("data/disc/00.png", "a"))],
        *("no column 'label'", "list.csv", "did you mean 'lable'?"),
    ),
    "a manifest of missing files": lambda g: (
        [manifest(g, ("path", "label"), *((f"{n}.png", "ab"[n % 2]) for n in range(8)))],
        *("8 of 8 images cannot be read", "0.png", "check"),
    ),
    "no manifest": lambda g: ([written(g.folder / "list.txt", "a")], "neither a folder nor", "list.txt", ".csv"),
    "a group that does not match": lambda g: (
        [g.data(), "--group-regex", "x(y)"],
        *("does not match", "--group-regex", "make it match"),
    ),
    "a broken regex": lambda g: ([g.data(), "--group-regex", "("], "not a regular", "--group-regex", "correct it"),
    # options
    "an unknown model": lambda g: ([g.data(), "--model", "resnet8"], "unknown model", "resnet8", "did you mean"),
    "a folder that is no run": lambda g: ([g.data(), "--model", g.data()], "not a finished run", "data", "give"),
    "an unknown strategy": lambda g: ([g.data(), "--strategy", "prob"], "'prob'", "--strategy", "did you mean 'probe'"),
    "an unknown recipe key": lambda g: (
        [g.data(), "--recipe", written(g.folder / "r.yaml", "interpolatoin: x\n")],
        *("unknown key 'interpolatoin'", "r.yaml", "did you mean 'interpolation'?"),
    ),
    "a bad recipe value": lambda g: (
        [g.data(), "--recipe", written(g.folder / "r.yaml", "seed: much\n")],
        *("'seed'", "r.yaml", "whole number"),
    ),
    "another command's recipe": lambda g: (
        [g.data(), "--recipe", written(g.folder / "r.yaml", "command: evaluate\n")],
        *("for 'evaluate'", "r.yaml", "tlkit evaluate"),
    ),
    "an image size that it cannot take": lambda g: (
        [g.data(), "--model", "convnext_atto", "--weights", "random", "--image-size", 8],
        *("", "", "size"),
    ),
    "an existing run": lambda g: ([g.data(), "--out", g.trained], "exists already", "trained", "choose another --out"),
    "no GPU": lambda g: ([g.data(), "--device", "mps"], "no mps device", "--device", "--device auto"),
    # weights
    "weights of another network": lambda g: (
        [g.data(), "--model", "test_resnet", "--weights", file_of_weights(g, "test_vit")],
        *("do not fit", "weights.safetensors", "--model"),
    ),
    "missing weights": lambda g: (
        [g.data(), "--weights", g.folder / "none.pth"],
        *("no such file or run", "none.pth", "give --weights"),
    ),
    "broken weights": lambda g: (
        [g.data(), "--weights", written(g.folder / "w.safetensors", "x")],
        *("not a weights file", "w.safetensors", "give"),
    ),
    "a pickled network": lambda g: (
        [g.data(), "--model", "test_resnet", "--weights", pickled(g)],
        *("", "whole.pth", "state"),
    ),
    "a run of another network": lambda g: (
        [g.data(), "--model", "test_vit", "--weights", g.trained],
        *("holds a test_resnet", "trained", "give --model"),
    ),
    "no network and no weights": lambda g: (
        [g.data(), "--model", "resnet18"],
        *("no network and no weights", "resnet18", "--weights FILE"),
    ),
    "no public weights": lambda g: (
        [g.data(), "--model", "resnet18.nobody_in1k"],
        *("no", "resnet18.nobody_in1k", "resnet18."),
    ),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line(
    tlkit: Tlkit, ground: Ground, offline: None, small: tuple[str, ...], contents: Any, case: str, as_json: bool
) -> None:
    arguments, what, where, remedy = CASES[case](ground)
    words = [str(word) for word in arguments]
    for option, value in zip(small[::2], small[1::2], strict=True):
        if option not in words and not (option == "--weights" and case.startswith("no") and case.endswith("weights")):
            words += [option, value]
    if "--out" not in words:
        words += ["--out", str(ground.folder / "run")]
    before = contents(ground.folder)
    done = tlkit("finetune", *words, *(["--json"] if as_json else []))

    assert done.code == 1
    for told in (what, where, remedy):
        assert told in done.error, done.error
    assert "Traceback" not in done.err
    assert contents(ground.folder) == before, "nothing is left behind, nothing is changed"
    if not as_json:
        assert done.out == ""
        return
    assert done.out.count("\n") == 1
    answer = json.loads(done.out)
    assert (answer["command"], answer["exit_code"]) == ("finetune", 1)
    assert set(answer["error"]) == {"what", "where", "remedy", "details"}
    assert answer["error"]["what"]


@pytest.mark.parametrize("content", ["png called jpg", "jpg called png", "gif called tiff"])
def test_an_image_with_another_formats_name_is_read(
    tlkit: Tlkit, ground: Ground, small: tuple[str, ...], content: str
) -> None:
    """It is what it holds: half the photos on the web are called something else."""
    data = ground.data()
    one = next((data / "disc").glob("*.png" if content.startswith(("png", "gif")) else "*.jpg"))
    if content.startswith("gif"):
        from PIL import Image

        with Image.open(one) as image:
            image.save(data / "disc" / "x.gif")
        one = data / "disc" / "x.gif"
    one.rename(one.with_suffix("." + content.split()[-1]))
    assert tlkit("finetune", data, *small, "--out", ground.folder / "run", "--quiet").code == 0


# Not enough disk


def test_too_little_disk_is_told_before_the_work(
    tlkit: Tlkit, ground: Ground, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    done = tlkit("finetune", ground.data(), *small, "--out", ground.folder / "run")
    assert done.code == 1
    assert "not enough disk: 1 MiB free" in done.error and str(ground.folder) in done.error and "--out" in done.error
    assert not (ground.folder / "run").exists()


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*_: object, **__: object) -> None:
    """What safetensors 0.8 raises on a full disk."""
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL = {
    "the weights": ("safetensors.torch.save_file", no_space_in_rust),
    "the figures": ("tlkit.run_folder.append_metrics", no_space),
    "the predictions": ("tlkit.run_folder.csv.writer", no_space),
    "the report": ("tlkit.reports.page.write_text", no_space),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
@pytest.mark.parametrize("where", FULL)
def test_a_disk_that_fills_up_is_told_and_the_run_can_go_on(
    tlkit: Tlkit,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    as_json: bool,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        if where == "the predictions":  # the list of splits, at the start, still had room
            write = run_folder.write_rows
            full = lambda path, *rest: no_space() if path.name == "predictions.csv" else write(path, *rest)  # noqa: E731
            context.setattr(run_folder, "write_rows", full)
        else:
            context.setattr(*FULL[where])
        arguments = ("--recipe", trained / "recipe.yaml", "--out", run, *(["--json"] if as_json else []))
        done = tlkit("finetune", *arguments)
    assert done.code == 1
    assert done.error == f"{run}: no space left on the disk; free some space, or give --out on another disk"
    assert f"tlkit finetune --resume {run}" in done.err
    assert (json.loads(done.out)["exit_code"] == 1) if as_json else (done.out == "")
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert (run / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert {path.name for path in run.iterdir()} == {path.name for path in trained.iterdir()}


# Other commands


OTHERS: dict[str, Callable[[Ground], Made]] = {
    "predict: no such file": lambda g: (["predict", g.trained, g.folder / "x.jpg"], "no such file", "x.jpg", "check"),
    "predict: no images": lambda g: (
        ["predict", g.trained, made(g.folder / "x")],
        "no images",
        "x",
        "give image files",
    ),
    "predict: no such model": lambda g: (["predict", "resnet8", g.data()], "unknown model", "resnet8", "did you mean"),
    "predict: a run without its weights": lambda g: (
        ["predict", broken_run(g, "model.safetensors", None), g.data()],
        *("not a finished run", "broken", "give"),
    ),
    "predict: a run with half its weights": lambda g: (
        ["predict", broken_run(g, "model.safetensors", 1000), g.data()],
        *("cannot be loaded", "broken", "check that it is whole"),
    ),
    "predict: a run with half its configuration": lambda g: (
        ["predict", broken_run(g, "config.json", 100), g.data()],
        *("cannot be read", "broken", "check"),
    ),
    "evaluate: no such folder": lambda g: (["evaluate", g.trained, g.folder / "x"], "no such f", "x", "check"),
    "evaluate: no such split": lambda g: (
        ["evaluate", g.trained, g.data(), "--split", "val"],
        "no split",
        "data",
        "all",
    ),
    "evaluate: misspelt split": lambda g: (["evaluate", g.trained, "--split", "tst"], "tst", "--split", "did you mean"),
    "evaluate: a run with half its recipe": lambda g: (
        ["evaluate", broken_run(g, "recipe.yaml", 20)],
        *("", "broken", ""),
    ),
}


def broken_run(ground: Ground, name: str, kept: int | None) -> Path:
    run = ground.folder / "broken"
    shutil.copytree(ground.trained, run)
    if kept is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes((run / name).read_bytes()[:kept])
    return run


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_do_the_same(tlkit: Tlkit, ground: Ground, offline: None, case: str) -> None:
    arguments, what, where, remedy = OTHERS[case](ground)
    done = tlkit(*arguments)
    assert done.code == 1
    for told in (what, where, remedy):
        assert told in done.error, done.error
    assert done.err.count("\n") == 1
    assert done.out == ""
