"""A network ready to use: built by name or from a run, with its weights, preprocessing and class names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._hub import save_config_for_hf
from torch import nn

from tlkit import __version__, config, run_folder
from tlkit.errors import TlkitError, did_you_mean
from tlkit.networks import imagenet
from tlkit.networks.weights import load_matching, names_from_package, no_weights, package_file, read_weights, require_hub
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
    """

    network: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    weights: str
    remarks: list[str] = field(default_factory=list)


def build(model: str, weights: str, preprocess: config.Preprocess | None = None) -> Loaded:
    """Build a network.

    Args:
        model: A timm name, or the folder of a run.
        weights: ``default`` (a run's own; else an installed package that carries them, else the hub), ``random`` (call
            `torch.manual_seed` first), a file, or the folder of a run.
        preprocess: What to use instead of the preprocessing that goes with the weights.

    Raises:
        TlkitError: Unknown name, no weights, or weights that do not fit.
    """
    preprocess = preprocess or config.Preprocess()
    if run_folder.is_run(model):
        return _from_run(Path(model), weights, preprocess)
    name = _known_name(model)
    if run_folder.is_run(weights):
        found = architecture(Path(weights))
        if found != name.split(".")[0]:
            raise TlkitError(f"this run holds a {found}, not a {name}", where=weights, remedy=f"give --model {weights}")
        return _from_run(Path(weights), "default", preprocess)
    remarks: list[str] = []
    if weights == "default" and (packaged := package_file(name)):
        network = _create(name, preprocess.image_size)
        remarks += load_matching(network, names_from_package(read_weights(packaged), network), packaged.name)
        source = f"package {packaged.parent.parent.name.replace('_', '-')}"
    elif weights == "default":
        network, source = _from_hub(name, preprocess.image_size), "hub"
    elif weights == "random":
        network, source = _create(name, preprocess.image_size), "random"
    else:
        state = read_weights(Path(weights))
        network, source = _create(name, preprocess.image_size), weights
        remarks += load_matching(network, state, weights)
    return Loaded(
        network.eval(),
        name,
        _preprocessing(network, preprocess),
        None if weights == "random" else imagenet.class_names(network),
        source,
        remarks,
    )


def save_network(folder: Path, loaded: Loaded) -> None:
    """Write ``model.safetensors`` and ``config.json``: loadable by timm as ``local-dir:FOLDER``, and by `build`."""
    import safetensors.torch

    network, preprocessing = loaded.network, loaded.preprocessing
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with run_folder.atomically(folder / run_folder.WEIGHTS) as part:
        safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})
    ours = {"version": __version__, "preprocessing": preprocessing.to_dict(), "classes": list(loaded.classes or ())}
    extra = {"label_names": list(loaded.classes or ()), "tlkit": ours}
    with run_folder.atomically(folder / run_folder.CONFIG) as part:
        save_config_for_hf(network, str(part), model_config=extra, data_config=preprocessing.to_timm())
        # written as UTF-8 whatever the system's encoding is
        part.write_text(json.dumps(json.loads(part.read_text()), indent=2, ensure_ascii=False), encoding="utf-8")


def weight_bytes(network: nn.Module) -> int:
    """Bytes that the weights take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def architecture(run: Path) -> str:
    """The timm name of the network in a run."""
    return str(run_folder.read_json(run / run_folder.CONFIG)["architecture"])


def _from_run(run: Path, weights: str, preprocess: config.Preprocess) -> Loaded:
    if weights not in ("default", "random", str(run)):
        raise TlkitError("a run brings its own weights", where="--weights", remedy="leave it out, or give --model a name")
    stored = run_folder.read_json(run / run_folder.CONFIG)
    ours = stored.get("tlkit", {})
    size: dict[str, Any] = {}
    if preprocess.image_size and stored["pretrained_cfg"].get("fixed_input_size"):
        size = {"img_size": preprocess.image_size}
    try:
        network = timm.create_model(f"local-dir:{run}", pretrained=weights == "default", **size)
    except Exception as error:  # timm, torch and safetensors each raise errors of their own for a broken folder
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TlkitError(f"the run's network cannot be loaded ({reason})", where=run, remedy="check that it is whole") from error
    kept = Preprocessing.from_dict(ours["preprocessing"]) if ours else _preprocessing(network, config.Preprocess())
    names = tuple(ours.get("classes") or stored.get("label_names") or ())
    return Loaded(
        network.eval(), stored["architecture"], _override(kept, preprocess), names or None, f"run {run}" if weights == "default" else "random"
    )


def _from_hub(name: str, image_size: int | None) -> nn.Module:
    require_hub(name)
    try:
        return _create(name, image_size, pretrained=True)
    except TlkitError:
        raise
    except Exception as error:  # the hub's client has a whole family of errors, and changes it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise no_weights(name, reason) from error


def _create(name: str, image_size: int | None, pretrained: bool = False) -> nn.Module:
    given: dict[str, Any] = {}
    if image_size is not None:
        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is not None and cfg.fixed_input_size:
            given["img_size"] = image_size
    try:
        network = timm.create_model(name, pretrained=pretrained, **given)
    except (AssertionError, ValueError) as error:
        raise TlkitError(f"cannot be built ({error})", where=name, remedy="try another --image-size") from error
    if not isinstance(network, nn.Module) or not hasattr(network, "get_classifier"):
        raise TlkitError("has no classifier", where=name, remedy="choose a classification network")
    return network


def _known_name(model: str) -> str:
    if Path(model).is_dir():
        raise TlkitError("this folder is not a finished run", where=model, remedy="give a timm name, or a run's folder")
    if timm.is_model(model) or model.startswith(("hf-hub:", "local-dir:")):
        return model
    remedy = did_you_mean(model.split(".")[0], timm.list_models()) or "it is neither a timm name nor a run's folder"
    raise TlkitError("unknown model", where=model, remedy=remedy)


def _preprocessing(network: nn.Module, preprocess: config.Preprocess) -> Preprocessing:
    return _override(Preprocessing.from_timm(resolve_model_data_config(network)), preprocess)


def _override(kept: Preprocessing, preprocess: config.Preprocess) -> Preprocessing:
    return kept.with_overrides(
        size=preprocess.image_size,
        crop=preprocess.crop,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )
