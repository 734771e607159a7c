"""Features of a frozen backbone: in the order of the data, each image once, however they are batched and read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from tlkit import compute, config
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import View
from tlkit.networks.build import Loaded
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing
from tlkit.training import features
from tlkit.training.features import Features

PREPROCESSING = Preprocessing(
    size=64, crop=0.9, crop_mode="center", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
FP32 = config.Compute(device="cpu", precision="fp32")


def extract(network: Any, dataset: ViewDataset, how: How) -> Features:
    """`tlkit.training.features.extract` with nothing kept."""
    loaded = Loaded(network, "test_resnet", dataset.preprocessing, classes=None, weights="random")
    return features.extract(loaded, dataset, how)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def paths(shapes: Path) -> list[str]:
    return sorted(path.relative_to(shapes).as_posix() for path in shapes.rglob("*.*"))[:11]


def test_features_are_timms(network: Any, shapes: Path, paths: list[str]) -> None:
    """timm's own preprocessing and ``forward_head(pre_logits=True)``, image by image."""
    dataset = ViewDataset(shapes, paths, PREPROCESSING, View())
    found = extract(network, dataset, How(compute.accelerator(FP32), batch_size=4, workers=0))
    assert (found.values.shape, found.values.dtype) == ((11, 1, network.head_hidden_size), np.float32)
    assert found.rows.tolist() == list(range(11))
    assert found.bad == []
    own = PREPROCESSING
    transform = create_transform(
        own.size, crop_pct=own.crop, interpolation=own.interpolation, mean=own.mean, std=own.std
    )
    for row, path in enumerate(paths):
        with Image.open(shapes / path) as image, torch.inference_mode():
            pixels = transform(image.convert("RGB")).unsqueeze(0)
            expected = network.forward_head(network.forward_features(pixels), pre_logits=True)[0].numpy()
        np.testing.assert_allclose(found.values[row, 0], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (4, 2), (64, 1), (None, None)])
def test_batches_and_workers_change_nothing(
    network: Any, shapes: Path, paths: list[str], batch_size: int | None, workers: int | None
) -> None:
    dataset, accelerator = ViewDataset(shapes, paths, PREPROCESSING, View()), compute.accelerator(FP32)
    reference = extract(network, dataset, How(accelerator, batch_size=5, workers=0))
    found = extract(network, dataset, How(accelerator, batch_size, workers))
    assert found.rows.tolist() == reference.rows.tolist()
    np.testing.assert_allclose(found.values, reference.values, rtol=1e-4, atol=1e-5)


def test_mirror_images_are_second_views(network: Any, shapes: Path, paths: list[str], tmp_path: Path) -> None:
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(shapes / path) as image:
            mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            mirrored.save((tmp_path / path).with_suffix(".png"))
    accelerator, squashed = compute.accelerator(FP32), replace(PREPROCESSING, crop=1, crop_mode="squash")
    both = extract(network, ViewDataset(shapes, paths, squashed, View(mirrored=True)), How(accelerator, workers=0))
    assert both.values.shape[:2] == (11, 2)
    others = [str(Path(path).with_suffix(".png")) for path in paths]
    mirror = extract(network, ViewDataset(tmp_path, others, squashed, View()), How(accelerator, workers=0))
    np.testing.assert_allclose(both.values[:, 1], mirror.values[:, 0], rtol=1e-3, atol=1e-3)
    plain = extract(network, ViewDataset(shapes, paths, squashed, View()), How(accelerator, workers=0))
    np.testing.assert_allclose(both.values[:, 0], plain.values[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [{0}, {3, 4, 5}, {10}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_listed_and_moves_nothing(
    network: Any, shapes: Path, paths: list[str], bad: set[int], workers: int
) -> None:
    """Batches of three: among them some that are bad as a whole."""
    accelerator = compute.accelerator(FP32)
    whole = extract(network, ViewDataset(shapes, paths, PREPROCESSING, View()), How(accelerator, workers=0))
    named = [f"gone/{row}.jpg" if row in bad else path for row, path in enumerate(paths)]
    dataset = ViewDataset(shapes, named, PREPROCESSING, View())
    found = extract(network, dataset, How(accelerator, batch_size=3, workers=workers))
    assert [file.path for file in found.bad] == [f"gone/{row}.jpg" for row in sorted(bad)]
    assert all(file.reason for file in found.bad)
    assert found.rows.tolist() == [row for row in range(11) if row not in bad]
    np.testing.assert_allclose(found.values, whole.values[found.rows], rtol=1e-4, atol=1e-5)


def test_nothing_at_all_can_be_read(network: Any, tmp_path: Path) -> None:
    dataset = ViewDataset(tmp_path, ["a.jpg", "b.jpg"], PREPROCESSING, View())
    found = extract(network, dataset, How(compute.accelerator(FP32), workers=0))
    assert (len(found.rows), len(found.values), len(found.bad)) == (0, 0, 2)


def test_progress_is_told_in_images(network: Any, shapes: Path, paths: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    extract(
        network,
        ViewDataset(shapes, [*paths, "gone.jpg"], PREPROCESSING, View()),
        How(compute.accelerator(FP32), batch_size=5, workers=0, progress=lambda *now: told.append(now)),
    )
    assert told == [("features", done, 12) for done in (0, 5, 10, 12)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_is_left_as_it_was(network: Any, shapes: Path, paths: list[str], precision: Any) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    accelerator = compute.accelerator(config.Compute(device="cpu", precision=precision))
    extract(network, ViewDataset(shapes, paths, PREPROCESSING, View(mirrored=True)), How(accelerator, workers=0))
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bf16_is_near_fp32(network: Any, shapes: Path, paths: list[str]) -> None:
    dataset = ViewDataset(shapes, paths, PREPROCESSING, View())
    found = [
        extract(network, dataset, How(compute.accelerator(config.Compute("cpu", precision)), workers=0)).values
        for precision in ("fp32", "bf16")
    ]
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert 0 < error < 0.03, "8 bits a number"
