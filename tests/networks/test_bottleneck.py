"""A bottleneck in front of the classifier: the network's surface stays, and what is stored is built again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import ResNet

from tlkit.errors import TlkitError
from tlkit.networks import variants
from tlkit.networks.bottleneck import add_bottleneck, bottleneck_width, without_bottleneck
from tlkit.networks.build import build, save_network
from tlkit.networks.forward import pooled_features, splits_at_head, takes_a_head
from tlkit.networks.stages import stages

MODELS = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "lenet")


def with_bottleneck(name: str, width: int = 12) -> Any:
    torch.manual_seed(0)
    loaded = build(name, "random")
    loaded.network.reset_classifier(5)  # type: ignore[operator]
    variants.become(loaded.network, variants.Design(loaded.name, loaded.stem, loaded.norm, width))
    loaded.network.eval()
    return replace(loaded, classes=tuple("abcde"))


def images(loaded: Any) -> torch.Tensor:
    size = loaded.preprocessing.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_sees_what_the_bottleneck_puts_out(name: str) -> None:
    loaded = with_bottleneck(name)
    network, given = loaded.network, images(loaded)
    with torch.no_grad():
        features = pooled_features(network, given)
        assert features.shape == (2, 12)
        assert (features >= 0).all()
        assert torch.allclose(network.get_classifier()(features), network(given), atol=1e-5)
    assert splits_at_head(network, given)
    assert takes_a_head(network, given)
    assert bottleneck_width(network) == network.head_hidden_size == 12


@pytest.mark.parametrize("name", MODELS)
def test_a_stored_network_is_the_same(name: str, tmp_path: Path) -> None:
    loaded = with_bottleneck(name)
    save_network(tmp_path, loaded)
    again = build(str(tmp_path), "default")
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        wanted = loaded.network(images(loaded))
        assert torch.equal(again.network(images(loaded)), wanted)
        assert torch.equal(plain(images(loaded)), wanted)
    assert again.title == f"{name} (bottleneck of 12)"
    assert again.classes == tuple("abcde")


@pytest.mark.parametrize("name", MODELS)
def test_it_belongs_to_the_head(name: str) -> None:
    loaded = with_bottleneck(name)
    parts = stages(loaded.network)
    assert parts[-1].name == "head"
    inside = [part for part in parts for parameter in part.parameters if parameter.startswith("bottleneck")]
    assert {part.name for part in inside} == {"head"}
    before = {part.name: part.parameters for part in stages(without_bottleneck(loaded.network))[:-1]}
    assert {part.name: part.parameters for part in parts[:-1]} == before


def test_another_number_of_classes_leaves_it() -> None:
    network = with_bottleneck("test_resnet").network
    kept = network.bottleneck[0].weight.clone()
    network.reset_classifier(3)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert torch.equal(network.bottleneck[0].weight, kept)
    network.reset_classifier(0)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 12)


def test_it_stays_what_it_was() -> None:
    network = with_bottleneck("test_resnet").network
    assert isinstance(network, ResNet)
    plain = without_bottleneck(network)
    assert type(plain) is ResNet
    given = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.forward_features(given), network.forward_features(given))  # type: ignore[operator]
    assert plain(given).shape == (2, 5)
    assert bottleneck_width(network) == 12
    assert without_bottleneck(plain) is plain


def test_a_classifier_of_another_kind_is_refused() -> None:
    network = timm.create_model("deit_tiny_distilled_patch16_224")
    with pytest.raises(TlkitError, match="give --bottleneck 0"):
        add_bottleneck(network, 8)
