"""An exported ONNX file beside the network that it came from: images a second, labels, probabilities.

    python benchmarks/onnx_speed.py RUN|MODEL FILE.onnx DATA [--images 200] [--rounds 3]

Both run on the CPU in float32 on the same images, in turns, as `evaluate` runs them. Seconds are the network's alone,
without decoding and without what choosing its form took; the ratio is the median of the rounds.
"""

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the tlkit command sets

import numpy as np

from tlkit import compute, config
from tlkit.data.loading import ViewDataset
from tlkit.data.new_images import read_images
from tlkit.data.transforms import CENTER
from tlkit.evaluation.predict import predict_all
from tlkit.networks.build import build
from tlkit.networks.exported import read_onnx
from tlkit.networks.frozen_pass import How


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    networks = {"torch": build(asked.model, "default"), "onnxruntime": read_onnx(asked.file)}
    samples = read_images(asked.data)
    rows = np.sort(np.random.default_rng(0).permutation(len(samples))[: asked.images])
    paths = [samples.paths[row] for row in rows]
    how = How(compute.accelerator(config.Compute(device="cpu", precision="fp32")))
    seconds, found = {name: [] for name in networks}, {}
    for _ in range(asked.rounds):
        for name, loaded in networks.items():
            dataset = ViewDataset(samples.root, paths, loaded.preprocessing, CENTER)
            found[name] = predict_all(loaded.network, dataset, how)
            seconds[name].append(found[name].network_seconds)
    one, other = (found[name].probabilities for name in networks)
    print(f"{len(one)} images, {np.sum(one.argmax(1) == other.argmax(1))} same labels")
    print(f"largest difference of probabilities {np.abs(one - other).max():.2g}")
    for name, taken in seconds.items():
        print(f"{name}: {', '.join(f'{len(one) / second:.1f}' for second in taken)} images/s")
    ratios = [torch / onnx for torch, onnx in zip(*seconds.values(), strict=True)]
    print(f"onnxruntime / torch: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
