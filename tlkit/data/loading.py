"""Batches of decoded images, in order, from as many processes as asked for; unreadable files are reported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tlkit import processes
from tlkit.data.decode import UnreadableImage, decode
from tlkit.errors import InputLost, TlkitError
from tlkit.preprocessing import Preprocessing
from tlkit.progress import Progress, silent
from tlkit.shards.folder import Folder

if TYPE_CHECKING:  # torchvision takes two seconds to import, and not every command that reads images needs it
    from tlkit.data.transforms import View


@dataclass(frozen=True)
class BadFile:
    """An image that could not be read.

    Args:
        path: As it is called in the data.
        reason: Why not, in a few words.
        lost: What lies elsewhere and does not come: nothing is known of the image itself.
    """

    path: str
    reason: str
    lost: InputLost | None = None


@dataclass(frozen=True)
class Batch:
    """Decoded images.

    Args:
        images: 8-bit (B, V, C, S, S): V views of each image; nothing (0) where no file could be read.
        rows: Position of each image among the paths (B).
        bad: Files of this batch that could not be read, with their positions.
    """

    images: Tensor
    rows: Tensor
    bad: list[tuple[int, BadFile]]


class Views(Protocol):
    """Images, each in V views."""

    preprocessing: Preprocessing

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadFile]:
        """The row itself and its views, 8-bit (V, C, S, S)."""


class ViewDataset(Dataset):
    """The views of each image. Module-level and picklable, so that worker processes may be spawned."""

    def __init__(self, root: Folder, paths: Sequence[str], preprocessing: Preprocessing, view: View) -> None:
        self.root, self.paths, self.preprocessing, self.view = root, paths, preprocessing, view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadFile]:
        try:
            image = decode(self.root / self.paths[row], min_side=self.view.least_side(self.preprocessing))
            return row, self.view(image, self.preprocessing)
        except (UnreadableImage, InputLost) as error:
            return row, bad_file(self.paths[row], error)


def bad_file(path: str, error: UnreadableImage | InputLost) -> BadFile:
    """An image that cannot be read; as a value, for torch rebuilds few exceptions of another process as they were."""
    return BadFile(path, error.reason, error) if isinstance(error, InputLost) else BadFile(path, str(error))


def refuse_lost(bad: Iterable[BadFile]) -> None:
    """Raise where an image is not broken but out of reach: it must not pass for one that can be left out.

    Raises:
        InputLost: So it is.
    """
    for file in bad:
        if file.lost is not None:
            raise file.lost


def collate(items: list[tuple[int, Tensor | BadFile]]) -> Batch:
    """Stack what could be read, list what could not."""
    good = [(row, views) for row, views in items if not isinstance(views, BadFile)]
    bad = [(row, found) for row, found in items if isinstance(found, BadFile)]
    images = torch.stack([views for _, views in good]) if good else torch.empty(0, dtype=torch.uint8)
    return Batch(images, torch.tensor([row for row, _ in good], dtype=torch.long), bad)


AT_ONCE = 4
"""Batches that threads decode before they are computed with."""


def load(dataset: Views, *, batch_size: int, workers: int | None, pin_memory: bool = False) -> Generator[Batch]:
    """Batches in the order of the paths; the same batches for any number of workers.

    By processes while the network computes elsewhere, or with ``workers=0`` one by one in between.

    Raises:
        InputLost: Images lie elsewhere and do not come.
    """
    count = default_workers(len(dataset)) if workers is None else workers
    loader: Iterable[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=count,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if count else None,
    )
    for batch in loader:
        refuse_lost(file for _, file in batch.bad)
        yield batch


def load_in_turns(dataset: Views, *, batch_size: int) -> Generator[Batch]:
    """The same batches, decoded by threads that rest while the network computes on the same cores.

    Where both compute at once, a layer's threads wait for each other whenever one of them has lost its core to a
    decoder. Decoding holds Python's lock for a small part of its time, so that two threads nearly double its rate; and
    nothing has to be started or copied.
    """
    pool = ThreadPoolExecutor(min(cores(), 8))
    try:
        for first in range(0, len(dataset), AT_ONCE * batch_size):
            rows = range(first, min(first + AT_ONCE * batch_size, len(dataset)))
            items = list(pool.map(dataset.__getitem__, rows))
            for start in range(0, len(items), batch_size):
                batch = collate(items[start : start + batch_size])
                refuse_lost(file for _, file in batch.bad)
                yield batch
    finally:
        pool.shutdown(cancel_futures=True)


class _Readable(Dataset):
    """For each image whether it can be decoded."""

    def __init__(self, root: Folder, paths: Sequence[str], min_side: int) -> None:
        self.root, self.paths, self.min_side = root, paths, min_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> BadFile | None:
        try:
            decode(self.root / self.paths[row], min_side=self.min_side)
        except (UnreadableImage, InputLost) as error:
            return bad_file(self.paths[row], error)
        return None


def unreadable_files(
    root: Folder,
    paths: Sequence[str],
    min_side: int,
    *,
    workers: int | None = None,
    progress: Progress = silent,
) -> list[BadFile]:
    """The files that cannot be decoded, before a training run starts that would stumble over them.

    Several processes read a part each, and all know of all.
    """
    part = processes.share(paths)
    count, bad, done = default_workers(len(part)) if workers is None else workers, [], 0
    loader = DataLoader(_Readable(root, part, min_side), batch_size=32, num_workers=count, collate_fn=list)
    for found in loader:
        unread = [file for file in found if file is not None]
        refuse_lost(unread)
        bad += unread
        done += len(found)
        progress("reading", done, len(part))
    return [file for files in processes.gathered(bad) for file in files]


def default_workers(images: int) -> int:
    """Decoding processes that pay for their start: none for a handful of images, at most one a core, at most 8.

    A spawned process (Windows, macOS) imports torch anew, which takes seconds; a forked one starts at once.
    """
    forked = multiprocessing.get_start_method() == "fork"
    if images < (64 if forked else 4000):
        return 0
    return min(cores(), 8)


def cores() -> int:
    """Cores that this process may use, of those that it shares with the others of its job."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // processes.count_here())


def refuse_bad_files(bad: Sequence[BadFile], images: int, root: Folder, on_error: str) -> None:
    """Raise where unreadable files are not to be skipped (``on_error="fail"``), or where nothing else is left.

    Raises:
        TlkitError: Each file is named with its reason.
    """
    if not bad or (on_error == "skip" and len(bad) < images):
        return
    details = [f"{file.path}: {file.reason}" for file in bad]
    first = f"{bad[0].path}: {bad[0].reason}"
    count = f"{len(bad)} of {images} images cannot be read ({first if len(bad) == 1 else f'first {first}'})"
    remedy = "remove or mend them, or leave them out with --on-error skip" if len(bad) < images else "check the files"
    raise TlkitError(count, where=root, remedy=remedy, details=details if len(bad) > 1 else [])
