"""Files that are the same, and pictures that are the same but for size, compression, cropping or a turn.

Whether two pictures are as alike as a copy and its original, or just of one kind, depends on the data: two bicycles on
white are closer than two photos of one beetle. So a pair counts where it is close, and much closer than either picture
is to a crowd of others. The same is done with perceptual hashes and with a network's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from tlkit.data.content import copies

CROWD = 20
"""How many other pictures make a crowd, at most."""
BLOCK = 2048  # pictures compared with all others at once: a few hundred MiB for 100,000 of them
PAIRS = 1000  # pairs that are laid over each other at once
ROUNDING = 1e-5


@dataclass(frozen=True)
class Closeness:
    """Which pairs of unit vectors count as copies, by their cosine distance (1 - cosine similarity).

    Args:
        limit: The largest distance of a pair.
        share: The largest distance of a pair as a share of the distance of either to the last picture of a crowd.
        sure: A distance up to which that share does not matter.
        unrelated: Distance to the crowd where there are too few pictures for one.
    """

    limit: float
    share: float
    sure: float
    unrelated: float


HASHES = Closeness(limit=72 / 128, share=0.6, sure=16 / 128, unrelated=1.0)
"""Of 256-bit hashes: a bit that differs is a distance of 1 / 128, half of them differ between unrelated pictures.
Without the crowd, 12,520 pairs among the 9,298 digits of USPS, which has no copies, would count; with it 47."""
FEATURES = Closeness(limit=0.2, share=0.3, sure=0.0, unrelated=0.5)
ALIKE = 0.98
"""Part of a thumbnail's variance that the other one has to explain once they are laid over each other."""


@dataclass(frozen=True)
class Group:
    """Pictures that are the same.

    Args:
        rows: Which ones, ascending.
        found_by: ``content`` (the same bytes), ``hash`` or ``features``.
    """

    rows: tuple[int, ...]
    found_by: str

    @property
    def exact(self) -> bool:
        return self.found_by == "content"


def find_groups(
    digests: Sequence[str | None],
    hashes: np.ndarray,
    thumbnails: np.ndarray,
    plain: np.ndarray,
    features: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> list[Group]:
    """All groups of pictures that are the same, those of the same bytes first; a near group includes exact copies.

    Args:
        digests: Of the content of each file (N).
        hashes: Perceptual hashes (N, 256), bool.
        thumbnails: 8-bit grey (N, 32, 32).
        plain: Mask (N) of pictures that show nothing: their hashes are chance, so none of them is near another.
        features: Of a network (N, D), where there are any.
        labels: Class of each image (N), by default all of one. To a network, images of a class are close to each other:
            there, a crowd is of half as many as the image's class has, and so not of other classes.
    """
    first = copies(digests)
    rows = np.flatnonzero((first == np.arange(len(first))) & ~plain)
    pairs = close_pairs(np.where(hashes[rows], 1.0, -1.0) / np.sqrt(hashes.shape[1]), HASHES)
    pairs = pairs[alike(thumbnails[rows[pairs[:, 0]]], thumbnails[rows[pairs[:, 1]]]) >= ALIKE]
    by = ["hash"] * len(pairs)
    if features is not None:
        length = np.linalg.norm(features[rows], axis=1, keepdims=True)
        of_class = np.zeros(len(rows), dtype=np.int64) if labels is None else labels[rows]
        crowd = (np.bincount(of_class)[of_class] // 2).clip(2, CROWD) if len(rows) else of_class
        more = close_pairs(features[rows] / np.maximum(length, 1e-12), FEATURES, crowd)
        pairs, by = np.concatenate([pairs, more]), by + ["features"] * len(more)
    members: dict[int, list[int]] = {}
    for row, one in enumerate(first.tolist()):
        members.setdefault(one, []).append(row)
    exact = [Group(tuple(same), "content") for same in members.values() if len(same) > 1]
    near = []
    for joined, found_by in _joined(len(rows), pairs, by):
        near.append(Group(tuple(sorted(row for one in joined for row in members[int(rows[one])])), found_by))
    return exact + sorted(near, key=lambda group: group.rows)


def close_pairs(vectors: np.ndarray, closeness: Closeness, crowd: np.ndarray | None = None) -> np.ndarray:
    """The pairs (P, 2) among unit vectors (N, D) that are close, and much closer than a crowd of others.

    ``crowd`` says of how many others (N), by default of `CROWD`.

    Of each vector only the `CROWD` nearest are looked at: a closer pair than the crowd is among them, and thousands of
    copies of one picture, each a pair with each other one, would fill the memory.
    """
    values = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    count, to_crowd = len(values), np.full(len(values), closeness.unrelated)
    size = np.full(count, CROWD) if crowd is None else crowd
    most, found = min(CROWD, count - 1), [np.empty((0, 3))]
    for start in range(0, count, BLOCK) if count > 1 else ():
        similar = values[start : start + BLOCK] @ values.T
        rows = torch.arange(len(similar))
        similar[rows, rows + start] = -2.0  # itself
        nearest = similar.topk(most)
        place = torch.from_numpy(size[start : start + BLOCK] - 1)
        last = 1 - nearest.values[rows, place.clamp_max(most - 1)].double().numpy()
        to_crowd[start : start + BLOCK] = np.where(place.numpy() < most, last, closeness.unrelated)
        at, rank = torch.nonzero(nearest.values >= 1 - closeness.limit - ROUNDING, as_tuple=True)
        found.append(
            torch.stack([at + start, nearest.indices[at, rank], 1 - nearest.values[at, rank]], 1).double().numpy()
        )
    pairs, distances = np.concatenate(found)[:, :2].astype(np.int64), np.concatenate(found)[:, 2]
    bound = np.maximum(closeness.share * to_crowd[pairs].min(1, initial=closeness.unrelated), closeness.sure)
    return np.unique(np.sort(pairs[distances <= bound + ROUNDING], axis=1), axis=0)


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much of each picture's variance the other one explains, laid over it by shifts and scales (P), in [0, 1].

    Gauss-Newton on a gain, an offset, and a shift and a scale along either axis, as for optical flow (Lucas and Kanade,
    An iterative image registration technique, 1981): what a crop of some per cent does to a thumbnail is undone.

    Args:
        one: 8-bit grey (P, S, S).
        other: Likewise; each is laid over the other, and the better fit counts.
    """
    found = [np.empty(0)]
    for start in range(0, len(one), PAIRS):
        first, second = (_smooth(torch.from_numpy(part[start : start + PAIRS])) for part in (one, other))
        found.append(torch.maximum(_explained(first, second), _explained(second, first)).double().numpy())
    return np.concatenate(found)


def _smooth(grey: Tensor) -> Tensor:
    """8-bit images (P, S, S) in [0, 1] without their finest detail, which moves further than a step can follow."""
    line = torch.tensor([0.25, 0.5, 0.25])
    padded = F.pad(grey[:, None].float() / 255, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, (line[:, None] * line)[None, None])[:, 0]


STEPS = 4
FARTHEST = 0.15  # of half the side: what is moved further is another picture
BORDER = 2  # pixels that may lie outside of the other picture


def _explained(moved: Tensor, still: Tensor) -> Tensor:
    """Best share of the variance of ``still`` (P, S, S) that ``moved`` explains, over some steps of moving it (P)."""
    count, side, _ = moved.shape
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = slice(BORDER, side - BORDER)
    target = still[:, inside, inside].flatten(1)
    target = target - target.mean(1, keepdim=True)
    best, move = torch.zeros(count), torch.zeros(count, 4)  # shift and scale along x, then along y
    for step in range(STEPS + 1):
        across = x * (1 + move[:, 1, None, None]) + move[:, 0, None, None]
        down = y * (1 + move[:, 3, None, None]) + move[:, 2, None, None]
        grid = torch.stack([across, down], dim=-1)
        here = F.grid_sample(moved[:, None], grid, mode="bicubic", padding_mode="border", align_corners=False)[:, 0]
        shown = here[:, inside, inside].flatten(1)
        shown = shown - shown.mean(1, keepdim=True)
        share = (target * shown).sum(1).square() / (target.square().sum(1) * shown.square().sum(1)).clamp_min(1e-9)
        best = torch.maximum(best, share)
        if step < STEPS:
            along_y, along_x = torch.gradient(here, dim=(1, 2))
            columns = torch.stack([here, torch.ones_like(here), along_x, x * along_x, along_y, y * along_y], dim=-1)
            found = _least_squares(columns[:, inside, inside].flatten(1, 2), still[:, inside, inside].flatten(1))
            gain = found[:, :1].clamp(0.5, 2)
            move = (move + (found[:, 2:] * 2 / side / gain).clamp(-0.1, 0.1)).clamp(-FARTHEST, FARTHEST)
    return best


def _least_squares(columns: Tensor, target: Tensor) -> Tensor:
    """Weights (P, C) of columns (P, N, C) that explain a target (P, N); where columns are alike, small ones."""
    size = columns.norm(dim=1, keepdim=True) + 1e-6
    scaled = columns / size
    normal = scaled.transpose(1, 2) @ scaled + 1e-4 * torch.eye(columns.shape[2])
    return torch.linalg.solve(normal, scaled.transpose(1, 2) @ target[..., None])[..., 0] / size[:, 0]


def _joined(count: int, pairs: np.ndarray, by: Sequence[str]) -> list[tuple[list[int], str]]:
    """Pairs joined to groups, each with what found it: the hash where it found any of its pairs."""
    if not len(pairs):
        return []
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    label = connected_components(links, directed=False)[1]
    groups: dict[int, tuple[set[int], set[str]]] = {}
    for (left, right), found_by in zip(pairs.tolist(), by, strict=True):
        rows, ways = groups.setdefault(int(label[left]), (set(), set()))
        rows |= {left, right}
        ways.add(found_by)
    return [(sorted(rows), "hash" if "hash" in ways else "features") for rows, ways in groups.values()]
