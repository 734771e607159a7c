"""One process with two threads against two processes with one: what sharing the work costs, and whether it is the same.

    python benchmarks/processes.py DATA [--rounds 2] [--model resnet18]

Trains everything for two epochs from random weights (batch norm over the whole batch, fp32), then evaluates; both in
turns. Rates are of what the commands themselves measure: the second epoch, the passes of evaluation.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(processes, *words):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
    began = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "tlkit", *map(str, words), "--json", "--quiet", "--precision", "fp32"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout), time.perf_counter() - began


def predicted(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return [(row["path"], row["predicted"], float(row["probability"])) for row in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="resnet18")
    arguments = parser.parse_args()
    start = ["--model", arguments.model, "--weights", "random", "--image-size", 128]
    options = ["--strategy", "full", "--epochs", 2, "--batch-size", 32, "--optimizer", "sgd", "--lr", "0.01"]
    found = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(arguments.rounds):
            for processes in (1, 2):
                out = folder / f"{processes}-{number}"
                told, whole = run(processes, "finetune", arguments.data, *start, *options, "--out", out)
                rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                images, loss = told["images"]["train"] + told["images"].get("val", 0), rows[-1]["losses"]["loss"]
                epoch = images / (rows[1]["seconds"] - rows[0]["seconds"])
                measured = folder / f"{processes}-{number}-measured"
                _, evaluated = run(processes, "evaluate", folder / f"1-{number}", "--split", "all", "--out", measured)
                found[processes].append((epoch, whole, evaluated))
                print(
                    f"{processes} process(es): epoch {epoch:.1f} images/s, command {whole:.1f} s, loss {loss:.5f}",
                    end="",
                )
                print(f"; evaluate {evaluated:.1f} s")
            one, two = (predicted(folder / f"{processes}-{number}-measured") for processes in (1, 2))
            same = sum(a[:2] == b[:2] for a, b in zip(one, two, strict=True))
            furthest = max(abs(a[2] - b[2]) for a, b in zip(one, two, strict=True))
            print(f"predictions: {same} of {len(one)} alike, in the same order; probabilities within {furthest:.1g}")
    for place, what in enumerate(("training rate", "whole finetune command", "whole evaluate command")):
        ratios = [two[place] / one[place] for one, two in zip(found[1], found[2], strict=True)]
        print(f"two processes / one, {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
