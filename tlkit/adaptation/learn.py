"""One adaptation, with one method and one seed: trains, measures each epoch, keeps the one that is chosen."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlkit import compute, config, processes
from tlkit.adaptation import selection
from tlkit.adaptation.inputs import DomainBatches, Inputs
from tlkit.adaptation.method import Method
from tlkit.adaptation.objective import Adaptation
from tlkit.errors import InputLost, TlkitError
from tlkit.evaluation.metrics import metrics
from tlkit.networks.frozen_pass import How
from tlkit.training.checkpoint import (
    Checkpoint,
    Due,
    optimizer_state,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from tlkit.training.fit import Diverged, Place, fit, held_signals
from tlkit.training.optimizers import create_optimizer
from tlkit.training.setup import schedule
from tlkit.training.tracking import History


@dataclass(frozen=True)
class Domain:
    """Images of a domain.

    Args:
        inputs: What the learner is given of them.
        labels: Classes (N); -1 for what has none, or none of the network's.
        trained: Rows that are trained on.
        measured: Rows that are measured on after each epoch: of the source those set apart, of the target all that can
            be; they need labels for their accuracy to be told.
    """

    inputs: Inputs
    labels: np.ndarray
    trained: np.ndarray
    measured: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How each of a command's trainings goes.

    Args:
        optimisation: As the options say.
        epochs: How many.
        each: Images of each domain in a step.
        rates: Highest learning rate of each stage that trains.
        head_rate: That of what the method learns beside the network.
        select: What chooses the epoch.
        label_smoothing: Of the source's labels.
        class_weights: Of each class (K), or None.
        balanced: Draw as many images of each source class.
    """

    optimisation: config.Optimisation
    epochs: int
    each: int
    rates: Mapping[str, float]
    head_rate: float
    select: str
    label_smoothing: float
    class_weights: Tensor | None
    balanced: bool


@dataclass
class Progress:
    """How far a training has come.

    Args:
        place: Epoch, step, sums of the losses.
        history: One row for each epoch.
        seconds: Spent before this process.
        best: Epoch that is chosen so far; 0 for none.
        score: Its score.
        oracle: Epoch that is best by the target's labels; 0 where it has none.
        highest: Its accuracy.
    """

    place: Place = field(default_factory=Place)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    best: int = 0
    score: float = 0.0
    oracle: int = 0
    highest: float = -1.0


class Learner:
    """A network in adaptation.

    Args:
        module: Maps inputs to features and logits; shares its parameters with the network.
        groups: Of the optimiser, by `tlkit.training.optimizers.parameter_groups`.
        method: What it is adapted by.
        loss: That method's, made for this network.
        name: The method's name, for people.
        seed: Of the order of images and whatever is random in a step.
        source: Labelled images.
        target: Others.
        weight: Of the method's loss.
        plan: How it trains.
        how: Device, precision, processes; who is told.
        folder: Where the state is stored, and taken up from.
        checkpoint_every: How often.
        record: Told each epoch's row.
        follow: Told the rows of all epochs after each.
        idle: Whether the module may hold parameters that train but are never used.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        method: Method,
        loss: nn.Module | None,
        *,
        name: str,
        seed: int,
        source: Domain,
        target: Domain,
        weight: float,
        plan: Plan,
        how: How,
        folder: Path,
        checkpoint_every: str,
        record: Callable[[Mapping[str, Any]], None],
        follow: Callable[[History], None],
        idle: Callable[[], bool],
    ) -> None:
        self.method, self.name, self.seed, self.plan, self.how, self.folder = method, name, seed, plan, how, folder
        self.source, self.target, self.record, self.follow = source, target, record, follow
        self.idle = idle
        device = how.accelerator.device
        self.module = module.to(device)
        self.objective = Adaptation(
            self.module, loss, weight, label_smoothing=plan.label_smoothing, class_weights=plan.class_weights
        ).to(device)
        beside = list(loss.parameters()) if loss is not None else []
        if beside:
            decay = plan.optimisation.weight_decay
            told = {"lr": plan.head_rate, "peak": plan.head_rate, "weight_decay": decay, "stage": "discriminator"}
            groups = [*groups, {"params": beside, **told}]
        self.optimizer = create_optimizer(plan.optimisation.optimizer, groups, plan.optimisation.momentum)
        self.progress = Progress()
        self.kept: dict[str, Tensor] = {}
        """Probabilities of the target's images in the epochs that are told of, and the source's in the chosen one."""
        self.best: dict[str, Tensor] = {}
        self.began, self._due = time.monotonic(), Due(checkpoint_every, time.monotonic())

    @property
    def seconds(self) -> float:
        """Spent in it so far, in all processes one after another."""
        return self.progress.seconds + time.monotonic() - self.began

    def run(self) -> None:
        """Train to the end, from where a stored state left off; the module then holds the chosen weights.

        Raises:
            TlkitError: The loss left for good, or there is not enough memory.
        """
        self._restore()
        plan, progress, how = self.plan, self.progress, self.how
        at, source, target = how.accelerator, self.source, self.target
        batches = DomainBatches(
            source.inputs,
            target.inputs,
            source.trained,
            source.labels[source.trained],
            target.trained,
            each=plan.each,
            epochs=plan.epochs,
            seed=self.seed,
            balanced=plan.balanced,
            rank=at.process_index,
            processes=at.num_processes,
        )
        whole, label = plan.epochs * batches.steps, f"{self.name}, seed {self.seed}"
        watched = [row["losses"]["loss"] for row in progress.history]
        rate = schedule(plan.optimisation, plan.epochs, batches.steps, watched)

        def before_step(step: int) -> None:
            self.objective.progress = step / whole

        def after_step() -> bool:
            done = progress.place.epoch * batches.steps + progress.place.step
            how.progress(label, done * plan.each, whole * plan.each)
            if self._due.after_step(time.monotonic()):
                self.save()
            return False

        def after_epoch(losses: dict[str, float]) -> bool:
            watched.append(losses["loss"])
            self._after_epoch(losses, rate, batches.steps)
            self.follow(progress.history)
            return False

        prepared, optimizer = compute.prepare(at, self.objective, self.optimizer, self.idle)
        try:
            with self._saved_when_stopped():
                fit(
                    prepared,
                    batches,
                    optimizer,
                    rate,
                    accelerator=at,
                    epochs=plan.epochs,
                    place=progress.place,
                    seed=self.seed,
                    before_step=before_step,
                    after_step=after_step,
                    after_epoch=after_epoch,
                    clip=plan.optimisation.clip,
                    say=how.say,
                )
        except Diverged as error:
            what = f"{self.name}, epoch {progress.place.epoch + 1}: {error.what}"
            raise TlkitError(what, remedy="start anew with a lower --lr, or with --clip 1") from error
        at.free_memory()
        self.module.load_state_dict(self.best)
        self.save(finished=True)

    def _after_epoch(self, losses: dict[str, float], rate: Callable[[int], float], steps: int) -> None:
        """Measure both domains, record, keep what is told of in the end."""
        processes.broadcast(list(self.objective.buffers()))  # there are norms with statistics of each one's own images
        module = self.module
        if self.method.norms is not None:
            module = copy.deepcopy(module)
            order = np.random.default_rng(self.seed).permutation(self.target.trained)
            with self.how.accelerator.autocast():
                self.method.norms(module, lambda: self.target.inputs.batches(order))
        source, target = self.source, self.target
        of_source = self.probabilities(module, source)
        of_target = self.probabilities(module, target)
        if not (np.isfinite(of_source).all() and np.isfinite(of_target).all()):
            raise Diverged("the network's outputs are no numbers any more")
        labels = source.labels[source.measured]
        progress, place = self.progress, self.progress.place
        epoch = place.epoch + 1
        found = selection.score(self.plan.select, of_target, of_source, labels, epoch)
        with held_signals():
            step = place.epoch * steps + place.step
            row: dict[str, Any] = {
                "method": self.name,
                "seed": self.seed,
                "epoch": epoch,
                "epochs": self.plan.epochs,
                "step": step,
                "losses": losses,
                "rates": {group["stage"]: group["peak"] * rate(step - 1) for group in self.optimizer.param_groups},
                "source_val": _brief(of_source, labels),
                "score": found,
            }
            probabilities = torch.from_numpy(of_target)
            if not progress.best or found > progress.score:
                progress.best, progress.score = epoch, found
                self.best = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
                self.kept |= {"selected": probabilities, "source_val": torch.from_numpy(of_source)}
            if epoch == self.plan.epochs:
                self.kept["last"] = probabilities
            known = target.labels[target.measured] >= 0
            if known.any():
                row["target"] = _brief(of_target[known], target.labels[target.measured][known])
                if row["target"]["top1"] > progress.highest:
                    progress.oracle, progress.highest = epoch, row["target"]["top1"]
                    self.kept["oracle"] = probabilities
            progress.history.append(row)
            self.record(row)
            place.epoch, place.step, place.totals = epoch, 0, {}
        self.how.say(_line(row))

    def probabilities(self, module: nn.Module, domain: Domain) -> np.ndarray:
        """Of each class (M, K), of the images of a domain that are measured on."""
        return self._pass(module, domain.inputs, domain.measured)[1].softmax(1).numpy()

    def features(self, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
        """What the classifier sees (M, D) of some rows."""
        return self._pass(self.module, inputs, rows)[0].numpy()

    def _pass(self, module: nn.Module, inputs: Inputs, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (M, D) and logits (M, K) of some rows; several processes take a part each, and are given all."""
        module.eval()
        found, part = [], np.array_split(rows, processes.count())[processes.rank()]
        with torch.no_grad(), self.how.accelerator.autocast():
            for batch in inputs.batches(part) if len(part) else ():
                some, made = module(batch)
                found.append((some.float().cpu(), made.float().cpu()))
        features, logits = zip(*(pair for of_one in processes.gathered(found) for pair in of_one), strict=True)
        return torch.cat(features), torch.cat(logits)

    # State

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a file that has gone leave the state behind."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) or isinstance(error, InputLost):
                with held_signals():
                    self.save()
            raise

    def save(self, finished: bool = False) -> None:
        """Store the state; of what is finished, what is told of in the end. The first of several processes does."""
        if not processes.is_first():
            return
        memory, scalars = ({}, {}) if finished else optimizer_state(self.optimizer)
        tensors = {"best": self.best, "kept": self.kept, "optimizer": memory}
        if not finished:
            tensors["objective"] = dict(self.objective.state_dict())
        totals = {name: value.item() for name, value in self.progress.place.totals.items()}
        told = asdict(self.progress) | {"seconds": self.seconds}
        told["place"] |= {"totals": totals}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.folder, Checkpoint(tensors, {"progress": told, "optimizer": scalars}))

    def _restore(self) -> None:
        stored = processes.on_first(lambda: read_checkpoint(self.folder))
        if stored is None:
            return
        values, device = dict(stored.values["progress"]), self.how.accelerator.device
        place = values.pop("place")
        totals = {name: torch.tensor(value, device=device) for name, value in place["totals"].items()}
        self.progress = Progress(place=Place(**{**place, "totals": totals}), **values)
        self.kept = {name: tensor.cpu() for name, tensor in stored.tensors.get("kept", {}).items()}
        self.best = stored.tensors.get("best", {})
        if "objective" in stored.tensors:
            self.objective.load_state_dict(stored.tensors["objective"])
            restore_optimizer(self.optimizer, stored.tensors.get("optimizer", {}), stored.values["optimizer"])


def _brief(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    figures = metrics(probabilities, labels)
    return {"loss": figures["loss"], "top1": figures["top1"]}


def _line(row: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in row["losses"].items() if name != "loss")
    line = f"{row['method']}, seed {row['seed']}, epoch {row['epoch']}/{row['epochs']}: {losses},"
    return f"{line} source val {row['source_val']['top1']:.3f}, score {row['score']:.4f}"


def stored_history(folder: Path) -> str:
    """Rows of ``metrics.jsonl`` of a training that has stored a state; empty where it has none."""
    stored = read_checkpoint(folder)
    rows = stored.values["progress"]["history"] if stored is not None else []
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
