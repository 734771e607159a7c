"""Does a pretrained network help with few images of something else? Pretrained against random weights.

    python benchmarks/pretrain_transfer.py RUN DOMAIN [--images 20] [--seeds 5] [-- OPTION ...]

RUN is a run of `tlkit pretrain`, DOMAIN a folder of class folders. For each seed a few images of each class are drawn
to learn from and 100 others to test on; `tlkit finetune --strategy full` learns from them twice with the same options,
once from RUN's weights, once from random ones of the same network. What follows -- is passed on to both.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def draw(domain, images, seed, manifest):
    chooser = random.Random(seed)
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for folder in sorted(path for path in domain.iterdir() if path.is_dir()):
            paths = sorted(folder.iterdir())
            for number, path in enumerate(chooser.sample(paths, images + 100)):
                writer.writerow((path.resolve(), folder.name, "train" if number < images else "test"))


def accuracy(manifest, run, seed, options, out):
    command = [sys.executable, "-m", "tlkit", "finetune", str(manifest), "--model", str(run), "--strategy", "full"]
    command += ["--seed", str(seed), "--out", str(out), "--json", "--quiet", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["metrics"]["test"]["top1"]


def main():
    own, _, passed_on = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("domain", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(own.split())
    pretrained, from_random = [], []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder, options = Path(name), passed_on.split()
            draw(arguments.domain, arguments.images, seed, folder / "drawn.csv")
            pretrained.append(accuracy(folder / "drawn.csv", arguments.run, seed, options, folder / "a"))
            options = [*options, "--weights", "random"]
            from_random.append(accuracy(folder / "drawn.csv", arguments.run, seed, options, folder / "b"))
        print(seed, pretrained[-1], from_random[-1], file=sys.stderr)
    gains = [one - other for one, other in zip(pretrained, from_random, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    print("| weights | test top-1, mean | standard deviation |")
    print("| --- | --- | --- |")
    for name, found in (("pretrained", pretrained), ("random", from_random)):
        print(f"| {name} | {statistics.mean(found):.4f} | {statistics.stdev(found):.4f} |")
    print(f"| gain | {statistics.mean(gains):+.4f} | standard error {error:.4f} |")


if __name__ == "__main__":
    main()
