"""`tlkit extract-features` against what its two parts allow, and against a plain loop: images a second, as ratios.

    python benchmarks/extract_features.py DATA [--images 1000] [--rounds 3] [--models resnet18 tf_efficientnet_lite0]

All programs take turns. "Allowed" is what the compiled network's rate on tensors in memory and the decoder's rate on
all cores give together when their costs are added. The plain loop is timm's network in float32, its own transform, a
DataLoader of two processes, batches of 32. Start-up and compilation are not counted; what compiling took is shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the tlkit command sets

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tlkit import compute, config
from tlkit.data.folders import read_samples
from tlkit.data.loading import ViewDataset, load_in_turns
from tlkit.data.transforms import center
from tlkit.networks.build import build
from tlkit.networks.forward import channels_last, features_of
from tlkit.networks.quick import quickest

BATCH = 16
PACKAGED = "tf_efficientnet_lite0"


class Plain(Dataset):
    def __init__(self, root, paths, transform):
        self.root, self.paths, self.transform = root, paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(Image.open(self.root / self.paths[row]).convert("RGB"))


def plain_rate(network, samples):
    network = network.to(memory_format=torch.contiguous_format).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    loader = DataLoader(Plain(samples.root, samples.paths, transform), batch_size=32, num_workers=2)
    count, began = 0, None
    with torch.inference_mode():
        for images in loader:
            network.forward_head(network.forward_features(images), pre_logits=True)
            if began is None:
                began = time.perf_counter()  # the processes have started
            else:
                count += len(images)
    return count / (time.perf_counter() - began)


def decoder_rate(dataset):
    began = time.perf_counter()
    for _ in load_in_turns(dataset, batch_size=BATCH):
        pass
    return len(dataset) / (time.perf_counter() - began)


def memory_rate(form, accelerator, images, batches):
    began = time.perf_counter()
    for _ in range(batches):
        with form.context(), accelerator.autocast():
            form.run(images)
    return batches * len(images) / (time.perf_counter() - began)


def tlkit(data, model, how):
    weights = "default" if model == PACKAGED else "random"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tlkit", "extract-features", str(data), "--model", model]
        options = ["--weights", weights, "--compile", how, "--out", f"{folder}/features.npz", "--json", "--quiet"]
        done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["resnet18", PACKAGED])
    arguments = parser.parse_args()
    samples = read_samples(arguments.data)
    accelerator = compute.accelerator(config.Compute(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        for path in samples.paths[: arguments.images]:
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            (data / path).symlink_to((samples.root / path).resolve())
        samples = read_samples(data)
        for model in arguments.models:
            report(model, data, samples, accelerator, arguments.rounds)


def report(model, data, samples, accelerator, rounds):
    loaded = build(model, "default" if model == PACKAGED else "random")
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, center)
    plain = build(model, "default" if model == PACKAGED else "random").network
    images = torch.randn(BATCH, 3, loaded.preprocessing.size, loaded.preprocessing.size)
    images = images.contiguous(memory_format=torch.channels_last)
    network = channels_last(loaded.network.eval())
    form = quickest(
        network, features_of, images, count=10**6, autocast=accelerator.autocast, compile="always", say=print
    )
    rows, compiling = [], []
    for number in range(rounds):
        decoder, memory = decoder_rate(dataset), memory_rate(form, accelerator, images, 40)
        compiled = tlkit(data, model, "always")
        folded, loop = tlkit(data, model, "never"), plain_rate(plain, samples)
        memory = (memory + memory_rate(form, accelerator, images, 40)) / 2  # before and after
        allowed = 1 / (1 / decoder + 1 / memory)
        compiling.append(compiled["compile_seconds"])
        rows.append((decoder, memory, allowed, compiled["images_per_second"], folded["images_per_second"], loop))
        print(f"{model}, round {number + 1}: " + " ".join(f"{value:.0f}" for value in rows[-1]), file=sys.stderr)
    names = ("decoder", f"{form.name}, in memory", "allowed", "tlkit, compiled", "tlkit, not compiled", "plain loop")
    print(f"\n{model}, {len(samples)} images, {rounds} rounds; compiling {statistics.median(compiling):.0f} s")
    print("| what | images a second, median |\n| --- | --- |")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):.0f} |")
    for title, ratios in (
        ("compiled / allowed", [row[3] / row[2] for row in rows]),
        ("compiled / plain loop", [row[3] / row[5] for row in rows]),
        ("not compiled / plain loop", [row[4] / row[5] for row in rows]),
    ):
        print(f"{title}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
