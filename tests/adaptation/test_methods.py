"""Each method's loss against a computation of its own in float64, and that its gradient reaches the features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from tlkit import config
from tlkit.adaptation.adversarial import discriminator, domain_loss, ramp, reversed_gradient
from tlkit.adaptation.kernels import gaussian, median, mmd2, squared_distances
from tlkit.adaptation.method import Domains, chosen, method
from tlkit.errors import TlkitError

WIDTH, CLASSES = 6, 4
WITH_LOSS = [name for name in config.METHODS if method(name).loss is not None]


def made(seed: int = 0, sources: int = 9, targets: int = 7, shift: float = 1.0) -> Domains:
    """A step's features and logits, in float64, the target's shifted."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda rows, columns: torch.randn(rows, columns, generator=random, dtype=torch.float64)  # noqa: E731
    features = normal(sources, WIDTH), normal(targets, WIDTH) * 1.5 + shift
    logits = normal(sources, CLASSES) * 2, normal(targets, CLASSES) * 2
    labels = torch.randint(CLASSES, (sources,), generator=random)
    return Domains(*features, *logits, labels, progress=0.3)


def loss_of(name: str, domains: Domains) -> nn.Module:
    torch.manual_seed(0)
    make = method(name).loss
    assert make is not None
    return make(domains.source.shape[1], domains.source_logits.shape[1]).double().eval()


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def certain(shares: np.ndarray) -> np.ndarray:
    weights = 1 + np.exp((shares * np.log(shares)).sum(1))
    return weights / weights.mean()


def unbiased(kernel: np.ndarray, first: int) -> float:
    """MMD^2 by its definition: sums over pairs of different samples."""
    ours, others = range(first), range(first, len(kernel))
    alike = np.mean([kernel[i, j] for i in ours for j in ours if i != j])
    beyond = np.mean([kernel[i, j] for i in others for j in others if i != j])
    return float(alike + beyond - 2 * np.mean([kernel[i, j] for i in ours for j in others]))


def kernel_of(values: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
    apart = cdist(values, values, "sqeuclidean")
    pairs = np.sort(apart[np.triu_indices(len(apart), 1)])
    middle = pairs[(len(pairs) - 1) // 2]  # torch's median: the lower of two
    return np.mean([np.exp(-apart / (2 * factor * middle)) for factor in factors], axis=0)


def by_mmd(domains: Domains, loss: Any) -> float:
    both = torch.cat([domains.source, domains.target]).numpy()
    return unbiased(kernel_of(both, (0.125, 0.25, 0.5, 1, 2)), len(domains.source))


def by_jmmd(domains: Domains, loss: Any) -> float:
    both = torch.cat([domains.source, domains.target]).numpy()
    shares = softmax(torch.cat([domains.source_logits, domains.target_logits]).numpy())
    return unbiased(kernel_of(both, (0.125, 0.25, 0.5, 1, 2)) * kernel_of(shares, (1,)), len(domains.source))


def by_coral(domains: Domains, loss: Any) -> float:
    apart = np.cov(domains.source.numpy(), rowvar=False) - np.cov(domains.target.numpy(), rowvar=False)
    return float(np.linalg.norm(apart, "fro") ** 2 / (4 * WIDTH**2))


def judged(loss: Any, inputs: np.ndarray, sources: int, weights: np.ndarray) -> float:
    """Binary cross-entropy of the discriminator's layers, multiplied out."""
    values = inputs
    for layer in loss.discriminator:
        if isinstance(layer, nn.Linear):
            values = values @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        elif isinstance(layer, nn.BatchNorm1d):
            values = values / math.sqrt(1 + layer.eps)  # in evaluation, with the statistics that it begins with
        elif isinstance(layer, nn.ReLU):
            values = np.maximum(values, 0)
    logits = values[:, 0]
    losses = weights * np.where(np.arange(len(logits)) < sources, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
    return float((losses[:sources].mean() + losses[sources:].mean()) / 2)


def by_dann(domains: Domains, loss: Any) -> float:
    both = torch.cat([domains.source, domains.target]).numpy()
    return judged(loss, both, len(domains.source), np.ones(len(both)))


def by_cdan(domains: Domains, loss: Any) -> float:
    both = torch.cat([domains.source, domains.target]).numpy()
    shares = softmax(torch.cat([domains.source_logits, domains.target_logits]).numpy())
    products = np.stack([np.outer(one, other).ravel() for one, other in zip(both, shares, strict=True)])
    sources = len(domains.source)
    weights = np.concatenate([certain(shares[:sources]), certain(shares[sources:])])
    return judged(loss, products, sources, weights)


def by_mcc(domains: Domains, loss: Any) -> float:
    shares = softmax(domains.target_logits.numpy() / 2.5)
    weights, found = certain(shares), np.zeros((CLASSES, CLASSES))
    for one in range(CLASSES):
        for other in range(CLASSES):
            found[one, other] = sum(shares[:, one] * weights * shares[:, other])
    found /= found.sum(1, keepdims=True)
    return float((found.sum() - np.trace(found)) / CLASSES)


INDEPENDENT: dict[str, Callable[[Domains, Any], float]] = {
    "mmd": by_mmd,
    "jmmd": by_jmmd,
    "coral": by_coral,
    "dann": by_dann,
    "cdan": by_cdan,
    "mcc": by_mcc,
}


def test_every_method_with_a_loss_is_computed_twice() -> None:
    assert set(WITH_LOSS) == set(INDEPENDENT)


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_equals_its_independent_computation(name: str, seed: int) -> None:
    domains = made(seed)
    loss = loss_of(name, domains)
    assert loss(domains).item() == pytest.approx(INDEPENDENT[name](domains, loss), rel=1e-9)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_a_loss_reaches_what_it_adapts(name: str) -> None:
    """The gradient is there, and small steps along it lower the loss (raise it, where it is reversed)."""
    domains = made()
    of_logits = name == "mcc"
    varied = domains.target_logits if of_logits else domains.target
    varied = varied.clone().requires_grad_()
    seen = replace(domains, target_logits=varied) if of_logits else replace(domains, target=varied)
    loss = loss_of(name, domains)
    loss(seen).backward()
    assert varied.grad is not None
    assert varied.grad.abs().sum() > 1e-6
    step = 1e-4 * varied.grad / varied.grad.norm()
    with torch.no_grad():
        lower = varied - step
        moved = replace(domains, target_logits=lower) if of_logits else replace(domains, target=lower)
        change = float(loss(moved) - loss(domains))
    adversarial = name in ("dann", "cdan")
    assert change > 0 if adversarial else change < 0


@pytest.mark.parametrize("name", ["dann", "cdan"])
def test_reversed_gradients_are_those_of_finite_differences_turned_round(name: str) -> None:
    domains = made()
    loss = loss_of(name, domains)
    features = domains.target.clone().requires_grad_()
    loss(replace(domains, target=features)).backward()
    assert features.grad is not None
    factor = -(2 / (1 + math.exp(-10 * domains.progress)) - 1)
    for row, column in ((0, 0), (3, 5), (6, 2)):
        values, step = [], 1e-6
        for sign in (1, -1):
            moved = domains.target.clone()
            moved[row, column] += sign * step
            with torch.no_grad():
                values.append(float(loss(replace(domains, target=moved))))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(features.grad[row, column]) == pytest.approx(factor * slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["dann", "cdan"])
def test_the_discriminator_itself_learns_to_tell_domains_apart(name: str) -> None:
    """Behind the reversal its own gradient is the plain one: a step along it lowers its loss, at any progress."""
    domains = replace(made(), progress=0.0)
    loss = loss_of(name, domains)
    before = loss(domains)
    before.backward()
    with torch.no_grad():
        for parameter in loss.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-3 * parameter.grad)
    assert loss(domains).item() < before.item()


def test_at_the_beginning_nothing_is_reversed() -> None:
    features = torch.ones(3, requires_grad=True)
    reversed_gradient(features, ramp(0.0)).sum().backward()
    assert features.grad is not None and not features.grad.abs().any()
    assert ramp(0.0) == 0
    assert ramp(0.5) == pytest.approx(math.tanh(2.5))  # 2 / (1 + exp(-x)) - 1 = tanh(x / 2)
    assert 0.9999 < ramp(1.0) < 1


def test_cdan_projects_many_products_at_random_and_keeps_their_inner_products() -> None:
    torch.manual_seed(0)
    make = method("cdan").loss
    assert make is not None
    loss: Any = make(500, 10)
    features, shares = torch.randn(40, 500), torch.rand(40, 10).softmax(1)
    exact = (features[:, :, None] * shares[:, None]).flatten(1)
    projected = loss.products(features, shares)
    assert projected.shape == (40, 1024)
    assert exact.shape[1] > 4096
    gram, estimate = exact @ exact.T, projected @ projected.T
    relative = (estimate.diagonal() / gram.diagonal()).mean()
    assert float(relative) == pytest.approx(1, abs=0.1)
    assert torch.corrcoef(torch.stack([gram.flatten(), estimate.flatten()]))[0, 1] > 0.9


def test_the_discrepancy_of_gaussians_is_near_its_closed_form() -> None:
    """E k of N(m, s^2 I) and N(m', s^2 I) is (v / (v + 2 s^2))^(D/2) exp(-|m - m'|^2 / (2 v + 4 s^2)).

    A Gaussian integral; k is exp(-d^2 / (2 v)).
    """
    dimensions, variance, spread, apart, count = 3, 2.0, 0.8, 1.2, 3000

    def expected(distance: float) -> float:
        whole = variance + 2 * spread**2
        return (variance / whole) ** (dimensions / 2) * math.exp(-(distance**2) / (2 * whole))

    truth = 2 * expected(0) - 2 * expected(apart)
    random = torch.Generator().manual_seed(3)
    source = spread * torch.randn(count, dimensions, generator=random, dtype=torch.float64)
    target = spread * torch.randn(count, dimensions, generator=random, dtype=torch.float64)
    target[:, 0] += apart
    kernel = gaussian(squared_distances(torch.cat([source, target])), variance, (1.0,))
    assert float(mmd2(kernel, count)) == pytest.approx(truth, rel=0.03)


def test_the_estimate_is_unbiased() -> None:
    """Of samples of one distribution it is 0 on average, however few they are, and so sometimes below."""
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        both = torch.randn(10, 2, generator=random, dtype=torch.float64)
        found.append(float(mmd2(gaussian(squared_distances(both), 2.0, (1.0,)), 4)))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0


def test_distances_of_equal_rows_do_not_spoil_the_kernel() -> None:
    alike = torch.ones(6, 3, requires_grad=True)
    apart = squared_distances(alike)
    value = mmd2(gaussian(apart, median(apart)), 3)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert alike.grad is not None and torch.isfinite(alike.grad).all()


def test_both_domains_count_for_a_half() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0])
    loss = domain_loss(logits, 1)
    wanted = (math.log(2) + math.log1p(math.exp(5))) / 2
    assert float(loss) == pytest.approx(wanted, rel=1e-6)


def test_a_discriminator_gives_one_logit_an_image() -> None:
    found: Tensor = discriminator(5)(torch.randn(7, 5))
    assert found.shape == (7,)


def test_methods_are_found_by_their_files() -> None:
    assert chosen("all") == list(config.METHODS)
    assert chosen("all")[0] == "source-only"
    assert chosen(" mcc, dann ,mcc") == ["mcc", "dann"]
    for name in config.METHODS:
        assert method(name).paper


@pytest.mark.parametrize(
    ("text", "told"),
    [("dan", "did you mean 'dann'"), ("zzz", "source-only, adabn"), (" , ", "names no method")],
)
def test_an_unknown_method_is_refused(text: str, told: str) -> None:
    with pytest.raises(TlkitError, match="method") as caught:
        chosen(text)
    assert told in str(caught.value)
