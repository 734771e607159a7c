"""One step of adaptation: one pass for both domains, and what is learnt from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from tlkit.adaptation.inputs import DomainBatches, Vectors, refuse_too_few
from tlkit.adaptation.method import method
from tlkit.adaptation.objective import Adaptation, Head, Whole
from tlkit.errors import TlkitError
from tlkit.networks.bottleneck import add_bottleneck


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return timm.create_model("lenet", num_classes=3)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    source, target = (torch.randn(6, 3, 28, 28, generator=random) for _ in range(2))
    return source, torch.tensor([0, 1, 2, 0, 1, 2]), target + 1


def test_both_domains_go_through_one_pass(network: Any) -> None:
    """Batch norm's statistics are those of both together, and it is given one batch."""
    seen = []
    network.features.norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    source, labels, target = inputs()
    loss = method("mcc").loss
    assert loss is not None
    Adaptation(Whole(network), loss(500, 3), 1.0)(source, labels, target)
    assert seen == [12]


def test_without_a_loss_the_target_is_not_seen(network: Any) -> None:
    source, labels, target = inputs()
    network.eval()
    alone = Adaptation(Whole(network), None, 1.0)
    found = alone(source, labels, target)
    assert set(found) == {"loss", "task"}
    assert found["loss"].item() == pytest.approx(F.cross_entropy(network(source), labels).item(), rel=1e-5)
    assert alone(source, labels, target * 100)["loss"].item() == found["loss"].item()


def test_the_losses_add_up_by_their_weight(network: Any) -> None:
    source, labels, target = inputs()
    network.eval()
    make = method("mmd").loss
    assert make is not None
    found = Adaptation(Whole(network), make(500, 3), 2.5)(source, labels, target)
    assert found["loss"].item() == pytest.approx((found["task"] + 2.5 * found["transfer"]).item(), rel=1e-6)


def test_the_progress_is_what_ramps_are_functions_of(network: Any) -> None:
    source, labels, target = inputs()
    make = method("dann").loss
    assert make is not None
    loss = make(500, 3)

    def gradient(weight: float, progress: float) -> torch.Tensor:
        objective = Adaptation(Whole(network), loss, weight).eval()
        objective.progress = progress
        objective.zero_grad()
        objective(source, labels, target)["loss"].backward()
        return network.features.conv1.weight.grad.clone()

    assert torch.allclose(gradient(1.0, 0.0), gradient(0.0, 0.0), atol=1e-7)
    assert (gradient(1.0, 0.5) - gradient(0.0, 0.5)).abs().max() > 1e-5


def test_a_head_on_features_is_the_network_behind_them(network: Any) -> None:
    add_bottleneck(network, 16)
    network.eval()
    images = inputs()[0]
    plain = copy.deepcopy(network)
    with torch.no_grad():
        pooled = type(plain).__mro__[1].forward_head(plain, plain.forward_features(images), pre_logits=True)  # type: ignore[attr-defined]
        features, logits = Head(network)(pooled)
        whole_features, whole_logits = Whole(network)(images)
    assert torch.allclose(logits, network(images), atol=1e-5)
    assert torch.allclose(features, whole_features, atol=1e-5)
    assert torch.allclose(logits, whole_logits, atol=1e-5)
    assert features.shape == (6, 16)


def domains(source: int, target: int, each: int, balanced: bool = False) -> tuple[DomainBatches, torch.Tensor]:
    labels = torch.arange(source) % 2 if not balanced else (torch.arange(source) == 0).long()
    first = Vectors(torch.arange(source).float()[:, None].numpy(), labels.numpy(), torch.device("cpu"))
    second = Vectors(
        torch.arange(target).float()[:, None].numpy(), torch.zeros(target).long().numpy(), torch.device("cpu")
    )
    rows = torch.arange(source).numpy(), torch.arange(target).numpy()
    made = DomainBatches(
        first, second, rows[0], labels.numpy(), rows[1], each=each, epochs=3, seed=0, balanced=balanced
    )
    return made, labels


@pytest.mark.parametrize(("source", "target"), [(20, 7), (7, 20), (10, 10)])
def test_steps_have_as_many_images_of_each_domain(source: int, target: int) -> None:
    batches, labels = domains(source, target, 4)
    assert batches.steps == max(source, target) // 4
    seen: dict[str, list[float]] = {"source": [], "target": []}
    for epoch in range(3):
        steps = list(batches.epoch(epoch))
        assert len(steps) == batches.steps
        for inputs, truth, others in steps:
            assert inputs.shape == others.shape == (4, 1)
            assert truth.tolist() == labels[inputs[:, 0].long()].tolist()
            seen["source"] += inputs[:, 0].tolist()
            seen["target"] += others[:, 0].tolist()
    for name, count in (("source", source), ("target", target)):
        rounds, rest = divmod(len(seen[name]), count)
        for number in range(rounds):  # whole times through the domain, one after another
            assert sorted(seen[name][number * count : (number + 1) * count]) == list(range(count))
        assert len(set(seen[name][len(seen[name]) - rest :])) == rest


def test_an_epoch_can_be_taken_up_in_its_middle() -> None:
    batches, _ = domains(20, 7, 4)
    whole = [tuple(part.tolist() for part in step) for step in batches.epoch(1)]
    rest = [tuple(part.tolist() for part in step) for step in domains(20, 7, 4)[0].epoch(1, 2)]
    assert rest == whole[2:]


def test_classes_can_be_drawn_evenly() -> None:
    batches, labels = domains(20, 20, 4, balanced=True)
    drawn = torch.cat([truth for epoch in range(3) for _, truth, _ in batches.epoch(epoch)])
    assert labels.sum() == 1
    assert float(drawn.float().mean()) == pytest.approx(0.5, abs=0.05)


def test_too_few_images_are_refused_with_what_would_do() -> None:
    refuse_too_few(8, 8, "folder")
    with pytest.raises(
        TlkitError, match=r"folder: has 7 images, and a step takes 8 of each domain; give --batch-size 14"
    ):
        refuse_too_few(7, 8, "folder")
    with pytest.raises(TlkitError, match="give more images"):
        refuse_too_few(1, 8, "folder")
