"""The one training loop. It knows nothing of images: it minimises ``objective(*batch)["loss"]``.

Nothing random in it has a state: before each step the generators are seeded with a function of the run's seed and the
step's place. A run that goes on from a stored place therefore draws what it would have drawn without a stop.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tlkit import processes
from tlkit.data.training import seed_of
from tlkit.errors import TlkitError
from tlkit.networks.depthwise import QuickDepthwise
from tlkit.networks.freezing import train_mode
from tlkit.networks.shared_batch_norm import SharedBatchNorm

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKED_EVERY = {"cpu": 1}
"""Steps between two looks at whether the loss is finite: on a GPU each look waits for the device."""
CHECKED_EVERY_ELSEWHERE = 16


class Batches(Protocol):
    """What the loop takes its batches from."""

    @property
    def steps(self) -> int:
        """Steps in an epoch."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch from step ``first`` on."""

    def weight(self, epoch: int, step: int) -> float:
        """What this process's mean loss counts for in a step, so that the mean over processes is the batch's."""


@dataclass
class Place:
    """How far a phase has come; whatever is done between two steps finds everything else to match.

    Args:
        epoch: Epochs finished.
        step: Steps done in the epoch that has begun.
        totals: Sums of the named losses over these steps, each of the whole batch.
        parts: Parts that each batch is computed in.
    """

    epoch: int = 0
    step: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    parts: int = 1


class Diverged(TlkitError):
    """The loss is nan or infinite."""


def fit(
    objective: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    *,
    accelerator: Accelerator,
    epochs: int,
    place: Place,
    seed: int,
    after_step: Callable[[], bool],
    after_epoch: Callable[[dict[str, float]], bool],
    before_step: Callable[[int], None] | None = None,
    average: Callable[[int], None] | None = None,
    clip: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Minimise ``objective(*batch)["loss"]``.

    A signal that arrives while a step is computed is held back until the step is whole, so that what ``place`` says and
    what weights and optimiser hold always belong together; elsewhere it interrupts at once.

    Args:
        objective: Maps a batch to named losses; prepared by ``accelerator``, as is ``optimizer``.
        batches: Of each epoch.
        optimizer: Its groups hold their highest rate as ``peak``.
        rate: Factor of the highest rate for each step, counted through all epochs.
        accelerator: Device, precision, processes.
        epochs: How many in all.
        place: Where to begin; moved on with every step.
        seed: Of whatever is random within a step (dropout, stochastic depth, mixing).
        after_step: Called between steps; returns True to end here.
        after_epoch: Called with the mean losses of an epoch that is finished but not yet counted; returns True to end.
        before_step: Called with the number of steps done before each, for what in the objective changes with them.
        average: Called with the number of steps done after each update.
        clip: Longest gradient.
        say: Told what a person should know.

    Raises:
        Diverged: The loss is nan or infinite.
        TlkitError: Not enough memory for a single sample, or for a batch whose samples the objective couples.
    """
    device = accelerator.device
    loop = _Loop(objective, optimizer, accelerator, clip, place, say)
    watch = _FiniteLoss(optimizer, CHECKED_EVERY.get(device.type, CHECKED_EVERY_ELSEWHERE))
    with after_the_first() as waiting:
        while place.epoch < epochs:
            train_mode(objective)
            stream = batches.epoch(place.epoch, place.step)
            with stopped_together(waiting) as stops:
                while place.step < batches.steps:
                    number = place.epoch * batches.steps + place.step
                    draw = seed_of(seed, number, accelerator.process_index)
                    seed_generators(device, draw)
                    batch = next(stream)
                    weight = batches.weight(place.epoch, place.step)
                    factor = rate(number)
                    if before_step is not None:
                        before_step(number)
                    with held_signals():
                        for group in optimizer.param_groups:
                            group["lr"] = group["peak"] * factor
                        losses = _of_all(loop.step(batch, weight, draw), weight, accelerator)
                        watch(number, losses["loss"])
                        for name, value in losses.items():
                            place.totals[name] = place.totals.get(name, 0) + value
                        if average is not None:
                            average(number + 1)
                        place.step += 1
                    if after_step() or stops():
                        return
            watch.look()
            ended = after_epoch({name: float((total / place.step).item()) for name, total in place.totals.items()})
            if ended:
                return


def _of_all(losses: dict[str, Tensor], weight: float, accelerator: Accelerator) -> dict[str, Tensor]:
    """Losses of a whole batch from those of this process's part of it."""
    if processes.count() == 1:
        return losses
    means = accelerator.reduce(torch.stack([value.float() * weight for value in losses.values()]), "mean")
    return dict(zip(losses, means.unbind(), strict=True))


@dataclass
class _Loop:
    """One step: forward and backward in as many parts as fit into memory, then the update."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    clip: float | None
    place: Place
    say: Callable[[str], None]
    told: bool = False

    def step(self, batch: tuple[Tensor, ...], weight: float, draw: int) -> dict[str, Tensor]:
        while True:
            try:
                losses = self._gradients(batch, weight)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(len(batch[0]), error)
            seed_generators(self.accelerator.device, draw)
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _gradients(self, batch: tuple[Tensor, ...], weight: float) -> dict[str, Tensor]:
        """Add the batch's gradients; returns its mean losses."""
        count = len(batch[0])
        least = int(count / weight + 1e-6)  # that any process has of this batch: all compute it in as many parts
        parts = max(1, min(self.place.parts, least // 2))  # of two samples at least, for batch norm's sake
        if parts == 1:
            losses = self._losses(batch)
            self.accelerator.backward(losses["loss"] * weight)
            return {name: value.detach() for name, value in losses.items()}
        whole: dict[str, Tensor] = {}
        for number, part in enumerate(zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)):
            last = number == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses, share = self._losses(part), len(part[0]) / count
                self.accelerator.backward(losses["loss"] * (weight * share))
            for name, value in losses.items():
                whole[name] = whole.get(name, 0) + value.detach() * share
        return whole

    def _losses(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        at = self.accelerator
        quick = at.device.type == "cpu" and at.mixed_precision == "bf16"
        several = processes.count() > 1
        with QuickDepthwise() if quick else nullcontext(), SharedBatchNorm() if several else nullcontext():
            return self.objective(*batch)

    def _halve(self, count: int, error: Exception) -> None:
        self.optimizer.zero_grad()
        parts, couples = self.place.parts, self.accelerator.unwrap_model(self.objective).couples_samples
        if couples or self.accelerator.num_processes > 1 or parts >= count // 2:
            why = "its objective compares the samples of a batch, which cannot be computed in parts" if couples else ""
            what = f"not enough memory for a batch of {count} in {parts} part{'s' if parts > 1 else ''}"
            raise TlkitError(
                f"{what}; {why}" if why else what, where=str(self.accelerator.device), remedy="lower --batch-size"
            ) from error
        if not self.told:
            self.say("not enough memory: each batch is computed in parts, which adds up to the same step")
            self.told = True
        self.place.parts = 2 * parts
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _FiniteLoss:
    """Notices a loss that is nan or infinite, and the step where it first was."""

    def __init__(self, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.optimizer, self.every = optimizer, every
        self.recent: list[tuple[int, Tensor]] = []

    def __call__(self, step: int, loss: Tensor) -> None:
        self.recent.append((step, loss))
        if len(self.recent) >= self.every:
            self.look()

    def look(self) -> None:
        if not self.recent:
            return
        losses = torch.stack([loss for _, loss in self.recent]).tolist()
        for (step, _), loss in zip(self.recent, losses, strict=True):
            if not math.isfinite(loss):
                rates = {group["stage"]: group["lr"] for group in self.optimizer.param_groups if "stage" in group}
                told = ", ".join(f"{name} {value:.2g}" for name, value in rates.items())
                raise Diverged(f"the loss became {loss} in step {step + 1}; rates: {told}")
        self.recent.clear()


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators that layers draw from.

    Not `torch.manual_seed`: it also seeds devices that nothing runs on, and on a machine without them remembers each
    call, with its stack, for the day when they come up.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


Arrived = list[tuple[int, Any]]
"""Signals that are held back, as their handlers would be called."""


@contextmanager
def after_the_first() -> Iterator[Arrived]:
    """Ctrl-C and SIGTERM to another process than the first wait for the next look of `stopped_together`.

    In the middle of an evaluation the first can stop at once: it stores the state by itself. Another one that did would
    leave it without a process that it needs.

    Yields:
        Those that have arrived.
    """
    if processes.is_first():
        yield []
        return
    with held_signals() as arrived:
        yield arrived


@contextmanager
def stopped_together(waiting: Arrived) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM, to whichever of several processes, take effect in all of them between the same two steps.

    A process that stopped by itself would leave the others in the middle of a step that cannot be finished without it.

    Args:
        waiting: What has arrived in `after_the_first`.

    Yields:
        To be called by all processes after each step; returns True where one of them is to stop: all then leave the
        context, at whose end the signal takes effect.
    """
    if processes.count() == 1:
        yield lambda: False
        return
    with held_signals() as arrived:

        def stops() -> bool:
            here = any(number in STOPS for number, _ in (*waiting, *arrived))
            wanted = bool(processes.highest(here))
            if wanted and not here:
                signal.raise_signal(signal.SIGTERM)
            return wanted

        yield stops


STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals() -> Iterator[Arrived]:
    """Ctrl-C and SIGTERM that arrive inside take effect at its end.

    Yields:
        Those that have arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []  # only the main thread is ever interrupted
        return
    # a decoding process that dies of the same signal raises in here, too
    held = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGCHLD") if hasattr(signal, name)]
    arrived: Arrived = []
    kept = {number: signal.signal(number, lambda *call: arrived.append(call)) for number in held}
    try:
        yield arrived
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    for number, frame in sorted(arrived, key=lambda call: held.index(call[0]))[:1]:
        handler = kept[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL and number != getattr(signal, "SIGCHLD", None):
            signal.raise_signal(number)
