"""`tlkit shard`: what it writes is what it was given, for webdataset as for tlkit; and going on after a stop."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tlkit.commands import shard as command
from tlkit.data.content import digest
from tlkit.data.folders import Samples, read_samples
from tlkit.data.new_images import read_images

Tlkit = Callable[..., Any]


def contents(samples: Samples) -> dict[str | None, str]:
    """The class of each image by its digest."""
    named = zip(samples.paths, samples.labels, strict=True)
    return {digest(samples.root / path): samples.classes[label] for path, label in named}


@pytest.fixture
def photos(make_shapes: Callable[..., Path], tmp_path: Path) -> Path:
    """Three classes of six, with names that webdataset would cut, and the same stem twice."""
    folder = make_shapes(tmp_path / "photos", images=6)
    names = ["a.b.png", "ü n.png", "c.PNG", "c.jpeg", "d.png", "e.png"]
    for one in folder.iterdir():
        for path, name in zip(sorted(one.iterdir()), names, strict=True):
            path.rename(one / name)
    return folder


def test_what_goes_in_comes_out(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = tlkit("shard", photos, out, "--max-images", 5, "--json").json
    assert (told["images"], told["shards"], told["classes"], told["out"]) == (18, 4, 3, str(out))
    assert told["patterns"] == [f"{out}/out-{{000000..000003}}.tar"]
    assert sorted(path.name for path in out.iterdir()) == [
        "index.parquet",
        *(f"out-{number:06d}.tar" for number in range(4)),
    ]
    before = read_samples(photos)
    wanted = contents(before)
    for data in (out, Path(told["patterns"][0])):
        after = read_samples(data)
        assert contents(after) == wanted
    (out / "index.parquet").unlink()
    scanned = read_samples(out)
    assert list(scanned.paths) == list(after.paths) and scanned.classes == after.classes
    assert scanned.labels.tolist() == after.labels.tolist()


def test_webdataset_reads_it(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    assert tlkit("shard", photos, tmp_path / "out", "--max-images", 5).code == 0
    data = webdataset.WebDataset(f"{tmp_path}/out/out-{{000000..000003}}.tar", shardshuffle=False).decode("pil")
    found = {
        item["json"]["path"]: (item["json"]["label"], item["cls"], np.asarray(item.get("png", item.get("jpeg"))).shape)
        for item in data
    }
    samples = read_samples(photos)
    assert {path: (label, number) for path, (label, number, _) in found.items()} == {
        path: (samples.classes[label], label)
        for path, label in zip(samples.paths, samples.labels.tolist(), strict=True)
    }
    assert {shape for _, _, shape in found.values()} == {(80, 72, 3)}


def test_splits_groups_and_order(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    """Each split has shards of its own; images are mixed, the same way for the same seed."""
    samples = read_samples(photos)
    rows = enumerate(zip(samples.paths, samples.labels, strict=True))
    lines = [
        f"{photos / path},{samples.classes[label]},{'test' if row % 6 < 2 else 'train'},g{row // 2}"
        for row, (path, label) in rows
    ]
    manifest = tmp_path / "all.csv"
    manifest.write_text("\n".join(["path,label,split,group", *lines]))
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        told = tlkit("shard", manifest, out, "--max-images", 4, "--seed", seed, "--json").json
        assert told["patterns"] == [
            f"{out}/{name}-train-{{000000..000002}}.tar",
            f"{out}/{name}-test-{{000000..000001}}.tar",
        ]
        found = read_samples(out)
        assert sorted(found.splits.tolist()) == ["test"] * 6 + ["train"] * 12
        assert set(found.groups.tolist()) == {f"g{number}" for number in range(9)}
        orders.append([path.partition("/")[2] for path in found.paths])
        (out / "index.parquet").unlink()
        scanned = read_samples(out)  # in the order of names: test comes first
        assert sorted(zip(scanned.paths, scanned.splits, scanned.groups, strict=True)) == sorted(
            zip(found.paths, found.splits, found.groups, strict=True)
        )
    assert orders[0] == orders[1] != orders[2]
    labels = read_samples(tmp_path / "a" / "a-train-000000.tar").labels
    assert len(set(labels.tolist())) > 1, "a shard is like the whole"


def test_sizes(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    told = tlkit("shard", photos, tmp_path / "out", "--max-size", "0.02MB", "--json").json
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) == told["shards"] > 1 and max(sizes) <= 20_480  # a tar file is filled up to 10 KiB
    assert sum(sizes) == told["bytes"]


def test_images_without_labels_and_shards_of_shards(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    assert tlkit("shard", photos / "disc", tmp_path / "new").code == 0
    found = read_images(tmp_path / "new")
    assert len(found) == 6 and found.classes == ("",)
    assert tlkit("shard", photos, tmp_path / "one").code == 0
    assert tlkit("shard", tmp_path / "one", tmp_path / "two", "--max-images", 4).code == 0
    assert read_samples(tmp_path / "two").labels.tolist().count(2) == 6


def test_what_is_refused(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    assert tlkit("shard").code == 2
    assert tlkit("shard", photos).error == "tlkit shard: missing argument OUT; give the folder to write"
    assert tlkit("shard", photos, photos).error.startswith(f"{photos}: exists already, and is never overwritten")
    assert tlkit("shard", photos, tmp_path / "x", "--out", tmp_path / "y").code == 2
    assert "is not understood" in tlkit("shard", photos, tmp_path / "x", "--max-size", "much").error
    assert not (tmp_path / "x").exists()
    plan = tlkit("shard", photos, tmp_path / "x", "--plan", "--json").json
    assert plan["plan"] == {"shards": ["x-000000.tar"]} and not (tmp_path / "x").exists()


def test_files_that_cannot_be_read(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    (photos / "disc" / "gone.png").symlink_to(tmp_path / "nowhere")
    done = tlkit("shard", photos, tmp_path / "x")
    assert done.code == 1 and "1 of 19 images cannot be read (disc/gone.png: no such file or directory)" in done.error
    told = tlkit("shard", photos, tmp_path / "y", "--on-error", "skip", "--json").json
    assert told["images"] == 18 and [file["path"] for file in told["skipped_files"]] == ["disc/gone.png"]


def test_a_file_that_goes_in_between(
    tlkit: Tlkit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written stays, and the same command goes on."""
    write = command.write_shard

    def broken(path: Path, *rest: Any) -> Any:
        if path.name == "x-000001.tar":
            (photos / "disc" / "d.png").rename(tmp_path / "d.png")
        return write(path, *rest)

    monkeypatch.setattr(command, "write_shard", broken)
    done = tlkit("shard", photos, tmp_path / "x", "--max-images", 3)
    monkeypatch.undo()
    if done.code:  # it was not in the first shard
        assert "disc/d.png" in done.error
    (tmp_path / "d.png").rename(photos / "disc" / "d.png")
    again = tlkit("shard", photos, tmp_path / "x", "--max-images", 3) if done.code else done
    assert again.code == 0
    assert tlkit("shard", photos, tmp_path / "y", "--max-images", 3).code == 0
    for number in range(6):
        assert (tmp_path / "x" / f"x-{number:06d}.tar").read_bytes() == (
            tmp_path / "y" / f"y-{number:06d}.tar"
        ).read_bytes()


def test_begun_with_other_options(tlkit: Tlkit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_shard", stopped)
    done = tlkit("shard", photos, tmp_path / "x")
    assert done.code == 130 and "the same command goes on with what is written" in done.err
    monkeypatch.undo()
    done = tlkit("shard", photos, tmp_path / "x", "--max-images", 2)
    assert done.error.startswith(f"{tmp_path / 'x'}: shards were begun here from other images or options")
    assert tlkit("shard", photos, tmp_path / "x").code == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_killed_it_goes_on_to_the_same_bytes(tlkit: Tlkit, photos: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert tlkit("shard", photos, whole, "--max-images", 1).code == 0
    (tmp_path / "killed").mkdir()
    out, draw = tmp_path / "killed" / "whole", random.Random(3)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-m", "tlkit", "shard", photos, out, "--max-images", "1"])
        there = draw.randint(1, 8)
        while len(list(out.glob("*.tar"))) < there and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert tlkit("shard", photos, out, "--max-images", 1).code == 0
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
