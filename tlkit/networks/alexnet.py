"""AlexNet in its three forms, and LeNet: convolutions with pooling between, then fully connected layers.

timm has neither; they are registered with it, so that they are built, cut, stored and loaded like its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["AlexNet"]


class Convolution(NamedTuple):
    """A convolution, its activation, and max pooling after it.

    Args:
        channels: Of its output.
        kernel: Side of its filters.
        stride: Of its filters.
        padding: Zeros on each side.
        groups: Parts of the channels that do not see each other.
        pool: Side of the windows of pooling with stride 2; 0 for none.
        local_norm: Whether local response normalisation follows the activation.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    pool: int = 0
    local_norm: bool = False


class AlexNet(nn.Module):
    """Convolutions with pooling between, then fully connected layers.

    Args:
        convolutions: What the features are made of.
        hidden: Widths of the fully connected layers before the classifier, which are numbered on from the convolutions.
        grid: Side of the last feature map; from images of another size it is pooled to that.
        dropout: Which fully connected layers dropout stands before, by number.
        num_classes: Outputs; 0 for no classifier.
        in_chans: Channels of the images.
        drop_rate: Share of numbers that dropout sets to zero.
        norm_layer: Made with the number of channels, after each convolution; None for no normalisation.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        convolutions: Sequence[Convolution],
        hidden: Sequence[int],
        grid: int,
        dropout: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        norm_layer: type[nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        self._ends: list[int] = []  # of the feature maps, as places in self.features

        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, stride = in_chans, 1
        for number, conv in enumerate(convolutions, start=1):
            layers[f"conv{number}"] = nn.Conv2d(
                channels, conv.channels, conv.kernel, conv.stride, conv.padding, groups=conv.groups, **place
            )
            if norm_layer is not None:
                layers[f"norm{number}"] = norm_layer(conv.channels, **place)
            layers[f"act{number}"] = nn.ReLU(inplace=True)
            if conv.local_norm:
                # section 3.3: k = 2, n = 5, alpha = 1e-4, beta = 0.75; torch divides alpha by n, the paper does not
                layers[f"lrn{number}"] = nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)
            if conv.pool:
                layers[f"pool{number}"] = nn.MaxPool2d(conv.pool, 2)
            channels, stride = conv.channels, stride * conv.stride * (2 if conv.pool else 1)
            self.feature_info.append(
                {"num_chs": channels, "reduction": stride, "module": f"features.{next(reversed(layers))}"}
            )
            self._ends.append(len(layers) - 1)
        self.features = nn.Sequential(layers)

        full: OrderedDict[str, nn.Module] = OrderedDict()
        full["pool"], full["flatten"] = nn.AdaptiveAvgPool2d(grid), nn.Flatten()
        width = channels * grid**2
        for number, outputs in enumerate(hidden, start=len(convolutions) + 1):
            if number in dropout:
                full[f"drop{number}"] = nn.Dropout(drop_rate)
            full[f"fc{number}"], full[f"act{number}"] = nn.Linear(width, outputs, **place), nn.ReLU(inplace=True)
            width = outputs
        self.pre_logits = nn.Sequential(full)
        last = len(convolutions) + len(hidden) + 1
        self.head_drop = nn.Dropout(drop_rate) if last in dropout else nn.Identity()
        self.num_features, self.head_hidden_size = channels, width
        self.head = nn.Linear(width, num_classes, **place) if num_classes else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, for timm's layer-wise learning rates."""
        return {"stem": r"^features\.\w+1\.", "blocks": [(r"^features\.\D+(\d+)\.", None), (r"^pre_logits", (99,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the features again in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; ``global_pool`` has nothing to choose from here."""
        self.num_classes = num_classes
        place = get_device_dtype(self)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **place) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps (B, C, H, W) after each convolution's pooling, where it has one.

        Args:
            x: Images (B, C, H, W).
            indices: Which, all by default; a number means the last ones.
            norm: There is no last normalisation: without effect, as in timm's VGG.
            stop_early: Compute no further than the last of them.
            output_fmt: ``NCHW`` alone.
            intermediates_only: Return the list alone, instead of the features and the list.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self._ends), indices)
        found = []
        for place, layer in enumerate(self.features[: self._ends[last] + 1] if stop_early else self.features):
            x = layer(x)
            if place in self._ends and self._ends.index(place) in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what these feature maps do not need, and return their numbers."""
        wanted, last = feature_take_indices(len(self._ends), indices)
        self.features = self.features[: self._ends[last] + 1]
        if prune_head or last < len(self._ends) - 1:  # the head is made for the last map
            self.pre_logits = nn.Sequential()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0)
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last feature map."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            # convolution by convolution: an activation in place must not change what is kept
            parts = [self.features[start + 1 : end + 1] for start, end in pairwise((-1, *self._ends))]
            return checkpoint_seq(parts, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits (B, K), or to what the classifier sees, (B, D)."""
        x = self.head_drop(self.pre_logits(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(x))


def from_torchvision(state: Mapping[str, Tensor], network: AlexNet) -> Mapping[str, Tensor]:
    """Weights of torchvision's ``alexnet`` under our names; others as they are."""
    if "classifier.6.weight" not in state:
        return state
    convolutions = dict(zip(("0", "3", "6", "8", "10"), range(1, 6), strict=True))
    names = {f"features.{place}": f"features.conv{number}" for place, number in convolutions.items()}
    names |= {"classifier.1": "pre_logits.fc6", "classifier.4": "pre_logits.fc7", "classifier.6": "head"}
    split = {name: name.rpartition(".") for name in state}
    return {f"{names.get(split[name][0], split[name][0])}.{split[name][2]}": tensor for name, tensor in state.items()}


def _config(side: int, **changed: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (6, 6),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "features.conv1",
        "classifier": "head",
        "license": "bsd-3-clause",
        **changed,
    }


_half = (0.5, 0.5, 0.5)
default_cfgs = generate_default_cfgs(
    {
        "alexnet": _config(227, crop_pct=227 / 256),
        "alexnet_2gpu": _config(227, crop_pct=227 / 256),
        "alexnet_torchvision.tv_in1k": _config(224, url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
        "lenet": _config(28, num_classes=10, pool_size=(4, 4), crop_pct=1.0, mean=_half, std=_half),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], given: dict[str, Any]) -> AlexNet:
    features = {"flatten_sequential": True, "out_indices": tuple(range(len(defaults["convolutions"])))}
    network: AlexNet = build_model_with_cfg(
        AlexNet,
        variant,
        pretrained,
        feature_cfg=features,
        pretrained_filter_fn=from_torchvision,
        **{**defaults, **given},
    )
    return network


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """AlexNet (Krizhevsky et al., 2012) in one tower, without local response normalisation: 62,378,344 parameters."""
    convolutions = (
        Convolution(96, 11, stride=4, pool=3),
        Convolution(256, 5, padding=2, pool=3),
        Convolution(384, 3, padding=1),
        Convolution(384, 3, padding=1),
        Convolution(256, 3, padding=1, pool=3),
    )
    sizes = {"convolutions": convolutions, "hidden": (4096, 4096), "grid": 6, "dropout": (7, 8)}
    return _create("alexnet", pretrained, sizes, kwargs)


@register_model
def alexnet_2gpu(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """AlexNet as published (Krizhevsky et al., 2012, section 3): two towers, which see each other in the third
    convolution and in the fully connected layers, and local response normalisation: 60,965,224 parameters."""
    convolutions = (
        Convolution(96, 11, stride=4, pool=3, local_norm=True),
        Convolution(256, 5, padding=2, groups=2, pool=3, local_norm=True),
        Convolution(384, 3, padding=1),
        Convolution(384, 3, padding=1, groups=2),
        Convolution(256, 3, padding=1, groups=2, pool=3),
    )
    sizes = {"convolutions": convolutions, "hidden": (4096, 4096), "grid": 6, "dropout": (7, 8)}
    return _create("alexnet_2gpu", pretrained, sizes, kwargs)


@register_model
def alexnet_torchvision(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """AlexNet as torchvision has it, of which there are public weights (Krizhevsky 2014, arXiv:1404.5997, one tower):
    61,100,840 parameters."""
    convolutions = (
        Convolution(64, 11, stride=4, padding=2, pool=3),
        Convolution(192, 5, padding=2, pool=3),
        Convolution(384, 3, padding=1),
        Convolution(256, 3, padding=1),
        Convolution(256, 3, padding=1, pool=3),
    )
    sizes = {"convolutions": convolutions, "hidden": (4096, 4096), "grid": 6, "dropout": (6, 7)}
    return _create("alexnet_torchvision", pretrained, sizes, kwargs)


@register_model
def lenet(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """LeNet with batch norm after each convolution, for images of 28 px (LeCun et al., 1998).

    The widths are those of Caffe's example, which work on adapting between digits uses (Long et al., 2015).
    """
    sizes: dict[str, Any] = {
        "convolutions": (Convolution(20, 5, pool=2), Convolution(50, 5, pool=2)),
        "hidden": (500,),
        "grid": 4,
        "dropout": (4,),
    }
    return _create("lenet", pretrained, {**sizes, "num_classes": 10, "norm_layer": nn.BatchNorm2d}, kwargs)
