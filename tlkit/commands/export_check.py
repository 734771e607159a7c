"""What an export is checked on, and how far it is from the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlkit import config
from tlkit.commands.console import Console
from tlkit.commands.labelled import report_skipped
from tlkit.commands.measuring import align, learnt_from, own_data, part_named, read_labelled
from tlkit.commands.passing import how
from tlkit.data.folders import Samples, is_there
from tlkit.data.loading import ViewDataset, Views, load_in_turns
from tlkit.data.new_images import read_images
from tlkit.data.transforms import CENTER
from tlkit.errors import TlkitError
from tlkit.evaluation.metrics import measured
from tlkit.networks.build import Loaded
from tlkit.networks.forward import logits_of
from tlkit.networks.frozen_pass import FrozenPass
from tlkit.preprocessing import Preprocessing
from tlkit.progress import silent

TOLERANCE = 1e-3
"""How far a probability may be off that of the network, where both compute in float32."""

CALIBRATED_ON, NOISE, AT_ONCE = 128, 32, 16  # images


@dataclass(frozen=True)
class Images:
    """Images that a network and its export are compared on.

    Args:
        views: The images.
        of: What they are, in words.
        labels: Class of each in the network's numbers (N); None where nobody knows.
    """

    views: Views
    of: str
    labels: np.ndarray | None = None


@dataclass
class Noise:
    """Made images of independent random pixels, the same each time."""

    preprocessing: Preprocessing

    def __len__(self) -> int:
        return NOISE

    def __getitem__(self, row: int) -> tuple[int, Tensor]:
        side, random = self.preprocessing.size, torch.Generator().manual_seed(row)
        shape = (1, len(self.preprocessing.mean), side, side)
        return row, torch.randint(256, shape, dtype=torch.uint8, generator=random)


def images_to_check(model: str, exporting: config.Exporting, loaded: Loaded, console: Console) -> Images:
    """Those that a person names, else the run's own that it was not trained on, else noise.

    Raises:
        TlkitError: There are none where a person names some.
    """
    if exporting.check is not None:
        samples, of = read_images(exporting.check, progress=console.progress), "images"
    else:
        try:
            found = _held_out(model, console)
        except TlkitError as error:  # its images are gone, or are others now
            console.warn(f"the run's own images cannot be used: {error}")
            found = None
        if found is None:
            console.warn(
                "compared on noise: --check DATA compares on images, and states accuracies if they have labels"
            )
            return Images(Noise(loaded.preprocessing), "made noise")
        samples, of = found
    try:
        samples, labelled = align(samples, loaded).samples, True
    except TlkitError:  # other classes than the network's, or none: still images
        labelled = False
    samples = samples.take(drawn(len(samples), exporting.check_images))
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, CENTER)
    return Images(dataset, of, samples.labels if labelled else None)


def _held_out(model: str, console: Console) -> tuple[Samples, str] | None:
    data = own_data(Path(model))
    if data is None or not is_there(data):
        return None
    samples = read_labelled([model], None, "export", console.progress)
    part, mask = part_named(samples, "auto")
    if line := learnt_from([model], None, samples, mask):
        console.warn(line)
    return samples.take(mask), f"images of {part}" if part != "all" else "images"


def calibration_batches(model: str, folder: Path | None, loaded: Loaded) -> list[Tensor]:
    """Images (B, C, S, S) in [0, 1] that show the ranges of a network's activations.

    Args:
        model: A run, whose training images are taken where there is no folder.
        folder: Images.
        loaded: The network.

    Raises:
        TlkitError: There are none.
    """
    if folder is not None:
        samples = read_images(folder)
    else:
        data = own_data(Path(model))
        if data is None or not is_there(data):
            remedy = "give --calibrate-on FOLDER, a hundred images such as it will see"
            raise TlkitError("int8 needs images that show its ranges", where="--quantise int8", remedy=remedy)
        samples = read_labelled([model], None, "export", silent)
        samples = samples.take(samples.splits == "train")
    samples = samples.take(drawn(len(samples), CALIBRATED_ON))
    dataset = ViewDataset(samples.root, samples.paths, loaded.preprocessing, CENTER)
    batches = load_in_turns(dataset, batch_size=AT_ONCE)
    found = [batch.images[:, 0].float() / 255 for batch in batches if len(batch.rows)]
    if not found:
        raise TlkitError("none of the images can be read", where=samples.root, remedy="give --calibrate-on FOLDER")
    return found


def drawn(count: int, wanted: int) -> np.ndarray:
    """Rows of at most so many images, drawn at random, the same each time; ascending."""
    return np.sort(np.random.default_rng(0).permutation(count)[:wanted])


def differences(
    loaded: Loaded, exported: nn.Module, images: Images, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far the export is from the network, in float32 on the CPU; and the metrics of both, where there are labels.

    Returns:
        ``{images, of, same_labels, max_difference}``, and ``{network, export}`` of metrics objects or nothing.

    Raises:
        TlkitError: No image can be read, or the export's probabilities are not numbers.
    """
    rows, wanted = _probabilities(loaded.network, images.views, "network", console)
    _, found = _probabilities(exported, images.views, "export", console)
    if not np.isfinite(found).all():
        what = "not written: its probabilities are not numbers, as where 16 bits overflow"
        raise TlkitError(what, where=loaded.title, remedy="leave out --quantise, or try another --format")
    told = {
        "images": len(rows),
        "of": images.of,
        "same_labels": int((found.argmax(1) == wanted.argmax(1)).sum()),
        "max_difference": float(np.abs(found - wanted).max()),
    }
    if images.labels is None:
        return told, {}
    labels = images.labels[rows]
    return told, {"network": measured(wanted, labels), "export": measured(found, labels)}


def _probabilities(network: nn.Module, views: Views, label: str, console: Console) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images that could be read (N) and probabilities (N, K)."""
    passes = how(config.Compute(device="cpu", precision="fp32"), console)
    rows, probabilities, unread = [], [], []
    for some, logits, bad in FrozenPass(network, views, logits_of, passes, label=label, plain=True):
        if len(some):
            rows.append(some.numpy())
            probabilities.append(logits[:, 0].softmax(-1).numpy())
        unread += [file for _, file in bad]
    if not rows:
        raise TlkitError("none of the images can be read", where="--check", remedy="give others")
    if label == "network":
        report_skipped(console, unread)
    return np.concatenate(rows), np.concatenate(probabilities)
