"""What `tlkit check-data` finds of what is known to be wrong, and what it takes.

    python benchmarks/check_data.py copies FOLDER...              files of the same bytes, against hashing in this file
    python benchmarks/check_data.py planted FOLDER [--seeds 5]    near copies of 100 of the images
    python benchmarks/check_data.py labels FOLDER [--seeds 5]     a tenth of the labels in train made wrong
    python benchmarks/check_data.py speed FOLDER [--images 10000] [--rounds 3]   against decoding alone

FOLDER holds class folders, for `labels` train/ with class folders. Near copies: resized to 0.7, JPEG of quality 50, and
2 % cut off each side, one each. Wrong labels: any other class at random. For `speed`, the images of FOLDER are written
as files of 256 px, mirrored and turned until there are enough of them; what is compared are whole processes, and the
work after imports.
"""

import argparse
import csv
import hashlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png"}
DECODE = """
import sys, time
from pathlib import Path
from tlkit.data.folders import read_samples
from tlkit.data.loading import unreadable_files
samples = read_samples(Path(sys.argv[1]))
began = time.monotonic()
assert not unreadable_files(samples.root, samples.paths, 256)
print(time.monotonic() - began)
"""
CHECK = """
import sys, time
from tlkit.cli.app import run
import tlkit.commands.check_data
began = time.monotonic()
assert run(["check-data", sys.argv[1], "--quiet", "--json"]) == 0
print()
print(time.monotonic() - began)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["copies", "planted", "labels", "speed"])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    match arguments.what:
        case "copies":
            for folder in arguments.folders:
                copies(folder)
        case "planted":
            planted(arguments.folders[0], range(arguments.seeds))
        case "labels":
            labels(arguments.folders[0], range(arguments.seeds))
        case "speed":
            speed(arguments.folders[0], arguments.images, arguments.rounds)


def images_in(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def check(*arguments):
    command = [sys.executable, "-m", "tlkit", "check-data", *map(str, arguments), "--json", "--quiet"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def copies(folder):
    known = {}
    for path in images_in(folder):
        name = path.relative_to(folder).as_posix()
        known.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), set()).add(name)
    known = {frozenset(paths) for paths in known.values() if len(paths) > 1}
    groups = check(folder)["duplicates"]
    found = {frozenset(group["paths"]) for group in groups if group["kind"] == "exact"}
    near = sum(group["kind"] == "near" for group in groups)
    print(f"{folder.name}: {len(known)} groups of files of the same bytes, {len(found & known)} of them found,")
    print(f"  {len(found - known)} others; and {near} groups of near copies that nobody planted")


def planted(folder, seeds):
    scores = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as made:
            truth = plant(folder, Path(made), random.Random(seed))
            found = check(made)["duplicates"]
        wanted = pairs(truth.values())
        got = pairs(group["paths"] for group in found)
        scores.append((len(wanted & got) / len(wanted), len(wanted & got) / max(len(got), 1)))
        print(f"seed {seed}: {len(wanted)} pairs planted, recall {scores[-1][0]:.3f}, precision {scores[-1][1]:.3f}")
    recall, precision = (statistics.mean(column) for column in zip(*scores, strict=True))
    print(f"mean: recall {recall:.3f}, precision {precision:.3f}")


def plant(folder, made, rng):
    paths = images_in(folder)
    chosen, truth = set(rng.sample(paths, 100)), {}
    for number, path in enumerate(paths):
        place = made / f"class{number % 5}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.jpg").write_bytes(path.read_bytes())
        if path not in chosen:
            continue
        image = Image.open(path).convert("RGB")
        (width, height), cut = image.size, [round(0.02 * side) for side in image.size]
        image.resize((round(0.7 * width), round(0.7 * height)), Image.Resampling.BICUBIC).save(place / f"{number}r.jpg")
        image.save(place / f"{number}q.jpg", quality=50)
        image.crop((cut[0], cut[1], width - cut[0], height - cut[1])).save(place / f"{number}c.jpg", quality=95)
        truth[number] = [f"{place.name}/{number}{which}.jpg" for which in ("", "r", "q", "c")]
    return truth


def pairs(groups):
    return {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}


def labels(folder, seeds):
    paths = images_in(folder / "train")
    names = sorted({path.parent.name for path in paths})
    shares = []
    for seed in seeds:
        rng = random.Random(seed)
        wrong = set(rng.sample(paths, round(0.1 * len(paths))))
        with tempfile.TemporaryDirectory() as made:
            manifest = Path(made) / "flipped.csv"
            with manifest.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["path", "label"])
                for path in paths:
                    others = [name for name in names if name != path.parent.name]
                    writer.writerow([path.absolute(), rng.choice(others) if path in wrong else path.parent.name])
            suspects = check(manifest, "--deep")["label_suspects"]
        top = {Path(one["path"]) for one in suspects[: round(0.12 * len(paths))]}
        shares.append(len(top & {path.absolute() for path in wrong}) / len(wrong))
        right = len({Path(one["path"]) for one in suspects} & {path.absolute() for path in wrong})
        print(f"seed {seed}: {len(wrong)} of {len(paths)} labels wrong, {shares[-1]:.3f} of them in the top 12 %;")
        print(f"  {len(suspects)} suspects in all, {right} of them wrong")
    print(f"mean: {statistics.mean(shares):.3f}")


def speed(folder, images, rounds):
    with tempfile.TemporaryDirectory() as made:
        write_many(images_in(folder), Path(made), images)
        seconds = {name: [] for name in ("decode", "check", "decode, whole process", "check, whole process")}
        for _ in range(rounds):
            for name, code in (("decode", DECODE), ("check", CHECK)):
                began = time.monotonic()
                done = subprocess.run([sys.executable, "-c", code, made], check=True, stdout=subprocess.PIPE, text=True)
                seconds[f"{name}, whole process"].append(time.monotonic() - began)
                seconds[name].append(float(done.stdout.splitlines()[-1]))
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
    for form in ("", ", whole process"):
        rows = zip(seconds[f"check{form}"], seconds[f"decode{form}"], strict=True)
        ratios = [one / other for one, other in rows]
        print(f"ratio{form}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def write_many(paths, made, count):
    """Files of 256 px on the shorter side, all different."""
    turns = [None, *Image.Transpose][: -(-count // len(paths))]
    for number, (turn, path) in enumerate(itertools.islice(itertools.product(turns, paths), count)):
        place = made / f"class{number % 20}"
        place.mkdir(exist_ok=True)
        image = Image.open(path).convert("RGB")
        shrink = 256 / min(image.size)
        image = image.resize([round(shrink * side) for side in image.size])
        image = image if turn is None else image.transpose(turn)
        image.save(place / f"{number}.jpg", quality=90)


if __name__ == "__main__":
    main()
