"""What each of several processes makes of its part of a batch: gradients averaged over them, as training has them.

    numerics.py OUT

Where there is a single process, the same functions give what it makes of the whole.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tlkit import compute, config, processes
from tlkit.adaptation.method import method
from tlkit.adaptation.objective import Adaptation
from tlkit.networks.shared_batch_norm import SharedBatchNorm

METHODS = ("mmd", "jmmd", "coral", "mcc", "dann", "cdan")
SHAPES = {"images": (8, 5, 3, 4), "vectors": (8, 5)}


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        features = self.body(inputs)
        return features, self.head(features)


def part(rows, sizes):
    return rows.split(sizes)[processes.rank()] if processes.count() > 1 else rows


def shared():
    return SharedBatchNorm() if processes.count() > 1 else nullcontext()


def averaged(module):
    """Gradients as DistributedDataParallel leaves them."""
    found = {}
    for name, tensor in module.named_parameters():
        if tensor.grad is not None:
            if processes.count() > 1:
                dist.all_reduce(tensor.grad)
            found[name] = (tensor.grad / processes.count()).numpy()
    return found


def batch_norm(kind):
    """Outputs of this process's part (they are uneven), gradients and running statistics, of a loss over all of it."""
    random = torch.Generator().manual_seed(0)
    whole, wanted = (torch.randn(SHAPES[kind], generator=random, dtype=torch.float64) for _ in range(2))
    inputs = part(whole * 3 + 100, (5, 3)).clone().requires_grad_()
    layer = (nn.BatchNorm2d if kind == "images" else nn.BatchNorm1d)(5, momentum=0.3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 5))
        layer.bias.copy_(torch.linspace(-1, 1, 5))
    with shared():
        outputs = layer(inputs)
    # the mean over processes is the loss of the whole
    ((outputs - part(wanted, (5, 3))).square().sum() * processes.count()).backward()
    found = {"outputs": outputs.detach().numpy(), "inputs": (inputs.grad / processes.count()).numpy()}
    return found | averaged(layer) | {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}


def adaptation(name):
    """Losses and gradients of a step of adaptation, with batch norm in the learner and in the discriminator."""
    torch.manual_seed(0)
    objective = Adaptation(Learner(), method(name).loss(8, 3), 0.7).double()
    objective.progress = 0.3
    random = torch.Generator().manual_seed(1)
    source, target = (torch.randn(8, 12, generator=random, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(8) % 3
    torch.manual_seed(2)
    with shared():
        losses = objective(*(part(rows, (4, 4)) for rows in (source, labels, target + 0.5)))
    losses["loss"].backward()
    return {f"loss {key}": value.detach().numpy() for key, value in losses.items()} | averaged(objective)


def everything():
    found = {f"{kind} {key}": value for kind in SHAPES for key, value in batch_norm(kind).items()}
    return found | {f"{name} {key}": value for name in METHODS for key, value in adaptation(name).items()}


def failure(call):
    try:
        call()
    except IndexError as error:
        return str(error)


def talk():
    """What the processes tell each other."""
    rank = processes.rank()
    return {
        "gathered": processes.gathered(rank),
        "highest": processes.highest(3 - rank),
        "first": processes.on_first(lambda: 10 + rank),
        "each": processes.each(lambda: 20 + rank),
        "share": list(processes.share(range(5))),
        "fails in the first": failure(lambda: processes.on_first(lambda: [0][rank + 1])),
        "fails in the second": failure(lambda: processes.each(lambda: [0][rank])),
    }


if __name__ == "__main__":
    compute.accelerator(config.Compute(device="cpu", precision="fp32"))
    out = Path(sys.argv[1])
    np.savez(out / f"{processes.rank()}.npz", **everything())
    (out / f"{processes.rank()}.txt").write_text(repr(talk()))
