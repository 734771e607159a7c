"""``evaluate --calibrate``: a temperature from images that are then not reported on, and the network that has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlkit.commands.labelled import write_splits
from tlkit.data.folders import Samples
from tlkit.data.splits import split
from tlkit.errors import TlkitError
from tlkit.evaluation.calibration import LARGEST, fit_temperature, with_temperature
from tlkit.evaluation.metrics import measured
from tlkit.evaluation.predict import Predictions
from tlkit.networks.build import Loaded, save_network
from tlkit.networks.exported import Exported
from tlkit.networks.forward import linear_classifiers

FITTED = "fitted"
"""Stands for the split of the images that the temperature is fitted on, while they are measured beside the others."""


@dataclass(frozen=True)
class Calibrated:
    """A temperature, and what it makes of the images that it was not fitted on.

    Args:
        temperature: That logits are divided by.
        samples: The images reported on.
        predictions: Theirs, with the temperature.
        told: What the summary says of it.
    """

    temperature: float
    samples: Samples
    predictions: Predictions
    told: dict[str, Any]


def choose_parts(samples: Samples, part: str, mask: np.ndarray, tta: str, seed: int) -> tuple[str, Samples, np.ndarray]:
    """Set the images apart that the temperature is fitted on: val where test is reported, else half of what was to be.

    Images that the network was trained on would say that it is surer than it is on others, so that train is never used.

    Args:
        samples: All images (N).
        part: The split to report on.
        mask: Its images (N).
        tta: Name of the views.
        seed: Of the halves.

    Returns:
        In words what is fitted on; the samples, those images under the split `FITTED`; the mask of both parts (N).

    Raises:
        TlkitError: Reported on train or all images of a run, or with other views than the centre.
    """
    if tta != "center":
        what = "the temperature is one for each view, and is fitted on the centre"
        raise TlkitError(what, where="--calibrate", remedy="leave --tta out; give it with the calibrated run")
    if part == "train" or (part == "all" and "train" in samples.splits):
        what = "images that the network was trained on cannot tell how sure it is of others"
        raise TlkitError(what, where=f"--split {part}", remedy="leave --split out, or give val or test")
    splits = samples.splits.astype("<U6")
    val = samples.splits == "val"
    if part == "test" and val.any():
        splits[val] = FITTED
        return "val", replace(samples, splits=splits), mask | val
    rows = np.flatnonzero(mask)
    halves = split(replace(samples.take(rows), splits=np.full(len(rows), "")), val=0.5, test=0, seed=seed)
    fitted = rows[halves.splits == "val"]
    if not len(fitted):
        what = f"{len(rows)} images are too few to be halved"
        remedy = "--calibrate needs three images of a class, and better hundreds"
        raise TlkitError(what, where=samples.root, remedy=remedy)
    splits[fitted] = FITTED
    return f"half of {part}", replace(samples, splits=splits), mask


def refuse_unfit(loaded: Loaded) -> None:
    """Raise where the temperature could not be made part of the network.

    Raises:
        TlkitError: The classifier is not linear, or nothing in the network can be changed.
    """
    if isinstance(loaded.network, Exported):
        remedy = "calibrate the run, and export what that writes"
        raise TlkitError("nothing can be changed in an ONNX file", where="--calibrate", remedy=remedy)
    try:
        linear_classifiers(loaded.network)
    except TlkitError as error:
        what = f"a temperature becomes part of a linear classifier, and {error.what}"
        raise TlkitError(what, where="--calibrate", remedy="leave it out, or choose another network") from error


def calibrate(found: Predictions, samples: Samples, fitted_on: str, part: str) -> Calibrated:
    """Fit the temperature on one part of the images, and measure what it does on the other.

    Raises:
        TlkitError: No image of one of them is left.
    """
    fitted = samples.splits == FITTED
    if not fitted.any() or fitted.all():
        raise TlkitError(f"no images of {fitted_on} or {part} are left", where=samples.root, remedy="add some")
    temperature = fit_temperature(found.probabilities[fitted], samples.labels[fitted])
    all_right = (found.probabilities[fitted].argmax(1) == samples.labels[fitted]).all()  # the colder, the better
    if all_right or not 1.01 / LARGEST < temperature < 0.99 * LARGEST:
        count = int(fitted.sum())
        what = f"the {count} images of {fitted_on} determine no temperature: they are all right, or most are wrong"
        raise TlkitError(what, where="--calibrate", remedy="give more images")
    rows = np.flatnonzero(~fitted)
    before, labels = found.probabilities[rows], samples.labels[rows]
    after = with_temperature(before, temperature).astype(np.float32)
    told = {
        "temperature": temperature,
        "fitted_on": fitted_on,
        "fitted_images": int(fitted.sum()),
        "before": measured(before, labels),
        "after": measured(after, labels),
    }
    kept = replace(found, rows=found.rows[rows], probabilities=after, center=found.center[rows])
    return Calibrated(temperature, samples.take(rows), kept, told)


def write_calibrated(folder: Path, loaded: Loaded, calibrated: Calibrated, samples: Samples) -> None:
    """Write the network with its logits divided by the temperature: in its classifier, so that anybody's code has it.

    The images that the temperature was fitted on count as ``train`` from now on: they have been learnt from.
    """
    with torch.no_grad():
        for layer in linear_classifiers(loaded.network):
            layer.weight.div_(calibrated.temperature)
            assert layer.bias is not None  # linear_classifiers returns no other
            layer.bias.div_(calibrated.temperature)
    save_network(folder, loaded)
    splits = samples.splits.copy()
    splits[splits == ""] = "test"  # reported on, of data without splits
    splits[splits == FITTED] = "train"
    write_splits(folder, replace(samples, splits=splits))
