"""A network in two parts: features and classifier."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkit.errors import TlkitError

# Images in one forward pass. On a CPU activations of more than about 16 images fall out of the caches.
BATCH_SIZES = {"cpu": 16, "cuda": 256, "mps": 64}


def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """What the classifier sees: (B, C, H, W) to (B, D), D = ``network.head_hidden_size``."""
    return network.forward_head(network.forward_features(images), pre_logits=True)  # type: ignore[operator]


def classify(network: nn.Module, features: Tensor) -> Tensor:
    """Logits (B, K) in float32 of features (B, D): what the network's own classifier makes of them."""
    logits = []
    with torch.autocast(features.device.type, enabled=False):
        for layer in linear_classifiers(network):
            assert layer.bias is not None  # linear_classifiers returns no other
            logits.append(F.linear(features.float(), layer.weight.flatten(1).float(), layer.bias.float()))
    return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]


def linear_classifiers(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers that make the logits of pooled features; a distilled network has two, whose logits are averaged.

    Raises:
        TlkitError: The classifier is no linear layer (with a bias) of pooled features.
    """
    found = network.get_classifier()  # type: ignore[operator]
    layers = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    for layer in layers:
        linear = isinstance(layer, nn.Linear | nn.Conv2d)  # timm has subclasses of its own
        if not linear or layer.bias is None or layer.weight[0, 0].numel() != 1:
            raise TlkitError(
                f"its classifier is not linear in pooled features ({type(layer).__name__})",
                where=_name(network),
                remedy="choose another network",
            )
    return layers


def set_classifier(network: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give the network a classifier of its own kind with these weights: (K, D) and (K)."""
    if network.num_classes != len(bias):
        network.reset_classifier(len(bias))  # type: ignore[operator]
    network.__dict__.pop("_tlkit_splits_at_head", None)
    with torch.no_grad():
        for layer in linear_classifiers(network):
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(bias)  # type: ignore[union-attr]


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """Pooled features (B, D) in float32 of normalised images (B, C, H, W).

    Raises:
        TlkitError: The network is more than a linear classifier of them.
    """
    if not takes_a_head(network, images):
        raise TlkitError(
            "cannot be cut in front of its classifier", where=_name(network), remedy="choose another network"
        )
    return pooled_features(network, images).float()


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K) in float32 of normalised images (B, C, H, W).

    The classifier is computed in float32 also under autocast: in bf16, logits have only 8 bits, and ties between
    classes are broken by chance.
    """
    if splits_at_head(network, images):
        return classify(network, pooled_features(network, images))
    return network(images).float()


def splits_at_head(network: nn.Module, images: Tensor) -> bool:
    """Whether `classify` of `pooled_features` is the whole network: tried once, on two of ``images``, in float32."""
    known = getattr(network, "_tlkit_splits_at_head", None)
    if known is None:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            known = _splits_at_head(network, images[:2])
        network._tlkit_splits_at_head = known  # type: ignore[assignment]
    return bool(known)


def takes_a_head(network: nn.Module, images: Tensor) -> bool:
    """Whether `set_classifier` makes the network a linear classifier of `pooled_features`: tried with a random one.

    The network's own classifier does not tell. A fresh one may be all zeros, which hides whatever else adds to the
    logits; and the two of a distilled network (DeiT), each of a token of its own, are a function of the tokens' mean,
    which is its pooled features, only once both have the same weights.
    """
    known = getattr(network, "_tlkit_takes_a_head", None)
    if known is None:
        layers = linear_classifiers(network)
        kept = [copy.deepcopy(layer.state_dict()) for layer in layers]
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(layers[0].weight.flatten(1).shape, generator=random) / layers[0].weight.shape[1] ** 0.5
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            set_classifier(network, weight, torch.randn(len(weight), generator=random))
            known = _splits_at_head(network, images[:2])
            for layer, own in zip(layers, kept, strict=True):
                layer.load_state_dict(own)
        network._tlkit_takes_a_head = known  # type: ignore[assignment]
    return bool(known)


def _splits_at_head(network: nn.Module, images: Tensor) -> bool:
    try:
        linear_classifiers(network)
        features = pooled_features(network, images)
    except (TlkitError, TypeError, AttributeError):
        return False  # some networks have other parts and signatures: they are run whole
    return features.ndim == 2 and torch.allclose(classify(network, features), network(images), rtol=1e-3, atol=1e-3)


def _name(network: nn.Module) -> str:
    return (getattr(network, "pretrained_cfg", None) or {}).get("architecture", type(network).__name__)


def channels_last(network: nn.Module) -> nn.Module:
    """The network with its convolutions' weights in the layout that processors are quickest with."""
    if any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return network.to(memory_format=torch.channels_last)
    return network
