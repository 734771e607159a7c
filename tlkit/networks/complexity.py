"""What a network costs: parameters, multiply-accumulates, activations and receptive field, by stage and by layer.

One pass counts all of it. On torch's meta device, where tensors have shapes and no values, that takes neither memory
nor arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tlkit.networks.build import weight_bytes
from tlkit.networks.stages import Stage, stages
from tlkit.networks.trace import Output, Trace, trace
from tlkit.preprocessing import Preprocessing


@dataclass(frozen=True)
class Part:
    """What a layer, a stage or a whole network costs for one image.

    Args:
        name: Of the layer or stage; empty for the network.
        kind: The layer's class; empty for stage and network.
        stage: Name of the stage that a layer belongs to.
        params: Numbers that training may change.
        trainable_params: Those of them that are not frozen.
        buffers: Numbers that go with them but are not trained, such as running averages.
        macs: Multiply-accumulates of convolutions, linear layers and products of matrices (attention).
        activations: Numbers that come out of these.
        output_shape: Without the batch; None where nothing came out.
        receptive_field: Pixels that one position of the output sees, along its longer side; None where that means
            nothing.
        receptive_field_limit: Why it means nothing.
        stride: Pixels between two positions of the output; None where there are no positions.
    """

    name: str
    kind: str
    stage: str
    params: int
    trainable_params: int
    buffers: int
    macs: int
    activations: int
    output_shape: tuple[int, ...] | None
    receptive_field: int | float | None
    receptive_field_limit: str
    stride: int | float | None


@dataclass(frozen=True)
class Complexity:
    """What a network costs for one image.

    Args:
        whole: The network. Receptive field and stride are those of its last feature map, its output the logits.
        stages: Its stages (`tlkit.networks.stages`); their counts sum to the whole's.
        layers: The modules in which something is computed or kept, in the order in which the network defines them;
            a tensor that two of them share is counted in the first.
        macs_by_kind: Multiply-accumulates of ``convolution``, ``linear`` and ``attention``.
        elements_by_kind: Numbers that come out of ``normalisation``, ``activation`` and ``pooling``, which are in no
            other count.
        weight_bytes: Of parameters, and of the buffers that are stored with them.
        uncounted: Operations that multiply in another way (Fourier transforms), and how often each is called.
    """

    whole: Part
    stages: tuple[Part, ...]
    layers: tuple[Part, ...]
    macs_by_kind: dict[str, int]
    elements_by_kind: dict[str, int]
    weight_bytes: int
    uncounted: dict[str, int]


def complexity(network: nn.Module, image: Tensor) -> Complexity:
    """Count what a network costs.

    Args:
        network: Any timm network, on any device.
        image: One input (1, C, H, W), where the network is; on the meta device only its shape counts.

    Raises:
        TlkitError: The network does not take such images.
    """
    seen = trace(network, image)
    tensors = _Tensors(network)
    parts = stages(network)
    stage_of = {name: stage.name for stage in parts for name in stage.modules}
    # a module that reaches over several stages (the network itself) counts where its own tensors are
    stage_of |= {name.rpartition(".")[0]: stage.name for stage in parts for name in stage.parameters}
    layers = [
        _part(
            *(name, (name,), tensors.held[name], seen, tensors, seen.outputs.get(name)),
            kind=type(module).__name__,
            stage=stage_of[name],
        )
        for name, module in tensors.modules.items()
    ]
    inside = {stage.name: [name for name in tensors.modules if stage_of[name] == stage.name] for stage in parts}
    by_stage = [
        _with_stride(
            _part(stage.name, inside[stage.name], stage.parameters, seen, tensors, _end(stage, seen)), stage, network
        )
        for stage in parts
    ]
    last = seen.features or next((_end(stage, seen) for stage in reversed(parts) if stage.output), None)
    output = Output(seen.outputs[""].shape, last.field if last else None)
    whole = _part("", tensors.modules, tensors.parameters, seen, tensors, output)
    if whole.stride is None:
        whole = replace(whole, stride=max((part.stride for part in by_stage if part.stride), default=None))
    return Complexity(
        whole=whole,
        stages=tuple(by_stage),
        layers=tuple(part for part in layers if part.params or part.buffers or part.macs or tensors.is_leaf(part.name)),
        macs_by_kind=dict(seen.macs_by_kind),
        elements_by_kind=dict(seen.elements_by_kind),
        weight_bytes=weight_bytes(network),
        uncounted=dict(seen.uncounted),
    )


def stage_costs(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Share of each stage in the multiply-accumulates; the shares sum to 1.

    Args:
        network: Any timm network.
        image: One input (1, C, H, W).
    """
    # a copy: what a network keeps from a pass in inference mode (position encodings) could not be trained with
    counted = complexity(copy.deepcopy(network), image)
    return {part.name: part.macs / (counted.whole.macs or 1) for part in counted.stages}


def noise(network: nn.Module, preprocessing: Preprocessing, count: int = 1) -> Tensor:
    """Random inputs (count, C, S, S), where the network is."""
    device = next(network.parameters()).device
    shape = (count, len(preprocessing.mean), preprocessing.size, preprocessing.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class _Tensors:
    """What each module keeps itself, each tensor once."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.parameters = dict(network.named_parameters())
        self.held: dict[str, list[str]] = {name: [] for name in self.modules}
        self.buffers = dict.fromkeys(self.modules, 0)
        for name in self.parameters:
            self.held[name.rpartition(".")[0]].append(name)
        for name, buffer in network.named_buffers():
            self.buffers[name.rpartition(".")[0]] += buffer.numel()

    def is_leaf(self, name: str) -> bool:
        module = self.modules[name]
        return not isinstance(module, nn.Identity) and next(module.children(), None) is None


def _part(
    name: str,
    modules: Collection[str],
    parameters: Collection[str],
    seen: Trace,
    tensors: _Tensors,
    output: Output | None,
    kind: str = "",
    stage: str = "",
) -> Part:
    field = output.field if output else None
    held = [tensors.parameters[name] for name in parameters]
    return Part(
        name=name,
        kind=kind,
        stage=stage,
        params=sum(parameter.numel() for parameter in held),
        trainable_params=sum(parameter.numel() for parameter in held if parameter.requires_grad),
        buffers=sum(tensors.buffers[module] for module in modules),
        macs=sum(seen.macs[module] for module in modules),
        activations=sum(seen.activations[module] for module in modules),
        output_shape=output.shape if output else None,
        receptive_field=_plain(max(field.size)) if field and not field.limit else None,
        receptive_field_limit=field.limit if field else "its path cannot be followed",
        stride=_plain(max(field.stride)) if field and field.dims else None,
    )


def _end(stage: Stage, seen: Trace) -> Output | None:
    """The stage's feature map, or what came last out of its modules."""
    if stage.output and stage.output in seen.outputs:
        return seen.outputs[stage.output]
    inside = set(stage.modules)
    return next((output for name, output in reversed(seen.outputs.items()) if name in inside), None)


def _with_stride(part: Part, stage: Stage, network: nn.Module) -> Part:
    """Where positions are no longer told apart (tokens), the stride is what timm says of the feature map."""
    if part.stride is not None or not stage.output:
        return part
    told = (info for info in network.feature_info if f"{info['module']}.".startswith(f"{stage.output}."))  # type: ignore
    return replace(part, stride=next((info["reduction"] for info in told), None))


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number
