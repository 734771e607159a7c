"""The quickest form of a network that does not learn: batch norm folded, weights in the pass's precision, compiled.

Each form is tried on the first images against the plain network in float32, and given up where it differs.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkit.errors import first_line
from tlkit.networks.exported import Exported
from tlkit.networks.stages import classifier_modules

Compute = Callable[[nn.Module, Tensor], Any]
"""Maps a network and normalised images (B, C, S, S) to a tensor or a tuple of tensors, each of B rows."""

TOLERANCE, TIMES = 1e-4, 1.5
"""How far outputs may be from those of the plain network in float32, as a part of their norm: in float32 the first, in
16 bits that many times as far as those of the plain network in the same precision are."""

TRIED_ON = 8  # images
FOLDED_FROM = 256  # images: below, a copy of the network and the comparison cost more than they save
COMPILED_FROM = 10_000
"""Images from which compiling pays: it takes 15 to 40 s where nothing of it is cached, and saves 2 to 3 ms an image."""


@dataclass(frozen=True)
class Form:
    """A network in the form in which images are passed through it.

    Args:
        name: ``plain``, ``folded`` or ``compiled``.
        run: Maps normalised images (B, C, S, S) to what was asked for.
        context: What it runs in.
        seconds: What compiling took, successful or not.
    """

    name: Literal["plain", "folded", "compiled"]
    run: Callable[[Tensor], Any]
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    seconds: float = 0.0


def quickest(
    network: nn.Module,
    compute: Compute,
    images: Tensor,
    *,
    count: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    compile: str = "auto",
    say: Callable[[str], None] = print,
) -> Form:
    """The quickest form that gives what the plain network gives.

    Args:
        network: In evaluation mode, on its device, in its memory format; left as it is.
        compute: What is wanted of it.
        images: The first batch, normalised (B, C, S, S); all others are to have its shape.
        count: How many images there are to pass in all.
        autocast: Context of the precision that is asked for.
        compile: ``always``, ``never``, or ``auto``: where the number of images pays for it.
        say: Told which form it is, and why another was given up.
    """
    plain = Form("plain", lambda batch: compute(network, batch))
    if isinstance(network, Exported):  # made quick where it was exported
        return plain
    wants = compiles(images.device, compile, count)
    if not wants and count < FOLDED_FROM:
        return plain
    wanted = _Wanted(network, compute, images[:TRIED_ON], autocast)
    form = _folded(network, compute, wanted, say) or plain
    if not wants:
        return form
    return _compiled(form, images, wanted, say)


def compiles(device: torch.device, compile: str, count: int) -> bool:
    """Whether the network is to be compiled for so many images; that it pays was measured on CPUs alone."""
    return compile == "always" or (compile == "auto" and device.type == "cpu" and count >= COMPILED_FROM)


class _Wanted:
    """What the plain network makes of some images, which every other form is compared with."""

    def __init__(
        self,
        network: nn.Module,
        compute: Compute,
        images: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.images, self.autocast = images, autocast
        with torch.inference_mode():
            self.exact = _rows(compute(network, images))
            with autocast():
                rounding = apart(_rows(compute(network, images)), self.exact)
        # where 16 bits overflow nothing can be compared, and nothing passes
        self.tolerance = max(TOLERANCE, TIMES * rounding) if math.isfinite(rounding) else 0.0

    def differs(self, found: list[Tensor]) -> str:
        """In words, empty where it does not."""
        error = apart(found, self.exact)
        if error <= self.tolerance:
            return ""
        return f"its outputs differ by {error:.1%} from the plain network's, {self.tolerance:.1%} are allowed"


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """How far outputs are from those wanted, as a part of their norm: the furthest; nan where one is not finite."""
    if [part.shape for part in found] != [part.shape for part in wanted]:
        return math.nan
    errors = [(one - other).norm() / other.norm().clamp_min(1e-12) for one, other in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).max())


def _rows(outputs: Any) -> list[Tensor]:
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return [part.float() for part in parts]


def _folded(network: nn.Module, compute: Compute, wanted: _Wanted, say: Callable[[str], None]) -> Form | None:
    try:
        quick = copy.deepcopy(network)
        with torch.inference_mode(False), torch.no_grad():
            fold_batch_norm(quick, wanted.images[:1].clone(), compute)
            with wanted.autocast():
                cast_weights(quick, wanted.images.device.type)
        with torch.inference_mode(), wanted.autocast():
            found = _rows(compute(quick, wanted.images))
        why = wanted.differs(found)
    except Exception as error:  # whatever a network's code does where a module is not what it was
        why = first_line(error)
    if why:
        say(f"runs as it is, not with its batch norm folded: {why}")
        return None
    return Form("folded", lambda batch: compute(quick, batch))


def fold_batch_norm(network: nn.Module, images: Tensor, compute: Compute = nn.Module.__call__) -> int:
    """Fold each batch norm that follows a convolution into it: w' = w s, b' = (b - m) s + t, s = g / sqrt(v + e).

    Which one follows which is seen in a pass of ``images`` (1, C, S, S) through ``compute``, under hooks.

    Returns:
        How many there were.
    """
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def convolved(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        made[id(output)] = name, output  # held, so that its id stays its own

    def normalised(name: str, given: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if id(given) in made:
            pairs.append((made[id(given)][0], name))

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: convolved(name, output)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: normalised(name, args[0])))
    try:
        compute(network, images)
    finally:
        for handle in handles:
            handle.remove()
    once = [(of, by) for of, by in pairs if calls[of] == calls[by] == 1]
    for convolution, norm in once:
        _fold(network, convolution, norm)
    return len(once)


def _fold(network: nn.Module, convolution: str, norm: str) -> None:
    before: nn.Module = network.get_submodule(convolution)
    batch_norm: Any = network.get_submodule(norm)
    scale = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    shift = -batch_norm.running_mean * scale
    if batch_norm.weight is not None:
        scale, shift = scale * batch_norm.weight, shift * batch_norm.weight + batch_norm.bias
    weight, bias = before.get_parameter("weight"), before.bias
    before.weight = nn.Parameter(weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    before.bias = nn.Parameter(shift if bias is None else shift + bias * scale, requires_grad=False)  # type: ignore[operator]
    # timm's batch norm holds the activation that comes after it
    rest = [getattr(batch_norm, name, nn.Identity()) for name in ("drop", "act")]
    kept = [module for module in rest if not isinstance(module, nn.Identity)]
    parent, _, leaf = norm.rpartition(".")
    setattr(network.get_submodule(parent), leaf, kept[0] if len(kept) == 1 else nn.Sequential(*kept))


def cast_weights(network: nn.Module, device: str) -> None:
    """Bring the weights of convolutions and linear layers to what autocast brings them to, once rather than each time.

    The classifier stays as it is: it is computed in float32.
    """
    if not torch.is_autocast_enabled(device):
        return
    heads = classifier_modules(network) if hasattr(network, "get_classifier") else ()
    inside = tuple(f"{head}." for head in heads)
    for name, module in network.named_modules():
        # convolutions with a way of their own (standardised weights) need all bits for it
        usual = type(module).forward in (nn.Conv2d.forward, Conv2dSame.forward, nn.Linear.forward)
        if usual and name not in heads and not name.startswith(inside):
            module.to(torch.get_autocast_dtype(device))


def _compiled(form: Form, images: Tensor, wanted: _Wanted, say: Callable[[str], None]) -> Form:
    """The form compiled, or as it was."""
    say("compiling the network: takes 10 to 60 s")
    began = time.monotonic()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA on machines without
    try:
        from torch._inductor import config as inductor

        torch.compiler.reset()  # it compiles one function a few times at most, for whatever network
        compiled = torch.compile(form.run, dynamic=False)
        with torch.no_grad(), wanted.autocast(), inductor.patch(freezing=True):
            found = [part[: len(wanted.images)] for part in _rows(compiled(images))]
        why = wanted.differs(found)
    except Exception as error:  # whatever is missing or unsupported, a compiler's errors have no class in common
        why = f"{type(error).__name__}: {first_line(error)}"
    seconds = time.monotonic() - began
    if why:
        say(f"runs uncompiled: {why}")
        return replace(form, seconds=seconds)
    say(f"compiled in {seconds:.0f} s")
    return Form("compiled", compiled, torch.no_grad, seconds)
