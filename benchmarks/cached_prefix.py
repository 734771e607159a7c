"""Gradual unfreezing with frozen stages run once against frozen stages run in every epoch: time of phases, accuracy.

    python benchmarks/cached_prefix.py DATA [--seeds 5] [--views 4] [--warm] [-- OPTION ...]

DATA is a folder with train/ and val/; what follows -- is passed on to every run. Three phases of five epochs come after
the head's, and no phase ends early. Both ways take turns, each cached run with an empty cache: making it counts. With
--warm each is repeated with the cache that it left behind.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = ("--strategy", "gradual", "--stages", "4", "--epochs-per-stage", "5", "--patience", "0")


def main():
    own, _, passed_on = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args(own.split())
    found = {"every epoch": [], "once": [], "once, kept before": []}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as cache:
            ways = {"every epoch": 0, "once": arguments.views} | (
                {"once, kept before": arguments.views} if arguments.warm else {}
            )
            for way, views in ways.items():
                options = ["--seed", str(seed), "--cached-views", str(views), *passed_on.split()]
                found[way].append(run(arguments.data, options, cache))
                print(seed, way, *(f"{value:.3f}" for value in found[way][-1]), file=sys.stderr)
    print("| frozen stages run | seconds of the phases, mean | part of every epoch's | top-1, mean (range) | loss |")
    print("| --- | --- | --- | --- | --- |")
    for way, runs in found.items():
        if runs:
            seconds, top1, loss = zip(*runs, strict=True)
            parts = [one / other[0] for one, other in zip(seconds, found["every epoch"], strict=True)]
            part = f"{statistics.median(parts):.2f} ({min(parts):.2f} to {max(parts):.2f})"
            right = f"{statistics.mean(top1):.4f} ({min(top1):.4f} to {max(top1):.4f})"
            print(f"| {way} | {statistics.mean(seconds):.1f} | {part} | {right} | {statistics.mean(loss):.3f} |")


def run(data, options, cache):
    """Seconds of the phases after the head's, accuracy and loss on val."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tlkit", "finetune", str(data), *OPTIONS, *options]
        command += ["--out", f"{folder}/run", "--json", "--quiet"]
        environment = os.environ | {"TLKIT_CACHE": cache}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    summary = json.loads(done.stdout)
    seconds = sum(phase["seconds"] for phase in summary["phases"][1:])
    return seconds, summary["metrics"]["val"]["top1"], summary["metrics"]["val"]["loss"]


if __name__ == "__main__":
    main()
