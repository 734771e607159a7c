"""Where a network looked: Grad-CAM, the part of the last feature map that speaks for a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlkit.data.folders import Samples
from tlkit.data.loading import ViewDataset, load_in_turns
from tlkit.data.transforms import CENTER, normalise
from tlkit.networks.build import Loaded
from tlkit.networks.frozen_pass import How
from tlkit.networks.stages import stages

HeatMaps = Callable[[Sequence[int]], list[np.ndarray | None]]
"""From rows of images to a map (h, w) in [0, 1] for each; None where there is none."""

AT_ONCE = 8
"""Images whose activations are kept for the gradient at a time."""


def heat_maps(loaded: Loaded, samples: Samples, predicted: np.ndarray, how: How) -> HeatMaps:
    """Maps of where the network looked for the class that it predicted, of whichever of the images are asked for.

    Args:
        loaded: The network.
        samples: Images (N).
        predicted: Class of each (N).
        how: Device.
    """

    def of(rows: Sequence[int]) -> list[np.ndarray | None]:
        paths = [samples.paths[row] for row in rows]
        dataset = ViewDataset(samples.root, paths, loaded.preprocessing, CENTER)
        network, device = loaded.network.eval().to(how.accelerator.device), how.accelerator.device
        found: list[np.ndarray | None] = [None] * len(rows)
        for batch in load_in_turns(dataset, batch_size=AT_ONCE):
            if len(batch.rows):
                places = batch.rows.tolist()
                images = normalise(batch.images[:, 0].to(device), loaded.preprocessing)
                images = images.contiguous(memory_format=torch.channels_last)
                targets = torch.as_tensor(predicted[[rows[place] for place in places]], device=device)
                with how.accelerator.autocast():
                    maps = grad_cam(network, images, targets)
                for place, heat in zip(places, maps, strict=True):
                    found[place] = heat
        return found

    return of


def grad_cam(network: nn.Module, images: Tensor, targets: Tensor) -> list[np.ndarray | None]:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) of a class's logit on the last stage that has any.

    In a vision transformer that classifies by its class token, nothing flows from the last block's other tokens: the
    stage before it is taken.

    Args:
        network: In evaluation mode; its weights need no gradients.
        images: Normalised (B, C, S, S).
        targets: Class of each (B).

    Returns:
        For each image a map (h, w) in [0, 1], 1 where most speaks for the class; None where no stage's output is a map,
        or nothing in it speaks for the class.
    """
    found: list[np.ndarray | None] = [None] * len(images)
    for name in reversed([stage.output for stage in stages(network) if stage.output]):
        todo = [place for place, one in enumerate(found) if one is None]
        if not todo:
            break
        for place, heat in zip(todo, _of_stage(network, name, images[todo], targets[todo]), strict=True):
            found[place] = heat
    return found


def _of_stage(network: nn.Module, name: str, images: Tensor, targets: Tensor) -> list[np.ndarray | None]:
    """Grad-CAM on the output of one module; nothing before it is differentiated."""
    maps: list[Tensor] = []

    def begin(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        maps.append(output.detach().clone().requires_grad_())  # a copy: a layer after it may work in place
        torch.set_grad_enabled(True)  # until the end of the pass
        return maps[-1]

    nothing: list[np.ndarray | None] = [None] * len(images)
    hook = network.get_submodule(name).register_forward_hook(begin)
    try:
        with torch.no_grad():
            speaks = network(images).gather(1, targets.view(-1, 1)).sum()
            if not maps or not speaks.requires_grad:
                return nothing
            (gradient,) = torch.autograd.grad(speaks, maps[-1:], allow_unused=True)
    except RuntimeError:  # what a network keeps of an earlier pass in inference mode cannot be differentiated
        return nothing
    finally:
        hook.remove()
    if gradient is None or (placed := _placed(network, maps[-1].detach())) is None:
        return nothing
    slopes = _placed(network, gradient)
    assert slopes is not None  # of the same shape
    heats = (slopes.mean((1, 2), keepdim=True) * placed).sum(-1).relu().float().cpu().numpy()
    return [one / one.max() if one.max() > 0 else None for one in heats]


def _placed(network: nn.Module, output: Tensor) -> Tensor | None:
    """A stage's output as a map (B, h, w, C); None where it is none.

    Networks of convolutions put out (B, C, h, w), others (B, h, w, C): images are square, so that equal sides tell.
    """
    if output.ndim == 4:
        return output if output.shape[1] == output.shape[2] != output.shape[3] else output.permute(0, 2, 3, 1)
    if output.ndim == 3:
        tokens = output[:, int(getattr(network, "num_prefix_tokens", 0)) :]
        side = math.isqrt(tokens.shape[1])
        if side > 1 and side**2 == tokens.shape[1]:
            return tokens.unflatten(1, (side, side))
    return None
