"""A network ready to use: built by name or from a run, with its weights, preprocessing and class names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import resolve_model_input_args
from timm.models._hub import save_config_for_hf
from torch import nn

from tlkit import __version__, config, run_folder
from tlkit.errors import TlkitError, first_line
from tlkit.networks import imagenet, variants
from tlkit.networks.bottleneck import bottleneck_width
from tlkit.networks.names import known_name
from tlkit.networks.weights import (
    cached_file,
    load_matching,
    names_from_package,
    names_from_torchvision,
    no_weights,
    package_file,
    plain_tensors,
    read_weights,
    require_hub,
)
from tlkit.preprocessing import Preprocessing


@dataclass(frozen=True)
class Loaded:
    """A network and what must go with it.

    Args:
        network: A timm network, in evaluation mode, on the CPU.
        name: Its timm name.
        preprocessing: What its weights expect.
        classes: What its outputs mean; None where nobody knows.
        weights: Where its weights come from, in words.
        remarks: What a person should know about how they were matched.
        stem: The network's own (``standard``), or the one for small images (``small``).
        norm: The network's ``own``, or another (`tlkit.networks.variants`).
    """

    network: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    weights: str
    remarks: list[str] = field(default_factory=list)
    stem: str = "standard"
    norm: str = "own"

    @property
    def title(self) -> str:
        """What to call the network where a person reads it."""
        changes = [f"{self.stem} stem"] * (self.stem != "standard") + [f"{self.norm} norm"] * (self.norm != "own")
        if width := bottleneck_width(self.network):
            changes.append(f"bottleneck of {width}")
        return f"{self.name} ({', '.join(changes)})" if changes else self.name


def build(
    model: str,
    weights: str,
    preprocess: config.Preprocess | None = None,
    stem: str = "standard",
    norm: str | None = None,
) -> Loaded:
    """Build a network.

    Args:
        model: A timm name (also ``hf-hub:REPOSITORY``), or the folder of a run.
        weights: ``default`` (a run's own; else an installed package that carries them, else the hub), ``random`` (call
            `torch.manual_seed` first), a file, or the folder of a run.
        preprocess: What to use instead of the preprocessing that goes with the weights.
        stem: ``small`` is for small images (`tlkit.networks.variants`); a run has its own, whichever is asked for by
            default.
        norm: Another normalisation than the network's own (`tlkit.networks.norms`).

    Raises:
        TlkitError: Unknown name, no weights, weights that do not fit, or a family without such a stem or norm.
    """
    preprocess = preprocess or config.Preprocess()
    if run_folder.is_run(model):
        return _from_run(Path(model), weights, preprocess, stem, norm)
    name, size = known_name(model), preprocess.image_size
    if run_folder.is_run(weights):
        found = architecture(Path(weights))
        if found != name.split(".")[0]:
            raise TlkitError(f"this run holds a {found}, not a {name}", where=weights, remedy=f"give --model {weights}")
        return _from_run(Path(weights), "default", preprocess, stem, norm)
    design = variants.design(name, stem, norm)
    if design.is_variant and weights == "default":
        _refuse_default_weights(design)
    remarks: list[str] = []
    if weights == "default" and (packaged := package_file(name)):
        network = create(design, size)
        remarks += load_matching(network, names_from_package(read_weights(packaged), network), packaged.name)
        source = f"package {packaged.parent.parent.name.replace('_', '-')}"
    elif weights == "default":
        network, source = _from_hub(name, size), "hub"
    elif weights == "random":
        network, source = create(design, size), "random"
    else:
        network, remarks = _from_file(design, size, Path(weights))
        source = weights
    # a head that is new, or that the file did not have, means nothing yet
    classes = None if weights == "random" or remarks else imagenet.class_names(network)
    if classes and source == weights:
        remarks.append(f"the {len(classes)} outputs of {weights} are taken for ImageNet's classes")
    kept = Preprocessing.from_timm(resolve_model_data_config(network))
    kept = overridden(kept, preprocess)
    variants.refuse_single_numbers(design, kept.size)
    return Loaded(_ready(network, size), name, kept, classes, source, remarks, design.stem, design.norm)


def save_network(folder: Path, loaded: Loaded) -> None:
    """Write ``model.safetensors`` and ``config.json``: loadable by timm as ``local-dir:FOLDER``, and by `build`."""
    import safetensors.torch

    network, preprocessing, classes = loaded.network, loaded.preprocessing, list(loaded.classes or ())
    tensors = plain_tensors(network.state_dict())
    with run_folder.atomically(folder / run_folder.WEIGHTS) as part:
        safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})
    ours = {"version": __version__, "preprocessing": preprocessing.to_dict(), "classes": classes}
    with run_folder.atomically(folder / run_folder.CONFIG) as part:
        extra = {"label_names": classes, "tlkit": ours}
        save_config_for_hf(network, str(part), model_config=extra, data_config=preprocessing.to_timm())


def weight_bytes(network: nn.Module) -> int:
    """Bytes that the weights take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def architecture(run: Path) -> str:
    """The timm name of the network in a run.

    Raises:
        TlkitError: The run's configuration is broken.
    """
    return variants.described_by(read_config(run)).base


def read_config(run: Path) -> dict[str, Any]:
    path = run / run_folder.CONFIG
    stored = run_folder.read_json(path)
    if not isinstance(stored.get("architecture"), str) or not isinstance(stored.get("pretrained_cfg"), dict):
        raise TlkitError("does not describe a timm network", where=path, remedy="check that it belongs to a whole run")
    return stored


def _refuse_default_weights(design: variants.Design) -> None:
    option, what = ("--stem", "the small stem") if design.stem == "small" else ("--norm", f"{design.norm} norm")
    why = "" if design.stem == "small" else f": those of {design.base} were trained with its own normalisation"
    remedy = f"give --weights random, a run or a file that has it, or leave out {option}"
    raise TlkitError(f"there are no public weights for {what}{why}", where=option, remedy=remedy)


def design_of_run(run: Path, stored: dict[str, Any], stem: str, norm: str | None) -> variants.Design:
    """The network of a run, which brings its own stem and normalisation.

    Raises:
        TlkitError: Another is asked for.
    """
    design = variants.described_by(stored)
    remedy = "leave out {}, or start from random weights"
    if stem not in ("standard", design.stem):
        what = f"the network of {run} has the {design.stem} stem"
        raise TlkitError(what, where="--stem", remedy=remedy.format("--stem"))
    if norm not in (None, design.norm) and variants.design(design.base, design.stem, norm).norm != design.norm:
        has = "its own normalisation" if design.norm == "own" else f"{design.norm} norm"
        what = f"the network of {run} was trained with {has}"
        raise TlkitError(what, where="--norm", remedy=remedy.format("--norm"))
    return design


def preprocessing_of_run(stored: dict[str, Any], network: nn.Module) -> Preprocessing:
    ours = stored.get("tlkit") or {}
    if "preprocessing" in ours:
        return Preprocessing.from_dict(ours["preprocessing"])
    return Preprocessing.from_timm(resolve_model_data_config(network))  # a folder that timm wrote


def _from_run(run: Path, weights: str, preprocess: config.Preprocess, stem: str, norm: str | None) -> Loaded:
    if weights not in ("default", "random", str(run)):
        raise TlkitError(
            "a run brings its own weights", where="--weights", remedy="leave it out, or give --model a name"
        )
    stored = read_config(run)
    design = design_of_run(run, stored, stem, norm)
    own = weights != "random"
    try:
        network = create(f"local-dir:{run}", preprocess.image_size, weights={} if own else None)
    except TlkitError:
        raise
    except Exception as error:  # timm, torch and safetensors each raise errors of their own for a broken folder
        what = f"the run's network cannot be loaded ({first_line(error)})"
        raise TlkitError(what, where=run, remedy="check that it is whole") from error
    kept = preprocessing_of_run(stored, network)
    classes = tuple(stored.get("label_names") or ()) or None
    network = _ready(network, preprocess.image_size)
    source = f"run {run}" if own else "random"
    kept = overridden(kept, preprocess)
    return Loaded(network, design.base, kept, classes, source, stem=design.stem, norm=design.norm)


def _from_hub(name: str, image_size: int | None) -> nn.Module:
    file = cached_file(name)
    if file is None:
        require_hub(name)
    # a file that is there is loaded as the hub's client would, but without a network
    weights = {"file": str(file)} if file and not name.startswith("hf-hub:") else {}
    try:
        return create(name, image_size, weights=weights)
    except TlkitError:
        raise
    except Exception as error:  # the hub's client has a whole family of errors, and changes it
        if weights:
            what = f"the downloaded weights cannot be loaded ({first_line(error)})"
            raise TlkitError(what, where=file, remedy="remove this file, so that it is downloaded again") from error
        raise no_weights(name, error) from error


def _from_file(design: variants.Design, image_size: int | None, file: Path) -> tuple[nn.Module, list[str]]:
    network = create(design, image_size)
    state = names_from_torchvision(read_weights(file), network)
    try:
        return network, load_matching(network, state, str(file))
    except TlkitError:
        if image_size is None or design.is_variant:
            raise
    network = create(design, None)
    remarks = load_matching(network, state, str(file))  # they are for the network's own size: timm interpolates them
    weights = {"state_dict": network.state_dict(), "num_classes": network.num_classes, "label_offset": None}
    network = create(design, image_size, weights=weights)
    del network.pretrained_cfg["state_dict"]  # type: ignore[operator, union-attr]
    return network, remarks


def create(
    model: str | variants.Design,
    image_size: int | None,
    *,
    weights: dict[str, Any] | None = None,
    changed: Mapping[str, int] | None = None,
) -> nn.Module:
    """A network by timm's name; one of a fixed input size is made for ``image_size``.

    Args:
        model: What to build, or a name: also ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY``.
        image_size: In pixels; by default the network's own.
        weights: Where timm is to find weights other than where it usually does; None for random ones.
        changed: ``num_classes`` or ``in_chans``, where they are not to be the network's own.
    """
    design = model if isinstance(model, variants.Design) else variants.Design(model)
    name = design.base
    try:
        if design.is_variant:  # of a family that takes images of any size
            return timm.create_model(variants.NAME, **design._asdict(), **changed or {})
        given = resolve_model_input_args(name, {"img_size": image_size}, pretrained_cfg_overlay=weights)
        network = timm.create_model(**given, pretrained=weights is not None, **changed or {})
    except TypeError as error:
        if not changed:
            raise
        options = " and ".join(config.option_name(key) for key in changed)
        what = f"cannot be built with other {options} ({first_line(error)})"
        raise TlkitError(what, where=name, remedy=f"leave out {options}") from error
    except (AssertionError, ValueError) as error:
        what = f"cannot be built ({first_line(error)})"
        raise TlkitError(what, where=name, remedy="try another --image-size") from error
    except RuntimeError as error:
        if image_size is None or weights is None:
            raise
        what = f"the weights cannot be loaded for images of {image_size} px ({first_line(error)})"
        raise TlkitError(what, where=name, remedy="leave out --image-size") from error
    if not isinstance(network, nn.Module) or not hasattr(network, "get_classifier"):
        raise TlkitError("has no classifier", where=name, remedy="choose a classification network")
    return network


def _ready(network: nn.Module, image_size: int | None) -> nn.Module:
    """In evaluation mode, and tried on an image where a person chose the size.

    Raises:
        TlkitError: The network does not take images of this size.
    """
    network.eval()
    if image_size is not None:
        channels = resolve_model_data_config(network)["input_size"][0]
        try:
            with torch.no_grad():
                network(torch.zeros(1, channels, image_size, image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            what = f"the network does not take images of {image_size} px ({first_line(error)})"
            raise TlkitError(what, where="--image-size", remedy="try another size") from error
    return network


def overridden(kept: Preprocessing, preprocess: config.Preprocess) -> Preprocessing:
    """What is asked for, and where nothing is, what goes with the weights."""
    return kept.with_overrides(
        size=preprocess.image_size,
        crop=preprocess.crop,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )
