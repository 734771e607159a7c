"""Speed: what is timed, how often, and how it is summed up; against a clock that the test turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tlkit import compute, config
from tlkit.networks import speed as measured
from tlkit.networks.speed import LEAST_REPEATS, MOST_REPEATS, SECONDS, WARM_UP, Spread, speed


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measured, "time", made)
    return made


class Recorder(nn.Module):
    """Takes as long for each image as it is told, and ten times as long for the first passes of each batch size."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.seconds = clock, seconds
        self.passes: list[int] = []
        self.states: set[tuple[bool, bool, torch.dtype]] = set()

    def forward(self, images: Tensor) -> Tensor:
        first = self.passes.count(len(images)) < WARM_UP
        self.passes.append(len(images))
        self.states.add((self.training, torch.is_grad_enabled(), images.dtype))
        self.clock.now += self.seconds * len(images) * (10 if first else 1)
        return images.mean((1, 2, 3)) * self.weight


@pytest.fixture(scope="module")
def accelerator() -> Any:
    return compute.accelerator(config.Compute(device="cpu", precision="fp32"))


def test_warming_up_is_not_counted(clock: Clock, accelerator: Any) -> None:
    network = Recorder(clock, 0.25)
    found = speed(network, (3, 8, 8), accelerator, batch_size=4)
    assert found.latency == Spread(0.25, 0.25, 0.25)
    assert found.images_per_second == Spread(4.0, 4.0, 4.0)
    assert found.repeats == (LEAST_REPEATS, LEAST_REPEATS)
    assert network.passes == [1] * (WARM_UP + LEAST_REPEATS) + [4] * (WARM_UP + LEAST_REPEATS)


def test_in_evaluation_mode_without_gradients(clock: Clock, accelerator: Any) -> None:
    network = Recorder(clock, 0.5).train()
    speed(network, (3, 8, 8), accelerator, batch_size=2)
    assert network.states == {(False, False, torch.float32)}
    assert network.weight.grad is None


@pytest.mark.parametrize("size", [None, 1, 5])
def test_batch_size(clock: Clock, accelerator: Any, size: int | None) -> None:
    """By default 16 on a processor."""
    network = Recorder(clock, 0.5)
    found = speed(network, (1, 4, 4), accelerator, batch_size=size)
    assert found.batch_size == (size or 16)
    assert set(network.passes) == {1, size or 16}
    assert (found.device, found.precision, found.threads) == ("cpu", "fp32", torch.get_num_threads())


@pytest.mark.parametrize(
    ("seconds", "repeats"),
    [(8.0, LEAST_REPEATS), (SECONDS / LEAST_REPEATS, LEAST_REPEATS), (SECONDS / 16, 16), (2**-12, MOST_REPEATS)],
)
def test_as_many_repeats_as_the_time_allows(clock: Clock, seconds: float, repeats: int) -> None:
    calls = 0

    def once() -> None:
        nonlocal calls
        calls += 1
        clock.now += seconds

    times = measured._times(once)
    assert len(times) == calls - WARM_UP
    assert len(times) == pytest.approx(repeats, abs=1)
    assert times == pytest.approx(np.full(len(times), seconds))
    assert LEAST_REPEATS <= len(times) <= MOST_REPEATS


def test_quartiles_of_passes_that_differ(clock: Clock, accelerator: Any) -> None:
    """Times of 1 to 10 s: quartiles 3.25, 5.5 and 7.75; rates have theirs from the rates, the slowest lowest."""

    class Slower(nn.Module):
        passes = 0

        def forward(self, images: Tensor) -> Tensor:
            number = self.passes % (WARM_UP + LEAST_REPEATS) - WARM_UP + 1
            self.passes += 1
            clock.now += max(number, 100 * (number < 1))
            return images

    found = speed(Slower(), (3, 4, 4), accelerator, batch_size=60)
    assert found.latency == Spread(median=5.5, low=3.25, high=7.75)
    low, median, high = np.percentile(60 / np.arange(1, 11), [25, 50, 75])
    assert found.images_per_second == Spread(pytest.approx(median), pytest.approx(low), pytest.approx(high))
    assert found.images_per_second.low < found.images_per_second.median < found.images_per_second.high


def test_random_numbers_are_left_alone(clock: Clock, accelerator: Any) -> None:
    before = torch.get_rng_state()
    speed(Recorder(clock, 1.0), (3, 4, 4), accelerator, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 3])
def test_a_real_network_by_the_real_clock(accelerator: Any, size: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    found = speed(network, (3, 8, 8), accelerator, batch_size=size)
    for spread in (found.latency, found.images_per_second):
        assert 0 < spread.low <= spread.median <= spread.high
    assert all(LEAST_REPEATS <= count <= MOST_REPEATS for count in found.repeats)
