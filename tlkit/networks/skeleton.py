"""Networks before any training, of any number of classes and channels; also as skeletons, of shapes without numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tlkit import run_folder
from tlkit.networks import variants
from tlkit.networks.build import Loaded, create, design_of_run, preprocessing_of_run, read_config
from tlkit.networks.names import known_name
from tlkit.preprocessing import Preprocessing


def skeleton(
    model: str,
    image_size: int | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    stem: str = "standard",
    norm: str | None = None,
) -> Loaded:
    """What `untrained` makes, on the meta device, where tensors have no values: in milliseconds and without memory."""
    with torch.device("meta"), _WithoutDrawing():
        return untrained(model, image_size, num_classes=num_classes, in_chans=in_chans, stem=stem, norm=norm)


def untrained(
    model: str,
    image_size: int | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    stem: str = "standard",
    norm: str | None = None,
) -> Loaded:
    """A network as it is before any training, of any number of classes and channels.

    Args:
        model: A timm name (also ``hf-hub:REPOSITORY``), or the folder of a run.
        image_size: In pixels; by default what its weights expect.
        num_classes: Outputs; by default the network's own.
        in_chans: Channels of its images; by default the network's own.
        stem: ``standard`` or ``small`` (`tlkit.networks.variants`); a run has its own.
        norm: Another normalisation than its own.

    Raises:
        TlkitError: Unknown name, or a network that cannot be built so.
    """
    changed = {key: value for key, value in (("num_classes", num_classes), ("in_chans", in_chans)) if value is not None}
    if run_folder.is_run(model):
        stored = read_config(Path(model))
        design = design_of_run(Path(model), stored, stem, norm)
        network = create(f"local-dir:{model}", image_size, changed=changed)
        kept = preprocessing_of_run(stored, network)
    else:
        design = variants.design(known_name(model), stem, norm)
        network = create(design, image_size, changed=changed)
        kept = Preprocessing.from_timm(resolve_model_data_config(network))
    kept = kept.with_overrides(size=image_size)
    variants.refuse_single_numbers(design, kept.size, channels_of(network))
    return Loaded(network.eval(), design.base, kept, None, "random", stem=design.stem, norm=design.norm)


def channels_of(network: nn.Module) -> int:
    """Channels of the images that a network takes."""
    return int(getattr(network, "in_chans", None) or resolve_model_data_config(network)["input_size"][0])


class _WithoutDrawing(TorchFunctionMode):
    """A context in which tensors of the meta device are not initialised, which is most of the time of making them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWING:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


_DRAWING = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.copy_, Tensor.erfinv_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.clamp_),  # of truncated normal distributions
}
