"""What normalisation does for training: norms against batch sizes, learning rates and initialisations.

    python benchmarks/norms.py ../shared/data/cifar10_sub --seeds 3 --results norms.jsonl

Trains LeNet by ``recipes/pretrain/cifar10-sub-norms.yaml`` (three epochs from random weights) through the command line,
each time with one thing changed, and prints test top-1, mean and range over seeds: after so few epochs it tells how
fast a network trains. The rate of another batch size is scaled with it (Goyal et al. 2017). Another initialisation is
the usual one with all convolutions multiplied by a factor. Results are kept in a file and not measured twice. Nothing
is chosen by these figures: every one is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlkit.cli.app import run
from tlkit.networks.build import build, save_network

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain" / "cifar10-sub-norms.yaml"
NORMS = ("none", "batch", "layer", "instance", "group")
BATCH_SIZES = (8, 32, 128)
RATES = (0.005, 0.05, 0.2, 0.5)
FACTORS = (0.1, 1.0, 10.0)
RATE, BATCH_SIZE = 0.05, 64  # of the recipe


def settings(seeds: int) -> Iterator[dict[str, Any]]:
    """Everything that is measured, all norms with one seed before the next seed."""
    for seed in range(seeds):
        for norm in NORMS:
            same = {"norm": norm, "seed": seed, "batch_size": BATCH_SIZE, "lr": RATE, "factor": 1.0}
            yield from ({**same, "batch_size": size, "lr": RATE * size / BATCH_SIZE} for size in BATCH_SIZES)
            yield from ({**same, "lr": rate} for rate in RATES)
            yield from ({**same, "factor": factor} for factor in FACTORS)


def measure(data: Path, setting: dict[str, Any]) -> float | None:
    """Test top-1 of one run; None where it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        options = [str(data), "--batch-size", str(setting["batch_size"]), "--lr", str(setting["lr"])]
        options += ["--seed", str(setting["seed"]), "--out", f"{folder}/run", "--quiet", "--json"]
        if setting["factor"] == 1.0:
            arguments = ["pretrain", *options, "--recipe", str(RECIPE), "--norm", setting["norm"]]
        else:
            start = scaled(Path(folder), setting)
            arguments = ["finetune", *options, "--model", str(start), "--strategy", "full", "--bn", "train"]
            arguments += ["--epochs", "3", "--optimizer", "sgd", "--schedule", "constant", "--warmup", "0"]
            arguments += ["--weight-decay", "0", "--augment", "none", "--image-size", "32"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = run(arguments)
        told = json.loads(said.getvalue())
        if code:
            if not told["error"]["what"].startswith("the loss became"):
                raise SystemExit(f"{' '.join(arguments)}: {told['error']}")
            return None
        return float(told["metrics"]["test"]["top1"])


def scaled(folder: Path, setting: dict[str, Any]) -> Path:
    """A run that holds the random network, its convolutions multiplied."""
    torch.manual_seed(setting["seed"])
    loaded = build("lenet", "random", norm=setting["norm"])
    with torch.no_grad():
        for module in loaded.network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(setting["factor"])
    start = folder / "start"
    start.mkdir()
    save_network(start, loaded)
    return start


def show(title: str, name: str, values: tuple[float, ...], found: list[dict[str, Any]], fixed: dict[str, Any]) -> None:
    """One table: norms by the values of one thing."""
    print(f"\n{title}\n{'':10}" + "".join(f"{value:>24g}" for value in values))
    for norm in NORMS:
        cells = []
        for value in values:
            rate = {"lr": RATE * value / BATCH_SIZE} if name == "batch_size" else {}
            wanted = {**fixed, "norm": norm, name: value, **rate}
            tops = [row["top1"] for row in found if all(row[key] == value for key, value in wanted.items())]
            numbers = [top for top in tops if top is not None]
            lost = len(tops) - len(numbers)
            if not tops:
                cells.append("-")
            elif not numbers:
                cells.append(f"diverged ({lost} of {lost})")
            else:
                spread = f"{statistics.mean(numbers):.3f} ({min(numbers):.3f}-{max(numbers):.3f})"
                cells.append(spread + (f" -{lost}" if lost else ""))
        print(f"{norm:10}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    """Measure what is missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("norms.jsonl"))
    given = parser.parse_args()
    found = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    known = [{key: value for key, value in row.items() if key != "top1"} for row in found]
    for setting in settings(given.seeds):
        if setting in known:
            continue
        row = {**setting, "top1": measure(given.data, setting)}
        known.append(setting)
        found.append(row)
        with given.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    base = {"batch_size": BATCH_SIZE, "lr": RATE, "factor": 1.0}
    without = {key: value for key, value in base.items() if key not in ("batch_size", "lr")}
    print("test top-1 after 3 epochs, mean (lowest-highest) over seeds; -n: n seeds diverged")
    show("images in a batch (rate scaled with it)", "batch_size", BATCH_SIZES, found, without)
    show("learning rate", "lr", RATES, found, {**base, "lr": 0})
    show("convolutions' initial weights times", "factor", FACTORS, found, base)


if __name__ == "__main__":
    main()
