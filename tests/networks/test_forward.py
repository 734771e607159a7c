"""A network cut in front of its classifier, and given another one: the two parts are the whole, whatever its kind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tlkit.errors import TlkitError
from tlkit.networks.forward import (
    channels_last,
    classify,
    features_of,
    linear_classifiers,
    logits_of,
    pooled_features,
    set_classifier,
    splits_at_head,
    takes_a_head,
)

# Name, and side of the images
NETWORKS = {
    "test_resnet": 64,
    "test_vit": 160,
    "test_convnext": 64,
    "test_efficientnet": 64,
    "test_nfnet": 64,  # weight-standardised convolutions
    "test_byobnet": 64,
    "test_mambaout": 64,  # a norm and a hidden layer in the head
    "test_maxvit": 160,
    "mobilenetv3_small_050": 32,  # a layer between pooling and classifier, which is of a class of timm's own
    "tf_efficientnet_lite0": 32,
    "dpn48b": 32,  # a 1 x 1 convolution for a classifier
    "deit_tiny_distilled_patch16_224": 224,  # two classifiers
    "cait_xxs24_224": 224,
    "densenet121": 64,
    "hgnetv2_b0": 64,
    "regnetx_002": 64,
    "ghostnet_050": 64,
}


def made(name: str, **options: Any) -> Any:
    """With every layer's weights random, classifiers too: timm makes some of them zero, which fits anything."""
    torch.manual_seed(0)
    network = timm.create_model(name, **options).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.05)
    return network


def images_for(name: str, count: int = 3) -> torch.Tensor:
    side = NETWORKS[name]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_head_makes_the_network_that_head_on_its_features(name: str) -> None:
    network, images = made(name), images_for(name)
    before = copy.deepcopy(network.state_dict())
    with torch.inference_mode():
        features = features_of(network, images)
    assert features.shape == (3, network.head_hidden_size)
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "trying it leaves no trace"

    random = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(7, features.shape[1], generator=random) * 0.1, torch.randn(7, generator=random)
    set_classifier(network, weight, bias)
    assert network.num_classes == 7
    with torch.inference_mode():
        expected = features.double() @ weight.T.double() + bias.double()
        spread = float(expected.abs().max())
        torch.testing.assert_close(network(images).double(), expected, rtol=1e-4, atol=1e-4 * spread)
        torch.testing.assert_close(logits_of(network, images).double(), expected, rtol=1e-4, atol=1e-4 * spread)
        torch.testing.assert_close(classify(network, features).double(), expected, rtol=1e-4, atol=1e-4 * spread)
    assert splits_at_head(network, images)


@pytest.mark.parametrize("classes", [1000, 2])
def test_nothing_but_the_classifier_changes(classes: int) -> None:
    network = made("deit_tiny_distilled_patch16_224")
    before = copy.deepcopy(network.state_dict())
    set_classifier(network, torch.ones(classes, 192), torch.zeros(classes))
    after = network.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed - {"head.bias", "head_dist.bias"} == {"head.weight", "head_dist.weight"}


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224", "levit_128s", "volo_d1_224"])
def test_logits_are_the_networks_own(name: str) -> None:
    """Cut in two where that is possible, whole where it is not."""
    network = made(name)
    images = images_for(name) if name in NETWORKS else torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(network, images), network(images), rtol=1e-3, atol=1e-3)
    assert splits_at_head(network, images) == (name == "test_resnet")


@pytest.mark.parametrize("name", ["levit_128s", "volo_d1_224"])
def test_a_network_with_another_head_is_refused(name: str) -> None:
    """LeViT has a norm in its classifier, VOLO adds what an auxiliary classifier makes of the patches."""
    with pytest.raises(TlkitError, match=name) as caught, torch.inference_mode():
        features_of(made(name), torch.randn(2, 3, 224, 224))
    assert caught.value.remedy == "choose another network"


def test_a_head_of_zeros_hides_nothing() -> None:
    """VOLO untrained: both of its classifiers are zero, so that any cut would seem to fit."""
    network = timm.create_model("volo_d1_224").eval()
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 1000:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(network.aux_head.weight)
    with torch.inference_mode():
        assert not takes_a_head(network, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize(
    "classifier", [nn.Identity(), nn.Sequential(nn.Linear(96, 5)), nn.Linear(96, 5, bias=False), nn.Conv2d(96, 5, 3)]
)
def test_only_linear_classifiers_count(classifier: nn.Module) -> None:
    network = made("test_resnet")
    network.fc = classifier
    with pytest.raises(TlkitError, match="not linear in pooled features"):
        linear_classifiers(network)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "dpn48b"])
def test_the_classifier_is_computed_in_float32_under_autocast(name: str) -> None:
    """In bf16 logits near 30 come in steps of an eighth: ties between classes would be broken by chance."""
    network, images = made(name), images_for(name)
    weight = torch.randn(50, network.head_hidden_size, generator=torch.Generator().manual_seed(0))
    set_classifier(network, weight, torch.full((50,), 100.0))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = pooled_features(network, images)
        logits = logits_of(network, images)
        assert features_of(network, images).dtype == torch.float32, "what a head is fitted to"
    assert logits.dtype == torch.float32
    expected = features.double().numpy() @ weight.T.double().numpy() + 100
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_channels_last_is_for_convolutions_and_changes_no_number(name: str) -> None:
    network, images = made(name), images_for(name)
    with torch.inference_mode():
        before = network(images)
        after = channels_last(network)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    kernels = [
        module.weight for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size > (1, 1)
    ]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert not any(isinstance(module, nn.Conv2d) for module in channels_last(nn.Linear(2, 2)).modules())
