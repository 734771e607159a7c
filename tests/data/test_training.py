"""Training images: a function of seed, epoch and row, whoever decodes them and wherever the stream begins."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tlkit.data.augment import augment
from tlkit.data.batches import BatchPlan
from tlkit.data.decode import decode
from tlkit.data.folders import Samples, read_samples
from tlkit.data.loading import BadFile
from tlkit.data.training import Mixing, TrainingBatches, TrainingDataset, collate, seed_of
from tlkit.errors import TlkitError
from tlkit.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    size=32, crop=0.8, crop_mode="center", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return read_samples(make_shapes(tmp_path_factory.mktemp("training") / "shapes", images=[5, 4, 4]))


def dataset(samples: Samples, preset: str = "strong", seed: int = 3) -> TrainingDataset:
    return TrainingDataset(samples, PREPROCESSING, preset, seed)


def batches(samples: Samples, workers: int = 0, epochs: int = 3, **options: Any) -> TrainingBatches:
    preset = options.pop("preset", "strong")
    plan = BatchPlan(samples.labels, 4, seed=5, **options.pop("plan", {}))
    return TrainingBatches(dataset(samples, preset), plan, epochs=epochs, device=CPU, workers=workers, **options)


def drained(made: TrainingBatches, epoch: int = 0, step: int = 0) -> list[tuple[Tensor, Tensor]]:
    """All batches from a step of an epoch on."""
    found = list(made.epoch(epoch, step))
    for number in range(epoch + 1, made.epochs):
        found += made.epoch(number)
    return found


def assert_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("preset", ["light", "standard", "strong"])
def test_an_item_depends_on_seed_epoch_and_row_alone(samples: Samples, preset: str) -> None:
    keys = [(epoch, row) for epoch in range(3) for row in range(len(samples))]
    made = dataset(samples, preset)
    first = {key: made[key] for key in keys}
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    again = dataset(samples, preset)
    for key in reversed(keys):
        image, label = again[key]
        assert isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape == (3, 32, 32)
        assert torch.equal(image, first[key][0])
        assert label == first[key][1] == samples.labels[key[1]]
    assert any(not torch.equal(first[0, row][0], first[1, row][0]) for row in range(len(samples)))
    other = dataset(samples, preset, seed=4)
    assert any(not torch.equal(other[key][0], first[key][0]) for key in keys)


def test_an_item_is_augment_with_its_own_seed(samples: Samples) -> None:
    made = dataset(samples)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(3, 2, 7))
        expected = augment(decode(samples.root / samples.paths[7], min_side=made.least_side), PREPROCESSING, "strong")
    assert torch.equal(made[2, 7][0], expected)


def test_the_loops_generator_is_left_alone(samples: Samples) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    dataset(samples)[0, 0]
    drained(batches(samples))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def stream(samples: Samples) -> list[tuple[Tensor, Tensor]]:
    return drained(batches(samples))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(
    samples: Samples, stream: list[tuple[Tensor, Tensor]], workers: int
) -> None:
    torch.manual_seed(1234 + workers)
    state = torch.get_rng_state()
    assert_same(drained(batches(samples, workers)), stream)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_started_later_is_the_rest(
    samples: Samples, stream: list[tuple[Tensor, Tensor]], workers: int
) -> None:
    steps = batches(samples).steps
    assert steps == 3 and len(stream) == 9
    places = [(epoch, step) for epoch in range(3) for step in range(steps)] if not workers else [(0, 2), (1, 1)]
    for epoch, step in places:
        assert_same(drained(batches(samples, workers), epoch, step), stream[epoch * steps + step :])


def test_batches_are_normalised_images_of_the_plan(samples: Samples) -> None:
    made = batches(samples, preset="none", epochs=1)
    rows = made.plan.batches(0)
    for batch, (images, labels) in zip(rows, made.epoch(0), strict=True):
        assert labels.tolist() == samples.labels[batch].tolist()
        assert images.is_contiguous(memory_format=torch.channels_last)
        for row, image in zip(batch.tolist(), images, strict=True):
            pixels = made.dataset[0, row][0].double() / 255
            mean, std = (
                torch.tensor(values).double()[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std)
            )
            torch.testing.assert_close(image.double(), (pixels - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_stream(samples: Samples, stream: list[tuple[Tensor, Tensor]], processes: int) -> None:
    ranks = [batches(samples, plan={"rank": rank, "processes": processes}) for rank in range(processes)]
    streams = [drained(made) for made in ranks]
    together = [torch.cat([images for images, _ in parts]) for parts in zip(*streams, strict=True)]
    assert torch.equal(torch.cat(together), torch.cat([images for images, _ in stream]))
    for epoch in range(3):
        for step in range(ranks[0].steps):
            sizes = [len(parts[epoch * ranks[0].steps + step][0]) for parts in streams]
            weights = [made.weight(epoch, step) for made in ranks]
            assert weights == pytest.approx([size * processes / sum(sizes) for size in sizes])


def test_one_process_weighs_one(samples: Samples) -> None:
    made = batches(samples)
    assert [made.weight(0, step) for step in range(made.steps)] == [1.0] * made.steps


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_file_that_vanished_is_named(samples: Samples, tmp_path: Path, workers: int, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(samples.root, folder)
    copied = read_samples(folder)
    made = batches(copied, workers)
    lost = folder / copied.paths[6]
    lost.unlink()
    if damage == "cut off":
        lost.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(TlkitError) as caught:
        drained(made)
    assert f"{copied.paths[6]} cannot be read any more" in caught.value.what
    assert caught.value.where == str(folder)
    assert "--resume" in caught.value.remedy


def test_collate_hands_on_the_first_bad_file() -> None:
    image, bad = torch.zeros(3, 2, 2, dtype=torch.uint8), [BadFile("a", "gone"), BadFile("b", "gone")]
    assert collate([(image, 0), (bad[0], 1), (bad[1], 2)]) == bad[0]
    images, labels = collate([(image, 0), (image + 1, 2)])  # type: ignore[misc]
    assert images.shape == (2, 3, 2, 2) and labels.tolist() == [0, 2]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_mixing_makes_labels_soft(samples: Samples, mixup: float, cutmix: float) -> None:
    plain = drained(batches(samples))
    torch.manual_seed(0)
    mixed = drained(batches(samples, mixing=Mixing(mixup, cutmix, 3)))
    assert not all(torch.equal(images, other) for (images, _), (other, _) in zip(mixed, plain, strict=True))
    for (_, soft), (_, labels) in zip(mixed, plain, strict=True):
        assert soft.shape == (len(labels), 3) and soft.is_floating_point()
        assert soft.sum(1).tolist() == pytest.approx([1.0] * len(labels))
        assert (soft.gather(1, labels[:, None]) >= 0).all()
        assert ((soft > 0).sum(1) <= 2).all(), "of two images"
        partners = torch.nn.functional.one_hot(labels.roll(1), 3) + torch.nn.functional.one_hot(labels, 3)
        assert (soft[partners == 0] == 0).all()
    torch.manual_seed(0)
    assert_same(drained(batches(samples, mixing=Mixing(mixup, cutmix, 3))), mixed)


def test_seeds_depend_on_all_numbers_and_their_order() -> None:
    seeds = {seed_of(*numbers) for numbers in np.ndindex(5, 5, 5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)
