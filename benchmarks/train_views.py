"""Does it pay to show the probe each training image twice, as it is and mirrored? Few images a class, several folders.

    python benchmarks/train_views.py FOLDER [FOLDER ...] [--shots 3 10] [--seeds 8]

Each FOLDER is one of class folders. From each, so many images a class are drawn to train on, the rest are tested on,
once for each seed; printed are means over seeds, and the mean paired difference with its standard error. Time doubles,
since the frozen network sees each training image twice.
"""

import argparse
from pathlib import Path

import numpy as np

from tlkit import compute, config
from tlkit.data.folders import read_samples
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import center_and_mirror
from tlkit.evaluation.metrics import metrics
from tlkit.networks.build import build
from tlkit.networks.frozen_pass import How
from tlkit.training.features import extract
from tlkit.training.probe import fit_head


def figures(features, labels, classes, shots, seed, views):
    random = np.random.default_rng(seed)
    train = np.concatenate([random.permutation(np.flatnonzero(labels == k))[:shots] for k in range(classes)])
    test = np.setdiff1d(np.arange(len(labels)), train)
    head = fit_head(features[train, :views], labels[train], classes, seed=seed)
    found = metrics(head.probabilities(features[test, 0].astype(np.float64)), labels[test])
    return found["top1"], found["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--shots", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    loaded = build("tf_efficientnet_lite0", "default")
    accelerator = compute.accelerator(config.Compute())
    print("| folder | images a class | top-1: centre | with mirrored | difference | loss: centre | with mirrored |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for folder in arguments.folders:
        samples = read_samples(folder)
        dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, center_and_mirror)
        features = extract(loaded, dataset, How(accelerator)).values
        for shots in arguments.shots:
            rows = np.array(
                [
                    [figures(features, samples.labels, len(samples.classes), shots, seed, views) for views in (1, 2)]
                    for seed in range(arguments.seeds)
                ]
            )  # (seeds, views, [top1, loss])
            (top1, loss), (top1_two, loss_two) = rows.mean(0)
            gain = rows[:, 1, 0] - rows[:, 0, 0]
            error = gain.std(ddof=1) / np.sqrt(len(gain))
            cells = [folder.name, str(shots), f"{top1:.3f}", f"{top1_two:.3f}", f"{gain.mean():+.4f} ± {error:.4f}"]
            print("|", " | ".join([*cells, f"{loss:.3f}", f"{loss_two:.3f}"]), "|")


if __name__ == "__main__":
    main()
