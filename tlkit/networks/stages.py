"""A network's stages: an ordered partition of its parameters, stem first, head last.

Freezing, gradual unfreezing, layer-wise rates, feature extraction points and parameter reports all use this partition.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tlkit.errors import TlkitError, did_you_mean

BOTTLENECK = "bottleneck"
"""Name of the module that `tlkit.networks.bottleneck` puts in front of a classifier: it is learnt anew with that."""


@dataclass(frozen=True)
class Stage:
    """Consecutive parts of a network.

    Args:
        name: ``stem``, ``stage1``, ``stage2`` ..., ``neck`` (what lies between the last stage and the classifier, where
            there is something), ``head`` (the classifier).
        parameters: Names of its parameters, in the network's order.
        modules: Names of the modules whose mode (training or evaluation) is the stage's. A module that reaches over
            several stages goes with the last of them, the network itself (``""``) with the head. So do pooling and
            dropout directly before the classifier: they act whenever the classifier is trained.
        output: Name of the module whose output is the stage's feature map; empty for stem, neck and head.
    """

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    output: str = ""


def stages(network: nn.Module) -> tuple[Stage, ...]:
    """Cut a timm network into stages at the feature maps that timm knows (``feature_info``).

    A module belongs to the first stage whose feature map is made at or after it, in the order in which the network
    defines its modules; the stem is what comes before the first block, up to the stem's own feature map where timm has
    one, and holds the network's own tensors (class token, position embeddings). No feature map depends on a later
    stage. Only in CoaT, whose scales run side by side, and in EfficientViM, where each stage has a classifier, do parts
    of later stages run before the end of earlier ones.

    Args:
        network: Any timm network for classification.

    Returns:
        Every parameter and every module in exactly one stage, and no stage without parameters: a network without
        classes has no head.
    """
    modules = dict(network.named_modules())
    place = {name: index for index, name in enumerate(modules)}
    end = _last_places(place)
    outputs = sorted(_feature_maps(network, modules), key=place.__getitem__)
    stem_end = place[outputs[0]] if outputs else 0
    if len(outputs) > 1 and _ends_the_stem(outputs[0], network):
        stem_end = end[outputs.pop(0)] + 1
    ends = [end[output] for output in outputs]
    heads = (*classifier_modules(network), *([BOTTLENECK] if BOTTLENECK in modules else []))
    body_end = _end_of_body(modules, end, heads)
    in_step = _lists_in_step(network, outputs)
    neck, head = len(outputs) + 1, len(outputs) + 2

    def number_of(module: str) -> int:
        """0 for the stem, k for the k-th stage, then the neck, then the head."""
        if _inside(module, heads) or place[module] > body_end:
            return head
        number = in_step.get(".".join(module.split(".")[:2]), 0)
        if place[module] < stem_end and number <= 1:
            return 0
        return number or bisect_left(ends, place[module]) + 1

    parameters: list[list[str]] = [[] for _ in range(head + 1)]
    for name, _ in network.named_parameters():  # a tensor with two names comes under the first
        parameters[number_of(name.rpartition(".")[0])].append(name)
    kept = [number for number, names in enumerate(parameters) if names]
    members: dict[int, list[str]] = {number: [] for number in kept}
    for name, number in _modes(modules, number_of).items():
        members[next((other for other in kept if other >= number), kept[-1])].append(name)
    titles = {0: "stem", neck: "neck", head: "head"}
    return tuple(
        Stage(
            titles.get(number, f"stage{sum(0 < other <= number for other in kept)}"),
            tuple(parameters[number]),
            tuple(members[number]),
            _called(outputs[number - 1], modules) if 0 < number < neck else "",
        )
        for number in kept
    )


def classifier_modules(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are made anew for another number of classes."""
    classifier = network.get_classifier()  # type: ignore[operator]
    parts = classifier if isinstance(classifier, tuple | list) else [classifier]
    names = [name for name, module in network.named_modules() if any(module is part for part in parts)]
    # auxiliary classifiers (VOLO's) are known to the configuration alone
    return (*names, *(name for name in classifier_names(network) if not _inside(name, names)))


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the layers that make the logits, as timm's configuration gives them."""
    listed = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (listed,) if isinstance(listed, str) else tuple(listed)


def _feature_maps(network: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Modules whose outputs are the feature maps."""
    info = getattr(network, "feature_info", None) or ()
    listed = {entry["module"] for entry in info} & modules.keys() - {""}
    if listed:
        return {_whole_block(name, listed) for name in listed}
    # the few networks whose feature_info names modules that they do not have: the entries of their largest container
    containers = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in modules.items()
        if name and isinstance(module, nn.Sequential | nn.ModuleList)
    }
    largest = max(containers, key=containers.__getitem__, default="")
    return {f"{largest}.{name}" for name, _ in modules[largest].named_children()} if largest else set()


def _whole_block(name: str, listed: Iterable[str]) -> str:
    """A feature map taken in the middle of a block is moved to its end: shortcuts run beside the whole block.

    The block is the largest module around that holds no other feature map.
    """
    parts = name.split(".")
    around = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next(
        (outer for outer in around if not any(_inside(other, [outer]) for other in listed if other != name)), name
    )


def _end_of_body(modules: Mapping[str, nn.Module], end: Mapping[str, int], heads: Collection[str]) -> int:
    """The place of the last module that is before the classifier and holds tensors, with all that is inside of it."""
    around = ("", *(name for name in modules if any(_inside(head, [name]) for head in heads)))
    return max(
        (
            end[name]
            for name, module in modules.items()
            if name not in around and not _inside(name, heads) and _holds_tensors(module)
        ),
        default=0,
    )


def _lists_in_step(network: nn.Module, outputs: Sequence[str]) -> dict[str, int]:
    """Entries of lists that run in step with the list of the stages (in Twins embeddings and position encodings).

    The order of definition says nothing of these.

    Returns:
        Number of its stage for each entry.
    """
    lists = [
        name
        for name, child in network.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == len(outputs)
    ]
    in_step = {name.rpartition(".")[0] for name in outputs} <= set(lists)
    return {f"{name}.{index}": index + 1 for name in lists for index in range(len(outputs)) if in_step}


def _ends_the_stem(output: str, network: nn.Module) -> bool:
    """Whether timm's first feature map is the stem's.

    It is where it is made by a module called so, by a single layer or activation, or by what comes first of all.
    """
    layers = sum(1 for _ in network.get_submodule(output).parameters())
    first = next((name for name, _ in network.named_parameters() if "." in name), "")
    return output.startswith("stem") or layers <= 3 or _inside(first, [output])


def _called(output: str, modules: Mapping[str, nn.Module]) -> str:
    """A list is never called itself: its last entry is."""
    while isinstance(module := modules[output], nn.ModuleList):
        output = f"{output}.{len(module) - 1}"
    return output


def _modes(modules: dict[str, nn.Module], number_of: Callable[[str], int]) -> dict[str, int]:
    """For each module the number of the last stage that it reaches into."""
    numbers: dict[str, int] = {}
    for name in reversed(modules):
        inner = (f"{name}.{child}" if name else child for child, _ in modules[name].named_children())
        numbers[name] = max((numbers[child] for child in inner if child in numbers), default=number_of(name))
    return dict(reversed(numbers.items()))


def _last_places(place: dict[str, int]) -> dict[str, int]:
    """For each module the place of the last one inside it."""
    last: dict[str, int] = {}
    for name, index in place.items():
        parts = name.split(".")
        last |= {".".join(parts[: depth + 1]): index for depth in range(len(parts))}
    return last


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _inside(module: str, outers: Iterable[str]) -> bool:
    return any(module == outer or module.startswith(f"{outer}.") for outer in outers)


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
