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
    if listed and len(listed) == network.num_classes:
        return tuple(listed)
    subset = infer_imagenet_subset(network)
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def describe(classes: Sequence[str]) -> tuple[str, ...]:
    """Readable names for WordNet ids (``n01440764`` to ``tench``); any other class keeps its name.

    Two classes of one name (``crane``) get their ids added.
    """
    short = [names[0] for names in _names(classes)]
    count = Counter(map(_plain, short))
    return tuple(
        f"{word} ({name})" if count[_plain(word)] > 1 else word for word, name in zip(short, classes, strict=True)
    )


def align(folders: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """For each class folder, the index of the network's class of that name; -1 where it has none.

    Names must be the same; for ImageNet classes WordNet ids, or any of their English names in any case, with spaces,
    hyphens or underscores, also do. The name that `describe` gives goes before the others.

    Raises:
        TlkitError: A name means several ImageNet classes.
    """
    index = {name: number for number, name in enumerate(classes)}
    first: dict[str, set[int]] = {}
    others: dict[str, set[int]] = {}
    if not all(name in index for name in folders) and _are_ids(classes):
        for number, (names, readable) in enumerate(zip(_names(classes), describe(classes), strict=True)):
            first.setdefault(_plain(readable), set()).add(number)
            for word in (*names, ", ".join(names)):
                others.setdefault(_plain(word), set()).add(number)
    words = others | first
    found: list[int] = []
    for name in folders:
        several = {index[name]} if name in index else words.get(_plain(name), {-1})
        if len(several) > 1:
            what = f"the name of several classes ({', '.join(classes[number] for number in sorted(several))})"
            raise TlkitError(what, where=name, remedy="name the folder by its WordNet id")
        found += several
    return np.array(found, dtype=np.int64)


def _names(classes: Sequence[str]) -> list[list[str]]:
    """The names of each class: those of a WordNet id, the common one first, or what it is called."""
    if not _are_ids(classes):
        return [[name] for name in classes]
    info, names = ImageNetInfo(), []
    for name in classes:
        try:
            names.append(info.label_name_to_description(name).split(", "))
        except KeyError:
            names.append([name])
    return names


def _are_ids(classes: Sequence[str]) -> bool:
    return bool(classes) and all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in classes)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
