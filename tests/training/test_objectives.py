"""The training objective against PyTorch's losses, closed forms, and itself in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkit.training.objectives import Supervised


def network(seed: int = 0) -> nn.Sequential:
    """A body (``0``) and a head (``2``)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(count: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count,), generator=generator)


def soft(count: int = 7) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(2)).softmax(1)


WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_its_formula_and_pytorchs(smoothing: float) -> None:
    made, (images, labels) = network(), batch()
    found = Supervised(made, label_smoothing=smoothing)(images, labels)
    logits = made(images).float()
    targets = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    closed = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert found.keys() == {"loss"}
    torch.testing.assert_close(found["loss"], closed)
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, labels, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_are_cross_entropy(smoothing: float) -> None:
    made, (images, _) = network(), batch()
    targets = (1 - smoothing) * soft() + smoothing / 3
    expected = -(targets * made(images).float().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Supervised(made, label_smoothing=smoothing)(images, soft())["loss"], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_soft_labels_that_are_certain_are_labels(smoothing: float, weights: Tensor | None) -> None:
    (images, labels), objective = batch(), Supervised(network(), label_smoothing=smoothing, class_weights=weights)
    certain = F.one_hot(labels, 3).float()
    torch.testing.assert_close(objective(images, certain)["loss"], objective(images, labels)["loss"])


def test_class_weights_weigh_each_image_by_its_class() -> None:
    made, (images, labels) = network(), batch()
    each = F.cross_entropy(made(images).float(), labels, reduction="none")
    objective = Supervised(made, class_weights=WEIGHTS)
    by_hand = sum(WEIGHTS[label] * loss for label, loss in zip(labels, each, strict=True)) / len(labels)
    torch.testing.assert_close(objective(images, labels)["loss"], by_hand)
    # PyTorch divides by the sum of the weights instead
    theirs = F.cross_entropy(made(images).float(), labels, WEIGHTS)
    torch.testing.assert_close(objective(images, labels)["loss"], theirs * WEIGHTS[labels].sum() / len(labels))
    expected = (soft() @ WEIGHTS * F.cross_entropy(made(images).float(), soft(), reduction="none")).mean()
    torch.testing.assert_close(objective(images, soft())["loss"], expected)
    assert "class_weights" not in objective.state_dict()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weights": WEIGHTS}, {"anchor": 0.3}])
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 5], [2, 2, 2, 1]])
def test_parts_weighted_by_size_add_up_to_the_batch(options: dict[str, Any], sizes: list[int]) -> None:
    """Loss and gradients; also where the parts' classes, and so their weights, differ."""
    (images, labels), made = batch(), network()
    anchored = {name: tensor.detach() + 1 for name, tensor in made.named_parameters()}
    objective = Supervised(made, **options, anchored=anchored)
    whole = objective(images, labels)["loss"]
    expected = torch.autograd.grad(whole, list(made.parameters()))
    parts = [
        objective(*part)["loss"] * (len(part[0]) / 7)
        for part in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), list(made.parameters())), expected)


def anchored_objective(
    anchor: float, names: list[str], frozen: tuple[str, ...] = ()
) -> tuple[Supervised, dict[str, Tensor]]:
    made = network()
    starts = {name: tensor.detach().clone() for name, tensor in made.named_parameters() if name in names}
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(0.1 * (number + 1))
    for name in frozen:
        made.get_parameter(name).requires_grad_(False)
    return Supervised(made, anchor=anchor, anchored=starts), starts


BODY = ["0.weight", "0.bias"]


def test_anchor_is_l2_sp() -> None:
    """alpha / 2 * |w - w0|^2, whose gradient is alpha * (w - w0); the head is not pulled."""
    objective, starts = anchored_objective(0.25, BODY)
    plain = Supervised(objective.network)
    images, labels = batch()
    found = objective(images, labels)
    distance = sum((objective.network.get_parameter(name) - start).square().sum() for name, start in starts.items())
    assert found.keys() == {"loss", "task", "anchor"}
    torch.testing.assert_close(found["anchor"], 0.25 / 2 * distance.detach())
    assert found["anchor"].item() == pytest.approx(0.25 / 2 * (30 * 0.1**2 + 5 * 0.2**2))
    torch.testing.assert_close(found["task"], plain(images, labels)["loss"].detach())
    torch.testing.assert_close(found["loss"].detach(), (found["task"] + found["anchor"]))
    assert not found["task"].requires_grad and not found["anchor"].requires_grad

    names = [name for name, _ in objective.network.named_parameters()]
    parameters = list(objective.network.parameters())
    pulled = torch.autograd.grad(found["loss"], parameters)
    free = torch.autograd.grad(plain(images, labels)["loss"], parameters)
    for name, parameter, with_pull, without in zip(names, parameters, pulled, free, strict=True):
        expected = 0.25 * (parameter - starts[name]).detach() if name in BODY else torch.zeros_like(parameter)
        torch.testing.assert_close(with_pull - without, expected, rtol=1e-5, atol=1e-7)


def test_what_is_frozen_is_not_pulled() -> None:
    objective, _ = anchored_objective(0.25, BODY, frozen=("0.weight",))
    assert objective(*batch())["anchor"].item() == pytest.approx(0.25 / 2 * 5 * 0.2**2)
    objective, _ = anchored_objective(0.25, BODY, frozen=tuple(BODY))
    assert objective(*batch()).keys() == {"loss"}


def test_no_anchor_no_pull() -> None:
    objective, _ = anchored_objective(0.0, BODY)
    assert objective(*batch()).keys() == {"loss"}


def test_the_loss_is_computed_in_float32() -> None:
    made = network().bfloat16()
    images, labels = batch()
    assert Supervised(made)(images.bfloat16(), labels)["loss"].dtype == torch.float32
    assert not Supervised.couples_samples
