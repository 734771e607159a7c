"""Variants of timm's networks: the stem for small images.

Importing this file makes `tlkit_variant` known to timm, so that a stored variant is built again by its ``config.json``.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import load_pretrained, register_model
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from torch import nn

NAME = "tlkit_variant"
"""The architecture in the ``config.json`` of a variant; the network that it is made from is in its ``model_args``."""

SMALL_SIDE = 32  # of CIFAR's images, for which both papers describe the stem


def tlkit_variant(base: str, stem: str = "small", pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm network with another stem. To be called by `timm.create_model`, whose own arguments are passed on.

    Args:
        base: A timm name, of a family for which `has_small_stem` is true.
        stem: ``small``: a 3 x 3 convolution of stride 1 and no pooling, so that all feature maps have sides four times
            as long (ResNet: He et al., 2016, section 4.2; DenseNet: Huang et al., 2017, section 3), for inputs of
            32 px of which nothing is cut away. ``standard``: the network's own.
        pretrained: Load weights of the same variant, from where timm's configuration says.
        **kwargs: As for ``base``: ``num_classes``, ``in_chans``, ``drop_rate`` ...

    Raises:
        ValueError: The family has no small stem, or ``stem`` is neither of the two.
    """
    network = timm.create_model(base, **kwargs)
    config = network.pretrained_cfg
    changed: dict[str, Any] = {}
    if stem == "small":
        changed["first_conv"] = _shrink_stem(network)
        network._traits = {**network._traits, **changed}
        changed |= dict.fromkeys(("pool_size", "test_pool_size", "test_input_size", "test_crop_pct", "min_input_size"))
        changed |= {"input_size": (config["input_size"][0], SMALL_SIDE, SMALL_SIDE), "crop_pct": 1.0}
    elif stem != "standard":
        raise ValueError(f"no stem '{stem}'")
    if not kwargs.get("pretrained_cfg"):  # else it is that of a stored variant, not the base's
        public_weights = dict.fromkeys(("url", "hf_hub_id", "hf_hub_filename", "tag"))
        config |= public_weights | changed | (kwargs.get("pretrained_cfg_overlay") or {})
    config["architecture"] = NAME
    if pretrained:
        cache = kwargs.get("cache_dir")
        load_pretrained(network, num_classes=network.num_classes, in_chans=network.in_chans, cache_dir=cache)
    return network


register_model(tlkit_variant)


def has_small_stem(network: nn.Module | str) -> bool:
    """Whether the family of a network, or of a timm name, has a small stem."""
    if isinstance(network, str):
        with torch.device("meta"):  # neither memory nor random numbers are used
            network = timm.create_model(network)
    return isinstance(network, ResNet | DenseNet)


def described_by(stored: dict[str, Any]) -> tuple[str, str]:
    """The timm name, without a tag, and the stem of the network that a ``config.json`` describes."""
    if stored["architecture"] != NAME:
        return stored["architecture"], "standard"
    arguments = stored.get("model_args") or {}
    return str(arguments.get("base")).split(".")[0], str(arguments.get("stem", "small"))


def _shrink_stem(network: Any) -> str:
    """Give a network the small stem.

    Returns:
        Name of its first convolution.
    """
    match network:
        case ResNet():
            network.conv1 = _convolution(network)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
            network.maxpool = nn.Identity()
            first = "conv1"
        case DenseNet():
            layers = network.features
            layers.conv0 = _convolution(network)
            nn.init.kaiming_normal_(layers.conv0.weight)  # as timm's
            names = [name for name, _ in layers.named_children()]
            for name in names[1 : names.index("denseblock1")]:  # each dense layer begins with its own normalisation
                delattr(layers, name)
            first = network.feature_info[0]["module"] = "features.conv0"
            places = {f"features.{name}": place for place, (name, _) in enumerate(layers.named_children())}
            network.feature_ends = [places[entry["module"]] for entry in network.feature_info]
        case _:
            raise ValueError(f"no small stem for {type(network).__name__}")
    for number, entry in enumerate(network.feature_info):
        entry["reduction"] //= 4 if number else 2
    return first


def _convolution(network: Any) -> nn.Conv2d:
    like, channels = next(network.parameters()), network.feature_info[0]["num_chs"]
    place = {"device": like.device, "dtype": like.dtype}
    return nn.Conv2d(network.in_chans, channels, kernel_size=3, padding=1, bias=False, **place)
