"""Every strategy of `tlkit finetune` on one folder: accuracy over seeds, and the whole process's time.

    python benchmarks/strategies.py DATA [--seeds 5] [--strategies auto probe ...] [-- OPTION ...]

DATA is a folder with train/ and val/; what follows -- is passed on to every run. A seed decides cross-validation folds,
the order and variation of images, and new heads; the network is the same.
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


def main():
    own, _, passed_on = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--strategies", nargs="+", default=["probe", "auto", "full", "differential", "lp-ft", "gradual"]
    )
    arguments = parser.parse_args(own.split())
    print("| strategy | top-1, mean (least to most) | loss, mean | seconds, mean (least to most) | seeds |")
    print("| --- | --- | --- | --- | --- |")
    for strategy in arguments.strategies:
        top1, loss, seconds = [], [], []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "tlkit", "finetune", str(arguments.data), "--strategy", strategy]
                options = ["--seed", str(seed), "--out", f"{folder}/run", "--json", "--quiet", *passed_on.split()]
                started = time.perf_counter()
                environment = os.environ | {"TLKIT_CACHE": f"{folder}/cache"}  # nothing was computed before
                done = subprocess.run(
                    [*command, *options], check=True, stdout=subprocess.PIPE, text=True, env=environment
                )
                seconds.append(time.perf_counter() - started)
            summary = json.loads(done.stdout)
            top1.append(summary["metrics"]["val"]["top1"])
            loss.append(summary["metrics"]["val"]["loss"])
            print(strategy, seed, f"{top1[-1]:.4f}", summary.get("decision", ""), file=sys.stderr)
        spread = f"{statistics.mean(top1):.4f} ({min(top1):.4f} to {max(top1):.4f})"
        took = f"{statistics.mean(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"| {strategy} | {spread} | {statistics.mean(loss):.3f} | {took} | {len(top1)} |", flush=True)


if __name__ == "__main__":
    main()
