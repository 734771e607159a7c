"""`tlkit extract-features`: the numbers, the three formats, going on after a stop, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from safetensors import safe_open

from tlkit.data import loading
from tlkit.data.decode import decode
from tlkit.data.feature_file import ROWS, VALUES, working_folder
from tlkit.data.folders import read_samples
from tlkit.data.transforms import center, normalise, resize
from tlkit.preprocessing import Preprocessing

Tlkit = Callable[..., Any]
FP32 = ("--precision", "fp32")
ENDINGS = ("npz", "parquet", "safetensors")


@pytest.fixture
def extract(tlkit: Tlkit, small: tuple[str, ...]) -> Tlkit:
    """``extract(data, out, *options)``."""
    return lambda data, out, *options: tlkit("extract-features", data, *small, *FP32, "--out", out, *options)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    seen: list[str] = []

    def told(path: Path, **options: Any) -> Any:
        seen.append(Path(path).name)
        return decode(path, **options)

    monkeypatch.setattr(loading, "decode", told)
    return seen


def read(path: Path) -> dict[str, Any]:
    """Features (N, ...), path, label, split and identity of a file in any of the formats."""
    match path.suffix:
        case ".npz":
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files} | {"identity": json.loads(str(found["identity"]))}
        case ".parquet":
            table = pyarrow.parquet.read_table(path)
            identity = json.loads(table.schema.metadata[b"tlkit"])
            columns = {name: np.array(table[name].to_pylist()) for name in ("path", "label", "split")}
            values = np.array(table["features"].to_pylist(), dtype=np.float32)
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


@pytest.mark.parametrize("ending", ENDINGS)
def test_pooled_features_in_each_format(extract: Tlkit, shapes: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"features.{ending}"
    told = extract(shapes, out, "--json").json
    found, samples = read(out), read_samples(shapes)
    assert (told["images"], told["dim"], told["out"]) == (36, 96, str(out))
    assert told["images_per_second"] > 0 and told["shape"] == [96]
    assert found["features"].shape == (36, 96) and found["features"].dtype == np.float32
    assert found["path"].tolist() == samples.paths
    assert found["label"].tolist() == [samples.classes[label] for label in samples.labels]
    assert set(found["split"].tolist()) == {""}
    assert found["identity"]["model"] == "test_resnet" and len(found["identity"]["weights_sha256"]) == 32
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    described = found["identity"]["preprocessing"]
    assert described["size"] == 64


def test_the_numbers_are_the_networks(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    assert extract(shapes, tmp_path / "a.npz").code == 0
    found = read(tmp_path / "a.npz")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    known = Preprocessing.from_dict(found["identity"]["preprocessing"])
    wanted, maps = [], []
    for path in found["path"]:
        image = normalise(center(resize(decode(shapes / str(path), min_side=0), known), known.size), known)
        with torch.no_grad():
            wanted.append(network.forward_head(network.forward_features(image), pre_logits=True)[0].numpy())
            maps.append(network.forward_intermediates(image, indices=[2], intermediates_only=True)[0][0].numpy())
    assert np.allclose(found["features"], np.stack(wanted), atol=1e-4)
    for ending in ENDINGS:
        assert extract(shapes, tmp_path / f"map.{ending}", "--stage", "stage2").code == 0
        got = read(tmp_path / f"map.{ending}")["features"]
        assert got.shape == np.stack(maps).shape
        assert np.allclose(got, np.stack(maps), atol=1e-4)


def test_data_in_each_form(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    for number, part in enumerate(("train", "val")):
        for kind in ("disc", "square"):
            (split / part / kind).mkdir(parents=True)
            shutil.copy(shapes / kind / f"0{2 * number}.png", split / part / kind / "ünïcode photo.png")
    assert extract(split, tmp_path / "split.npz").code == 0
    found = read(tmp_path / "split.npz")
    assert found["split"].tolist() == ["train", "train", "val", "val"]
    assert found["label"].tolist() == ["disc", "square"] * 2
    assert found["path"][0] == "train/disc/ünïcode photo.png"
    flat = tmp_path / "flat"
    shutil.copytree(shapes / "disc", flat)
    assert extract(flat, tmp_path / "flat.parquet").code == 0
    found = read(tmp_path / "flat.parquet")
    assert len(found["path"]) == 12 and set(found["label"].tolist()) == {""}
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,label,split\n{shapes / 'disc/00.png'},a,train\n{shapes / 'square/00.png'},b,train\n")
    assert extract(manifest, tmp_path / "list.safetensors").code == 0
    assert read(tmp_path / "list.safetensors")["label"].tolist() == ["a", "b"]


def test_unreadable_files(extract: Tlkit, shapes: Path, tmp_path: Path, decoded: list[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "f.npz"
    shutil.copytree(shapes, data)
    (data / "disc" / "03.jpg").write_bytes(b"no image")
    failed = extract(data, out)
    assert failed.code == 1 and "disc/03.jpg" in failed.error and "--on-error skip" in failed.error
    assert not out.exists() and working_folder(out).is_dir()
    decoded.clear()
    told = extract(data, out, "--on-error", "skip", "--json").json
    assert decoded == ["03.jpg"]
    assert told["images"] == 35 and [file["path"] for file in told["skipped_files"]] == ["disc/03.jpg"]
    assert not working_folder(out).exists()


def test_a_mended_file_takes_its_place(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    assert extract(data, tmp_path / "whole.npz").code == 0
    good = (data / "disc" / "03.jpg").read_bytes()
    (data / "disc" / "03.jpg").write_bytes(b"no image")
    assert extract(data, tmp_path / "mended.npz").code == 1
    (data / "disc" / "03.jpg").write_bytes(good)
    assert extract(data, tmp_path / "mended.npz").code == 0
    whole, mended = read(tmp_path / "whole.npz"), read(tmp_path / "mended.npz")
    assert whole["path"].tolist() == mended["path"].tolist()
    assert np.allclose(whole["features"], mended["features"], atol=1e-5)


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


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("by", ["the same command", "--resume"])
def test_what_was_stopped_goes_on(
    tlkit: Tlkit,
    small: tuple[str, ...],
    shapes: Path,
    tmp_path: Path,
    decoded: list[str],
    number: signal.Signals,
    by: str,
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    options = (*small, *FP32, "--batch-size", "4", "--workers", "0")
    assert tlkit("extract-features", shapes, *options, "--out", whole).code == 0
    command = ["extract-features", shapes, *options, "--out", out]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *map(str, command)], stdout=pipe, stderr=pipe, text=True
    ) as process:
        rows = working_folder(out) / ROWS
        while process.poll() is None and not (rows.is_file() and rows.stat().st_size):
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number), stderr
    assert not out.exists()
    if number != signal.SIGKILL:
        assert f"go on with: tlkit extract-features --resume {out}" in stderr
    decoded.clear()
    again = tlkit(*command) if by == "the same command" else tlkit("extract-features", "--resume", out)
    assert again.code == 0, again.err
    assert 0 < len(decoded) < 36
    assert np.array_equal(read(out)["features"], read(whole)["features"])
    assert tlkit("extract-features", "--resume", out).code == 0  # finished: says so
    assert not working_folder(out).exists()


@pytest.mark.parametrize("broken", ["numbers cut", "line cut", "nothing written"])
def test_half_of_a_batch_is_made_again(
    extract: Tlkit, shapes: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlkit.commands import extract_features

    out, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    assert extract(shapes, whole, "--batch-size", "8").code == 0

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(extract_features.Unfinished, "write", stop)
        with pytest.raises(Stop):
            extract(shapes, out, "--batch-size", "8")
    folder = working_folder(out)
    match broken:
        case "numbers cut":
            with (folder / VALUES).open("rb+") as file:
                file.truncate((folder / VALUES).stat().st_size - 1000)
        case "line cut":
            text = (folder / ROWS).read_text()
            (folder / ROWS).write_text(text[:-20])
        case _:
            (folder / ROWS).unlink()
    assert extract(shapes, out, "--batch-size", "8").code == 0
    assert np.array_equal(read(out)["features"], read(whole)["features"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--seed", "1"), "weights_sha256"),
        (("--stage", "stage1"), "stage"),
        (("--crop", "0.5"), "preprocessing"),
        (("--model", "test_vit", "--image-size", "160"), "model"),
    ],
)
def test_two_networks_never_share_a_file(
    extract: Tlkit, shapes: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "f.npz"
    shutil.copytree(shapes, data)
    (data / "disc" / "03.jpg").write_bytes(b"no image")
    assert extract(data, out).code == 1
    kept = sorted((path.name, path.stat().st_size) for path in working_folder(out).iterdir())
    other = extract(data, out, *options)
    assert other.code == 1 and f"features begun with another {named}" in other.error
    assert sorted((path.name, path.stat().st_size) for path in working_folder(out).iterdir()) == kept
    assert extract(data, out, "--on-error", "skip").code == 0
    assert extract(data, out).error.startswith(f"{out}: exists already")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--stage", "stagee1"), 1, "did you mean 'stage1'"),
        (("--stage", "head"), 1, "choose one of pooled, stage1"),
        (("--stage", "stem"), 1, "--stage: unknown value 'stem'"),
        (("--out", "{}/f.csv"), 1, "cannot write '.csv' files; use .parquet, .npz, .safetensors"),
        (("--out", "{}/none/f.npz"), 1, "there is no such folder"),
    ],
)
def test_mistakes(
    extract: Tlkit, shapes: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = extract(shapes, tmp_path / "f.npz", *(word.format(tmp_path) for word in arguments))
    assert (done.code, told in done.error) == (code, True), done.error
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing(tlkit: Tlkit, small: tuple[str, ...], shapes: Path, tmp_path: Path) -> None:
    assert tlkit("extract-features", "--out", tmp_path / "f.npz").code == 2
    assert tlkit("extract-features", shapes, *small).code == 2
    (tmp_path / "empty").mkdir()
    assert "no images" in tlkit("extract-features", tmp_path / "empty", *small, "--out", tmp_path / "f.npz").error
    planned = tlkit("extract-features", shapes, *small, "--plan", "--json").json
    assert planned["plan"] == {"images": 36}


def test_features_go_to_a_classifier_in_a_few_lines(extract: Tlkit, shapes: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    assert extract(shapes, tmp_path / "f.npz").code == 0
    found = np.load(tmp_path / "f.npz")
    model = LogisticRegression(max_iter=1000).fit(found["features"], found["label"])
    assert model.score(found["features"], found["label"]) > 0.6  # untrained network; chance is 0.33


def test_a_file_is_written_in_parts(
    extract: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlkit.data import feature_file

    monkeypatch.setattr(feature_file, "CHUNK", 5 * 96 * 4)
    for ending in ENDINGS:
        sizes: list[int] = []
        write = feature_file.WRITERS[f".{ending}"]

        def told(path: Path, chunks: Any, *rest: Any, write: Any = write, sizes: list[int] = sizes) -> None:
            write(path, (sizes.append(len(chunk)) or chunk for chunk in chunks), *rest)

        monkeypatch.setitem(feature_file.WRITERS, f".{ending}", told)
        assert extract(shapes, tmp_path / f"f.{ending}").code == 0
        assert sizes == [5] * 7 + [1]
    first, *others = (read(tmp_path / f"f.{ending}")["features"] for ending in ENDINGS)
    assert all(np.array_equal(first, other) for other in others)
