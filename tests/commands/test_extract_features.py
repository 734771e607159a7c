"""`tlkit extract-features`: the numbers, the three formats, going on after a stop, what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open

from tlkit.data import feature_file, loading
from tlkit.data.decode import decode
from tlkit.data.feature_log import IDENTITY, ROWS, VALUES
from tlkit.data.folders import read_samples
from tlkit.data.transforms import center, normalise, resize
from tlkit.data.unfinished_features import Unfinished, working_folder
from tlkit.networks import frozen_pass
from tlkit.networks.stages import stages
from tlkit.preprocessing import Preprocessing

Tlkit = Callable[..., Any]
Contents = Callable[[Path], dict[str, Any]]
FP32 = ("--precision", "fp32")
ENDINGS = ("npz", "parquet", "safetensors")
IN_FOURS = ("--batch-size", 4, "--workers", 0)
"""Batches that are decoded one after the other, each just before it is computed with."""

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
linux = pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")


@pytest.fixture
def extract(tlkit: Tlkit, small: tuple[str, ...], start: Path) -> Tlkit:
    """``extract(data, out, *options)``."""
    options = (*small, *FP32, "--weights", start)
    return lambda data, out, *more: tlkit("extract-features", data, *options, "--out", out, *more)


@pytest.fixture(scope="module")
def alone(
    tlkit: Tlkit, small: tuple[str, ...], start: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Pooled features of `shapes`, made in fours and never stopped. Read only."""
    out = tmp_path_factory.mktemp("alone") / "alone.npz"
    done = tlkit("extract-features", shapes, *small, *FP32, "--weights", start, *IN_FOURS, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were decoded, as CLASS/NAME."""
    seen: list[str] = []

    def told(path: Path, **options: Any) -> Any:
        seen.append("/".join(Path(path).parts[-2:]))
        return decode(path, **options)

    monkeypatch.setattr(loading, "decode", told)
    return seen


@pytest.fixture
def interrupted(extract: Tlkit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``interrupted(data, out, *options)``: Ctrl-C while the 18th image is read, after four batches of four."""

    def run(data: Path, out: Path, *options: Any, after: int = 17) -> Any:
        seen: list[Path] = []

        def stopping(path: Path, **named: Any) -> Any:
            if len(seen) == after:
                raise KeyboardInterrupt
            seen.append(path)
            return decode(path, **named)

        with monkeypatch.context() as patched:
            patched.setattr(loading, "decode", stopping)
            done = extract(data, out, *IN_FOURS, *options)
        assert done.code == 130, done.err
        assert not out.exists()
        return done

    return run


@pytest.fixture
def broken(shapes: Path, tmp_path: Path) -> Path:
    """36 images, two of which cannot be read. May be written to."""
    data = shutil.copytree(shapes, tmp_path / "data")
    for name in BAD:
        (data / name).write_bytes(b"no image")
    return data


BAD = ["disc/03.jpg", "square/00.png"]


def read(path: Path) -> dict[str, Any]:
    """Features (N, ...), path, label, split and identity of a file, by nothing but the formats' own libraries."""
    match path.suffix:
        case ".npz":
            with np.load(path, allow_pickle=False) as found:
                assert set(found.files) == {"features", "path", "label", "split", "identity"}
                return {name: found[name] for name in found.files} | {"identity": json.loads(str(found["identity"]))}
        case ".parquet":
            table = pyarrow.parquet.read_table(path)
            identity = json.loads(table.schema.metadata[b"tlkit"])
            columns = {name: np.array(table[name].to_pylist()) for name in ("path", "label", "split")}
            values = table["features"].combine_chunks().values.to_numpy()
            return {"features": values.reshape(-1, *identity.pop("shape")), "identity": identity} | columns
        case _:
            with safe_open(path, "numpy") as found:
                texts = {name: json.loads(text) for name, text in found.metadata().items()}
                labels = np.array(texts["classes"])[found.get_tensor("label")]
                return {
                    "features": found.get_tensor("features"),
                    "identity": texts["identity"],
                    "path": np.array(texts["path"]),
                    "split": np.array(texts["split"]),
                    "label": labels,
                }


def numbers(path: Path) -> bytes:
    """The bytes of the features."""
    found: bytes = read(path)["features"].tobytes()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two files hold the same."""
    arrays = ("features", "path", "label", "split")
    return one["identity"] == other["identity"] and all(np.array_equal(one[name], other[name]) for name in arrays)


def log_of(out: Path) -> Path:
    """Where the first process keeps what it has done."""
    return working_folder(out) / "log-0"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def said(done: Any) -> list[str]:
    """Lines on stderr but the one on how the weights were understood."""
    return [line for line in done.err.splitlines() if "are taken for ImageNet's classes" not in line]


def plain(weights: Path, root: Path, paths: Sequence[str], known: Preprocessing) -> tuple[np.ndarray, dict[str, Any]]:
    """Pooled features (N, D) and the maps of all stages, (N, C, H, W) each by name, one image after the other."""
    network = timm.create_model("test_resnet").eval()
    network.load_state_dict(safetensors.torch.load_file(weights))
    pooled: list[np.ndarray] = []
    maps: dict[str, list[np.ndarray]] = {}
    for stage in stages(network):
        if stage.output:
            kept = maps.setdefault(stage.name, [])
            network.get_submodule(stage.output).register_forward_hook(
                lambda _, __, output, kept=kept: kept.append(output[0].numpy().copy())
            )
    for path in paths:
        image = decode(root / path, min_side=0)
        with torch.no_grad():
            found = network.forward_features(normalise(center(resize(image, known), known.size), known))
            pooled.append(network.forward_head(found, pre_logits=True)[0].numpy())
    return np.stack(pooled), {name: np.stack(found) for name, found in maps.items()}


# The numbers, in all formats


def test_the_numbers_are_the_networks(extract: Tlkit, shapes: Path, start: Path, tmp_path: Path) -> None:
    """Pooled and of each stage, in the data's order, the same in all formats."""
    samples = read_samples(shapes)
    expected: dict[str, np.ndarray] = {}
    for ending in ENDINGS:
        assert extract(shapes, tmp_path / f"pooled.{ending}").code == 0
        found = read(tmp_path / f"pooled.{ending}")
        if not expected:
            known = Preprocessing.from_dict(found["identity"]["preprocessing"])
            pooled, maps = plain(start, shapes, samples.paths, known)
            expected = {"pooled": pooled} | maps
            assert set(maps) >= {"stage1", "stage2", "stage3", "stage4"}
            assert all(one.ndim == 4 for one in maps.values())
        for stage, wanted in expected.items():
            out = tmp_path / f"{stage}.{ending}"
            if stage != "pooled":
                assert extract(shapes, out, "--stage", stage, "--quiet").code == 0
            found = read(out)
            assert found["features"].dtype == np.float32 and found["features"].shape == wanted.shape
            assert np.allclose(found["features"], wanted, atol=1e-4)
            assert found["path"].tolist() == list(samples.paths)
            assert found["label"].tolist() == [samples.classes[label] for label in samples.labels]
            assert found["split"].tolist() == [""] * 36
            assert same(found, read(tmp_path / f"{stage}.{ENDINGS[0]}"))
    assert names(tmp_path) == {f"{stage}.{ending}" for stage in expected for ending in ENDINGS}


def test_a_map_in_parquet_is_flat_with_its_shape_beside_it(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.parquet"
    shape = extract(shapes, out, "--stage", "stage2", "--json").json["shape"]
    table = pyarrow.parquet.read_table(out)
    assert table.schema.names == ["path", "label", "split", "features"]
    kind = table.schema.field("features").type
    assert pyarrow.types.is_fixed_size_list(kind) and kind.list_size == np.prod(shape) and len(shape) == 3
    assert pyarrow.types.is_float32(kind.value_type)
    assert json.loads(table.schema.metadata[b"tlkit"])["shape"] == shape


def test_what_the_file_says_of_itself(extract: Tlkit, shapes: Path, start: Path, tmp_path: Path) -> None:
    assert extract(shapes, tmp_path / "f.npz").code == 0
    identity = read(tmp_path / "f.npz")["identity"]
    assert set(identity) == {
        *("model", "weights", "weights_sha256", "preprocessing", "stage", "tta", "precision", "device"),
        *("data", "version"),
    }
    assert (identity["model"], identity["stage"], identity["tta"]) == ("test_resnet", "pooled", "center")
    assert str(start) in identity["weights"] and len(identity["weights_sha256"]) >= 32
    assert identity["preprocessing"]["size"] == 64
    assert identity["data"] == str(shapes.resolve()) and identity["device"] == "cpu"


def test_json_is_one_object_with_the_contracts_fields(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    done = extract(shapes, tmp_path / "f.npz", "--json")
    assert done.out.count("\n") == 1
    told = done.json
    assert set(told) == {
        *("command", "version", "seconds", "model", "weights", "stage", "tta", "images", "dim", "shape", "out"),
        *("images_per_second", "compile_seconds", "skipped_files"),
    }
    assert (told["command"], told["images"], told["dim"], told["shape"]) == ("extract-features", 36, 96, [96])
    assert (told["stage"], told["out"], told["skipped_files"]) == ("pooled", str(tmp_path / "f.npz"), [])
    assert told["images_per_second"] > 0
    told = extract(shapes, tmp_path / "g.npz", "--stage", "stage1", "--json").json
    assert told["dim"] == np.prod(told["shape"]) and len(told["shape"]) == 3


def test_a_folded_network_gives_the_same_and_goes_on_as_such(
    tlkit: Tlkit, extract: Tlkit, interrupted: Tlkit, shapes: Path, start: Path, tmp_path: Path
) -> None:
    """Many images are passed through the network with its batch norm folded, also where few of them are left."""
    manifest, whole, out = tmp_path / "list.csv", tmp_path / "whole.npz", tmp_path / "f.npz"
    paths = sorted(path for path in shapes.rglob("*.*"))
    rows = [(str(paths[number % 36]), "ab"[number % 2]) for number in range(260)]
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    assert extract(manifest, whole, *IN_FOURS).code == 0
    found = read(whole)
    assert found["path"].tolist() == [path for path, _ in rows]
    known = Preprocessing.from_dict(found["identity"]["preprocessing"])
    pooled, _ = plain(start, shapes, [str(path) for path in paths], known)
    assert np.allclose(found["features"], pooled[[number % 36 for number in range(260)]], atol=1e-4)
    interrupted(manifest, out, after=250)
    assert tlkit("extract-features", "--resume", out).code == 0
    assert numbers(out) == numbers(whole)


def test_a_file_is_written_in_parts(
    extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_file, "CHUNK", 5 * 96 * 4)
    for ending in ENDINGS:
        sizes: list[int] = []
        write = feature_file.WRITERS[f".{ending}"]

        def told(path: Path, chunks: Any, *rest: Any, write: Any = write, sizes: list[int] = sizes) -> None:
            def seen() -> Iterator[np.ndarray]:
                for chunk in chunks:
                    sizes.append(len(chunk))
                    yield chunk

            write(path, seen(), *rest)

        with monkeypatch.context() as patched:
            patched.setitem(feature_file.WRITERS, f".{ending}", told)
            assert extract(shapes, tmp_path / f"f.{ending}").code == 0
        assert sizes == [5] * 7 + [1]
    first, *others = (read(tmp_path / f"f.{ending}") for ending in ENDINGS)
    assert all(same(first, other) for other in others)


def test_features_go_to_a_classifier_in_a_few_lines(
    extract: Tlkit, make_shapes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the README."""
    for number, split in enumerate(("train", "val")):
        make_shapes(tmp_path / "photos" / split, seed=number)
    assert extract(tmp_path / "photos", tmp_path / "photos.npz").code == 0
    monkeypatch.chdir(tmp_path)

    from sklearn.linear_model import LogisticRegression

    photos = np.load("photos.npz")  # features, path, label, split, identity
    train = photos["split"] == "train"
    model = LogisticRegression(max_iter=1000).fit(photos["features"][train], photos["label"][train])
    assert model.score(photos["features"][~train], photos["label"][~train]) > 0.6  # untrained network; chance is 0.33


# DATA


def test_split_folders(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number, part in enumerate(("train", "valid", "test")):
        for kind in ("disc", "square"):
            (data / part / kind).mkdir(parents=True)
            shutil.copy(shapes / kind / f"0{2 * number}.png", data / part / kind / "ünïcode photo.png")
    for ending in ENDINGS:
        assert extract(data, tmp_path / f"f.{ending}").code == 0
        found = read(tmp_path / f"f.{ending}")
        order = read_samples(data)
        assert found["path"].tolist() == list(order.paths) and found["split"].tolist() == order.splits.tolist()
        assert sorted(set(found["split"].tolist())) == ["test", "train", "val"]
        assert found["label"].tolist() == ["disc", "square"] * 3
        assert "train/disc/ünïcode photo.png" in found["path"].tolist()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_without_labels(extract: Tlkit, shapes: Path, tmp_path: Path, ending: str) -> None:
    (flat := tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(shapes.rglob("*.png"))[:5]):
        shutil.copy(path, flat / f"{9 - number}.png")
    (flat / "notes.txt").write_text("no image")
    done = extract(flat, tmp_path / f"f.{ending}")
    assert done.code == 0 and "1 files in" in done.err
    found = read(tmp_path / f"f.{ending}")
    assert found["path"].tolist() == ["5.png", "6.png", "7.png", "8.png", "9.png"]
    assert found["label"].tolist() == found["split"].tolist() == [""] * 5


def test_a_manifest(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    """Its rows in their order; paths relative to it."""
    shutil.copytree(shapes / "disc", tmp_path / "in" / "disc")
    rows = [
        ("disc/05.jpg", "ü", "val"),
        (str(shapes / "square" / "00.png"), "b", "train"),
        ("disc/00.png", "ü", "train"),
    ]
    with (tmp_path / "in" / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    assert extract(shapes, tmp_path / "all.npz").code == 0
    whole = read(tmp_path / "all.npz")
    by_path = dict(zip(whole["path"].tolist(), whole["features"], strict=True))
    for ending in ENDINGS:
        assert extract(tmp_path / "in" / "list.csv", tmp_path / f"f.{ending}").code == 0
        found = read(tmp_path / f"f.{ending}")
        assert list(zip(found["path"], found["label"], found["split"], strict=True)) == rows
        wanted = np.stack([by_path[path] for path in ("disc/05.jpg", "square/00.png", "disc/00.png")])
        assert np.allclose(found["features"], wanted, atol=1e-5)


@linux
@pytest.mark.parametrize("ending", ENDINGS)
def test_names_that_are_no_text(extract: Tlkit, shapes: Path, tmp_path: Path, ending: str) -> None:
    """In names of images, of classes and of the folder of all; also on the way through a stop."""
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data\xff\nend"))
    odd = [b"new\nline.png", b"byte\xff.png", "ü日.png".encode()]
    for kind in (b"disc", b"sq\xffuare"):
        folder = Path(os.fsdecode(os.fsencode(data) + b"/" + kind))
        folder.mkdir(parents=True)
        for name in odd:
            shutil.copy(shapes / "disc" / "00.png", os.fsencode(folder) + b"/" + name)
    bad = next(path for path in data.rglob("byte*") if path.parent.name == "disc")
    bad.write_bytes(b"no image")
    out = tmp_path / f"f.{ending}"
    failed = extract(data, out)
    assert failed.code == 1 and len(failed.error.splitlines()) == 1
    shutil.copy(shapes / "disc" / "00.png", bad)
    assert extract(data, out).code == 0
    found, samples = read(out), read_samples(data)
    spelled = [str(name).encode(errors="backslashreplace").decode() for name in samples.paths]
    labels = [samples.classes[label] for label in samples.labels]
    assert found["path"].tolist() == (spelled if ending == "parquet" else list(samples.paths))
    assert found["label"].tolist() == [
        name.replace("\udcff", "\\udcff") if ending == "parquet" else name for name in labels
    ]
    assert any("\n" in name for name in samples.paths) and len(found["features"]) == 6
    assert names(tmp_path) == {data.name, out.name}


def test_one_image(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(shapes / "disc" / "00.png", tmp_path / "one")
    assert extract(shapes, tmp_path / "all.npz").code == 0
    first = read(tmp_path / "all.npz")["features"][:1]
    for ending in ENDINGS:
        out = tmp_path / f"f.{ending}"
        assert extract(tmp_path / "one", out, "--json").json["images"] == 1
        assert read(out)["features"].shape == (1, 96)
        assert np.allclose(read(out)["features"], first, atol=1e-5)


# Files that cannot be read


def test_bad_files_are_named_and_the_work_is_kept(
    extract: Tlkit, broken: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command that skips them ends at once: it decodes those alone, and computes nothing."""
    out, passes = tmp_path / "f.npz", []
    run = frozen_pass.FrozenPass._run
    monkeypatch.setattr(frozen_pass.FrozenPass, "_run", lambda *given: passes.append(1) or run(*given))
    failed = extract(broken, out)
    assert failed.code == 1
    assert "2 of 36 images cannot be read" in failed.error and "--on-error skip" in failed.error
    for name in BAD:
        assert f"tlkit: {name}: " in failed.err
    assert len(decoded) == 36 and passes
    assert not out.exists() and working_folder(out).is_dir()
    decoded.clear(), passes.clear()
    done = extract(broken, out, "--on-error", "skip", "--json")
    assert sorted(decoded) == BAD and not passes
    assert done.json["images"] == 34 and [file["path"] for file in done.json["skipped_files"]] == BAD
    assert all(file["reason"] for file in done.json["skipped_files"])
    assert all(f"left out {name}: " in done.err for name in BAD)
    found = read(out)
    assert found["path"].tolist() == [path for path in read_samples(broken).paths if path not in BAD]
    assert len(found["features"]) == len(found["label"]) == len(found["split"]) == 34
    assert names(tmp_path) == {"data", "f.npz"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_bad_files_can_be_skipped_at_once(
    extract: Tlkit, shapes: Path, broken: Path, tmp_path: Path, ending: str
) -> None:
    out, whole = tmp_path / f"f.{ending}", tmp_path / f"whole.{ending}"
    assert extract(shapes, whole).code == 0
    told = extract(broken, out, "--on-error", "skip", "--json").json
    assert [file["path"] for file in told["skipped_files"]] == BAD
    found, all_of_them = read(out), read(whole)
    kept = [row for row, path in enumerate(all_of_them["path"].tolist()) if path not in BAD]
    assert np.allclose(found["features"], all_of_them["features"][kept], atol=1e-5)
    for name in ("path", "label"):
        assert found[name].tolist() == all_of_them[name][kept].tolist()


@pytest.mark.parametrize("by", ["the same command", "--resume"])
def test_a_mended_file_takes_its_place(
    tlkit: Tlkit, extract: Tlkit, shapes: Path, broken: Path, tmp_path: Path, decoded: list[str], by: str
) -> None:
    assert extract(shapes, tmp_path / "whole.npz").code == 0
    out = tmp_path / "mended.npz"
    assert extract(broken, out).code == 1
    shutil.copy(shapes / BAD[0], broken / BAD[0])
    decoded.clear()
    one_left = extract(broken, out)
    assert one_left.code == 1 and BAD[1] in one_left.error and BAD[0] not in one_left.err
    assert sorted(decoded) == BAD
    shutil.copy(shapes / BAD[1], broken / BAD[1])
    decoded.clear()
    done = extract(broken, out, "--json") if by != "--resume" else tlkit("extract-features", "--resume", out, "--json")
    assert decoded == [BAD[1]]
    assert done.json["images"] == 36 and done.json["skipped_files"] == []
    whole, mended = read(tmp_path / "whole.npz"), read(out)
    assert mended["path"].tolist() == whole["path"].tolist()
    assert np.allclose(mended["features"], whole["features"], atol=1e-5)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_nothing_but_bad_files(extract: Tlkit, tmp_path: Path, on_error: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"no image")
    done = extract(tmp_path / "data", tmp_path / "f.npz", "--on-error", on_error)
    assert done.code == 1 and "1 of 1 images cannot be read" in done.error and "a.png" in done.error
    assert not (tmp_path / "f.npz").exists()


# Going on


@pytest.mark.parametrize(
    ("by", "ending"),
    [("the same command", "npz"), ("--resume", "npz"), ("the same command", "parquet"), ("--resume", "safetensors")],
)
def test_what_was_interrupted_goes_on(
    tlkit: Tlkit,
    extract: Tlkit,
    interrupted: Tlkit,
    shapes: Path,
    tmp_path: Path,
    decoded: list[str],
    by: str,
    ending: str,
) -> None:
    """More than once; what is done is not read again, and the numbers are those of a run left alone."""
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"f.{ending}"
    assert extract(shapes, whole, *IN_FOURS).code == 0
    told = interrupted(shapes, out, "--quiet")
    assert said(told) == [
        f"note: go on with: tlkit extract-features --resume {out}",
        "tlkit: error: interrupted",
    ]
    interrupted(shapes, out, after=9)
    decoded.clear()
    done = extract(shapes, out, *IN_FOURS) if by != "--resume" else tlkit("extract-features", "--resume", out)
    assert done.code == 0, done.err
    assert "going on: 24 of 36 images are done" in done.err
    assert decoded == list(read_samples(shapes).paths[24:])
    assert same(read(out), read(whole)) and numbers(out) == numbers(whole)
    assert names(tmp_path) == {whole.name, out.name}


def test_a_finished_file_says_so_and_stays_as_it_is(
    tlkit: Tlkit, extract: Tlkit, shapes: Path, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "f.npz"
    assert extract(shapes, out).code == 0
    before = contents(tmp_path)
    done = tlkit("extract-features", "--resume", out)
    assert done.code == 0 and f"{out} is finished" in done.out
    assert tlkit("extract-features", "--resume", out, "--json").json["out"] == str(out)
    refused = extract(shapes, out)
    assert refused.code == 1 and refused.error.startswith(f"{out}: exists already, and is never overwritten")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_another_process_had_done_is_gone_on_with(
    tlkit: Tlkit, extract: Tlkit, interrupted: Tlkit, shapes: Path, tmp_path: Path, decoded: list[str], ending: str
) -> None:
    """Its log is beside the first one's; the file takes rows from both."""
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"f.{ending}"
    assert extract(shapes, whole, *IN_FOURS).code == 0
    interrupted(shapes, out)
    log_of(out).rename(working_folder(out) / "log-3")
    interrupted(shapes, out, after=5)
    assert names(working_folder(out)) == {"log-0", "log-3", "recipe.yaml"}
    decoded.clear()
    done = tlkit("extract-features", "--resume", out, "--json")
    assert done.json["images"] == 36 and "going on: 20 of 36 images are done" in done.err
    assert decoded == list(read_samples(shapes).paths[20:])
    assert out.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == {whole.name, out.name}


def test_a_folder_of_parts_is_finished_and_stays_as_it_is(
    tlkit: Tlkit, extract: Tlkit, shapes: Path, tmp_path: Path, contents: Contents
) -> None:
    (out := tmp_path / "f.parquet").mkdir()
    (out / "part-00000-of-00002.parquet").touch()
    (working_folder(out) / "log-1").mkdir(parents=True)  # left by a stop in the last moment
    done = tlkit("extract-features", "--resume", out)
    assert done.code == 0 and f"{out} is finished" in done.out
    refused = extract(shapes, out)
    assert refused.code == 1 and refused.error.startswith(f"{out}: exists already, and is never overwritten")
    assert names(tmp_path) == {out.name} and names(out) == {"part-00000-of-00002.parquet"}


def test_it_goes_on_from_another_folder(
    tlkit: Tlkit, interrupted: Tlkit, extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATA and FILE may have been given relative to where one was."""
    assert extract(shapes, tmp_path / "whole.npz", *IN_FOURS).code == 0
    monkeypatch.chdir(shapes.parent)
    out = tmp_path / "f.npz"
    interrupted(Path(shapes.name), Path(os.path.relpath(out)))
    monkeypatch.chdir(tmp_path)
    done = tlkit("extract-features", "--resume", "f.npz")
    assert done.code == 0, done.err
    assert same(read(out), read(tmp_path / "whole.npz"))


def test_another_number_of_workers_goes_on_to_the_same_numbers(
    extract: Tlkit, interrupted: Tlkit, shapes: Path, tmp_path: Path
) -> None:
    assert extract(shapes, tmp_path / "whole.npz", *IN_FOURS).code == 0
    interrupted(shapes, tmp_path / "f.npz")
    assert extract(shapes, tmp_path / "f.npz", "--batch-size", 4, "--workers", 2).code == 0
    assert numbers(tmp_path / "f.npz") == numbers(tmp_path / "whole.npz")


def test_a_stop_before_any_work_leaves_nothing(interrupted: Tlkit, shapes: Path, tmp_path: Path) -> None:
    done = interrupted(shapes, tmp_path / "f.npz", after=2)
    assert "go on with" not in done.err
    assert names(tmp_path) == set()


def test_nothing_to_go_on_with(tlkit: Tlkit, tmp_path: Path) -> None:
    done = tlkit("extract-features", "--resume", tmp_path / "f.npz")
    assert done.code == 1 and "f.npz" in done.error
    assert done.err.count("\n") == 1 and names(tmp_path) == set()


@pytest.mark.parametrize(
    "hurt", ["numbers cut", "many numbers cut", "line cut", "line end cut", "rows lost", "all cut"]
)
def test_half_of_a_batch_is_made_again(
    extract: Tlkit, interrupted: Tlkit, shapes: Path, alone: Path, tmp_path: Path, decoded: list[str], hurt: str
) -> None:
    out = tmp_path / "f.npz"
    interrupted(shapes, out)
    values, rows = log_of(out) / VALUES, log_of(out) / ROWS
    size = values.stat().st_size
    assert size == 16 * 96 * 4
    done = 12
    match hurt:
        case "numbers cut":
            os.truncate(values, size - 1)
        case "many numbers cut":
            os.truncate(values, size // 2 - 1)
            done = 4
        case "line cut":
            os.truncate(rows, rows.stat().st_size - 20)
        case "line end cut":
            os.truncate(rows, rows.stat().st_size - 1)
            done = 16  # the line is whole
        case "rows lost":
            rows.unlink()
            done = 0
        case _:
            os.truncate(values, 0)
            done = 0
    decoded.clear()
    assert extract(shapes, out, *IN_FOURS).code == 0
    assert decoded == list(read_samples(shapes).paths[done:])
    assert numbers(out) == numbers(alone)


SLOWLY = """
import sys, time
from pathlib import Path
from tlkit.cli.app import run
from tlkit.data import loading

def slow(*arguments, decode=loading.decode, **named):
    time.sleep(0.1)
    return decode(*arguments, **named)

loading.decode = slow
sys.exit(run(sys.argv[1:]))
"""


def started(*words: Any, program: str = SLOWLY) -> subprocess.Popen[str]:
    """A tlkit process in a session of its own."""
    command, pipe = [sys.executable, "-c", program, *map(str, words)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_a_batch(out: Path, process: subprocess.Popen[str]) -> None:
    rows = log_of(out) / ROWS
    while process.poll() is None and not (rows.is_file() and rows.stat().st_size):
        time.sleep(0.02)


@unix
@pytest.mark.parametrize(
    ("number", "by", "workers"),
    [
        pytest.param(signal.SIGTERM, "--resume", 0, id="SIGTERM"),
        pytest.param(signal.SIGTERM, "the same command", 2, id="SIGTERM, workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "the same command", 0, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "--resume", 2, id="SIGINT, workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "--resume", None, id="SIGINT, threads", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "--resume", 0, id="SIGKILL", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "the same command", 2, id="SIGKILL, workers", marks=pytest.mark.slow),
    ],
)
def test_a_process_stopped_by_a_signal_goes_on(
    tlkit: Tlkit,
    small: tuple[str, ...],
    shapes: Path,
    tmp_path: Path,
    decoded: list[str],
    number: signal.Signals,
    by: str,
    workers: int | None,
) -> None:
    """The signal goes to the whole process group, as from a terminal or a batch system."""
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    options = (*small, *FP32, "--batch-size", 3, *(() if workers is None else ("--workers", workers)))
    assert tlkit("extract-features", shapes, *options, "--out", whole).code == 0
    command = ("extract-features", shapes, *options, "--out", out)
    with started(*command, "--json") as process:
        wait_for_a_batch(out, process)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate()
    code = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert process.returncode == code, stderr
    assert not out.exists() and "Traceback" not in stderr
    if number != signal.SIGKILL:
        assert json.loads(stdout)["exit_code"] == code
        assert stderr.splitlines()[-2:] == [
            f"note: go on with: tlkit extract-features --resume {out}",
            f"tlkit: error: {'interrupted' if code == 130 else 'terminated'}",
        ]
    done_before = [name for line in (log_of(out) / ROWS).open() for name in json.loads(line)["images"]]
    paths = read_samples(shapes).paths
    decoded.clear()
    if workers:  # so that decoding is seen here, not in another process
        recipe = working_folder(out) / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f"workers: {workers}", "workers: 0"))
        command = (*command, "--workers", 0)
    again = tlkit(*command) if by == "the same command" else tlkit("extract-features", "--resume", out)
    assert again.code == 0, again.err
    assert 0 < len(done_before) < 36
    assert sorted(decoded) == sorted(path for path in paths if path not in done_before)
    assert numbers(out) == numbers(whole)
    assert names(tmp_path) == {"whole.npz", "out.npz"}


@unix
@pytest.mark.slow
def test_two_processes_never_write_one_file(
    tlkit: Tlkit, small: tuple[str, ...], shapes: Path, tmp_path: Path, contents: Contents
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    options = (*small, *FP32, *IN_FOURS)
    assert tlkit("extract-features", shapes, *options, "--out", whole).code == 0
    with started("extract-features", shapes, *options, "--out", out) as process:
        wait_for_a_batch(out, process)
        for words in ((shapes, *options, "--out", out), ("--resume", out)):
            second = tlkit("extract-features", *words)
            assert second.code == 1 and "another process is writing these features" in second.error
            assert str(working_folder(out)) in second.error and "choose another --out" in second.error
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    assert numbers(out) == numbers(whole)
    assert names(tmp_path) == {"whole.npz", "out.npz"}


@unix
def test_a_second_writer_is_refused(
    extract: Tlkit, interrupted: Tlkit, shapes: Path, tmp_path: Path, contents: Contents
) -> None:
    out = tmp_path / "f.npz"
    interrupted(shapes, out)
    folder, before = working_folder(out), contents(tmp_path)
    with Unfinished(folder, json.loads((log_of(out) / IDENTITY).read_text()), []):
        refused = extract(shapes, out, *IN_FOURS)
        assert refused.code == 1 and "another process is writing these features" in refused.error
        assert len(said(refused)) == 1
    assert contents(tmp_path) == before
    assert extract(shapes, out, *IN_FOURS).code == 0


# Other features, the same file


def other_data(data: Path) -> tuple[Any, ...]:
    return (shutil.copytree(data, data.parent / "elsewhere"),)


def one_more(data: Path) -> tuple[Any, ...]:
    shutil.copy(data / "disc" / "00.png", data / "disc" / "99.png")
    return (data,)


def renamed(data: Path) -> tuple[Any, ...]:
    (data / "disc" / "00.png").rename(data / "disc" / "0.png")
    return (data,)


OTHERS: dict[str, tuple[str, Callable[[Path], tuple[Any, ...]]]] = {
    "model": ("model", lambda data: (data, "--model", "test_vit", "--weights", "random", "--image-size", 160)),
    "weights": ("weights", lambda data: (data, "--weights", "random")),
    "stage": ("stage", lambda data: (data, "--stage", "stage1")),
    "size": ("preprocessing", lambda data: (data, "--image-size", 96)),
    "crop": ("preprocessing", lambda data: (data, "--crop", 0.5)),
    "mean": ("preprocessing", lambda data: (data, "--mean", 0.1, 0.2, 0.3)),
    "precision": ("precision", lambda data: (data, "--precision", "bf16")),
    "folder": ("data", other_data),
}


@pytest.mark.parametrize("other", OTHERS)
def test_features_of_two_kinds_never_share_a_file(
    extract: Tlkit, interrupted: Tlkit, shapes: Path, alone: Path, tmp_path: Path, contents: Contents, other: str
) -> None:
    """One line tells what differs, nothing is lost, and the first goes on."""
    data, out = shutil.copytree(shapes, tmp_path / "data"), tmp_path / "f.npz"
    interrupted(data, out)
    named, change = OTHERS[other]
    arguments = change(data)
    before = contents(working_folder(out))
    refused = extract(arguments[0], out, *arguments[1:])
    assert refused.code == 1
    assert f"features begun with another {named}: " in refused.error, refused.error
    assert str(working_folder(out)) in refused.error and "choose another --out" in refused.error
    assert len(said(refused)) == 1
    assert contents(working_folder(out)) == before and not out.exists()
    assert extract(data, out, *IN_FOURS).code == 0
    assert numbers(out) == numbers(alone)


@pytest.mark.parametrize(("change", "decoded_again"), [(one_more, 1), (renamed, 1)])
def test_images_that_came_or_went_since_cost_only_themselves(
    extract: Tlkit,
    interrupted: Tlkit,
    shapes: Path,
    tmp_path: Path,
    decoded: list[str],
    change: Callable[[Path], Any],
    decoded_again: int,
) -> None:
    data, out = shutil.copytree(shapes, tmp_path / "data"), tmp_path / "f.npz"
    interrupted(data, out)
    lines = (log_of(out) / ROWS).read_text().splitlines()
    done = sum(len(json.loads(line)["images"]) for line in lines)
    change(data)
    decoded.clear()
    assert extract(data, out, *IN_FOURS).code == 0
    images = sum(path.is_file() for path in data.rglob("*"))
    assert len(decoded) in (images - done, images - done + decoded_again)
    assert extract(data, tmp_path / "whole.npz", *IN_FOURS).code == 0
    assert numbers(out) == numbers(tmp_path / "whole.npz")


def test_the_same_name_with_other_weights(
    tlkit: Tlkit, small: tuple[str, ...], shapes: Path, start: Path, tmp_path: Path
) -> None:
    """A file of weights that was written anew; random ones from another seed."""
    weights, out = tmp_path / "w.safetensors", tmp_path / "f.npz"
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / BAD[0]).write_bytes(b"no image")
    shutil.copy(start, weights)
    words = ("extract-features", data, *small, *FP32, "--out", out)
    assert tlkit(*words, "--weights", weights).code == 1
    state = safetensors.torch.load_file(weights)
    state["conv1.weight" if "conv1.weight" in state else next(iter(state))].mul_(2)
    safetensors.torch.save_file(state, weights)
    assert "features begun with another weights_sha256: " in tlkit(*words, "--weights", weights).error
    words = (*words[:-1], tmp_path / "g.npz")
    assert tlkit(*words, "--seed", 1).code == 1
    assert "features begun with another weights_sha256: " in tlkit(*words, "--seed", 2).error


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--stage", "stagee1"), "--stage: unknown value 'stagee1'; did you mean 'stage1'"),
        (("--stage", "poled"), "did you mean 'pooled'"),
        (("--stage", "head"), "--stage: unknown value 'head'; choose one of pooled, stage1"),
        (("--stage", "stem"), "--stage: unknown value 'stem'; "),
        (("--stage", ""), "--stage: unknown value ''"),
        (("--out", "{}/f.csv"), "cannot write '.csv' files; use .parquet, .npz, .safetensors"),
        (("--out", "{}/f"), "cannot write '' files"),
        (("--out", "{}/none/f.npz"), "there is no such folder"),
        (("--out", "{}"), "exists already"),
        (("--model", "test_resnett"), "did you mean"),
        (("--weights", "{}/none.safetensors"), "none.safetensors"),
    ],
)
def test_mistakes(extract: Tlkit, shapes: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    words = [word.format(tmp_path) for word in arguments]
    done = extract(shapes, tmp_path / "f.npz", *words, "--json")
    assert done.code == 1 and told in done.error, done.error
    assert len(said(done)) == 1
    assert names(tmp_path) == set()
    assert json.loads(done.out)["exit_code"] == 1


def test_a_folder_that_may_not_be_written_to(
    extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    """Root may write anywhere."""
    monkeypatch.setattr(feature_file.os, "access", lambda path, mode: Path(path) != tmp_path)
    done = extract(shapes, tmp_path / "f.npz")
    assert done.code == 1 and f"{tmp_path}: nothing may be written there; choose another --out" in done.error
    assert names(tmp_path) == set() and not decoded


def test_what_is_missing(tlkit: Tlkit, small: tuple[str, ...], shapes: Path, tmp_path: Path) -> None:
    done = tlkit("extract-features", "--out", tmp_path / "f.npz", *small)
    assert done.code == 2 and "DATA" in done.error
    done = tlkit("extract-features", shapes, *small)
    assert done.code == 2 and "--out" in done.error
    done = tlkit("extract-features", "--plan")
    assert done.code == 2 and "DATA" in done.error
    (tmp_path / "empty").mkdir()
    for data, told in (("empty", "no images"), ("none", "no such file")):
        done = tlkit("extract-features", tmp_path / data, *small, "--out", tmp_path / "f.npz")
        assert done.code == 1 and told in done.error and str(tmp_path / data) in done.error
    assert names(tmp_path) == {"empty"}


@pytest.mark.parametrize("begun", [False, True], ids=["", "begun"])
def test_a_plan_writes_nothing(
    tlkit: Tlkit,
    small: tuple[str, ...],
    extract: Tlkit,
    interrupted: Tlkit,
    shapes: Path,
    tmp_path: Path,
    decoded: list[str],
    contents: Contents,
    begun: bool,
) -> None:
    if begun:
        interrupted(shapes, tmp_path / "f.npz")
    decoded.clear()
    before = contents(tmp_path)
    assert extract(shapes, tmp_path / "f.npz", "--plan", "--json").json["plan"] == {"images": 36}
    assert tlkit("extract-features", shapes, *small, "--plan", "--json").json["plan"] == {"images": 36}
    done = extract(shapes, tmp_path / "f.npz", "--plan")
    assert done.code == 0 and "36 images" in done.out and "test_resnet" in done.out and "pooled" in done.out
    assert contents(tmp_path) == before and not decoded


# A disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB of its own; for root alone."""
    (place := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, check=False, capture_output=True).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("while_", ["computing", "writing the file"])
def test_a_disk_that_is_really_full(
    tlkit: Tlkit, extract: Tlkit, shapes: Path, tmp_path: Path, small_disk: Path, ending: str, while_: str
) -> None:
    """36 maps take 1.2 MB, and as much again while the file is written."""
    whole, out = tmp_path / f"whole.{ending}", small_disk / f"f.{ending}"
    size = 36 * 4 * extract(shapes, whole, "--stage", "stage1", *IN_FOURS, "--json").json["dim"]

    def resize_disk(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)

    resize_disk(size // 2 if while_ == "computing" else size + 2**16 + whole.stat().st_size // 2)
    done = extract(shapes, out, "--stage", "stage1", *IN_FOURS)
    assert done.code == 1
    assert "no space left on the disk" in done.error and "free some space" in done.error
    assert "Traceback" not in done.err and f"go on with: tlkit extract-features --resume {out}" in done.err
    assert names(small_disk) == {working_folder(out).name}
    resize_disk(size * 4)
    again = tlkit("extract-features", "--resume", out)
    assert again.code == 0, again.err
    assert "going on: " in again.err
    assert numbers(out) == numbers(whole)
    assert names(small_disk) == {out.name}


# Trouble at the end


def test_a_bad_file_can_be_removed(extract: Tlkit, broken: Path, tmp_path: Path, decoded: list[str]) -> None:
    """As the error says: 'remove or mend them'. What was computed of the others is used."""
    failed = extract(broken, tmp_path / "f.npz")
    assert failed.code == 1 and "remove or mend them" in failed.error
    for name in BAD:
        (broken / name).unlink()
    decoded.clear()
    assert extract(broken, tmp_path / "f.npz").code == 0
    assert not decoded


@unix
def test_one_that_came_a_moment_later_removes_nothing(
    extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes start at once: neither has seen the other's folder."""
    enter, first = Unfinished.__enter__, []

    def second(self: Unfinished) -> Unfinished:
        first.append(enter(Unfinished(self.folder, self.identity, self.paths)))
        return enter(self)

    with monkeypatch.context() as patched:
        patched.setattr(Unfinished, "__enter__", second)
        refused = extract(shapes, tmp_path / "f.npz")
    assert refused.code == 1 and "another process is writing these features" in refused.error
    first[0].__exit__()
    assert working_folder(tmp_path / "f.npz").is_dir()


KILLED = """
import os, signal, sys
from tlkit.cli.app import run
from tlkit.data import feature_file

def killing(path, chunks, *rest):
    path.write_bytes(next(chunks).tobytes())
    os.kill(os.getpid(), signal.SIGKILL)

feature_file.WRITERS[".npz"] = killing
sys.exit(run(sys.argv[1:]))
"""


@unix
@pytest.mark.slow
def test_a_kill_while_the_file_is_written_leaves_nothing_in_the_end(
    tlkit: Tlkit, small: tuple[str, ...], shapes: Path, tmp_path: Path, decoded: list[str]
) -> None:
    out = tmp_path / "f.npz"
    with started("extract-features", shapes, *small, *FP32, "--out", out, program=KILLED) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert tlkit("extract-features", "--resume", out).code == 0
    assert not decoded and read(out)["features"].shape == (36, 96)
    assert names(tmp_path) == {"f.npz"}


def test_a_stop_after_the_file_is_there_leaves_nothing_in_the_end(
    tlkit: Tlkit, extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the file taking its place and the removal of what it was made from."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        extract(shapes, tmp_path / "f.npz")
    assert (tmp_path / "f.npz").is_file()
    assert tlkit("extract-features", "--resume", tmp_path / "f.npz").code == 0
    assert names(tmp_path) == {"f.npz"}


@linux
def test_a_name_with_no_room_for_another_beside_it(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    """It is written, or refused in one line."""
    done = extract(shapes, tmp_path / f"{'x' * 251}.npz")
    assert done.code == 0 or done.error


def test_a_file_that_came_while_it_worked_is_not_overwritten(
    extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.npz"

    def meanwhile(path: Path, **options: Any) -> Any:
        out.write_text("mine")
        return decode(path, **options)

    monkeypatch.setattr(loading, "decode", meanwhile)
    done = extract(shapes, out)
    assert out.read_text(errors="replace") == "mine"
    assert done.code == 1 and "exists already" in done.error
