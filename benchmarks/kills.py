"""Runs that are killed at random moments and resumed: is the model the one of a run that was left alone, bit for bit?

    python benchmarks/kills.py [--kills 20] [--seed 0]

Three phases of `tlkit unfreeze` on made pictures. Each kill is SIGKILL to the whole process group at a uniformly drawn
moment of the time that the run takes, start-up included; a run is killed until it is through, then the next one begins.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

NETWORK = [
    "--model",
    "test_resnet",
    "--weights",
    "random",
    "--image-size",
    "64",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]
OPTIONS = [*NETWORK, "--stages", "3", "--epochs-per-stage", "4", "--checkpoint-every", "2steps", "--quiet"]


def write_pictures(folder, images=40):
    draw_from = random.Random(0)
    for label, colour in (("red", "#c33"), ("green", "#3a4"), ("blue", "#33c")):
        (folder / label).mkdir(parents=True)
        for number in range(images):
            image = Image.new("RGB", (72, 80), (draw_from.randint(190, 255),) * 3)
            left, top, side = draw_from.randint(2, 30), draw_from.randint(2, 30), draw_from.randint(15, 40)
            ImageDraw.Draw(image).ellipse((left, top, left + side, top + side), fill=colour)
            image.save(folder / label / f"{number:03d}.png")


def digest(run):
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments, tlkit = random.Random(arguments.seed), [sys.executable, "-m", "tlkit"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = alike = runs = from_state = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "data")
        begin = [*tlkit, "unfreeze", str(folder / "data"), *OPTIONS, "--out"]
        started = time.perf_counter()
        environment["TLKIT_CACHE"] = str(folder / "cache of alone")
        subprocess.run([*begin, str(folder / "alone")], check=True, stdout=subprocess.DEVNULL, env=environment)
        whole, wanted = time.perf_counter() - started, digest(folder / "alone")
        while kills < arguments.kills:
            run = folder / f"killed{runs}"
            environment["TLKIT_CACHE"] = str(folder / f"cache{runs}")
            while True:
                resumes = (run / "recipe.yaml").exists()
                from_state += (run / "state" / "checkpoint.safetensors").exists()
                going_on = [*tlkit, "unfreeze", "--resume", str(run), "--checkpoint-every", "2steps", "--quiet"]
                command = going_on if resumes else [*begin, str(run)]
                if run.exists() and not resumes:
                    run = folder / f"killed{runs}-again"  # killed before there was anything to go on with
                    command = [*begin, str(run)]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
                try:
                    process.wait(timeout=moments.uniform(0, whole) if kills < arguments.kills else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    continue
                if process.returncode:
                    sys.exit(f"exit code {process.returncode}")
                break
            runs += 1
            alike += digest(run) == wanted
    print(f"{kills} kills in {runs} runs, {from_state} times resumed from a stored state: {alike} runs bit-identical")


if __name__ == "__main__":
    main()
