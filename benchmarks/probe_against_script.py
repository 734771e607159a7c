"""`tlkit finetune` against the same job by hand: accuracy, and the whole process's time as a ratio.

    python benchmarks/probe_against_script.py DATA [--rounds 5]

DATA is a folder with train/ and val/. The three programs take turns, so that a noisy machine is noisy for all.
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

HERE = Path(__file__).parent


def timed(command):
    with tempfile.TemporaryDirectory() as cache:  # nothing was computed before
        environment = os.environ | {"TLKIT_CACHE": cache}
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return time.perf_counter() - started, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    script = [sys.executable, str(HERE / "minimal_probe.py"), str(arguments.data)]
    seconds = {"script, plain": [], "script, tuned": [], "tlkit finetune": []}
    right = {}
    for number in range(arguments.rounds):
        for name, command in (("script, plain", script), ("script, tuned", [*script, "--tuned"])):
            took, printed = timed(command)
            seconds[name].append(took)
            right[name] = "{} of {}".format(*printed.split())
        with tempfile.TemporaryDirectory() as folder:
            run = ["-m", "tlkit", "finetune", str(arguments.data), "--strategy", "probe", "--json"]
            took, printed = timed([sys.executable, *run, "--out", f"{folder}/run"])
        seconds["tlkit finetune"].append(took)
        val = json.loads(printed)["metrics"]["val"]
        right["tlkit finetune"] = f"{round(val['top1'] * val['images'])} of {val['images']}"
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    ours = seconds["tlkit finetune"]
    print("| program | right | seconds, median (least to most) | tlkit's time / its time, median of rounds |")
    print("| --- | --- | --- | --- |")
    for name, took in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, took, strict=True))
        spread = f"{statistics.median(took):.1f} ({min(took):.1f} to {max(took):.1f})"
        print(f"| {name} | {right[name]} | {spread} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
