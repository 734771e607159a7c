"""Labels that look wrong: a linear head on frozen features, fitted without an image, sees another class in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tlkit.data.splits import folds_of_copies
from tlkit.training.probe import held_out


@dataclass(frozen=True)
class Suspect:
    """An image whose label may be wrong.

    Args:
        row: Which one.
        probability: Of its label, to a head that was fitted without the image and its copies.
        suggested: The class that this head sees.
        suggested_probability: Of that class.
    """

    row: int
    probability: float
    suggested: int
    suggested_probability: float


def label_suspects(
    features: np.ndarray, labels: np.ndarray, copies: np.ndarray, *, seed: int
) -> tuple[list[Suspect], int]:
    """Images that a head fitted without them takes for another class, the least probable label first.

    The ranking by the held-out probability of the given label is the self-confidence of confident learning (Northcutt,
    Jiang and Chuang, 2021, arXiv:1911.00068). Candidates to be looked at, not errors: the head makes mistakes too.

    Args:
        features: Of a frozen network (N, D).
        labels: Class of each image (N).
        copies: For each image the first one that shows the same (N): held out together, for a head that was fitted to
            a copy knows the answer.
        seed: Of the folds.

    Returns:
        The suspects, and how many images were judged: not those whose class has no other image.
    """
    names, labels = np.unique(labels, return_inverse=True)
    parts = folds_of_copies(labels, copies, seed)
    if len(parts) < 2 or len(names) < 2:
        return [], 0
    found = held_out(features, labels, len(names), parts, seed=seed)
    judged = ~np.isnan(found.own)
    rows = np.flatnonzero(judged & (found.best != labels))
    ranked = rows[np.argsort(found.own[rows], kind="stable")]
    suspects = [
        Suspect(int(row), float(found.own[row]), int(names[found.best[row]]), float(found.probability[row]))
        for row in ranked
    ]
    return suspects, int(judged.sum())
