"""The pipeline of `recipes/run/digits.yaml`, killed at random moments and started again: are the results the same?

    python benchmarks/pipeline_kills.py [--kills 3] [--seed 0]

Each kill is SIGKILL to the pipeline and its step at a uniformly drawn moment of the time that the pipeline takes; what
had ended by then stays. The last start is left alone.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tlkit.commands.demo import write_digits

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "run" / "digits.yaml"
FILES = ("model.safetensors", "predictions.csv", "config.json", "splits.csv")


def results(out):
    summary = json.loads((out / "summary.json").read_text())
    files = {str(path.relative_to(out)): path.read_bytes() for name in FILES for path in out.glob(f"*/{name}")}
    return files, [step["metrics"] for step in summary["steps"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder / "runs" / "demo" / "digits")

        def start(out):
            environment = os.environ | {"TLKIT_CACHE": str(folder / f"cache of {out}")}
            command = [sys.executable, "-m", "tlkit", "run", str(RECIPE), "--out", out]
            return subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=sys.stderr,
                start_new_session=True,
            )

        began = time.perf_counter()
        if start("alone").wait():
            sys.exit("the pipeline failed")
        whole = time.perf_counter() - began
        print(f"undisturbed: {whole:.0f} s")
        kills, done = sorted(moments.uniform(0, whole) for _ in range(arguments.kills)), 0.0
        for moment in kills:
            process = start("killed")
            try:
                process.wait(timeout=moment - done)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                summary = folder / "killed" / "summary.json"
                steps = json.loads(summary.read_text())["steps"] if summary.exists() else []
                hit = next((step["step"] for step in steps if step["state"] == "running"), "nothing")
                print(f"killed {moment - done:.0f} s after its start, in {hit}")
            done = moment
        if code := start("killed").wait():
            sys.exit(f"exit code {code}")
        (files, metrics), expected = results(folder / "killed"), results(folder / "alone")
        same = "the same" if (files, metrics) == expected else "NOT the same"
        print(f"{len(files)} files and the metrics of {len(metrics)} steps: {same}")


if __name__ == "__main__":
    main()
