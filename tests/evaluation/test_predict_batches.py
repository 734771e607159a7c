"""Probabilities of images: in the order of the data, each image once, the views averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tlkit import compute, config
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import View
from tlkit.evaluation.predict import collect, predict_batches
from tlkit.networks.build import Loaded
from tlkit.networks.forward import set_classifier
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing
from tlkit.training import features
from tlkit.training.features import Features

PREPROCESSING = Preprocessing(
    size=64, crop=1, crop_mode="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
FP32 = config.Compute(device="cpu", precision="fp32")


def extract(network: Any, dataset: ViewDataset, how: How) -> Features:
    """`tlkit.training.features.extract` with nothing kept."""
    loaded = Loaded(network, "test_resnet", dataset.preprocessing, classes=None, weights="random")
    return features.extract(loaded, dataset, how)


@pytest.fixture(scope="module")
def paths(shapes: Path) -> list[str]:
    return sorted(path.relative_to(shapes).as_posix() for path in shapes.rglob("*.*"))[::3]


@pytest.fixture(scope="module")
def network(shapes: Path, paths: list[str]) -> Any:
    """With a random classifier of centred features, so large that one class after another is likely."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=6).eval()
    dataset = ViewDataset(shapes, paths, PREPROCESSING, View())
    pooled = torch.from_numpy(extract(network, dataset, How(compute.accelerator(FP32), workers=0)).values[:, 0])
    weight = torch.randn(6, pooled.shape[1]) / pooled.std(0).clamp(min=1e-3) / 8
    set_classifier(network, weight, -weight @ pooled.mean(0))
    return network


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (5, 2), (None, None)])
@pytest.mark.parametrize("view", [View(), View(mirrored=True)])
def test_views_are_averaged_as_probabilities(
    network: Any, shapes: Path, paths: list[str], view: Any, batch_size: int | None, workers: int | None
) -> None:
    """Reference: the classifier's softmax on separately extracted features, then the mean over views in numpy."""
    dataset, accelerator = ViewDataset(shapes, paths, PREPROCESSING, view), compute.accelerator(FP32)
    found = collect(predict_batches(network, dataset, How(accelerator, batch_size, workers)))
    pooled = extract(network, dataset, How(accelerator, workers=0)).values.astype(np.float64)
    logits = pooled @ network.fc.weight.detach().double().numpy().T + network.fc.bias.detach().double().numpy()
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    expected = (shifted / shifted.sum(-1, keepdims=True)).mean(1)
    assert (found.probabilities.shape, found.probabilities.dtype) == ((12, 6), np.float32)
    np.testing.assert_allclose(found.probabilities, expected, atol=2e-3)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    assert found.rows.tolist() == list(range(12))
    assert len(set(found.probabilities.argmax(1).tolist())) > 1


@pytest.mark.parametrize("bad", [set(), {0}, {4, 5}, {8, 9, 10, 11}, set(range(12))], ids=str)
def test_rows_stay_with_their_images(network: Any, shapes: Path, paths: list[str], bad: set[int]) -> None:
    accelerator = compute.accelerator(FP32)
    whole = collect(
        predict_batches(network, ViewDataset(shapes, paths, PREPROCESSING, View()), How(accelerator, workers=0))
    )
    named = [f"gone/{row}.png" if row in bad else path for row, path in enumerate(paths)]
    dataset = ViewDataset(shapes, named, PREPROCESSING, View())
    found = collect(predict_batches(network, dataset, How(accelerator, batch_size=2, workers=0)))
    assert [file.path for file in found.bad] == [f"gone/{row}.png" for row in sorted(bad)]
    assert found.rows.tolist() == [row for row in range(12) if row not in bad]
    if found.rows.size:
        np.testing.assert_allclose(found.probabilities, whole.probabilities[found.rows], atol=1e-4)
    else:
        assert len(found.probabilities) == 0


def test_batches_come_one_by_one(network: Any, shapes: Path, paths: list[str]) -> None:
    """So that a million images need no more memory than a batch."""
    dataset = ViewDataset(shapes, paths, PREPROCESSING, View())
    parts = predict_batches(network, dataset, How(compute.accelerator(FP32), batch_size=5, workers=0))
    assert iter(parts) is parts
    assert next(parts).rows.tolist() == [0, 1, 2, 3, 4]
    assert [part.rows.tolist() for part in parts] == [[5, 6, 7, 8, 9], [10, 11]]
