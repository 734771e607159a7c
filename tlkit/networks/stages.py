"""A network's stages: an ordered partition of its parameters, stem first, head last; and freezing, stated over it.

Freezing, gradual unfreezing, layer-wise rates, feature extraction points and parameter reports all use this partition.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn

from tlkit.errors import TlkitError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """Consecutive modules of a network.

    Args:
        name: ``stem``, ``stage1``, ``stage2`` ..., ``neck`` (what lies between the last stage and the classifier, where
            there is something), ``head`` (the classifier).
        parameters: Names of its parameters, in the network's order.
        modules: Names of its modules that hold parameters or buffers of their own, or have no children at all.
        output: Name of the module whose output is the stage's feature map; empty for stem, neck and head.
    """

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    output: str = ""


def stages(network: nn.Module) -> tuple[Stage, ...]:
    """Cut a timm network into stages at the feature maps that timm knows (``feature_info``).

    A module belongs to the first stage whose feature map is made at or after it, in the order in which the network
    defines its modules; the stem is what comes before the first block, up to the
    stem's own feature map where timm has one.

    Args:
        network: Any timm network with a classifier.

    Returns:
        Every parameter in exactly one stage; stages without parameters are left out.
    """
    order = [name for name, _ in network.named_modules()]
    place = {name: index for index, name in enumerate(order)}
    heads = _classifier_names(network)
    boundaries = _boundaries(network, order, place)
    stem_end = place[boundaries[0]] if boundaries else 0
    if len(boundaries) > 1 and _ends_the_stem(network, boundaries[0]):
        stem_end = _last_place(boundaries.pop(0), order, place) + 1

    ends = [_last_place(boundary, order, place) for boundary in boundaries]

    def stage_of(module: str) -> int:
        """0 for the stem, k for the k-th stage, then the neck, then the head."""
        if any(_inside(module, head) for head in heads):
            return len(boundaries) + 2
        if place[module] < stem_end:
            return 0
        return next((number for number, end in enumerate(ends, start=1) if place[module] <= end), len(boundaries) + 1)

    members: list[list[str]] = [[] for _ in range(len(boundaries) + 3)]
    parameters: list[list[str]] = [[] for _ in members]
    for name, module in network.named_modules(remove_duplicate=False):
        if name not in place:
            continue  # a second name of a module that is used twice
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        if own or not any(True for _ in module.children()) or any(True for _ in module.buffers(recurse=False)):
            number = stage_of(name)
            members[number].append(name)
            parameters[number] += own
    names = ["stem", *(f"stage{number}" for number in range(1, len(boundaries) + 1)), "neck", "head"]
    outputs = ["", *boundaries, "", ""]
    kept = _each_parameter_once(network, parameters)
    made = [Stage(*row) for row in zip(names, kept, map(tuple, members), outputs, strict=True) if row[1]]
    return _numbered(made)


def _numbered(made: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages without parameters (a pooling layer) have gone: number the others 1, 2, 3 ... again."""
    number, out = 0, []
    for stage in made:
        name = stage.name
        if name.startswith("stage"):
            number += 1
            name = f"stage{number}"
        out.append(Stage(name, stage.parameters, stage.modules, stage.output))
    return tuple(out)


def _each_parameter_once(network: nn.Module, parameters: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """A tensor shared under two names is trained where the network names it first."""
    first = {name for name, _ in network.named_parameters()}
    kept = [tuple(name for name in names if name in first) for names in parameters]
    missing = first - {name for names in kept for name in names}
    if missing:
        raise AssertionError(f"parameters in no stage: {sorted(missing)}")
    return kept


def _classifier_names(network: nn.Module) -> list[str]:
    classifier = network.get_classifier()  # type: ignore[operator]
    parts = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    wanted = {id(part) for part in parts}
    names = [name for name, module in network.named_modules() if id(module) in wanted]
    # auxiliary classifiers (VOLO's) are known to the configuration alone
    listed = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return names + [name for name in ([listed] if isinstance(listed, str) else listed) if name not in names]


def _boundaries(network: nn.Module, order: Sequence[str], place: dict[str, int]) -> list[str]:
    """Modules whose outputs are the feature maps, in the order of definition."""
    info = getattr(network, "feature_info", None) or []
    listed = [entry["module"] for entry in info if isinstance(entry, dict) and entry.get("module") in place]
    found = {_whole_block(network, name) for name in listed} or _children_of_largest_container(network)
    ordered = sorted(found, key=lambda name: _last_place(name, order, place))
    return [name for name in ordered if not any(_inside(name, other) for other in found - {name})]


def _whole_block(network: nn.Module, name: str) -> str:
    """A feature map taken in the middle of a block is moved to its end: shortcuts run beside the whole block."""
    parts = name.split(".")
    if len(parts) > 2 and isinstance(network.get_submodule(parts[0]), nn.Sequential | nn.ModuleList):
        return ".".join(parts[:2])
    return name


def _children_of_largest_container(network: nn.Module) -> set[str]:
    """For the few networks whose ``feature_info`` names no module: the blocks of the container with most parameters."""
    containers = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in network.named_children()
        if isinstance(child, nn.Sequential | nn.ModuleList)
    }
    if not containers:
        return set()
    largest = max(containers, key=lambda name: containers[name])
    return {f"{largest}.{name}" for name, _ in network.get_submodule(largest).named_children()}


def _ends_the_stem(network: nn.Module, boundary: str) -> bool:
    """Whether timm's first feature map is the stem's: made by a module called so, or by a single layer or activation."""
    layers = sum(1 for _ in network.get_submodule(boundary).parameters())
    return boundary.split(".")[0] == "stem" or layers <= 3


def _last_place(module: str, order: Sequence[str], place: dict[str, int]) -> int:
    last = place[module]
    while last + 1 < len(order) and _inside(order[last + 1], module):
        last += 1
    return last


def _inside(module: str, outer: str) -> bool:
    return module == outer or module.startswith(outer + ".")


def find_stages(network: nn.Module, names: Collection[str]) -> tuple[Stage, ...]:
    """The stages of those names, in the network's order.

    Raises:
        TlkitError: The network has no stage of that name.
    """
    known = {stage.name: stage for stage in stages(network)}
    for name in names:
        if name not in known:
            remedy = did_you_mean(name, known) or f"it has {', '.join(known)}"
            raise TlkitError(f"the network has no stage '{name}'", where="stage", remedy=remedy)
    return tuple(stage for stage in known.values() if stage.name in names)


def freeze(network: nn.Module, names: Collection[str]) -> None:
    """Freeze the named stages and no others.

    A frozen stage has no gradients, and stays in evaluation mode through every later ``.train()``, of the network or of
    whatever holds it: batch norm keeps its running statistics, dropout and stochastic depth are off.

    Args:
        network: Any timm network.
        names: Stages to freeze; an empty collection unfreezes everything.

    Raises:
        TlkitError: The network has no stage of that name.
    """
    frozen = {stage.name for stage in find_stages(network, names)}
    for stage in stages(network):
        for parameter in stage.parameters:
            network.get_parameter(parameter).requires_grad_(stage.name not in frozen)
        for name in stage.modules:
            if name:  # the root holds parameters of its own in some networks, but its mode is not one stage's
                _hold_in_eval(network.get_submodule(name), stage.name in frozen)


def _hold_in_eval(module: nn.Module, held: bool) -> None:
    if held:
        module.eval()
        module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
    elif "train" in module.__dict__:
        del module.train


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """What ``.train()`` does to a frozen module; a module-level function, so that networks can still be pickled."""
    module.training = False
    for child in module.children():
        child.train(False)
    return module


def train_mode(module: nn.Module) -> None:
    """Put what is trained into training mode; what `freeze` froze stays in evaluation mode, buffers untouched."""
    module.train()


def trainable_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what is not frozen."""
    return ((name, tensor) for name, tensor in network.named_parameters() if tensor.requires_grad)
