"""The run folder: files whole or not at all, nothing overwritten, odd names kept, what is written read back."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import yaml

from tlkit import run_folder
from tlkit.errors import TlkitError

UNDECODABLE = os.fsdecode(b"caf\xe9/\xff.jpg")
ODD = [
    "größe/🐱.jpg",
    "a,b.jpg",
    "q\"uote'.jpg",
    "line\nbreak.jpg",
    "re\r\nturn\r.jpg",
    " spaces .jpg",
    "",
    UNDECODABLE,
]


class Usage(NamedTuple):
    """As `shutil.disk_usage` has it."""

    total: int
    used: int
    free: int


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Atomic writes


class Failure(BaseException):
    """Stands for whatever may stop a write, Ctrl-C included."""


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with run_folder.atomically(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == tmp_path, "on the same disk, so that a rename suffices"
    assert path.read_text() == "half" and listing(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_rest(old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    if old:
        path.write_text(old)
    with pytest.raises(Failure), run_folder.atomically(path) as part:
        part.write_text("half")
        raise Failure
    assert listing(tmp_path) == (["x.txt"] if old else [])
    assert not old or path.read_text() == old


def test_rows_that_fail_in_the_middle(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[int, int]]:
        yield 1, 2
        raise Failure

    run_folder.write_rows(tmp_path / "x.csv", ("a", "b"), [(0, 0)])
    before = (tmp_path / "x.csv").read_bytes()
    with pytest.raises(Failure):
        run_folder.write_rows(tmp_path / "x.csv", ("a", "b"), rows())
    assert (tmp_path / "x.csv").read_bytes() == before and listing(tmp_path) == ["x.csv"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_values_that_json_has_not(value: Any, tmp_path: Path) -> None:
    run_folder.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises((TypeError, ValueError)):
        run_folder.write_json(tmp_path / "x.json", {"a": value})
    assert run_folder.read_json(tmp_path / "x.json") == {"a": 1} and listing(tmp_path) == ["x.json"]


def save_tensors(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize("write", [lambda path: path.write_text("x"), save_tensors], ids=["text", "safetensors"])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(write: Any, umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with run_folder.atomically(tmp_path / "x") as part:
            write(part)
        assert os.umask(umask) == umask, "left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["x" * 255, "größe 🐱", os.fsdecode(b"\xff"), "a\nb", ".hidden", "-x"], ids=ascii)
def test_any_name_of_a_file(name: str, tmp_path: Path) -> None:
    run_folder.write_text(tmp_path / name, "text")
    assert listing(tmp_path) == [name] and (tmp_path / name).read_text() == "text"


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TlkitError, match=r"x\.csv: cannot be written \(No such file or directory\); check its folder"):
        run_folder.write_rows(tmp_path / "missing" / "x.csv", ("a",), [])


# Text, JSON, CSV, YAML


def test_text_keeps_bytes_that_are_not_unicode(tmp_path: Path) -> None:
    run_folder.write_text(tmp_path / "x", "\n".join(["größe", UNDECODABLE]) + "\r\n")
    assert (tmp_path / "x").read_bytes() == "größe\n".encode() + b"caf\xe9/\xff.jpg\r\n"


def test_json_is_valid_for_any_reader_whatever_the_names(tmp_path: Path) -> None:
    values = {"classes": ODD, "n": 1.5, UNDECODABLE: [None, True]}
    run_folder.write_json(tmp_path / "x.json", values)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")  # strictly: no bytes that are not UTF-8
    assert json.loads(text) == run_folder.read_json(tmp_path / "x.json") == values
    assert "größe/🐱.jpg" in text, "readable where it can be"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2]", b"\xff", b"3", b'{"a": 1'])
def test_broken_json(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(TlkitError, match=r"cannot be read .*; check that it belongs to a whole run") as caught:
        run_folder.read_json(tmp_path / "x.json")
    assert str(caught.value).count(str(tmp_path)) == 1


def test_rows_with_any_text(tmp_path: Path) -> None:
    run_folder.write_rows(tmp_path / "x.csv", ("name", "number"), [(name, row) for row, name in enumerate(ODD)])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        found = list(csv.reader(file))
    assert found == [["name", "number"], *([name, str(row)] for row, name in enumerate(ODD))]
    assert UNDECODABLE.encode(errors="surrogateescape") in (tmp_path / "x.csv").read_bytes()


def test_a_recipe_is_read_back_as_it_was(tmp_path: Path) -> None:
    recipe = {"command": "finetune", "data": UNDECODABLE, "seed": 0, "mean": [0.1, 0.2], "crop": None, "odd": ODD}
    text = run_folder.write_recipe(tmp_path, recipe)
    assert run_folder.read_recipe(tmp_path) == recipe == yaml.safe_load(text)
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8").startswith("# tlkit finetune --recipe FILE")


@pytest.mark.parametrize("content", [None, b"", b"- 1\n- 2", b"a: [", b"\xff", b"word", b"3"])
def test_broken_recipes(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(TlkitError, match=r"not the folder of a run: no readable recipe\.yaml; check the path"):
        run_folder.read_recipe(tmp_path)


def test_metrics_are_one_line_an_epoch(tmp_path: Path) -> None:
    for epoch in range(3):
        run_folder.append_metrics(tmp_path, {"epoch": epoch, "class": UNDECODABLE})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": epoch, "class": UNDECODABLE} for epoch in range(3)]


# Stored splits


def test_splits_are_read_back(tmp_path: Path) -> None:
    splits = {name: (f"class {name}", "val" if row % 2 else "") for row, name in enumerate(ODD)}
    rows = [(name, *of_name) for name, of_name in splits.items()]
    run_folder.write_rows(tmp_path / run_folder.SPLITS, ("path", "label", "split"), rows)
    assert run_folder.read_splits(tmp_path) == splits


def test_a_run_without_splits(tmp_path: Path) -> None:
    assert run_folder.read_splits(tmp_path) is None


@pytest.mark.parametrize("content", ["path,label\n1.jpg,a\n", "path,label,split\n1.jpg,a\n", "path,label,split\n1\n"])
def test_broken_splits(content: str, tmp_path: Path) -> None:
    (tmp_path / run_folder.SPLITS).write_text(content)
    with pytest.raises(TlkitError, match=r"splits\.csv: cannot be read"):
        run_folder.read_splits(tmp_path)


COLUMNS = ("path", "label", "split", "digest")


def test_what_a_run_was_trained_on(tmp_path: Path) -> None:
    kinds = ("train", "val", "test", "")
    rows = [(name, f"class {name}", kinds[row % 4], f"{row:032x}") for row, name in enumerate(ODD)]
    run_folder.write_rows(tmp_path / run_folder.SPLITS, COLUMNS, rows)
    assert run_folder.trained_on(tmp_path) == {f"{row:032x}": ODD[row] for row in (0, 4)}
    assert run_folder.read_splits(tmp_path) == {path: (label, split) for path, label, split, _ in rows}


def test_files_without_a_digest_are_not_known_again(tmp_path: Path) -> None:
    rows = [("gone.jpg", "a", "train", ""), ("1.jpg", "a", "train", "0f")]
    run_folder.write_rows(tmp_path / run_folder.SPLITS, COLUMNS, rows)
    assert run_folder.trained_on(tmp_path) == {"0f": "1.jpg"}


def test_runs_of_old_know_no_digests(tmp_path: Path) -> None:
    assert run_folder.trained_on(tmp_path) == {}
    run_folder.write_rows(tmp_path / run_folder.SPLITS, COLUMNS[:3], [("1.jpg", "a", "train"), ("2.jpg", "a", "val")])
    assert run_folder.trained_on(tmp_path) == {}
    assert run_folder.read_splits(tmp_path) == {"1.jpg": ("a", "train"), "2.jpg": ("a", "val")}


@pytest.mark.parametrize("content", ["path,label\n1.jpg,a\n", "path,label,split,digest\n1.jpg,a,train,0f,5\n"])
def test_what_a_run_was_trained_on_may_be_broken(content: str, tmp_path: Path) -> None:
    (tmp_path / run_folder.SPLITS).write_text(content)
    with pytest.raises(TlkitError, match=r"splits\.csv: cannot be read"):
        run_folder.trained_on(tmp_path)


# New runs


def test_a_new_run_where_it_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "größe" / "run"
    assert run_folder.new_run(out, "finetune") == out and out.is_dir() and listing(out) == []


def make(kind: str, path: Path) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.touch()
        case "link":
            path.symlink_to(path.parent)
        case "dangling link":
            path.symlink_to("gone")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_exists_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    make(kind, out)
    for refuse in (run_folder.refuse_existing, lambda path: run_folder.new_run(path, "finetune")):
        with pytest.raises(TlkitError, match="run: exists already, and is never overwritten; choose another --out"):
            refuse(out)
    run_folder.refuse_existing(None)
    run_folder.refuse_existing(tmp_path / "other")
    run_folder.refuse_existing(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_run_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TlkitError, match=r"cannot be made \(.*\); choose another --out"):
        run_folder.new_run(tmp_path / name, "finetune")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    found = [run_folder.new_run(None, "finetune").as_posix() for _ in range(3)]
    stem = "runs/finetune-20260102-030405"
    assert found == [stem, f"{stem}-2", f"{stem}-3"] and listing(tmp_path / "runs") == [Path(p).name for p in found]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_runs_is_no_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(kind, tmp_path / "runs")
    with pytest.raises(TlkitError, match="cannot be made"):
        run_folder.new_run(None, "finetune")


def test_is_run(tmp_path: Path) -> None:
    assert not run_folder.is_run(tmp_path) and not run_folder.is_run(tmp_path / "missing")
    for name in (run_folder.CONFIG, run_folder.WEIGHTS):
        assert not run_folder.is_run(tmp_path)
        (tmp_path / name).touch()
    assert run_folder.is_run(tmp_path) and run_folder.is_run(str(tmp_path))


# Disk space


@pytest.mark.parametrize("folder", ["here", "not/yet/made", "file/below"])
def test_too_little_space(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_folder.require_space(tmp_path / folder, 0)
    with pytest.raises(TlkitError, match=r"not enough disk: \d+ MiB free, about \d+ MiB needed; free some space"):
        run_folder.require_space(tmp_path / folder, 2**62)
    assert listing(tmp_path) == ["file"], "asking makes nothing"


@pytest.mark.parametrize(("free", "enough"), [(1000, True), (999, False)])
def test_the_space_needed_includes_some_to_spare(
    free: int, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spare = run_folder.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free + spare))
    if enough:
        run_folder.require_space(None, 1000)
    else:
        with pytest.raises(TlkitError, match="not enough disk"):
            run_folder.require_space(None, 1000)


# Jobs that torchrun starts again


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that this job has begun, which is now started again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    run = run_folder.new_run(None, "finetune")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return run


def test_a_job_that_is_started_again_finds_its_run(job: Path) -> None:
    run_folder.write_recipe(job, {"command": "finetune"})
    assert run_folder.begun_by_this_job(None, "finetune") == job
    assert run_folder.begun_by_this_job(job, "finetune") == job
    assert run_folder.begun_by_this_job(None, "adapt") is None


def test_a_run_of_another_job_is_nobody_elses(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_recipe(job, {"command": "finetune"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another night")
    assert run_folder.begun_by_this_job(job, "finetune") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run_folder.begun_by_this_job(job, "finetune") is None, "not started again"


def test_what_was_killed_before_it_had_a_recipe_is_begun_anew(job: Path) -> None:
    assert run_folder.begun_by_this_job(job, "finetune") is None
    assert not job.exists()


def test_without_torchrun_nothing_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert listing(run_folder.new_run(tmp_path / "run", "finetune")) == []
