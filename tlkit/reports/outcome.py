"""What was predicted of each image, and which image went into which cell of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tlkit.reports.words import plain, plural

CONFUSIONS_SHOWN = 30


@dataclass(frozen=True)
class Outcome:
    """Predictions by image.

    Args:
        truth: True class (N).
        predicted: Likeliest class (N).
        confidence: Probability of the predicted class (N).
        classes: Number of classes K.
    """

    truth: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    classes: int

    @classmethod
    def of(cls, truth: np.ndarray, probabilities: np.ndarray) -> Outcome:
        """Of true classes (N) and probabilities (N, K)."""
        if not len(truth):  # there may be no class either, whose likeliest could be asked for
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), probabilities.shape[1])
        predicted = probabilities.argmax(1)
        confidence = probabilities[np.arange(len(truth)), predicted]
        return cls(np.asarray(truth, np.int64), predicted, confidence, probabilities.shape[1])

    @property
    def right(self) -> np.ndarray:
        """Whether each image was given its true class (N)."""
        return self.truth == self.predicted

    @property
    def cells(self) -> np.ndarray:
        """Cell of the confusion matrix of each image (N), counted along its rows."""
        return self.truth * self.classes + self.predicted


class Cell(NamedTuple):
    """A cell of the confusion matrix that can be chosen.

    Args:
        truth, predicted: Its classes.
        key: How the page calls it.
        images: How many it holds.
        shade: Square root of its share of the row; 0 where there is no row.
        words: ``3 images of ants taken for bees``.
    """

    truth: int
    predicted: int
    key: str
    images: int
    shade: float
    words: str


def matrix(outcome: Outcome, classes: Sequence[str]) -> list[list[Cell]]:
    """The confusion matrix by row: true classes down, predicted ones across."""
    size = len(classes)
    counts = np.bincount(outcome.cells, minlength=size**2).reshape(size, size)
    # The square root of a cell's share of its row: a single mistake among 100 images is still seen.
    shades = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).round(3).tolist()
    return [
        [_cell(truth, guess, count, shades[truth][guess], classes) for guess, count in enumerate(row)]
        for truth, row in enumerate(counts.tolist())
    ]


def frequent_confusions(outcome: Outcome, classes: Sequence[str]) -> tuple[list[Cell], int]:
    """The most frequent cells that are wrong, and how many different ones there are in all."""
    codes, counts = np.unique(outcome.cells[~outcome.right], return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:CONFUSIONS_SHOWN]
    shown = [_cell(*divmod(int(codes[i]), outcome.classes), int(counts[i]), 0.0, classes) for i in largest]
    return shown, len(counts)


def _cell(truth: int, predicted: int, count: int, shade: float, classes: Sequence[str]) -> Cell:
    images, name = plural(count, "image"), plain(classes[truth])
    what = f"{images} of {name}, rightly" if truth == predicted else f"{images} of {name}"
    words = f"{what} taken for {plain(classes[predicted])}"
    return Cell(truth, predicted, f"{truth}-{predicted}", count, shade, words)
