"""Reading 12-megapixel JPEGs: decoding at reduced scale against decoding at full size, as a ratio.

    python benchmarks/large_jpegs.py [--images 8] [--size 224]

The photos are made: smooth shapes with noise of several strengths, 4000 x 3000, quality 90. The noisier, the more bytes
there are, which no decoder can skip. Both ways end in the same network input; their mean difference is printed as well.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tlkit.data.decode import decode
from tlkit.data.transforms import center, least_side, resize
from tlkit.preprocessing import Preprocessing


def make_photo(path, seed, noise):
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000), Image.BICUBIC)
    noisy = np.asarray(shapes, dtype=np.int16) + random.normal(0, noise, (3000, 4000, 1)).round().astype(np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure(folder, images, noise, how):
    """Bytes of a photo, seconds for one at full and at reduced scale (medians), mean difference of the inputs."""
    seconds, differences = {"full": [], "reduced": []}, []
    path = Path(folder, "photo.jpg")
    for number in range(images):
        make_photo(path, number, noise)
        inputs = {}
        for name, side in (("full", 0), ("reduced", least_side(how))):  # taking turns: noise of the machine hits both
            started = time.perf_counter()
            inputs[name] = center(resize(decode(path, min_side=side), how), how.size).float()
            seconds[name].append(time.perf_counter() - started)
        differences.append((inputs["full"] - inputs["reduced"]).abs().mean().item())
    full, reduced = (statistics.median(seconds[name]) for name in ("full", "reduced"))
    return path.stat().st_size, full, reduced, statistics.mean(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    how = Preprocessing(arguments.size, 0.875, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    print("| noise, of 255 | MB a photo | full size, images/s | reduced, images/s | ratio | mean difference, of 255 |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for noise in (0, 1, 2, 3, 4, 6):
            size, full, reduced, difference = measure(folder, arguments.images, noise, how)
            row = f"{size / 1e6:.1f} | {1 / full:.1f} | {1 / reduced:.1f} | {full / reduced:.1f} | {difference:.2f}"
            print(f"| {noise} | {row} |")


if __name__ == "__main__":
    main()
