"""Variants of timm's networks: the stem for small images, another normalisation, a bottleneck.

Importing this file makes `tlkit_variant` known to timm, so that a stored variant is built again by its ``config.json``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models import load_pretrained, register_model
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from torch import nn

from tlkit.errors import TlkitError
from tlkit.networks.alexnet import AlexNet
from tlkit.networks.bottleneck import add_bottleneck
from tlkit.networks.norms import norm_of, normalised_alone, set_norm

NAME = "tlkit_variant"
"""The architecture in the ``config.json`` of a variant; the network that it is made from is in its ``model_args``."""

SMALL_SIDE = 32  # of CIFAR's images, for which both papers describe the stem


class Design(NamedTuple):
    """What a network is: a timm name, and how it departs from it.

    Args:
        base: The timm name.
        stem: ``standard``, or ``small`` as in `tlkit_variant`.
        norm: ``own``, or another as in `tlkit_variant`.
        bottleneck: Width of the bottleneck in front of the classifier; 0 for none.
    """

    base: str
    stem: str = "standard"
    norm: str = "own"
    bottleneck: int = 0

    @property
    def is_variant(self) -> bool:
        """Whether it departs from timm's."""
        return (self.stem, self.norm, self.bottleneck) != ("standard", "own", 0)


def tlkit_variant(
    base: str, stem: str = "small", norm: str = "own", bottleneck: int = 0, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """A timm network with another stem or another normalisation, or with a bottleneck.

    To be called by `timm.create_model`, whose own arguments are passed on.

    Args:
        base: A timm name, of a family for which `has_small_stem` is true.
        stem: ``small``: a 3 x 3 convolution of stride 1 and no pooling, so that all feature maps have sides four times
            as long (ResNet: He et al., 2016, section 4.2; DenseNet: Huang et al., 2017, section 3), for inputs of
            32 px of which nothing is cut away. ``standard``: the network's own.
        norm: What stands in the place of batch norm, as in `tlkit.networks.norms.set_norm`; in AlexNet and in VGG
            without batch norm, after each convolution. ``own``: as the network has it.
        bottleneck: Width of a bottleneck (`tlkit.networks.bottleneck`); 0 for none.
        pretrained: Load weights of the same variant, from where timm's configuration says.
        **kwargs: As for ``base``: ``num_classes``, ``in_chans``, ``drop_rate`` ...

    Raises:
        ValueError: The family has no small stem, or ``stem`` is neither of the two.
    """
    between = {"norm_layer": nn.BatchNorm2d} if norm not in ("own", "none") and _takes_norm(base) else {}
    network = timm.create_model(base, **between, **kwargs)
    if between:
        network._model_args.pop("norm_layer", None)  # a class, which no config.json can hold; our own arguments say it
    config = network.pretrained_cfg
    changed: dict[str, Any] = {}
    if stem == "small":
        changed["first_conv"] = _shrink_stem(network)
        network._traits = {**network._traits, **changed}
        changed |= dict.fromkeys(("pool_size", "test_pool_size", "test_input_size", "test_crop_pct", "min_input_size"))
        changed |= {"input_size": (config["input_size"][0], SMALL_SIDE, SMALL_SIDE), "crop_pct": 1.0}
    elif stem != "standard":
        raise ValueError(f"no stem '{stem}'")
    if norm != "own":
        set_norm(network, norm)
    if bottleneck:
        add_bottleneck(network, bottleneck)
    if not kwargs.get("pretrained_cfg"):  # else it is that of a stored variant, not the base's
        public_weights = dict.fromkeys(("url", "hf_hub_id", "hf_hub_filename", "tag"))
        config |= public_weights | changed | (kwargs.get("pretrained_cfg_overlay") or {})
    config["architecture"] = NAME
    if pretrained:
        cache = kwargs.get("cache_dir")
        load_pretrained(network, num_classes=network.num_classes, in_chans=network.in_chans, cache_dir=cache)
    return network


register_model(tlkit_variant)


def become(network: Any, made: Design) -> None:
    """Give a network that was built without it the bottleneck of a design, and say so in its own configuration.

    Args:
        network: As timm built it.
        made: What it is to be.

    Raises:
        TlkitError: It has no place for a bottleneck.
    """
    add_bottleneck(network, made.bottleneck)
    network._model_args = {**network._model_args, **made._asdict()}
    network.pretrained_cfg |= dict.fromkeys(("url", "hf_hub_id", "hf_hub_filename", "tag")) | {"architecture": NAME}


def has_small_stem(network: nn.Module | str) -> bool:
    """Whether the family of a network, or of a timm name, has a small stem."""
    return isinstance(_shape_of(network) if isinstance(network, str) else network, ResNet | DenseNet)


@cache
def _takes_norm(base: str) -> bool:
    """Whether a network has convolutions alone, which a normalisation can be put behind."""
    network = _shape_of(base)
    return isinstance(network, AlexNet | VGG) and norm_of(network) == "none"


def _shape_of(base: str) -> nn.Module:
    with torch.device("meta"):  # neither memory nor random numbers are used
        return timm.create_model(base)


def design(base: str, stem: str = "standard", norm: str | None = None) -> Design:
    """A network that can be built.

    Args:
        base: A timm name.
        stem: ``standard`` or ``small``.
        norm: Another normalisation; None for the network's own.

    Raises:
        TlkitError: There is no small stem for it, or no batch norm that another could stand for.
    """
    if stem == "small" and (base.startswith("hf-hub:") or not has_small_stem(base)):
        remedy = "leave it out, or choose a ResNet, ResNeXt, Wide ResNet or DenseNet by its timm name"
        raise TlkitError(f"{base} has no small stem", where="--stem", remedy=remedy)
    if norm is None:
        return Design(base, stem)
    own = "" if base.startswith("hf-hub:") else norm_of(_shape_of(base))
    if own == norm:
        return Design(base, stem)
    if own != "batch" and not (own == "none" and _takes_norm(base)):
        what = f"{base} cannot be built with {norm} norm: its normalisation is not batch norm of maps"
        remedy = "leave it out, or choose an AlexNet, VGG, ResNet, ResNeXt, DenseNet or lenet by its timm name"
        raise TlkitError(what, where="--norm", remedy=remedy)
    return Design(base, stem, norm)


def refuse_single_numbers(made: Design, image_size: int, in_chans: int = 3) -> None:
    """Raise where a normalisation would see one number at a time, which leaves nothing of it but the shift.

    Raises:
        TlkitError: Names the first such layer.
    """
    if made.norm in ("own", "batch", "none"):
        return
    with torch.device("meta"):
        network = timm.create_model(NAME, base=made.base, stem=made.stem, norm=made.norm, in_chans=in_chans)
        alone = normalised_alone(network, torch.empty(2, in_chans, image_size, image_size))
    if alone:
        what = f"{made.base} at {image_size} px has maps of one number, which {made.norm} norm would erase ({alone[0]})"
        raise TlkitError(what, where="--norm", remedy="give a larger --image-size, or --norm layer")


def described_by(stored: dict[str, Any]) -> Design:
    """The network that a ``config.json`` describes; its name is without a tag."""
    if stored["architecture"] != NAME:
        return Design(stored["architecture"])
    arguments = stored.get("model_args") or {}
    base = str(arguments.get("base")).split(".")[0]
    stem, norm = str(arguments.get("stem", "small")), str(arguments.get("norm", "own"))
    return Design(base, stem, norm, int(arguments.get("bottleneck", 0)))


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
