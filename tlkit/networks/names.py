"""Names of models: timm's, ours, and those of the hub."""

from __future__ import annotations

from pathlib import Path

import timm
from timm.models._hub import load_model_config_from_hf

from tlkit.errors import TlkitError, did_you_mean
from tlkit.networks import variants
from tlkit.networks.weights import cached_file, no_weights, require_hub


def names_like(pattern: str) -> list[str]:
    """timm's and our own names that a pattern with ``*``, ``?`` or ``[...]`` fits; with tags where it has a dot.

    Raises:
        TlkitError: None.
    """
    names = timm.list_pretrained(pattern) if "." in pattern else timm.list_models(pattern)
    if not (names := [name for name in names if name != variants.NAME]):
        remedy = "give wildcards in quotes, such as 'resnet*'; 'tlkit models' lists all"
        raise TlkitError("no model has such a name", where=pattern, remedy=remedy)
    return names


def is_onnx(model: str) -> bool:
    """Whether ``model`` is called like an ONNX file."""
    return model.lower().endswith(".onnx")


def known_name(model: str) -> str:
    name, _, tag = model.partition(".")
    if is_onnx(model):
        remedy = "give the run that it was exported from"
        raise TlkitError("an ONNX file is for predict and evaluate alone", where=model, remedy=remedy)
    if model.startswith("hf-hub:"):
        if cached_file(model) is None:
            require_hub(model)
        try:
            load_model_config_from_hf(model.removeprefix("hf-hub:"))
        except Exception as error:  # as in _from_hub
            raise no_weights(model, error) from error
        return model
    if timm.is_model(name) and name != variants.NAME:
        tags = timm.list_pretrained(f"{name}.*")
        if tag and model not in tags:
            remedy = did_you_mean(model, tags) or f"known are {', '.join(tags) or 'none'}"
            raise TlkitError("there are no weights of that tag", where=model, remedy=remedy)
        return model
    if Path(model).is_dir():
        raise TlkitError("this folder is not a finished run", where=model, remedy="give a timm name, or a run's folder")
    remedy = did_you_mean(name, timm.list_models()) or "it is neither a timm name nor a run's folder"
    raise TlkitError("unknown model", where=model, remedy=remedy)
