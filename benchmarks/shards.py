"""Extraction of features from shards: memory at 10,000 and 100,000 images, kills, several processes, HTTP.

    python benchmarks/shards.py                 # ten minutes on 2 cores
    python benchmarks/shards.py --images 10000  # a smaller one

Small images (PNG of 16 x 16 pixels) and a tiny network (test_resnet at 32 pixels), so that what is measured is all but
the network. Peak memory is that of the largest process. Each extraction is checked: every image once, by its name.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from tlkit.data.unfinished_features import working_folder
from tlkit.shards.table import FILE, joined, write_table
from tlkit.shards.writing import Entry, write_shard

EACH = 5000
NETWORK = ("--model", "test_resnet", "--weights", "random", "--image-size", "32", "--device", "cpu", "--quiet")


def make_shards(folder: Path, images: int) -> Path:
    """Shards of so many images, all different, of ten classes."""
    folder.mkdir()
    classes = tuple(f"class{number}" for number in range(10))

    def entries(first: int) -> Iterator[Entry]:
        for number in range(first, min(first + EACH, images)):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            yield Entry(f"{number:07d}.png", file.getvalue(), classes[number % 10], number % 10, "", "")

    firsts = range(0, images, EACH)
    tables = [
        write_shard(folder / f"small-{part:06d}.tar", entries(first), classes) for part, first in enumerate(firsts)
    ]
    write_table(folder / FILE, joined(tables))
    return folder


def command(data: str | Path, out: Path, processes: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *several, "-m", "tlkit", "extract-features", str(data), *NETWORK, "--out", str(out)]


def finish(words: list[str]) -> tuple[float, float]:
    """Peak memory of the largest process (MB) and seconds."""
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return usage.ru_maxrss / 1000, time.monotonic() - began


def kill_at(words: list[str], out: Path, size: float) -> None:
    """Kill all processes once they have kept so many bytes of features."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while sum(path.stat().st_size for path in working_folder(out).glob("log-*/features.f32")) < size:
        assert process.poll() is None, words
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(out: Path, images: int) -> None:
    """Each image is there once."""
    names = pyarrow.parquet.read_table(out, columns=["path"]).column("path").to_pylist()
    wanted = sorted(f"small-{number // EACH:06d}.tar/{number:07d}.png" for number in range(images))
    assert sorted(names) == wanted, f"{len(names)} rows of {len(set(names))} images, {images} wanted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as temporary:
        here, draw = Path(temporary), random.Random(0)
        os.environ["TLKIT_CACHE"] = str(here / "cache")
        few, many = make_shards(here / "few", images // 10), make_shards(here / "many", images)
        seconds = {}
        for processes in (1, 2):
            memory = {}
            for count, data in ((images // 10, few), (images, many)):
                out = here / f"{count}-{processes}.parquet"
                memory[count], seconds[count, processes] = finish(command(data, out, processes))
                check(out, count)
            low, high = memory.values()
            took = seconds[images, processes]
            name = f"{processes} process{'es' * (processes > 1)}"
            print(
                f"{name}: {low:.0f} MB for {images // 10} images, {high:.0f} MB for"
                f" {images}: {high / low - 1:+.1%}; {took:.0f} s",
                flush=True,
            )
        whole = pyarrow.parquet.read_table(here / f"{images}-1.parquet")
        size = 4 * images * whole.schema.field("features").type.list_size
        for processes in (1, 2):
            out = here / f"killed-{processes}.parquet"
            shares = sorted(draw.uniform(0.05, 0.95) for _ in range(2))
            for share in shares:
                kill_at(command(many, out, processes), out, share * size)
            finish(command(many, out, processes))
            check(out, images)
            same = pyarrow.parquet.read_table(out).equals(whole)
            told = " and ".join(f"{share:.0%}" for share in shares)
            print(
                f"{processes} process{'es' * (processes > 1)}, killed at {told}: each once, the same: {same}",
                flush=True,
            )
        served(here, many, images, seconds[images, 1])


def served(here: Path, shards: Path, images: int, local: float) -> None:
    """The same from a server on this machine, and from a folder of files."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    memory, took = finish(command(url, here / "served.parquet", 1))
    check(here / "served.parquet", images)
    print(f"over HTTP: {memory:.0f} MB, {took:.0f} s, {local / took:.2f} times as quick as from the disk", flush=True)
    server.shutdown()
    shutil.rmtree(here / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
