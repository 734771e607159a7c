"""Views merged: against plain loops, and whole passes against torchvision's views, a softmax and a mean by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from tlkit import compute, config
from tlkit.data.decode import decode
from tlkit.data.loading import ViewDataset
from tlkit.data.transforms import View, resize
from tlkit.evaluation.predict import predict_all
from tlkit.evaluation.views import MERGES, VIEWS, merge
from tlkit.networks.frozen_pass import How
from tlkit.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    size=32, crop=0.8, crop_mode="center", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
FP32 = config.Compute(device="cpu", precision="fp32")
TINY = float(np.finfo(np.float32).tiny)


def normal(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def by_loop(views: np.ndarray, how: str) -> np.ndarray:
    """(N, V, K) to (N, K), number by number."""
    out = []
    for image in views.astype(np.float64).tolist():
        classes = list(zip(*image, strict=True))
        if how == "mean":
            values = [sum(column) / len(column) for column in classes]
        elif how == "max":
            values = [max(column) for column in classes]
        else:
            values = [math.prod(max(value, TINY) ** (1 / len(column)) for value in column) for column in classes]
        out.append(normal(values))
    return np.array(out)


def made(images: int, views: int, classes: int, seed: int, nought: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.dirichlet(np.full(classes, 0.5), (images, views))
    values[random.random(values.shape) < nought] = 0
    values[..., 0] += 1e-3
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize("nought", [0.0, 0.4])
@pytest.mark.parametrize(("images", "views", "classes"), [(1, 1, 2), (5, 2, 3), (4, 10, 7), (3, 30, 1000)])
def test_merging_is_that_of_a_loop(how: str, images: int, views: int, classes: int, nought: float) -> None:
    probabilities = made(images, views, classes, seed=views, nought=nought)
    found = merge(torch.from_numpy(probabilities), how).numpy()
    np.testing.assert_allclose(found, by_loop(probabilities, how), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("how", MERGES)
def test_one_view_and_equal_views_stay_what_they_are(how: str) -> None:
    one = torch.from_numpy(made(6, 1, 5, seed=0))
    assert torch.equal(merge(one, how), one[:, 0])
    torch.testing.assert_close(merge(one.expand(-1, 4, -1), how), one[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", MERGES)
def test_the_order_of_views_does_not_matter(how: str) -> None:
    views = torch.from_numpy(made(6, 5, 4, seed=1, nought=0.2))
    torch.testing.assert_close(merge(views, how), merge(views.flip(1), how), atol=1e-6, rtol=0)


def test_certain_views_that_contradict_each_other() -> None:
    views = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    for how in MERGES:
        torch.testing.assert_close(merge(views, how), torch.tensor([[0.5, 0.5, 0.0]]), atol=1e-6, rtol=0)


def test_one_view_that_excludes_a_class_is_enough_for_the_geometric_mean() -> None:
    views = torch.tensor([[[0.9, 0.1], [0.0, 1.0]]])
    assert merge(views, "mean").argmax() == 1 and merge(views, "geometric")[0, 0] < 1e-15
    assert merge(torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), "max")[0].tolist() == pytest.approx([9 / 17, 8 / 17])


# Whole passes


class Small(nn.Module):
    """A convolution, a pooling, a classifier: what it says depends on where in the picture things are."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.conv = nn.Conv2d(3, 8, 5, stride=3)
        self.fc = nn.Linear(8 * 4, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.adaptive_avg_pool2d(self.conv(images).relu(), 2)
        logits: Tensor = self.fc(maps.flatten(1)) * 3
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Small().eval()


@pytest.fixture(scope="module")
def mixed(
    make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], set[int]]:
    """21 images, of which two cannot be read."""
    folder = make_shapes(tmp_path_factory.mktemp("mixed"), images=7)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    bad = {0, 13}
    for row in bad:
        (folder / paths[row]).write_bytes(b"no image")
    return folder, paths, bad


def by_hand(network: nn.Module, folder: Path, paths: list[str], which: str, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Merged probabilities (N, K) and the class of the centre (N): one image at a time, views by torchvision."""
    mean, std, merged, middle = list(PREPROCESSING.mean), list(PREPROCESSING.std), [], []
    for path in paths:
        resized = resize(decode(folder / path, min_side=50), PREPROCESSING)
        ten = torch.stack(transforms.ten_crop(resized, [32, 32]))
        chosen = {"center": [4], "flip": [4, 9], "five-crop": [0, 1, 2, 3, 4], "ten-crop": list(range(10))}[which]
        with torch.no_grad():
            logits = network(transforms.normalize(ten.float() / 255, mean, std))
        probabilities = logits.double().softmax(-1).numpy()
        merged.append(by_loop(probabilities[None, chosen], how)[0])
        middle.append(int(probabilities[4].argmax()))
    return np.array(merged), np.array(middle)


@pytest.mark.parametrize(("workers", "batch_size"), [(None, 16), (0, 1), (0, 4), (1, 5), (2, 8)])
@pytest.mark.parametrize("which", ["center", "flip", "five-crop", "ten-crop"])
def test_a_pass_is_what_torchvision_and_a_mean_make_by_hand(
    network: nn.Module, mixed: tuple[Path, list[str], set[int]], which: str, workers: int | None, batch_size: int
) -> None:
    """Batches that do not divide the images; each image once, in their order, without those that are unreadable."""
    folder, paths, bad = mixed
    dataset = ViewDataset(folder, paths, PREPROCESSING, VIEWS[which])
    found = predict_all(network, dataset, How(compute.accelerator(FP32), batch_size, workers))
    good = [row for row in range(21) if row not in bad]
    expected, middle = by_hand(network, folder, [paths[row] for row in good], which, "mean")
    assert found.rows.tolist() == good
    assert [file.path for file in found.bad] == [paths[row] for row in sorted(bad)]
    assert found.probabilities.dtype == np.float32
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    assert found.center.tolist() == middle.tolist()
    assert len(set(middle.tolist())) > 1, "a network that always says the same proves nothing"


@pytest.mark.parametrize("how", MERGES)
def test_a_pass_merges_as_it_is_told(network: nn.Module, mixed: tuple[Path, list[str], set[int]], how: str) -> None:
    folder, paths, bad = mixed
    good = [path for row, path in enumerate(paths) if row not in bad]
    dataset = ViewDataset(folder, good, PREPROCESSING, VIEWS["ten-crop"])
    found = predict_all(network, dataset, How(compute.accelerator(FP32), 4, 0), how)
    expected, _ = by_hand(network, folder, good, "ten-crop", how)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    others = [by_hand(network, folder, good, "ten-crop", other)[0] for other in MERGES if other != how]
    assert all(np.abs(found.probabilities - other).max() > 1e-4 for other in others), "the merges differ here"


def test_nothing_that_can_be_read(network: nn.Module, tmp_path: Path) -> None:
    found = predict_all(
        network,
        ViewDataset(tmp_path, ["a.png", "b.png"], PREPROCESSING, View()),
        How(compute.accelerator(FP32), 4, 0),
    )
    assert len(found.rows) == len(found.probabilities) == len(found.center) == 0
    assert [file.path for file in found.bad] == ["a.png", "b.png"]
