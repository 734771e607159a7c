"""Peak memory of `tlkit extract-features` on few and on many images: it must not grow with their number.

    python benchmarks/extract_memory.py [--few 2000] [--many 20000] [--ending npz parquet safetensors]

Makes the images (coloured noise as small JPEGs) in a temporary folder. What is measured is the largest resident set of
the whole process, which decodes in threads of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "tlkit", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_images(folder, count):
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(path, quality=85)


def peak(data, out):
    """MB."""
    command = ["extract-features", str(data), "--image-size", "64", "--compile", "never", "--quiet", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    return int(done.stdout.splitlines()[-1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20000)
    parser.add_argument("--ending", nargs="+", default=["npz", "parquet", "safetensors"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "few", arguments.few)
        write_images(folder / "many", arguments.many)
        print(f"| file | MB, {arguments.few} images | MB, {arguments.many} images | ratio |\n| --- | --- | --- | --- |")
        for ending in arguments.ending:
            few, many = (peak(folder / data, folder / f"{data}.{ending}") for data in ("few", "many"))
            print(f"| {ending} | {few:.0f} | {many:.0f} | {many / few:.3f} |", flush=True)


if __name__ == "__main__":
    main()
