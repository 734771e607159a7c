"""Labels that look wrong: planted ones are ranked first, copies do not vouch for each other, few images will do."""

from __future__ import annotations

import numpy as np
import pytest

from tlkit.audit.suspects import label_suspects


def clusters(
    counts: list[int], width: int = 8, distance: float = 6.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian features (N, D) around one far off point for each class, their classes (N), and no copies."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = distance * np.linalg.qr(random.standard_normal((max(width, len(counts)), width)))[0][: len(counts)]
    features = centres[labels] + random.standard_normal((len(labels), width))
    return features, labels, np.arange(len(labels))


def flipped(labels: np.ndarray, share: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which that share is another class, and the rows of those, ascending."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(len(labels), round(share * len(labels)), replace=False))
    wrong = labels.copy()
    wrong[rows] = (labels[rows] + random.integers(1, labels.max() + 1, len(rows))) % (labels.max() + 1)
    return wrong, rows


@pytest.mark.parametrize(
    ("counts", "share"), [([60, 60], 0.1), ([60, 60], 0.02), ([20] * 5, 0.1), ([60, 20, 10], 0.05)], ids=str
)
@pytest.mark.parametrize("seed", range(2))
def test_planted_wrong_labels_are_ranked_first(counts: list[int], share: float, seed: int) -> None:
    features, labels, alone = clusters(counts, seed=seed)
    wrong, planted = flipped(labels, share, seed)
    suspects, judged = label_suspects(features, wrong, alone, seed=0)
    assert judged == len(labels)
    assert sorted(one.row for one in suspects[: len(planted)]) == planted.tolist()
    for one in suspects[: len(planted)]:
        assert one.suggested == labels[one.row], "the class that it was"
        assert one.probability < 0.5 < one.suggested_probability <= 1
    probabilities = [one.probability for one in suspects]
    assert probabilities == sorted(probabilities)
    assert len(suspects) < 2 * len(planted) + 3


@pytest.mark.parametrize("seed", range(2))
def test_right_labels_are_not_suspect(seed: int) -> None:
    features, labels, alone = clusters([30, 30, 30], distance=12, seed=seed)
    assert label_suspects(features, labels, alone, seed=seed) == ([], 90)


def test_a_suspect_is_more_probably_another_class() -> None:
    features, labels, alone = clusters([50, 50, 50], distance=1.5)
    suspects, _ = label_suspects(features, labels, alone, seed=0)
    assert len(suspects) > 10, "classes that overlap"
    for one in suspects:
        assert one.suggested != labels[one.row]
        assert 0 <= one.probability <= one.suggested_probability <= 1
        assert one.probability + one.suggested_probability <= 1 + 1e-6


def test_copies_with_the_same_wrong_label_do_not_vouch_for_each_other() -> None:
    """With more features than images a head knows each image that it was fitted to, and so each copy of it."""
    features, labels, alone = clusters([40, 40], width=400, distance=12)
    features, labels = np.concatenate([features, features[:8]]), np.concatenate([labels, labels[:8]])
    labels[:4] = 1
    labels[80:84] = 1  # four images of class 0 twice, both times as class 1
    alone = np.arange(88)
    copies = np.concatenate([np.arange(80), np.arange(8)])
    planted = {0, 1, 2, 3, 80, 81, 82, 83}
    blind, _ = label_suspects(features, labels, alone, seed=0)
    assert len(planted & {one.row for one in blind}) <= 2, "else this tells nothing"
    suspects, judged = label_suspects(features, labels, copies, seed=0)
    assert judged == 88 and {one.row for one in suspects} == planted


def test_copies_of_two_classes_are_both_looked_at() -> None:
    """The same picture in two classes: the wrong one of them is the suspect."""
    features, labels, alone = clusters([30, 30], distance=10)
    features, labels = np.concatenate([features, features[:3]]), np.concatenate([labels, [1, 1, 1]])
    suspects, judged = label_suspects(features, labels, np.concatenate([alone, [0, 1, 2]]), seed=0)
    assert judged == 63 and sorted(one.row for one in suspects) == [60, 61, 62]


# Few images


def test_a_class_of_one_image_is_not_judged() -> None:
    features, labels, alone = clusters([20, 1, 20])
    suspects, judged = label_suspects(features, labels, alone, seed=0)
    assert judged == 40 and 20 not in {one.row for one in suspects}


def test_a_class_whose_images_are_all_copies_is_not_judged() -> None:
    features, labels, alone = clusters([20, 3, 20])
    copies = np.where(labels == 1, 20, alone)
    suspects, judged = label_suspects(features, labels, copies, seed=0)
    assert judged == 40 and not {20, 21, 22} & {one.row for one in suspects}


@pytest.mark.parametrize("counts", [[0], [1], [2], [50], [1, 1]], ids=str)
def test_nothing_to_judge_by(counts: list[int]) -> None:
    features, labels, alone = clusters(counts)
    assert label_suspects(features, labels, alone, seed=0) == ([], 0)


@pytest.mark.parametrize("counts", [[2, 1], [2, 2], [3, 1, 1], [2] * 30], ids=str)
def test_hardly_anything_to_judge_by(counts: list[int]) -> None:
    features, labels, alone = clusters(counts, width=32)
    suspects, judged = label_suspects(features, labels, alone, seed=0)
    assert judged == sum(count for count in counts if count > 1)
    assert all(0 <= one.probability <= one.suggested_probability <= 1 for one in suspects)


def test_all_images_one_picture() -> None:
    features, labels, _ = clusters([5, 5])
    assert label_suspects(features[[0] * 10], labels, np.zeros(10, dtype=np.int64), seed=0) == ([], 0)
    suspects, judged = label_suspects(features[[0] * 10], labels, np.arange(10), seed=0)
    assert judged == 10 and all(one.probability <= 0.5 for one in suspects)


# Labels


def test_labels_with_gaps_are_the_same_labels() -> None:
    """Classes may have no image at all, or none that can be read."""
    features, labels, alone = clusters([30, 30, 30])
    wrong, planted = flipped(labels, 0.1)
    names = np.array([2, 7, 100])
    dense, judged = label_suspects(features, wrong, alone, seed=0)
    sparse, as_many = label_suspects(features, names[wrong], alone, seed=0)
    assert judged == as_many and len(sparse) >= len(planted)
    assert [one.row for one in sparse] == [one.row for one in dense]
    assert [one.suggested for one in sparse] == [int(names[one.suggested]) for one in dense]
    assert [one.probability for one in sparse] == [one.probability for one in dense]


def test_many_classes() -> None:
    features, labels, alone = clusters([4] * 50, width=64, distance=40)
    wrong, planted = flipped(labels, 0.03)
    suspects, judged = label_suspects(features, wrong, alone, seed=0)
    assert judged == 200
    assert sorted(one.row for one in suspects[: len(planted)]) == planted.tolist()


def test_the_same_again_and_other_folds() -> None:
    features, labels, alone = clusters([30, 30], distance=2)
    first, again, other = (label_suspects(features, labels, alone, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
