"""Features of a frozen backbone: one pass over the images, whatever is then fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tlkit import __version__, processes
from tlkit.data.content import digests
from tlkit.data.loading import BadFile, ViewDataset
from tlkit.networks.build import Loaded
from tlkit.networks.forward import features_of
from tlkit.networks.frozen_pass import FrozenPass, How
from tlkit.networks.quick import FOLDED_FROM, compiles
from tlkit.networks.stages import classifier_modules
from tlkit.networks.weights import fingerprint
from tlkit.training.cache import FeatureCache, NoRoom, Writer


@dataclass(frozen=True)
class Features:
    """Pooled features.

    Args:
        rows: Positions in the dataset of the images that could be read (N), ascending.
        values: Float32 (N, V, D): what the classifier sees of each of V views.
        bad: Files that could not be read.
    """

    rows: np.ndarray
    values: np.ndarray
    bad: list[BadFile]


def extract(
    loaded: Loaded, dataset: ViewDataset, how: How, cache: FeatureCache | None = None, view: str = "center"
) -> Features:
    """Pass all images through the network up to its classifier, but for those that an earlier run kept in the cache.

    Args:
        loaded: The network.
        dataset: The images.
        how: Device, precision, processes.
        cache: Where features are looked for, and kept as they come; by default nowhere.
        view: Name of the dataset's view.

    Raises:
        TlkitError: The network cannot be cut in front of its classifier.
    """
    if cache is None or not cache.budget:
        return _extract(loaded.network, dataset, how, len(dataset))
    whole = max(len(dataset), FOLDED_FROM)  # one form, whatever is there already
    heads = classifier_modules(loaded.network)
    below = [name for name in loaded.network.state_dict() if not name.startswith(tuple(f"{head}." for head in heads))]
    key = key_of(loaded, how, "pooled features", view, below) | {
        "compiled": compiles(how.accelerator.device, how.compile, whole)
    }
    files = digests(dataset.root, dataset.paths)
    with cache.open(key) as entry:
        places = entry.find([file or "" for file in files])
        everywhere = np.all(processes.gathered(places >= 0), axis=0)  # machines need not have the same in their caches
        there = np.flatnonzero(everywhere)
        values = entry.read(places[there]).view(np.float32) if len(there) else np.empty((0, 0), np.float32)
    if len(there):
        how.say(f"features of {len(there)} of {len(dataset)} images were there from an earlier run")
    todo = np.flatnonzero(~everywhere)
    part = ViewDataset(dataset.root, [dataset.paths[row] for row in todo.tolist()], dataset.preprocessing, dataset.view)
    with _writing(cache, key, len(todo), how) as keep:
        new = _extract(
            loaded.network, part, how, whole, lambda rows, found: keep([files[todo[row]] for row in rows], found)
        )
    if not len(there):
        return Features(todo[new.rows], new.values, new.bad)
    values = values.reshape(len(there), -1, loaded.network.head_hidden_size)  # type: ignore[arg-type]
    rows = np.concatenate([there, todo[new.rows]])
    order = np.argsort(rows)
    both = np.concatenate([values, new.values]) if len(new.rows) else values
    return Features(rows[order], both[order], new.bad)


def key_of(loaded: Loaded, how: How, what: str, view: str, names: Collection[str]) -> dict[str, Any]:
    """Everything that what is kept of an image depends on, but for the image's content.

    Args:
        loaded: The network.
        how: Device and precision.
        what: What is kept.
        view: Of the image.
        names: Tensors that it depends on.
    """
    return {
        "model": loaded.title,
        "what": what,
        "view": view,
        "weights": fingerprint(loaded.network, names),
        "preprocessing": loaded.preprocessing.to_dict(),
        "precision": how.accelerator.mixed_precision,
        "device": how.accelerator.device.type,
        "batch": how.size,
        "tlkit": __version__,
        "torch": torch.__version__,
    }


@contextmanager
def _writing(
    cache: FeatureCache, key: Mapping[str, Any], count: int, how: How
) -> Iterator[Callable[[Sequence[str | None], np.ndarray], None]]:
    """Keeps features as they come: room for all is taken with the first, whose size tells that of the others."""
    with ExitStack() as stack:
        writers: list[Writer | None] = []

        def keep(files: Sequence[str | None], values: np.ndarray) -> None:
            if not processes.is_first_here():
                return
            known = [place for place, file in enumerate(files) if file is not None]
            rows = np.ascontiguousarray(values[known]).reshape(len(known), -1).view(np.uint8)
            if not writers:
                try:
                    writers.append(stack.enter_context(cache.write(key, count, rows.shape[1])))
                except NoRoom as error:
                    how.say(f"features are not kept for later runs: {error}")
                    writers.append(None)
            if writers[0] is not None:
                writers[0].add([file for file in files if file is not None], rows)

        yield keep


def _extract(
    network: nn.Module,
    dataset: ViewDataset,
    how: How,
    whole: int,
    keep: Callable[[list[int], np.ndarray], None] = lambda rows, values: None,
) -> Features:
    rows, values, bad = [], [], []
    if not len(dataset):
        return Features(np.empty(0, dtype=np.int64), np.empty((0, 1, 0), dtype=np.float32), [])
    for in_batch, features, unreadable in FrozenPass(network, dataset, features_of, how, label="features", whole=whole):
        bad += [file for _, file in unreadable]
        if len(in_batch):
            keep(in_batch.tolist(), features.numpy())
            rows.append(in_batch)
            values.append(features)
    if not rows:
        return Features(np.empty(0, dtype=np.int64), np.empty((0, 1, 0), dtype=np.float32), bad)
    return Features(torch.cat(rows).numpy(), torch.cat(values).numpy(), bad)
