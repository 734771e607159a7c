"""Batch norm's statistics estimated anew from images, without labels and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkit.data.loading import BadFile, ViewDataset
from tlkit.errors import TlkitError, first_line
from tlkit.networks.frozen_pass import FrozenPass, How

BATCH_SIZE = 64
"""Each batch is normalised by its own statistics on its way: they should be near to those of all images."""


@dataclass(frozen=True)
class Estimated:
    """What came out.

    Args:
        shifts: For each batch norm, by name, how far its means moved: averaged over channels, in standard deviations
            that it had before.
        images: How many were used.
        bad: Files that could not be read.
    """

    shifts: dict[str, float]
    images: int
    bad: list[BadFile]


def estimate_statistics(network: nn.Module, dataset: ViewDataset, how: How) -> Estimated:
    """Replace the running statistics of every batch norm by those of all images of a dataset.

    Each layer's input is gathered while batches are normalised by their own statistics; mean and (unbiased) variance
    are those of all positions of all images together, so that they do not depend on the order of the batches or on a
    momentum (Wu and Johnson, 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3; on images of another
    domain this is AdaBN: Li et al., 2016, arXiv:1603.04779).

    Args:
        network: Changed in place; moved to the accelerator's device.
        dataset: Images, in a random order: a batch of one class alone would be normalised unlike any other.
        how: Device, precision, processes; images in one pass are by default `BATCH_SIZE`.

    Raises:
        TlkitError: The network has no batch norm with running statistics, or a batch cannot be normalised.
    """
    refuse_without_statistics(network, "there is nothing to estimate")
    norms = _norms(network)
    size = min(how.batch_size or BATCH_SIZE, max(len(dataset), 1))
    while size > 2 and len(dataset) % size == 1:  # one image alone may have nothing to be normalised by
        size -= 1
    images, bad = 0, []

    def passed(network: nn.Module, batch: Tensor) -> Tensor:
        for module in norms.values():
            module.training = True
        return network(batch)[:, :1]  # nothing of it is needed but that it was computed

    with _gathering(norms) as gathered:
        try:
            for rows, _, unread in FrozenPass(network, dataset, passed, replace(how, batch_size=size), plain=True):
                images += len(rows)
                bad += [file for _, file in unread]
        except ValueError as error:  # torch's, for a single number in each channel
            what = f"a batch cannot be normalised by itself ({first_line(error)})"
            raise TlkitError(what, where="images", remedy="give more images, or another --batch-size") from error
    if not images:
        return Estimated({}, 0, bad)
    return Estimated({name: _replace(norms[name], gathered[name]) for name in norms}, images, bad)


def estimate_from(network: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    """The same from batches (B, ...) that are there already, in a random order; `network` stays where it is.

    Args:
        network: Changed in place; must have batch norm.
        batches: Gives what the network is to be given; a batch of one, which has no variance, is passed over.
    """
    norms = _norms(network.eval())
    with torch.no_grad(), _gathering(norms) as gathered:
        for module in norms.values():
            module.training = True
        for batch in batches():
            if len(batch) > 1:
                network(batch)
    for name, module in norms.items():
        _replace(module, gathered[name])


def refuse_without_statistics(network: nn.Module, remedy: str) -> None:
    """Raise where there is no batch norm with running statistics.

    Raises:
        TlkitError: With that remedy.
    """
    if not _norms(network):
        raise TlkitError("the network has no batch norm", where="MODEL", remedy=remedy)


def _norms(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if _has_statistics(module)}


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


class _Gathered:
    """Count, mean and sum of squared distances from it, batch by batch (Chan et al., 1983), for each channel."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        values = inputs.detach().transpose(0, 1).flatten(1).float()
        count = values.shape[1]
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        mean, squares = mean.double().cpu(), variance.double().cpu() * count
        whole = self.count + count
        apart = mean - self.mean
        self.squares = self.squares + squares + apart**2 * (self.count * count / whole)
        self.mean = self.mean + apart * (count / whole)
        self.count = whole


@contextmanager
def _gathering(norms: dict[str, Any]) -> Iterator[dict[str, _Gathered]]:
    """Look at what each norm is given, while it normalises batches by themselves and leaves its statistics alone."""
    gathered = {name: _Gathered() for name in norms}
    before = {name: (module.training, module.track_running_stats) for name, module in norms.items()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: gathered[name].add(args[0]))
        for name, module in norms.items()
    ]
    for module in norms.values():
        module.track_running_stats = False
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()
        for name, module in norms.items():
            module.training, module.track_running_stats = before[name]


def _replace(module: nn.Module, gathered: _Gathered) -> float:
    mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
    shift = (gathered.mean.to(mean) - mean).abs() / (variance + module.eps).sqrt()  # type: ignore[operator]
    mean.copy_(gathered.mean)
    variance.copy_(gathered.squares / max(gathered.count - 1, 1))  # unbiased, as torch's running variance is
    return float(shift.mean())
