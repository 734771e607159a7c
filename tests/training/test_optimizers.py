"""Parameter groups and optimisers: everything that trains in one group each, and steps by the formula."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import list_optimizers

from tlkit.errors import TlkitError
from tlkit.networks.freezing import freeze
from tlkit.networks.stages import stages
from tlkit.training.optimizers import check_name, create_optimizer, parameter_groups

NETWORKS = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "test_byobnet",
    "resnet18",
    "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "coat_lite_tiny",
    "levit_128s",
]


def make(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3)


def rates_of(network: Any) -> dict[str, float]:
    """A rate for each stage, no two alike."""
    return {stage.name: 0.01 * (number + 1) for number, stage in enumerate(stages(network))}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("frozen", [0, 2])
def test_all_that_trains_is_in_one_group(name: str, frozen: int) -> None:
    network = make(name)
    freeze(network, [stage.name for stage in stages(network)[:frozen]])
    rates = {stage.name: rate for stage, rate in zip(stages(network), rates_of(network).values(), strict=True)}
    for stage in stages(network)[:frozen]:
        del rates[stage.name]  # of what is frozen none is asked for
    groups = parameter_groups(network, rates, 0.05)
    names = {id(tensor): key for key, tensor in network.named_parameters()}
    found = [names[id(tensor)] for group in groups for tensor in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {key for key, tensor in network.named_parameters() if tensor.requires_grad}

    stage_of = {key: stage.name for stage in stages(network) for key in stage.parameters}
    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    assert {group["stage"] for group in groups} == set(rates)
    for group in groups:
        assert group["params"]
        assert group["lr"] == group["peak"] == rates[group["stage"]]
        for tensor in group["params"]:
            key = names[id(tensor)]
            assert stage_of[key] == group["stage"]
            assert group["weight_decay"] == (0.0 if tensor.ndim <= 1 or key in exempt else 0.05), key


def test_a_vits_embeddings_do_not_decay() -> None:
    network = make("vit_tiny_patch16_224")
    groups = parameter_groups(network, rates_of(network), 0.05)
    decays = {id(tensor): group["weight_decay"] for group in groups for tensor in group["params"]}
    for key in ("pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"):
        assert decays[id(network.get_parameter(key))] == 0
    for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"):
        assert decays[id(network.get_parameter(key))] == 0.05


def losses_gradient(network: Any) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(network.train()(images), torch.tensor([0, 1, 2, 0])).backward()


def test_sgd_is_its_formula() -> None:
    """v <- mu v + (g + lambda w); w <- w - alpha v, twice, with each group's own alpha and lambda."""
    network = make("test_resnet")
    groups = parameter_groups(network, rates_of(network), 0.1)
    optimizer = create_optimizer("sgd", groups, momentum=0.9)
    own = {id(tensor): (group["lr"], group["weight_decay"]) for group in groups for tensor in group["params"]}
    velocity = {key: torch.zeros_like(tensor) for key, tensor in network.named_parameters()}
    for _ in range(2):
        losses_gradient(network)
        expected = {}
        for key, tensor in network.named_parameters():
            rate, decay = own[id(tensor)]
            velocity[key] = 0.9 * velocity[key] + tensor.grad + decay * tensor.detach()
            expected[key] = tensor.detach() - rate * velocity[key]
        optimizer.step()
        optimizer.zero_grad()
        for key, tensor in network.named_parameters():
            torch.testing.assert_close(tensor.detach(), expected[key], rtol=1e-5, atol=1e-7)


def test_adamw_is_its_formula() -> None:
    """Its first step: w <- w - alpha lambda w - alpha g / (|g| + eps)."""
    network = make("test_resnet")
    groups = parameter_groups(network, rates_of(network), 0.1)
    optimizer = create_optimizer("adamw", groups, momentum=0.9)
    assert type(optimizer) is torch.optim.AdamW
    own = {id(tensor): (group["lr"], group["weight_decay"]) for group in groups for tensor in group["params"]}
    losses_gradient(network)
    expected = {}
    for key, tensor in network.named_parameters():
        rate, decay = own[id(tensor)]
        expected[key] = tensor.detach() * (1 - rate * decay) - rate * tensor.grad / (tensor.grad.abs() + 1e-8)
    optimizer.step()
    for key, tensor in network.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[key], rtol=1e-4, atol=1e-6)


ELSEWHERE = ("bnb", "fused")
"""Beginnings of the names of optimisers that need another package and a GPU."""
TIMMS = [name for name in list_optimizers() if not name.startswith((*ELSEWHERE, "adahessian", "kron"))]


@pytest.mark.parametrize("name", ["sgd", "adamw", *TIMMS])
def test_every_optimiser_of_timms_keeps_rates_and_decay(name: str) -> None:
    network = make("test_resnet")
    groups = parameter_groups(network, rates_of(network), 0.1)
    wanted = [(group["stage"], group["peak"], group["weight_decay"], len(group["params"])) for group in groups]
    optimizer = create_optimizer(name, groups, momentum=0.8)
    found = optimizer.param_groups
    assert [(g["stage"], g["lr"], g["weight_decay"], len(g["params"])) for g in found] == [
        (stage, rate, decay, count) for stage, rate, decay, count in wanted
    ]
    if "momentum" in found[0] and isinstance(found[0]["momentum"], float) and name != "adadelta":
        assert found[0]["momentum"] == 0.8


def test_sgd_has_plain_momentum() -> None:
    network = make("test_resnet")
    for name, expected in (("sgd", False), ("momentum", False), ("nesterov", True)):
        groups = parameter_groups(network, rates_of(network), 0.1)
        assert create_optimizer(name, groups, 0.9).param_groups[0]["nesterov"] == expected


def test_values_that_an_optimiser_refuses_are_told() -> None:
    network = make("test_resnet")
    with pytest.raises(TlkitError, match="--optimizer: nesterov refuses: Nesterov momentum requires a momentum"):
        create_optimizer("nesterov", parameter_groups(network, rates_of(network), 0.1), 0.0)


def test_corrected_decay_is_that_of_each_stages_highest_rate() -> None:
    """lr^2 / highest lr: what decays by lr * decay at the highest rate, in each stage."""
    network = make("test_resnet")
    groups = parameter_groups(network, rates_of(network), 0.1)
    optimizer = create_optimizer("sgdc", groups, momentum=0.9)
    before = {id(tensor): tensor.detach().clone() for tensor in network.parameters()}
    for tensor in network.parameters():
        tensor.grad = torch.zeros_like(tensor)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * 0.5
    optimizer.step()
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            factor = 1 - 0.25 * group["peak"] * group["weight_decay"]
            torch.testing.assert_close(tensor.detach(), before[id(tensor)] * factor)


@pytest.mark.parametrize(
    ("name", "remedy"), [("adamwx", "did you mean"), ("sdg", "'sgd'"), ("???", "use sgd, adamw, or one of timm")]
)
def test_an_unknown_name_is_refused(name: str, remedy: str) -> None:
    for call in (check_name, lambda name: create_optimizer(name, [], 0.9)):
        with pytest.raises(TlkitError, match=rf"--optimizer: unknown optimiser '{name.replace('?', '.')}'") as caught:
            call(name)
        assert remedy in caught.value.remedy


def test_optimisers_that_cannot_run_here_are_refused() -> None:
    with pytest.raises(TlkitError, match="unknown optimiser 'adahessian'"):
        check_name("adahessian")
    if not torch.cuda.is_available():
        with pytest.raises(TlkitError, match="--optimizer: fusedadam cannot be used here"):
            check_name("fusedadam")


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon", "lamb", "adopt"])
def test_known_names(name: str) -> None:
    check_name(name)
