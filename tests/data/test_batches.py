"""Which images each step sees: every image once, the same on any number of processes, from any step on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tlkit.data.batches import BatchPlan, BatchSampler
from tlkit.errors import TlkitError


def plan(images: int, batch_size: int, **options: Any) -> BatchPlan:
    return BatchPlan(np.arange(images) % 3, batch_size, seed=options.pop("seed", 7), **options)


SIZES = [
    (4, 4),
    (5, 4),
    (7, 4),
    (9, 4),
    (16, 8),
    (33, 32),
    (37, 1),
    (37, 2),
    (37, 4),
    (37, 5),
    (37, 8),
    (37, 32),
    (100, 64),
]
PROCESSES = [1, 2, 3, 4]
CASES = [(n, size, processes) for n, size in SIZES for processes in PROCESSES if min(n, size) >= processes]


@pytest.mark.parametrize(("images", "batch_size", "processes"), CASES)
def test_every_image_once_an_epoch(images: int, batch_size: int, processes: int) -> None:
    made = plan(images, batch_size, processes=processes)
    for epoch in range(3):
        batches = made.batches(epoch)
        assert len(batches) == made.steps
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(images))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        if batch_size >= 2:
            assert min(len(batch) for batch in batches) >= min(2 * processes, batch_size, images)
    assert not np.array_equal(made.order(0), made.order(1))


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    assert [len(batch) for batch in plan(37, 4).batches(0)] == [4] * 8 + [5]
    assert [len(batch) for batch in plan(38, 4).batches(0)] == [4] * 9 + [2]
    assert [len(batch) for batch in plan(39, 4, processes=2).batches(0)] == [4] * 8 + [7], "one for each would be few"
    assert [len(batch) for batch in plan(40, 4, processes=2).batches(0)] == [4] * 10
    assert [len(batch) for batch in plan(3, 4).batches(0)] == [3]
    assert [len(batch) for batch in plan(1, 4).batches(0)] == [1]


@pytest.mark.parametrize(("images", "batch_size", "processes"), CASES)
def test_parts_of_processes_are_the_batch(images: int, batch_size: int, processes: int) -> None:
    ranks = [plan(images, batch_size, rank=rank, processes=processes) for rank in range(processes)]
    for epoch in range(2):
        for batch in ranks[0].batches(epoch):
            parts = [made.part(batch) for made in ranks]
            assert min(map(len, parts)) >= 1
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert np.concatenate(parts).tolist() == batch.tolist()


@pytest.mark.parametrize(("images", "batch_size", "processes"), CASES)
def test_weights_make_the_mean_of_means_the_batchs(images: int, batch_size: int, processes: int) -> None:
    losses = np.random.default_rng(0).random(images)
    ranks = [plan(images, batch_size, rank=rank, processes=processes) for rank in range(processes)]
    for batch in ranks[0].batches(0):
        means = [made.weight(batch) * losses[made.part(batch)].mean() for made in ranks]
        assert np.mean(means) == pytest.approx(losses[batch].mean())


@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_is_the_seeds_alone(balanced: bool) -> None:
    orders = [
        plan(37, 8, rank=rank, processes=processes, balanced=balanced).order(2).tolist()
        for processes in PROCESSES
        for rank in range(processes)
    ]
    assert all(order == orders[0] for order in orders)
    assert plan(37, 8, seed=8, balanced=balanced).order(2).tolist() != orders[0]
    assert plan(37, 8, balanced=balanced).order(3).tolist() != orders[0]


@pytest.mark.parametrize("counts", [[30, 3, 1], [5, 5, 5], [100, 1], [7, 0, 2], [40, 30, 20, 11], [1]])
def test_balanced_classes_are_seen_equally_often(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    made = BatchPlan(labels, 4, seed=1, balanced=True)
    for epoch in range(20):
        order = made.order(epoch)
        seen = np.bincount(labels[order], minlength=len(counts))
        assert len(order) == len(labels)
        present = seen[np.array(counts) > 0]
        assert present.max() - present.min() <= 1
        # no image again before each of its class was seen as often
        for number in np.flatnonzero(counts):
            times = np.bincount(order, minlength=len(labels))[labels == number]
            assert times.max() - times.min() <= 1


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_sampler_started_later_gives_the_rest(processes: int, balanced: bool) -> None:
    for rank in range(processes):
        made = plan(37, 8, rank=rank, processes=processes, balanced=balanced)
        full = list(BatchSampler(made, epochs=3))
        assert len(full) == len(BatchSampler(made, epochs=3)) == 3 * made.steps
        for epoch in range(3):
            for step in range(made.steps + 1):
                sampler = BatchSampler(made, 3, epoch, step)
                assert list(sampler) == full[epoch * made.steps + step :]
                assert len(sampler) == len(full) - epoch * made.steps - step


def test_keys_name_epoch_and_row() -> None:
    made = plan(5, 2)
    keys = [key for batch in BatchSampler(made, epochs=2) for key in batch]
    assert keys == [(epoch, row) for epoch in range(2) for row in made.order(epoch).tolist()]


@pytest.mark.parametrize(("images", "batch_size", "processes"), [(100, 3, 4), (3, 32, 4), (0, 4, 1), (37, 1, 2)])
def test_more_processes_than_images_in_a_step(images: int, batch_size: int, processes: int) -> None:
    with pytest.raises(TlkitError, match=rf"--batch-size: {min(images, batch_size)} images in a step for {processes}"):
        plan(images, batch_size, processes=processes)
