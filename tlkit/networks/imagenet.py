"""What the outputs of an ImageNet network mean, and how folder names are matched to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from tlkit.errors import TlkitError


def class_names(network: nn.Module) -> tuple[str, ...] | None:
    """WordNet ids of a public network's outputs, in order; None where it was not trained on an ImageNet."""
    listed = (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    if listed:
        return tuple(listed)
    subset = infer_imagenet_subset(network)
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def describe(classes: Sequence[str]) -> tuple[str, ...]:
    """Readable names for WordNet ids (``n01440764`` to ``tench``); any other class keeps its name.

    Two classes of one name (``crane``) get their ids added.
    """
    known = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True) if _are_ids(classes) else {}
    short = [known[name].split(",")[0].strip() if name in known else name for name in classes]
    count = Counter(short)
    return tuple(f"{word} ({name})" if count[word] > 1 else word for word, name in zip(short, classes, strict=True))


def align(folders: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """For each class folder, the index of the network's class of that name; -1 where it has none.

    Names must be the same; for ImageNet classes WordNet ids, or any of their English names in any case, with spaces,
    hyphens or underscores, also do.

    Raises:
        TlkitError: A name means several ImageNet classes.
    """
    index: dict[str, int] = {name: number for number, name in enumerate(classes)}
    words: dict[str, set[int]] = {}
    if _are_ids(classes) and not all(name in index for name in folders):
        descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
        for number, name in enumerate(classes):
            description = descriptions.get(name, "")
            for word in (description, *description.split(",")):
                words.setdefault(_plain(word), set()).add(number)
    found = []
    for name in folders:
        several = words.get(_plain(name), set())
        if name not in index and len(several) > 1:
            ids = ", ".join(classes[number] for number in sorted(several))
            raise TlkitError(f"'{name}' is the name of several classes ({ids})", where=name, remedy="use the WordNet id")
        found.append(index.get(name, next(iter(several), -1)))
    return np.array(found, dtype=np.int64)


def _are_ids(classes: Sequence[str]) -> bool:
    return bool(classes) and all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in classes)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
