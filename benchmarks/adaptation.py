"""Unsupervised domain adaptation by every method: accuracy on a target whose labels were never used, over seeds.

    python benchmarks/adaptation.py digits DIGITS [--seeds 3] [--methods all]
    python benchmarks/adaptation.py office OFFICE [--seeds 1] [--methods all]

DIGITS holds the folders mnist/ and usps/, OFFICE amazon/ and webcam/ (Office-Caltech), each of class folders. Both
directions are run: digits by the recipes in recipes/adapt (LeNet from random weights), office with frozen
EfficientNet-Lite0 features (--strategy probe). Each row is one method: top-1 on the target in the epoch that was chosen
without labels, in the last one, in the best one by the labels (the oracle, no result); of the same seed's network
trained on the source alone; and the seconds of one training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes" / "adapt"
# Digits with all of MNIST's 60,000 training images and the best epoch by the target's test labels: an upper bound.
# Jiang et al., Transfer-Learning-Library (github.com/thuml/Transfer-Learning-Library), its table of digits.
BOUND = {
    "mnist usps": {"source-only": 82.1, "mmd": 86.0, "jmmd": 84.0, "dann": 91.7, "cdan": 96.0, "mcc": 95.1},
    "usps mnist": {"source-only": 74.6, "mmd": 89.5, "jmmd": 86.8, "dann": 95.2, "cdan": 97.7, "mcc": 94.6},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "office"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--direction", choices=["there", "back", "both"], default="both")
    arguments = parser.parse_args()
    pairs = (
        [("mnist", "usps"), ("usps", "mnist")]
        if arguments.what == "digits"
        else [("amazon", "webcam"), ("webcam", "amazon")]
    )
    pairs = {"there": pairs[:1], "back": pairs[1:], "both": pairs}[arguments.direction]
    seeds = arguments.seeds or (3 if arguments.what == "digits" else 1)
    for source, target in pairs:
        options = ["--strategy", "probe"]
        if arguments.what == "digits":
            options = ["--recipe", str(RECIPES / f"{source}-to-{target}.yaml")]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tlkit", "adapt", "--source", str(arguments.folder / source)]
            command += ["--target", str(arguments.folder / target), *options, "--method", arguments.methods]
            command += ["--seeds", str(seeds), "--out", f"{folder}/run", "--json", "--quiet"]
            started = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            took = time.perf_counter() - started
        show(source, target, json.loads(done.stdout), took)


def show(source, target, summary, took):
    bound = BOUND.get(f"{source} {target}", {})
    print(f"\n{source} to {target}, {summary['table'][0]['seeds']} seed(s), whole process {took:.0f} s\n")
    gap = "MMD2, A-distance before | after"
    print(f"| method | target | last | oracle | source-only | bound | p, seed by seed | {gap} | seconds |")
    print("|" + " --- |" * 10)
    for row in summary["table"]:
        ours = [result for result in summary["results"] if result["method"] == row["method"]]
        cells = [spread(row[key]) for key in ("target", "target_last", "target_oracle", "target_source_only")]
        p = ", ".join(f"{one['paired']['p']:.1g}" for one in ours if "paired" in one)
        before = f"{mean(ours, 'mmd2', 'before'):.4f}, {mean(ours, 'a_distance', 'before'):.2f}"
        after = f"{mean(ours, 'mmd2', 'after'):.4f}, {mean(ours, 'a_distance', 'after'):.2f}"
        limit = bound.get(row["method"])
        cells += ["" if limit is None else f"{limit / 100:.3f}", p, before, after, f"{row['seconds']['mean']:.0f}"]
        print(f"| {row['method']} | {' | '.join(cells)} |", flush=True)


def spread(found):
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def mean(results, name, when):
    return sum(one[name][when] for one in results) / len(results)


if __name__ == "__main__":
    main()
