"""Files that a network is measured on and was trained on: the same bytes, whatever they are called."""

from __future__ import annotations

from collections.abc import Mapping

from tlkit.data.content import digests, learn_digests
from tlkit.data.folders import Samples
from tlkit.progress import Progress, silent


def shared_files(samples: Samples) -> list[dict[str, str]]:
    """Images of val and test that also stand in train: ``path``, ``split``, and ``train_path`` of each."""
    files = digests(samples.root, samples.paths)
    train = (samples.splits == "train").tolist()
    trained = {
        file: path for file, path, of_train in zip(files, samples.paths, train, strict=True) if of_train and file
    }
    return _among(trained, samples.take(samples.splits != "train"))


def shared_with(trained: Mapping[str, str], samples: Samples, progress: Progress = silent) -> list[dict[str, str]]:
    """Images that a run was trained on: ``path``, ``split``, and ``train_path`` of each.

    Args:
        trained: Path by content digest of the images that the run was trained on.
        samples: Images to be measured on.
        progress: Told how far the hashing is.
    """
    if not trained:
        return []
    learn_digests(samples.root, samples.paths, progress)
    return _among(trained, samples)


def _among(trained: Mapping[str, str], samples: Samples) -> list[dict[str, str]]:
    files = digests(samples.root, samples.paths)  # known by now
    return [
        {"path": path, "split": split, "train_path": trained[file]}
        for path, split, file in zip(samples.paths, samples.splits.tolist(), files, strict=True)
        if file is not None and file in trained
    ]


def in_words(shared: list[dict[str, str]], images: int) -> str:
    """What to say of shared files among so many images to be measured on."""
    first, more = shared[0], f" and {len(shared) - 1} more" if len(shared) > 1 else ""
    return (
        f"{len(shared)} of the {images} images measured on are training images too, byte for byte:"
        f" {first['path']} is {first['train_path']}{more}; figures flatter ('tlkit check-data' lists them all)"
    )
