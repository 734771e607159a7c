"""Training throughput: tlkit's loop against a bare PyTorch loop, and against timm's defaults.

    python benchmarks/training_loop.py [--model resnet18] [--data DATA] [--rounds 5]

Loop: both are fed the same tensors in memory, in the same precision and layout, with the same optimiser; the loop alone
differs. Defaults: with --data, whole epochs from image files, decoding included: tlkit's as `finetune --strategy
full` trains, and timm's parts put together with the defaults of its train.py (fp32, default layout, batch 128, 4
workers, random resized crop, flip, colour jitter 0.4, SGD with momentum), since that script is not in the package.
The programs take turns; ratios are of each round.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the tlkit command sets

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from tlkit import compute, config
from tlkit.data.batches import BatchPlan
from tlkit.data.folders import read_samples
from tlkit.data.training import TrainingBatches, TrainingDataset
from tlkit.networks.build import build
from tlkit.networks.depthwise import QuickDepthwise
from tlkit.networks.forward import channels_last
from tlkit.networks.freezing import freeze
from tlkit.training.fit import Place, fit
from tlkit.training.objectives import Supervised
from tlkit.training.optimizers import create_optimizer, parameter_groups


class InMemory:
    """The same batches every epoch."""

    def __init__(self, batches):
        self.batches, self.steps = batches, len(batches)

    def epoch(self, epoch, first=0):
        yield from self.batches[first:]

    def weight(self, epoch, step):
        return 1.0


def seconds_of(batches, network, stage_rates, accelerator, epochs=1):
    objective = Supervised(network)
    optimizer = create_optimizer("adamw", parameter_groups(network, stage_rates, 0.01), 0.9)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    place = Place()

    def next_epoch(_):
        place.epoch, place.step, place.totals = place.epoch + 1, 0, {}
        return False

    started = time.perf_counter()
    fit(
        objective,
        batches,
        optimizer,
        lambda step: 1.0,
        accelerator=accelerator,
        epochs=epochs,
        place=place,
        seed=0,
        after_step=lambda: False,
        after_epoch=next_epoch,
    )
    took = time.perf_counter() - started
    accelerator.free_memory()
    return took


def bare_seconds(batches, network, accelerator):
    """The plain loop that a person would write, knowing what is quick."""
    groups = parameter_groups(network, RATES, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    network.train()
    started = time.perf_counter()
    for images, labels in batches:
        with torch.autocast(
            accelerator.device.type, dtype=torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"
        ):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - started


def timm_seconds(data, model, classes):
    """An epoch with timm's parts and the defaults of its train.py."""
    network = timm.create_model(model, num_classes=classes).train()
    dataset = create_dataset("", root=data, split="train", is_training=True, batch_size=128)
    loader = create_loader(
        dataset,
        input_size=(3, 224, 224),
        batch_size=128,
        is_training=True,
        use_prefetcher=False,
        no_aug=False,
        hflip=0.5,
        color_jitter=0.4,
        interpolation="random",
        num_workers=4,
        device=torch.device("cpu"),
    )
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.05, momentum=0.9, weight_decay=2e-5)
    images_seen = 0
    started = time.perf_counter()
    for images, labels in loader:
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        images_seen += len(images)
    return (time.perf_counter() - started) / images_seen


def tlkit_seconds(data, loaded, accelerator):
    """An epoch as `tlkit finetune --strategy full` trains."""
    samples = read_samples(data)
    samples = samples.take(samples.splits == "train")
    plan = BatchPlan(samples.labels, 32, 0)
    dataset = TrainingDataset(samples, loaded.preprocessing, "light", 0)
    batches = TrainingBatches(dataset, plan, epochs=1, device=accelerator.device)
    return seconds_of(batches, loaded.network, RATES, accelerator) / len(samples)


class _Rates(dict):
    def __missing__(self, _):
        return 1e-4


RATES = _Rates()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", type=Path, help="folder with train/ of class folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    accelerator = compute.accelerator(config.Compute(device=arguments.device))
    torch.manual_seed(0)
    loaded = build(arguments.model, "random")
    network = channels_last(loaded.network.to(accelerator.device))
    freeze(network, [])
    size, device = loaded.preprocessing.size, accelerator.device
    batches = [
        (
            torch.randn(arguments.batch_size, 3, size, size, device=device).contiguous(
                memory_format=torch.channels_last
            ),
            torch.randint(0, network.num_classes, (arguments.batch_size,), device=device),
        )
        for _ in range(arguments.steps)
    ]
    images = arguments.batch_size * arguments.steps
    seconds_of(InMemory(batches[:2]), network, RATES, accelerator)  # warms up
    found = {"bare loop": [], "bare loop, quick depthwise": [], "tlkit's loop": []}
    for _ in range(arguments.rounds):
        found["bare loop"].append(bare_seconds(batches, network, accelerator))
        with QuickDepthwise():
            found["bare loop, quick depthwise"].append(bare_seconds(batches, network, accelerator))
        found["tlkit's loop"].append(seconds_of(InMemory(batches), network, RATES, accelerator))
    ours = np.array(found["tlkit's loop"])
    print(f"{arguments.model}, {size} px, batch {arguments.batch_size}, {accelerator.mixed_precision}, {device}")
    print("| loop | images a second, median | tlkit's throughput / its, median of rounds (least to most) |")
    print("| --- | --- | --- |")
    for name, took in found.items():
        ratios = np.array(took) / ours
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        print(f"| {name} | {images / statistics.median(took):.1f} | {spread} |")
    if arguments.data is None:
        return
    theirs, mine = [], []
    for _ in range(arguments.rounds):
        mine.append(tlkit_seconds(arguments.data, loaded, accelerator))
        theirs.append(timm_seconds(arguments.data, arguments.model, network.num_classes))
    ratios = np.array(theirs) / np.array(mine)
    print(f"| tlkit, an epoch of {arguments.data.name} | {1 / statistics.median(mine):.1f} | |")
    spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
    print(f"| timm's train.py defaults, the same | {1 / statistics.median(theirs):.1f} | {spread} |")


if __name__ == "__main__":
    main()
