"""ImageNet classes: readable names, and folders matched to them by id or by any of their names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo

from tlkit.errors import TlkitError
from tlkit.networks.imagenet import align, class_names, describe

IDS = tuple(ImageNetInfo("imagenet-1k").label_names())
SUBSETS = {
    1000: "imagenet-1k",
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}


def network_of(classes: int, **config: Any) -> Any:
    return SimpleNamespace(num_classes=classes, pretrained_cfg=config)


@pytest.mark.parametrize("count", SUBSETS)
def test_class_names(count: int) -> None:
    names = class_names(network_of(count))
    assert names == tuple(ImageNetInfo(SUBSETS[count]).label_names())
    assert len(set(names)) == count
    assert names[0] == {1000: "n01440764", 21842: "n01440764", 11221: "n00005787", 11821: "n00005787"}.get(
        count, "n00004475"
    )


def test_class_names_of_another_network() -> None:
    assert class_names(network_of(10)) is None
    stored = tuple(f"class {number}" for number in range(1000))
    assert class_names(network_of(1000, label_names=list(stored))) == stored, "what is stored goes before a guess"
    assert class_names(network_of(10, label_names=["a", "b"])) is None, "names of other outputs say nothing"
    with torch.device("meta"):
        assert class_names(timm.create_model("test_resnet")) == IDS
        assert class_names(timm.create_model("test_resnet", num_classes=37)) is None


def test_describe() -> None:
    names = describe(IDS)
    # positions as in every published list of the 1000 classes
    assert [names[index] for index in (0, 1, 207, 281, 285, 850, 999)] == [
        "tench",
        "goldfish",
        "golden retriever",
        "tabby",
        "Egyptian cat",
        "teddy",  # an id that the list of 22k lacks
        "toilet tissue",
    ]
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert (names[638], names[639]) == ("maillot (n03710637)", "maillot (n03710721)")
    assert (names[264], names[474]) == ("Cardigan (n02113186)", "cardigan (n02963159)")
    assert len(set(names)) == 1000


def test_describe_other_classes() -> None:
    names = ("cats, large", "dogs", "n0144076", "crane", "crane")
    assert describe(names) == ("cats, large", "dogs", "n0144076", "crane (crane)", "crane (crane)")
    assert describe(("dogs", "n01440764")) == ("dogs", "n01440764"), "only where all are ids"
    assert describe(("n01440764", "n00000000")) == ("tench", "n00000000")
    assert describe(()) == ()


@pytest.mark.parametrize("count", SUBSETS)
def test_ids_and_readable_names_are_found_again(count: int) -> None:
    classes = ImageNetInfo(SUBSETS[count]).label_names()
    assert np.array_equal(align(classes, classes), np.arange(count))
    shown = describe(classes)
    assert len(set(shown)) == count
    assert np.array_equal(align(shown, classes), np.arange(count))


@pytest.mark.parametrize(
    "folder, index",
    [
        ("n01440764", 0),
        ("tench", 0),
        ("Tench", 0),
        ("TINCA TINCA", 0),
        ("tench, Tinca tinca", 0),
        ("great_white_shark", 2),
        ("great-white-shark", 2),
        ("Great White  Shark", 2),
        ("white shark", 2),
        ("man-eater", 2),
        ("man_eater", 2),
        ("Carcharodon_carcharias", 2),
        ("Egyptian_cat", 285),
        ("jack-o'-lantern", 607),
        ("teddy bear", 850),
        ("ear", 998),
        ("crane (n02012849)", 134),
        ("partridge", 86),  # also another name of the ruffed grouse, 82
        ("missile", 657),  # also of the projectile, 744
        ("n99999999", -1),
        ("dog", -1),
        ("", -1),
        ("tenchh", -1),
    ],
)
def test_align(folder: str, index: int) -> None:
    found = align([folder], IDS)
    assert found.dtype == np.int64
    assert found.tolist() == [index]


@pytest.mark.parametrize(
    "folder, ids",
    [
        ("crane", "n02012849, n03126707"),
        ("Crane", "n02012849, n03126707"),
        ("maillot", "n03710637, n03710721"),
        ("cardigan", "n02113186, n02963159"),
        ("panda", "n02509815, n02510455"),
    ],
)
def test_ambiguous(folder: str, ids: str) -> None:
    with pytest.raises(TlkitError) as caught:
        align(["n01440764", folder], IDS)
    assert str(caught.value) == f"{folder}: the name of several classes ({ids}); name the folder by its WordNet id"


def test_align_many() -> None:
    folders = ["n02012849", "tench", "nothing", "n03126707", "Goldfish"]
    assert align(folders, IDS).tolist() == [134, 0, -1, 517, 1]
    assert align([], IDS).tolist() == []
    assert align(folders, IDS[:1]).tolist() == [-1, 0, -1, -1, -1]


def test_align_other_classes() -> None:
    """Where classes are no ids, only the same name is the same class: case, too, may matter."""
    classes = ["cat", "Cat", "a b", "crane"]
    assert align(["Cat", "cat", "a_b", "A b", "crane", "dog"], classes).tolist() == [1, 0, -1, -1, 3, -1]
    assert align(["tench"], ["n01440764", "cat"]).tolist() == [-1]


def test_published_positions() -> None:
    """Independent of timm: some ids in the order that all public networks share."""
    assert [IDS.index(name) for name in ("n01443537", "n02099601", "n02124075", "n03126707", "n15075141")] == [
        1,
        207,
        285,
        517,
        999,
    ]
