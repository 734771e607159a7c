"""What one look at each image tells without a network: how it is stored, its perceptual hash, how sharp it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
import scipy.fftpack  # noqa: F401 - imagehash would import it in each worker process
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tlkit.data.content import digest
from tlkit.data.decode import Stored, UnreadableImage, decode_stored
from tlkit.data.loading import BadFile, bad_file, default_workers, refuse_lost
from tlkit.errors import InputLost
from tlkit.progress import Progress, silent
from tlkit.shards.folder import Folder

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
        hash: The 256 bits of its perceptual hash, packed.
        thumbnail: The bytes of an 8-bit grey image of 32 x 32 pixels, squashed.
        contrast: Between the darkest and the brightest 0.5 % of what is left at 64 x 64 pixels, in [0, 255].
        sharpness: See `sharpness`, as a share of the contrast.
    """

    stored: Stored
    digest: str | None
    hash: bytes
    thumbnail: bytes
    contrast: int
    sharpness: float


class _Looks(Dataset):
    """Module-level and picklable, so that worker processes may be spawned."""

    def __init__(self, root: Folder, paths: Sequence[str]) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Look | BadFile:
        path = self.root / self.paths[row]
        try:
            grey, stored = decode_stored(path, min_side=SIDE, grey=True)
        except (UnreadableImage, InputLost) as error:
            return bad_file(self.paths[row], error)
        return look(grey, stored, digest(path))


def look_at(
    root: Folder, paths: Sequence[str], *, workers: int | None = None, progress: Progress = silent
) -> list[Look | BadFile]:
    """Decode each image once; what cannot be read is named with its reason."""
    count = default_workers(len(paths)) if workers is None else workers
    found: list[Look | BadFile] = []
    dataset: Any = _Looks(root, paths)
    for batch in DataLoader(dataset, batch_size=32, num_workers=count, collate_fn=list):
        refuse_lost(one for one in batch if isinstance(one, BadFile))
        found += batch
        progress("looking", len(found), len(paths))
    return found


def look(grey: Image.Image, stored: Stored, content: str | None) -> Look:
    """What the luminance of an upright image tells."""
    if (longer := min(grey.size) / SIDE) > 1.5:
        grey = grey.resize([max(1, round(side / longer)) for side in grey.size], Image.Resampling.BOX)
    small = grey.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS, reducing_gap=1.0)
    counts = np.cumsum(small.histogram())
    contrast = int(np.searchsorted(counts, 0.995 * counts[-1]) - np.searchsorted(counts, 0.005 * counts[-1]))
    return Look(
        stored=stored,
        digest=content,
        hash=np.packbits(imagehash.phash(small, HASH_SIDE).hash).tobytes(),
        thumbnail=small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR).tobytes(),
        contrast=contrast,
        sharpness=sharpness(np.asarray(grey)) / max(contrast, 1),
    )


def sharpness(grey: np.ndarray) -> float:
    """How much the most detailed 1 % of an image's pixels (H, W) differ from their neighbours, in grey values.

    The 99th percentile of the absolute Laplacian (4 x pixel - its four neighbours), on every fourth row. As a share of
    the contrast, a blur of two pixels brings it below 0.09 in practically all photos, which are above 0.14 as taken.
    """
    if min(grey.shape) < 3:
        return 255.0
    middle, above, below = (grey[first : len(grey) - 2 + first : 4].astype(np.int16) for first in (1, 0, 2))
    edges = 4 * middle[:, 1:-1] - middle[:, :-2] - middle[:, 2:] - above[:, 1:-1] - below[:, 1:-1]
    counts = np.cumsum(np.bincount(np.abs(edges).ravel()))
    return float(np.searchsorted(counts, 0.99 * counts[-1]))


def hashes(looks: Sequence[Look]) -> np.ndarray:
    """The bits of all perceptual hashes (N, 256), bool."""
    packed = np.frombuffer(b"".join(one.hash for one in looks), dtype=np.uint8)
    return np.unpackbits(packed).reshape(len(looks), HASH_SIDE**2).astype(bool)


def thumbnails(looks: Sequence[Look]) -> np.ndarray:
    """All thumbnails, 8-bit grey (N, 32, 32)."""
    joined = np.frombuffer(b"".join(one.thumbnail for one in looks), dtype=np.uint8)
    return joined.reshape(len(looks), THUMBNAIL_SIDE, THUMBNAIL_SIDE)
