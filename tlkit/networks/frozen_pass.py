"""The pass of images through a network that does not learn, which everything shares: decode, compute, hand over."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tlkit import processes
from tlkit.data.loading import BadFile, Views, load, load_in_turns
from tlkit.data.transforms import normalise
from tlkit.networks.forward import BATCH_SIZES, channels_last
from tlkit.networks.quick import Compute, Form, quickest
from tlkit.preprocessing import Preprocessing
from tlkit.progress import Progress, silent

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class How:
    """How images are passed through a network.

    Args:
        accelerator: Device and precision.
        batch_size: Images in one pass; by default what suits the device.
        workers: Decoding processes; by default what suits the machine.
        compile: ``auto`` compiles the network where the number of images pays for it.
        say: Told what a person should know.
        progress: Told before the first and after each batch how many images are done.
    """

    accelerator: Accelerator
    batch_size: int | None = None
    workers: int | None = None
    compile: Literal["auto", "always", "never"] = "auto"
    say: Callable[[str], None] = print
    progress: Progress = silent

    @property
    def size(self) -> int:
        """Images in one pass."""
        return self.batch_size or BATCH_SIZES[self.accelerator.device.type]


Passed = tuple[Tensor, Any, list[tuple[int, BadFile]]]
"""Rows (B) of a dataset, results of B rows and V views on the CPU (B, V, ...), what could not be read."""


class FrozenPass:
    """All images of a dataset, through ``compute(network, images)``, without gradients, in the dataset's order.

    Iterating yields rows (B) of the dataset, results of B rows and V views on the CPU (B, V, ...), as a tuple where
    ``compute`` gives one (nothing, where no image of the batch could be read), and what could not be read. Several
    processes take turns with whole batches, so that each image is computed beside the same others as in a single one,
    and all are given the results of all.

    Args:
        network: Put into evaluation mode and onto the accelerator's device.
        dataset: What to decode.
        compute: Maps a network and normalised images (B, C, S, S) to (B, ...), or to a tuple of such.
        how: Device, precision, processes.
        label: What the progress calls it.
        plain: Keep to the network itself: ``compute`` looks inside.
        whole: Images of the whole work where ``dataset`` is what is left of it: the form is chosen for these.
        spread: Share the dataset among several processes; otherwise it is this process's own, which asks no other.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Views,
        compute: Compute,
        how: How,
        *,
        label: str = "images",
        plain: bool = False,
        whole: int | None = None,
        spread: bool = True,
    ) -> None:
        self.network, self.dataset, self.compute, self.how, self.label = network, dataset, compute, how, label
        self.whole = len(dataset) if whole is None else whole
        self.spread = spread and processes.count() > 1
        self.form: Form | None = Form("plain", lambda images: compute(network, images)) if plain else None

        self.preparing_seconds = 0.0
        """What choosing the form took, compilation included."""

        self.network_seconds = 0.0
        """What the network took for the images so far, without that; of several processes the sum."""

    @property
    def compile_seconds(self) -> float:
        """What compiling took."""
        return self.form.seconds if self.form is not None else 0.0

    def __iter__(self) -> Iterator[Passed]:
        done = 0
        self.how.progress(self.label, done, len(self.dataset))
        with closing(self._spread() if self.spread else self._own(self.dataset)) as passed:
            for rows, results, bad in passed:
                done += len(rows) + len(bad)
                self.how.progress(self.label, done, len(self.dataset))
                yield rows, results, bad

    def _spread(self) -> Generator[Passed]:
        """Every so many'th batch is this process's own; the others' results come from them."""
        size, several = self.how.size, processes.count()
        batches = torch.arange(len(self.dataset)).split(size) if len(self.dataset) else ()
        own = batches[processes.rank() :: several]
        rows = torch.cat(own) if own else torch.empty(0, dtype=torch.long)
        with closing(self._own(_Rows(self.dataset, rows.tolist(), self.dataset.preprocessing))) as passed:
            for _ in range(-(-len(batches) // several)):
                before = self.network_seconds
                found = next(passed, None)
                if found is not None:
                    unread = [(int(rows[row]), file) for row, file in found[2]]
                    found = rows[found[0]], found[1], unread
                told = processes.gathered((found, self.network_seconds - before))
                self.network_seconds = before + sum(seconds for _, seconds in told)
                yield from (found for found, _ in told if found is not None)

    def _own(self, dataset: Views) -> Generator[Passed]:
        how, device = self.how, self.how.accelerator.device
        self.network = channels_last(self.network.eval().to(device))
        if device.type == "cpu" and how.workers is None:
            batches = load_in_turns(dataset, batch_size=how.size)
        else:
            batches = load(dataset, batch_size=how.size, workers=how.workers, pin_memory=device.type == "cuda")
        with closing(batches):  # its threads end at once, also where somebody holds on to an error
            for batch in batches:
                results: Any = torch.empty(0)
                if len(batch.rows):
                    count, views = batch.images.shape[:2]
                    images = batch.images.to(device, non_blocking=True).flatten(0, 1)
                    results = _each(self._run(images, self.whole * views), partial(_by_image, count=count))
                yield batch.rows, results, batch.bad

    def _run(self, images: Tensor, count: int) -> Any:
        """Results on the CPU of 8-bit images, for ``count`` images in all.

        All forms but the plain one are given full batches alone: compiled for that shape, and so that what comes out of
        an image does not depend on how many are beside it.
        """
        size, began = self.how.size, time.monotonic()
        if self.form is None:
            full = count >= size or self.how.compile == "always"
            self.form = quickest(
                self.network,
                self.compute,
                self._normalised(_filled(images[:size], size) if full else images),
                count=count,
                autocast=self.how.accelerator.autocast,
                compile=self.how.compile,
                say=self.how.say,
            )
            self.preparing_seconds = time.monotonic() - began
            began = time.monotonic()
        found = []
        for part in images.split(size):
            given = self._normalised(part if self.form.name == "plain" else _filled(part, size))
            with self.form.context(), self.how.accelerator.autocast():
                found.append(_each(self.form.run(given), partial(_first, count=len(part))))
        self.network_seconds += time.monotonic() - began
        return _joined(found)

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images, self.dataset.preprocessing).contiguous(memory_format=torch.channels_last)


@dataclass
class _Rows:
    """Some rows of a dataset, as a dataset of their own."""

    dataset: Views
    rows: Sequence[int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Tensor | BadFile]:
        return place, self.dataset[self.rows[place]][1]


def _filled(images: Tensor, count: int) -> Tensor:
    """``count`` images: the last is repeated where there are fewer."""
    if len(images) == count:
        return images
    more = images[-1:].expand(count - len(images), -1, -1, -1)
    return torch.cat([images, more])


def _first(found: Tensor, count: int) -> Tensor:
    return found[:count].cpu()


def _joined(found: list[Any]) -> Any:
    if len(found) == 1:
        return found[0]
    return tuple(map(torch.cat, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.cat(found)


def _by_image(found: Tensor, count: int) -> Tensor:
    return found.view(count, -1, *found.shape[1:])


def _each(results: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(change, results)) if isinstance(results, tuple) else change(results)
