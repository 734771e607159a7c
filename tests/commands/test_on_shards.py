"""Commands on images in shards, here and on a server that behaves badly: as on the folder that they came from."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from tlkit.data.batches import BatchPlan, by_shard

from ..server import Server

pytestmark = pytest.mark.usefixtures("impatient")

Tlkit = Callable[..., Any]
FP32 = ("--precision", "fp32")
TRAIN = ("--strategy", "full", "--epochs", 3, "--batch-size", 8, "--augment", "light", "--checkpoint-every", "2steps")


@pytest.fixture(scope="module")
def folder(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("on_shards") / "shapes", images=16)


@pytest.fixture(scope="module")
def shards(tlkit: Tlkit, folder: Path) -> Path:
    out = folder.parent / "shards"
    assert tlkit("shard", folder, out, "--max-images", 10).code == 0
    return out


@pytest.fixture
def remote(served: Server, shards: Path) -> str:
    """The shards on a server."""
    for path in shards.iterdir():
        (served.folder / path.name).write_bytes(path.read_bytes())
    return f"{served.url}/shards-{{000000..000004}}.tar"


def features(path: Path) -> dict[str, np.ndarray]:
    """Features of each image by the end of its name."""
    table = pyarrow.parquet.read_table(path)
    names = [name.rpartition(".tar/")[2].rpartition(".")[0] for name in table.column("path").to_pylist()]
    return dict(zip(names, np.array(table.column("features").to_pylist()), strict=True))


def assert_same(one: Path, other: Path) -> None:
    found, wanted = features(one), features(other)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def of_the_folder(tlkit: Tlkit, small: tuple[str, ...], folder: Path) -> Path:
    out = folder.parent / "folder.parquet"
    assert tlkit("extract-features", folder, *small, *FP32, "--out", out).code == 0
    return out


# Features


@pytest.fixture
def extract(tlkit: Tlkit, small: tuple[str, ...], remote: str, tmp_path: Path) -> Tlkit:
    """``extract(*options)`` from the server, into ``tmp_path / "f.parquet"``."""
    return lambda *options: tlkit("extract-features", remote, *small, *FP32, *options, "--out", tmp_path / "f.parquet")


@pytest.mark.parametrize("workers", [[], ["--workers", 0], ["--workers", 2]], ids=["threads", "0", "2"])
def test_features_are_those_of_the_folder(
    extract: Tlkit, served: Server, of_the_folder: Path, tmp_path: Path, workers: list[Any]
) -> None:
    """From a server that cuts each connection after a while, and fails once in between."""
    served.drops |= {f"shards-{number:06d}.tar": 9000 for number in range(5)}
    served.failing["shards-000002.tar"] = 1
    assert extract(*workers, "--json").json["images"] == 48
    assert_same(tmp_path / "f.parquet", of_the_folder)
    assert all(served.sent[name] == (served.folder / name).stat().st_size for name in served.drops)


@pytest.mark.parametrize("workers", [[], pytest.param(["--workers", 2], marks=pytest.mark.slow)], ids=["threads", "2"])
@pytest.mark.usefixtures("one_second")
def test_a_server_that_falls_silent(
    tlkit: Tlkit, extract: Tlkit, served: Server, of_the_folder: Path, tmp_path: Path, workers: list[Any]
) -> None:
    """One line, whatever is to be done with broken images; what was done is kept, and gone on with."""
    served.stalls["shards-000003.tar"] = 0
    out = tmp_path / "f.parquet"
    done = extract(*workers, "--batch-size", 4, "--on-error", "skip")
    assert done.code == 1 and not out.exists()
    assert done.error == (
        f"{served.url}/: shards-000003.tar cannot be read any more: no answer in 1s (3 attempts); see to it, then "
        "start again, or go on with --resume"
    )
    served.stalls.clear()
    again = tlkit("extract-features", "--resume", out)
    assert again.code == 0 and "of 48 images are done" in again.err
    assert_same(out, of_the_folder)


def test_a_corrupt_member(
    tlkit: Tlkit,
    small: tuple[str, ...],
    served: Server,
    remote: str,
    tmp_path: Path,
) -> None:
    """Its bytes are others than when it was written, or, without an index, it has lost its header."""
    shard = served.folder / "shards-000001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT") + 200
    content[place] ^= 255
    shard.write_bytes(content)
    done = tlkit("extract-features", remote, *small, "--out", tmp_path / "a.parquet")
    assert done.code == 1
    assert "1 of 48 images cannot be read (shards-000001.tar/" in done.error
    assert "its bytes are not those that were written into the shard); " in done.error
    options = (*small, "--on-error", "skip", "--json", "--out")
    told = tlkit("extract-features", remote, *options, tmp_path / "b.parquet").json
    assert told["images"] == 47 and len(told["skipped_files"]) == 1
    (served.folder / "index.parquet").unlink()
    content[content.index(b".png") : content.index(b".png") + 30] = b"x" * 30
    shard.write_bytes(content)
    told = tlkit("extract-features", remote, *options, tmp_path / "c.parquet").json
    assert told["images"] in (46, 47)  # the same image may have been hit twice
    assert any("broken place" in file["path"] for file in told["skipped_files"])


def test_a_missing_shard(
    tlkit: Tlkit,
    small: tuple[str, ...],
    served: Server,
    remote: str,
    tmp_path: Path,
) -> None:
    (served.folder / "shards-000002.tar").unlink()
    done = tlkit("extract-features", remote, *small, "--out", tmp_path / "a.parquet")
    assert done.error == f"{served.url}/shards-000002.tar: 1 of 5 shards are missing; check the address"
    assert list(tmp_path.glob(".*")) == []


def test_braces_that_the_shell_has_expanded(tlkit: Tlkit, shards: Path) -> None:
    done = tlkit("finetune", *sorted(shards.glob("*.tar")))
    assert done.code == 2
    assert done.error.endswith("put quotes around names of shards: 'name-{000000..000099}.tar'")


# Training and measuring


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_on_shards(
    tlkit: Tlkit, small: tuple[str, ...], shards: Path, remote: str, folder: Path, tmp_path: Path
) -> None:
    """Here and elsewhere the same run; measured again it gives the same, for its own shards and as new images."""
    runs = [tmp_path / "here", tmp_path / "there"]
    for data, run in zip((shards, remote), runs, strict=True):
        done = tlkit("finetune", data, *small, *FP32, *TRAIN, "--out", run, "--json")
        assert done.code == 0, done.err
    assert (runs[0] / "model.safetensors").read_bytes() == (runs[1] / "model.safetensors").read_bytes()
    assert [(row["path"], row["probability"]) for row in rows(runs[0] / "predictions.csv")] == [
        (row["path"], row["probability"]) for row in rows(runs[1] / "predictions.csv")
    ]
    told = [tlkit("evaluate", run, "--json").json["metrics"] for run in runs]
    trained = done.json["metrics"]["val"]
    assert told[0] == told[1] and told[0]["top1"] == pytest.approx(trained["top1"])
    assert told[0]["images"] == trained["images"]
    assert "url" not in (runs[1] / "recipe.yaml").read_text() and f"data: {remote}" in (
        runs[1] / "recipe.yaml"
    ).read_text().replace("'", "")
    for data, out in ((remote, "remote.csv"), (folder, "folder.csv")):
        assert tlkit("predict", runs[0], data, "--out", tmp_path / out, "--device", "cpu").code == 0
    found, wanted = (
        {Path(row["path"]).parts[-2:]: row["label"] for row in rows(tmp_path / name)}
        for name in ("remote.csv", "folder.csv")
    )
    assert len(found) == 48 and found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("one_second")
def test_a_run_whose_server_falls_silent(
    tlkit: Tlkit,
    small: tuple[str, ...],
    served: Server,
    remote: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """In the middle of training: the state is kept, and gone on with to the same weights."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = (*small, *FP32, *TRAIN, "--workers", workers)
    assert tlkit("finetune", shards, *options, "--out", whole).code == 0
    monkeypatch.setenv("TLKIT_SHARD_BUDGET", "0.1MB")  # copies come and go
    seen = 0
    answer = served.httpd.RequestHandlerClass.answer

    def fewer(self: Any, head: bool) -> None:
        nonlocal seen
        seen += not head
        if seen > 20:
            served.stalls |= {f"shards-{number:06d}.tar": 0 for number in range(5)}
        answer(self, head)

    monkeypatch.setattr(served.httpd.RequestHandlerClass, "answer", fewer)
    done = tlkit("finetune", remote, *options, "--out", run)
    assert done.code == 1 and "no answer in 1s" in done.error
    assert f"go on with: tlkit finetune --resume {run}" in done.err
    monkeypatch.setattr(served.httpd.RequestHandlerClass, "answer", answer)
    served.stalls.clear()
    monkeypatch.setenv("TLKIT_SHARD_BUDGET", "20GB")
    assert tlkit("finetune", "--resume", run).code == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_copies_are_shown_and_cleared(tlkit: Tlkit, small: tuple[str, ...], remote: str, tmp_path: Path) -> None:
    assert tlkit("extract-features", remote, *small, "--out", tmp_path / "f.parquet").code == 0
    told = tlkit("cache", "--json").json
    assert told["shards"]["copies"] == 6 and told["bytes"] == told["shards"]["bytes"] > 100_000  # with the index
    assert "6 copies of shards, 0." in tlkit("cache").out
    assert tlkit("cache", "--clear", "--older-than", "1h", "--json").json["shards"]["copies"] == 6
    assert tlkit("cache", "--clear", "--json").json["removed_bytes"] == told["bytes"]
    assert tlkit("cache", "--json").json["shards"] == {"copies": 0, "bytes": 0}


def test_check_data(tlkit: Tlkit, shards: Path, tmp_path: Path) -> None:
    told = tlkit("check-data", shards, "--json", "--out", tmp_path / "page.html").json
    assert told["images"] == 48 and not told["corrupt"]
    done = tlkit("check-data", shards, "--write-manifest", tmp_path / "clean.csv")
    assert done.error.startswith("--write-manifest: images in shards are no files that a manifest could name")


@pytest.mark.slow
def test_adaptation(tlkit: Tlkit, small: tuple[str, ...], shards: Path, remote: str, tmp_path: Path) -> None:
    options = (*small, "--epochs", 1, "--out", tmp_path / "run", "--json")
    done = tlkit("adapt", "--source", shards, "--target", remote, *options)
    assert done.json["metrics"]["target"]["images"] == 48


# The order of training


def test_each_image_once_an_epoch_from_a_few_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlkit.data.batches.BUFFER", 100)
    shard = np.repeat(np.arange(40), 50)
    plan = BatchPlan(np.zeros(2000, dtype=np.int64), 20, seed=3, shards=shard)
    orders = [np.concatenate(plan.batches(epoch)) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(2000))
        for first in range(0, 1900, 100):
            assert len(set(shard[order[first : first + 100]].tolist())) <= 6, "of forty"
    assert not np.array_equal(*orders)
    assert np.array_equal(orders[0], np.concatenate(plan.batches(0)))
    parts = [BatchPlan(plan.labels, 20, seed=3, shards=shard, rank=rank, processes=2) for rank in range(2)]
    both = [np.concatenate([part.part(batch) for part in parts]) for batch in parts[0].batches(0)]
    assert np.array_equal(np.concatenate(both), orders[0])


def test_an_image_moves_by_the_buffer_at_most() -> None:
    """As it would with one that is filled in the order of the shards."""
    random, rows = np.random.default_rng(0), np.arange(30_000)
    order = by_shard(rows, np.zeros(len(rows), dtype=np.int32), random)
    moved = np.argsort(order) - rows
    assert np.abs(moved).max() <= 10_000
    assert np.abs(moved).mean() > 2000


def test_balanced_draws_stay_together_by_shard() -> None:
    labels, shard = np.repeat([0, 1], [90, 10]), np.arange(100) // 10
    plan = BatchPlan(labels, 10, seed=1, balanced=True, shards=shard)
    assert np.bincount(labels[plan.order(0)]).tolist() == [50, 50]


def test_statistics_of_batch_norm(
    tlkit: Tlkit, small: tuple[str, ...], start: Path, shards: Path, folder: Path, tmp_path: Path
) -> None:
    """The same images give the same, but for their order."""
    shifts = []
    options = ("--weights", start, *small[4:], "--batch-size", 48)
    for data in (shards, folder):
        done = tlkit("update-bn", "test_resnet", data, *options, "--out", tmp_path / data.name, "--json")
        assert done.json["images"] == 48
        shifts.append(done.json["shifts"])
    assert shifts[0] == pytest.approx(shifts[1], rel=1e-3, abs=1e-4)
