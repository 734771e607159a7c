"""What one look at each image tells without a network: how it is stored, its perceptual hash, how sharp it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tlkit.data.content import digest
from tlkit.data.decode import Stored, UnreadableImage, decode_stored
from tlkit.data.loading import BadFile, Progress, default_workers, silent

SIDE = 256
"""Shorter side in pixels at which sharpness is judged: about what a network sees. Smaller images stay small."""
HASH_SIDE = 16  # 256 bits: of 64, as is usual, too many are the same in different pictures of one kind of thing
THUMBNAIL_SIDE = 32


@dataclass(frozen=True)
class Look:
    """What is known of an image that can be read.

    Args:
        stored: Format, mode and size.
        digest: Of the file's content; None where the file has gone meanwhile.
        hash: The 256 bits of its perceptual hash (256), bool.
        thumbnail: 8-bit grey (32, 32), squashed.
        contrast: Between the darkest and the brightest 0.5 % of its pixels, in [0, 255].
        sharpness: See `sharpness`.
    """

    stored: Stored
    digest: str | None
    hash: np.ndarray
    thumbnail: np.ndarray
    contrast: int
    sharpness: float


class _Looks(Dataset):
    """Module-level and picklable, so that worker processes may be spawned."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Look | BadFile:
        path = self.root / self.paths[row]
        try:
            image, stored = decode_stored(path, min_side=SIDE)
        except UnreadableImage as error:
            return BadFile(self.paths[row], str(error))
        return look(image, stored, digest(path))


def look_at(
    root: Path, paths: Sequence[str], *, workers: int | None = None, progress: Progress = silent
) -> list[Look | BadFile]:
    """Decode each image once; what cannot be read is named with its reason."""
    count = default_workers(len(paths)) if workers is None else workers
    found: list[Look | BadFile] = []
    dataset: Any = _Looks(root, paths)
    for batch in DataLoader(dataset, batch_size=32, num_workers=count, collate_fn=list):
        found += batch
        progress("looking", len(found), len(paths))
    return found


def look(image: Image.Image, stored: Stored, content: str | None) -> Look:
    """What an upright RGB image tells."""
    grey = image.convert("L")
    if (longer := min(grey.size) / SIDE) > 1:
        grey = grey.resize([max(1, round(side / longer)) for side in grey.size], Image.Resampling.BOX)
    small = grey.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    contrast = _contrast(grey)
    return Look(
        stored=stored,
        digest=content,
        hash=imagehash.phash(small, HASH_SIDE).hash.ravel(),
        thumbnail=np.asarray(small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)),
        contrast=contrast,
        sharpness=sharpness(grey, contrast),
    )


def sharpness(grey: Image.Image, contrast: int) -> float:
    """How much the most detailed 1 % of an image's pixels differ from their neighbours, as a share of its contrast.

    The 99th percentile of the absolute Laplacian (4 x pixel - its four neighbours): a blur of two pixels brings it
    below 0.09 in practically all photos, which are above 0.14 as taken.
    """
    if min(grey.size) < 3:
        return 1.0
    values = np.asarray(grey, dtype=np.int16)
    middle, above, below = values[1:-1:2], values[:-2:2], values[2::2]  # every other row tells enough
    edges = 4 * middle[:, 1:-1] - middle[:, :-2] - middle[:, 2:] - above[:, 1:-1] - below[:, 1:-1]
    return _percentile(np.bincount(np.abs(edges).ravel()), 0.99) / max(contrast, 1)


def _contrast(grey: Image.Image) -> int:
    counts = grey.histogram()
    return _percentile(counts, 0.995) - _percentile(counts, 0.005)


def _percentile(counts: Sequence[int] | np.ndarray, share: float) -> int:
    """The value that ``share`` of the pixels do not exceed, from how many have each value."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, share * total[-1]))
