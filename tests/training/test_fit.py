"""The loop: against a loop written out, from any place on, in parts, under signals, and with a loss that leaves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlkit import compute, config
from tlkit.errors import TlkitError
from tlkit.training import fit as fit_module
from tlkit.training.fit import Diverged, Place, fit, held_signals

STEPS, SIZE, EPOCHS = 4, 6, 3
unix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals are of Unix")


class Noise:
    """Batches that are a function of epoch and step."""

    steps = STEPS

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        for step in range(first, self.steps):
            random = torch.Generator().manual_seed(100 * epoch + step)
            yield torch.randn(SIZE, 5, generator=random), torch.randn(SIZE, 2, generator=random)

    def weight(self, epoch: int, step: int) -> float:
        return 1.0


class Squares(nn.Module):
    """Least squares; ``before`` is called with each part of a batch, and may raise."""

    couples_samples = False

    def __init__(self, dropout: float = 0.0, before: Callable[[Tensor], None] = lambda _: None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.before = before

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.before(inputs)
        error = (self.network(inputs) - targets).square().mean()
        return {"loss": error, "twice": 2 * error.detach()}


class Run:
    """One call of `fit` on `Squares`, with what it told."""

    def __init__(self, objective: Squares | None = None, momentum: float = 0.9) -> None:
        self.objective = objective or Squares()
        groups = [{"params": list(self.objective.parameters()), "lr": 0.0, "peak": 0.1, "stage": "all"}]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum)
        self.place, self.said, self.means, self.rates, self.averaged = Place(), [], [], [], []  # type: ignore[var-annotated]
        self.stop_at: int | None = None

    def fit(self, **given: Any) -> Run:
        accelerator = compute.accelerator(config.Compute(device="cpu", precision="fp32"))
        prepared, optimizer = accelerator.prepare(self.objective, self.optimizer)

        def after_step() -> bool:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            return self.place.epoch * STEPS + self.place.step == self.stop_at

        def after_epoch(means: dict[str, float]) -> bool:
            self.means.append(means)
            self.place.epoch, self.place.step, self.place.totals = self.place.epoch + 1, 0, {}
            return False

        options: dict[str, Any] = {
            "accelerator": accelerator,
            "epochs": EPOCHS,
            "place": self.place,
            "seed": 5,
            "after_step": after_step,
            "after_epoch": after_epoch,
            "average": self.averaged.append,
            "say": self.said.append,
        }
        fit(prepared, Noise(), optimizer, lambda step: 1 / (1 + step), **options | given)
        return self

    @property
    def weights(self) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in self.objective.parameters()])


def written_out(steps: int = EPOCHS * STEPS, clip: float | None = None) -> tuple[Tensor, list[float]]:
    """Stochastic gradient descent with momentum by its formula, without any of the package."""
    objective, losses = Squares(), []
    memory = [torch.zeros_like(tensor) for tensor in objective.parameters()]
    for step in range(steps):
        batch = next(Noise().epoch(step // STEPS, step % STEPS))
        loss = objective(*batch)["loss"]
        gradients = torch.autograd.grad(loss, list(objective.parameters()))
        if clip is not None:
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            gradients = tuple(gradient * min(1.0, clip / float(norm)) for gradient in gradients)
        with torch.no_grad():
            for tensor, gradient, mean in zip(objective.parameters(), gradients, memory, strict=True):
                mean.mul_(0.9).add_(gradient)
                tensor.sub_(0.1 / (1 + step) * mean)
        losses.append(loss.item())
    return torch.cat([tensor.detach().flatten() for tensor in objective.parameters()]), losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_is_gradient_descent(clip: float | None) -> None:
    run = Run().fit(clip=clip)
    weights, losses = written_out(clip=clip)
    torch.testing.assert_close(run.weights, weights, rtol=1e-5, atol=1e-6)
    assert run.rates == pytest.approx([0.1 / (1 + step) for step in range(EPOCHS * STEPS)])
    means = [sum(losses[STEPS * epoch : STEPS * (epoch + 1)]) / STEPS for epoch in range(EPOCHS)]
    assert [row["loss"] for row in run.means] == pytest.approx(means, rel=1e-5)
    assert [row["twice"] for row in run.means] == pytest.approx([2 * mean for mean in means], rel=1e-5)
    assert run.averaged == list(range(1, EPOCHS * STEPS + 1))


@pytest.mark.parametrize("place", range(1, EPOCHS * STEPS))
def test_it_goes_on_from_any_place_as_if_it_had_not_stopped(place: int) -> None:
    """Dropout and momentum included: nothing random has a state beyond the place."""
    whole = Run(Squares(dropout=0.5)).fit()
    first = Run(Squares(dropout=0.5))
    first.stop_at = place
    first.fit()
    assert first.place.epoch * STEPS + first.place.step == place
    torch.rand(place)  # whatever the generator was used for in between
    second = Run(Squares(dropout=0.5))
    second.objective.load_state_dict(first.objective.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.place = Place(first.place.epoch, first.place.step, dict(first.place.totals))
    second.fit()
    assert torch.equal(second.weights, whole.weights)
    assert first.means + second.means == whole.means


@pytest.mark.parametrize("place", [0, STEPS + 1])
def test_before_each_step_it_says_how_many_are_done(place: int) -> None:
    """Counted through all epochs, also where it goes on from a place: ramps are functions of that alone."""
    run, told = Run(), []
    run.place.epoch, run.place.step = divmod(place, STEPS)
    run.fit(before_step=lambda step: told.append((step, len(run.rates))))
    assert told == [(step, step - place) for step in range(place, EPOCHS * STEPS)]


def test_it_ends_when_told_to_after_an_epoch() -> None:
    run = Run()

    def end(_: object) -> bool:
        run.place.epoch += 1
        return True

    run.fit(after_epoch=end)
    assert (run.place.epoch, len(run.rates)) == (1, STEPS)


# Memory


def at_most(count: int, error: Callable[[], Exception]) -> Callable[[Tensor], None]:
    def refuse(inputs: Tensor) -> None:
        if len(inputs) > count:
            raise error()

    return refuse


ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(("fits", "parts"), [(5, 2), (3, 2), (2, 4)])
def test_what_does_not_fit_is_computed_in_parts_that_add_up(
    error: Callable[[], Exception], fits: int, parts: int
) -> None:
    run = Run(Squares(before=at_most(fits, error))).fit()
    assert run.place.parts == parts
    torch.testing.assert_close(run.weights, Run().fit().weights, rtol=1e-5, atol=1e-6)
    for row, whole in zip(run.means, Run().fit().means, strict=True):
        assert row == pytest.approx(whole, rel=1e-5)
    assert len(run.said) == 1 and "computed in parts" in run.said[0], "said once"


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_gradients_behind() -> None:
    run, failed = Run(), []

    def out_of_memory(gradient: Tensor) -> Tensor:
        if not failed and run.place.epoch * STEPS + run.place.step == 5:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient

    next(run.objective.parameters()).register_hook(out_of_memory)  # the last gradient: the others are there already
    run.fit()
    assert failed
    torch.testing.assert_close(run.weights, Run().fit().weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fits", [0, 1])
def test_what_does_not_fit_at_all_is_told(fits: int) -> None:
    run = Run(Squares(before=at_most(fits, ERRORS["gpu"])))
    with pytest.raises(TlkitError, match="not enough memory for a batch of 6 in 4 parts; lower --batch-size"):
        run.fit()
    assert (run.place.epoch, run.place.step) == (0, 0)


def test_samples_that_are_compared_with_each_other_are_not_taken_apart() -> None:
    run = Run(Squares(before=at_most(3, ERRORS["gpu"])))
    run.objective.couples_samples = True
    with pytest.raises(TlkitError, match=r"compares the samples of a batch.*lower --batch-size"):
        run.fit()
    assert run.said == [] and run.place.parts == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Run(Squares(before=at_most(1, lambda: RuntimeError("shapes cannot be multiplied")))).fit()


# A loss that leaves for good


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("every", [1, 3, 16])
def test_a_loss_that_is_not_finite_ends_it_with_step_and_rates(
    monkeypatch: pytest.MonkeyPatch, bad: float, every: int
) -> None:
    """However seldom the loop looks, as on a GPU: the step is the first one where it happened."""
    monkeypatch.setattr(fit_module, "CHECKED_EVERY", {"cpu": every})
    run = Run()

    def spoil(inputs: Tensor) -> None:
        if run.place.epoch * STEPS + run.place.step == 5:
            inputs.mul_(bad)

    run.objective.before = spoil
    with pytest.raises(Diverged, match=r"the loss became (nan|inf) in step 6; rates: all 0\.0"):
        run.fit()


# Signals


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """Signals whose handler has run."""
    found: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, lambda number, _: found.append(number))
    yield found
    for number, handler in kept.items():
        signal.signal(number, handler)


@unix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_held_signal_takes_effect_at_the_end(caught: list[int], number: int) -> None:
    handler = signal.getsignal(number)
    with held_signals():
        os.kill(os.getpid(), number)
        for _ in range(1000):
            pass
        assert caught == []
    assert caught == [number]
    assert signal.getsignal(number) is handler
    os.kill(os.getpid(), number)
    assert caught == [number] * 2, "and at once from then on"


@unix
def test_ctrl_c_becomes_an_interruption_after_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("inside")
        done.append("after")
    assert done == ["inside"]


@unix
def test_blocks_within_each_other_hold_to_the_end_of_the_outer_one(caught: list[int]) -> None:
    with held_signals():
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == []
    assert caught == [signal.SIGINT]


@unix
def test_an_error_inside_wins_over_the_signal(caught: list[int]) -> None:
    with pytest.raises(ValueError, match="mine"), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("mine")
    assert caught == []
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_another_thread_holds_nothing() -> None:
    found = []

    def work() -> None:
        with held_signals():
            found.append(signal.getsignal(signal.SIGINT))

    kept = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [kept]


@unix
@pytest.mark.parametrize("at", range(EPOCHS * STEPS))
def test_a_signal_within_a_step_leaves_everything_consistent(at: int) -> None:
    """Place, weights, momentum and sums are those after the whole step, from which the loop goes on exactly."""
    run = Run()

    def interrupt(_: Tensor) -> None:
        if run.place.epoch * STEPS + run.place.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    run.objective.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.place.epoch * STEPS + run.place.step == at + 1
    assert run.averaged == list(range(1, at + 2))
    whole = Run()
    whole.stop_at = at + 1
    whole.fit()
    assert torch.equal(run.weights, whole.weights)
    assert {name: float(total) for name, total in run.place.totals.items()} == {
        name: float(total) for name, total in whole.place.totals.items()
    }
    memory, same = (
        [entry["momentum_buffer"] for entry in one.optimizer.state_dict()["state"].values()] for one in (run, whole)
    )
    assert all(torch.equal(mine, other) for mine, other in zip(memory, same, strict=True))
