"""A bottleneck: a layer between a network's pooled features and its classifier, small enough to learn from few images.

Adaptation methods compare the distributions of what the classifier sees. Of a frozen backbone these are fixed; of a
bottleneck they can be learnt (Long et al. 2015, arXiv:1502.02791, section 4.1; Ganin et al. 2016).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from torch import Tensor, nn

from tlkit.errors import TlkitError
from tlkit.networks.stages import BOTTLENECK, classifier_modules


def add_bottleneck(network: Any, width: int) -> None:
    """Put a linear layer, batch norm and ReLU in front of the classifier, which is made anew.

    The features that `forward_head` gives before the logits are then those of the bottleneck (B, ``width``). All else
    of the network's surface stays as it was.

    Args:
        network: A timm network whose classifier is one linear layer of pooled features.
        width: Numbers that it puts out.

    Raises:
        TlkitError: The network has another kind of classifier.
    """
    names = classifier_modules(network)
    if len(names) != 1 or not isinstance(network.get_submodule(names[0]), nn.Linear | nn.Conv2d):
        what = "its classifier is not one linear layer, in front of which a bottleneck could stand"
        raise TlkitError(what, where="--bottleneck", remedy="give --bottleneck 0, or choose another network")
    like = next(network.parameters())
    place = {"device": like.device, "dtype": like.dtype}
    linear = nn.Linear(network.head_hidden_size, width, **place)
    network.add_module(BOTTLENECK, nn.Sequential(linear, nn.BatchNorm1d(width, **place), nn.ReLU()))
    network.__class__ = _with_bottleneck(type(network))  # type: ignore[arg-type]
    network.classifier_name, network.head_hidden_size = names[0], width
    network.reset_classifier(network.num_classes)


def bottleneck_width(network: nn.Module) -> int:
    """Numbers that the network's bottleneck puts out; 0 where it has none."""
    return network.head_hidden_size if hasattr(network, BOTTLENECK) else 0  # type: ignore[return-value]


def without_bottleneck(network: nn.Module) -> nn.Module:
    """A copy of the network as it was before `add_bottleneck`, with a new classifier; itself where it has none."""
    if not bottleneck_width(network):
        return network
    plain: Any = copy.deepcopy(network)
    plain.head_hidden_size = getattr(plain, BOTTLENECK)[0].in_features
    delattr(plain, BOTTLENECK)
    plain.__class__ = type(network).__mro__[1]
    plain.__dict__.pop("_tlkit_takes_a_head", None)
    plain.reset_classifier(network.num_classes)
    return plain


@cache
def _with_bottleneck(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a network with a bottleneck: a subclass of its own class, so that it remains a ResNet, say."""

    def forward_head(self: Any, maps: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = kind.forward_head(self, maps, pre_logits=True)  # type: ignore[attr-defined]
        features: Tensor = getattr(self, BOTTLENECK)(pooled)
        return features if pre_logits else self.get_submodule(self.classifier_name)(features)

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError("the pooling in front of a bottleneck cannot be changed")
        outer, _, name = self.classifier_name.rpartition(".")
        like = next(getattr(self, BOTTLENECK).parameters())
        place = {"device": like.device, "dtype": like.dtype}
        head = nn.Linear(self.head_hidden_size, num_classes, **place) if num_classes else nn.Identity()
        setattr(self.get_submodule(outer), name, head)
        self.num_classes = num_classes

    changed = {"forward_head": forward_head, "reset_classifier": reset_classifier}
    return type(f"{kind.__name__}WithBottleneck", (kind,), changed)
