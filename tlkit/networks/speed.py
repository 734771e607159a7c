"""How fast a network is on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tlkit.networks.forward import BATCH_SIZES, channels_last

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP = 3
LEAST_REPEATS, MOST_REPEATS = 10, 100
SECONDS = 2.0
"""After the least number of passes, none is begun later than this."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements.

    Args:
        median: Of all.
        low: A quarter of them are below.
        high: A quarter of them are above.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """How fast a network is.

    Args:
        latency: Seconds for one image alone.
        images_per_second: In batches of ``batch_size``.
        batch_size: Images in one pass.
        repeats: Passes measured, of one image and of a batch.
        device: Where.
        precision: Of the network's arithmetic.
        threads: Of the processor.
    """

    latency: Spread
    images_per_second: Spread
    batch_size: int
    repeats: tuple[int, int]
    device: str
    precision: str
    threads: int


def speed(
    network: nn.Module, shape: tuple[int, int, int], accelerator: Accelerator, batch_size: int | None = None
) -> Speed:
    """Measure passes through a network in evaluation mode, after some to warm up, decoding not included.

    Args:
        network: Moved to the accelerator's device.
        shape: Of one image, (C, H, W).
        accelerator: Device and precision.
        batch_size: Images in one pass for the throughput; by default what suits the device.
    """
    device = accelerator.device
    size = batch_size or BATCH_SIZES[device.type]
    network = channels_last(network.eval().to(device))
    images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)

    def passing(count: int) -> Callable[[], None]:
        def once() -> None:
            with torch.inference_mode(), accelerator.autocast():
                network(images[:count])
            if device.type != "cpu":  # elsewhere work is only queued by then
                getattr(torch, device.type).synchronize()

        return once

    one, many = _times(passing(1)), _times(passing(size))
    return Speed(
        latency=_spread(one),
        images_per_second=_spread(size / many),
        batch_size=size,
        repeats=(len(one), len(many)),
        device=str(device),
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        threads=torch.get_num_threads(),
    )


def _times(once: Callable[[], None]) -> np.ndarray:
    for _ in range(WARM_UP):
        once()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_REPEATS or (len(times) < MOST_REPEATS and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return np.array(times)


def _spread(values: np.ndarray) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))
