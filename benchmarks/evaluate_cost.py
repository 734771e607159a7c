"""What evaluating costs beside computing features: whole processes that take turns, and ten-crop's network time.

    python benchmarks/evaluate_cost.py DATA [--model tf_efficientnet_lite0] [--rounds 3]

DATA is a folder of images of ImageNet's classes. `tlkit extract-features` writes pooled features of them to an npz
file, `tlkit evaluate` measures the model on them (with --out: its report page too); start-up counts for all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, data = arguments.model, str(arguments.data)
    seconds = {"extract-features": [], "evaluate": [], "evaluate --out": []}
    network = {"center": [], "ten-crop": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            timed(seconds["extract-features"], "extract-features", data, "--model", model, "--out", f"{folder}/f.npz")
            told = timed(seconds["evaluate"], "evaluate", model, data)
            timed(seconds["evaluate --out"], "evaluate", model, data, "--out", f"{folder}/run")
        network["center"].append(told["network_seconds"])
        told = timed([], "evaluate", model, data, "--tta", "ten-crop")
        network["ten-crop"].append(told["network_seconds"])
    print("| | seconds, median | ratio, median (least to most) |")
    print("| --- | --- | --- |")
    for found, base in ((seconds, "extract-features"), (network, "center")):
        for name, values in found.items():
            ratios = [value / other for value, other in zip(values, found[base], strict=True)]
            title = name if found is seconds else f"network alone, {name}"
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {title} | {statistics.median(values):.1f} | {spread if name != base else '1'} |")


def timed(into, *command):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tlkit", *command, "--json", "--quiet"], check=True, stdout=subprocess.PIPE, text=True
    )
    into.append(time.monotonic() - began)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
