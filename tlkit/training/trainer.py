"""Carries out a strategy's phases on a network, and keeps a state from which a stopped run goes on exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tlkit import compute, config, processes, run_folder
from tlkit.data.folders import Samples
from tlkit.data.loading import ViewDataset
from tlkit.data.training import TrainingBatches
from tlkit.data.transforms import CENTER, View
from tlkit.errors import InputLost, TlkitError
from tlkit.evaluation.metrics import image_losses, metrics
from tlkit.evaluation.predict import predict_all
from tlkit.networks.build import Loaded
from tlkit.networks.complexity import noise
from tlkit.networks.forward import channels_last, classify
from tlkit.networks.freezing import freeze, has_idle_parameters, trainable_parameters
from tlkit.networks.frozen_pass import How
from tlkit.networks.stages import stages
from tlkit.networks.weights import fingerprint
from tlkit.progress import Progress, silent
from tlkit.training import rate_finder
from tlkit.training.cache import FeatureCache
from tlkit.training.checkpoint import FILE, Checkpoint, Due, optimizer_state, restore_optimizer, write_checkpoint
from tlkit.training.closed_head import fit_closed, fold
from tlkit.training.features import Features, extract
from tlkit.training.fit import Diverged, Place, fit, held_signals
from tlkit.training.objectives import Supervised
from tlkit.training.optimizers import create_optimizer, parameter_groups
from tlkit.training.phases import Decision, Outcome, Phase, Strategy
from tlkit.training.prefix import Form, Kept, KeptBatches, Prefix
from tlkit.training.probe import Head
from tlkit.training.setup import TRAIN_VIEWS, Settings, anchors, make_batches, make_objective, make_plan, schedule
from tlkit.training.state import PhaseState, State
from tlkit.training.tracking import History

REMEMBERED = "remembered "
ENDS = ("", "budget", "time limit")
"""Why a clock ends a phase."""


class Trainer:
    """A network in training.

    Args:
        loaded: The network, on the CPU; with a classifier for the samples' classes, unless a closed solution makes it.
        samples: All images, with their splits; each can be read.
        choosing: Mask of the choosing part (N); empty where there is none.
        settings: What the options say.
        how: Device, precision, processes; who is told.
        cache: Where what frozen layers put out is kept.
        run: The run's folder.
        follow: Told the rows of all epochs after each of the loop's.
        checkpoint_every: How often the state is stored there: ``"200steps"``, or a duration.
        features: Of all samples, where they are there already.
        features_seconds: What they took.
        notes: What else the stored state is to hold, as JSON.
    """

    def __init__(
        self,
        loaded: Loaded,
        samples: Samples,
        choosing: np.ndarray,
        settings: Settings,
        *,
        how: How,
        cache: FeatureCache,
        run: Path,
        follow: Callable[[History], None],
        checkpoint_every: str = "5min",
        features: Features | None = None,
        features_seconds: float = 0.0,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.loaded, self.samples, self.choosing, self.settings = loaded, samples, choosing, settings
        self.how, self.accelerator, self.say, self.progress = how, how.accelerator, how.say, how.progress
        self.run, self.cache, self.follow = run, cache, follow
        self.network = channels_last(loaded.network.to(how.accelerator.device))
        self.features = features
        self.head: Head | None = None
        place = Place(parts=settings.training.accumulate)
        self.state = State(seconds=features_seconds, phase=PhaseState(place=place, seconds=features_seconds))
        self.remembered: dict[str, dict[str, Tensor]] = {}
        self.best: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.average: ModelEmaV3 | None = None
        self._stored: Checkpoint | None = None
        self._notes = notes or {}
        self.began = self.phase_began = time.monotonic()
        augmentation = settings.augmentation
        self._prefix = Prefix(
            loaded,
            samples,
            settings.caching,
            cache,
            preset=augmentation.augment or "none",
            mixes=settings.mixes,
            seed=settings.compute.seed,
            how=how,
        )
        self._kept: Kept | None = None
        self._certain: list[Phase] = []
        self._due = Due(checkpoint_every, self.began)
        self._anchors = anchors(self.network) if settings.training.anchor else {}

    @property
    def seconds(self) -> float:
        """Spent in the run so far, in all its processes."""
        return self.state.seconds + time.monotonic() - self.began

    # Phases

    def carry_out(self, strategy: Strategy, certain: Sequence[Phase] = ()) -> Decision:
        """Go through the phases, from where the stored state left them.

        Args:
            strategy: Yields them.
            certain: Those of the loop that will come, as far as that is known.
        """
        self._certain = list(certain)
        try:
            phase = next(strategy)
            for outcome in self.state.outcomes:
                phase = strategy.send(outcome)
            while True:
                phase = strategy.send(self._carry_out(phase))
        except StopIteration as end:
            decision: Decision = end.value
        if decision.weights is not None:
            self._restore(self.remembered[decision.weights])
        for number, (kept, why) in decision.verdicts.items():
            self.state.phases[number - 1] |= {"kept": kept, "why": why}
        return decision

    def _carry_out(self, phase: Phase) -> Outcome:
        self.phase_began = time.monotonic()
        if not self.state.phase.begun:
            with held_signals():
                if phase.remember is not None:
                    self.remembered[phase.remember] = _copied(self.network)
                if phase.start is not None:
                    self._restore(self.remembered[phase.start])
                present = self.state.phase
                if phase.chooses and self.state.outcomes and self.state.outcomes[-1].losses:
                    present.losses = list(self.state.outcomes[-1].losses)
                    present.best, present.lowest = 0, float(np.mean(present.losses))
                    self.best = _copied(self.network)
                present.begun = True
        frozen = [stage.name for stage in stages(self.network) if stage.name not in phase.stages]
        freeze(self.network, frozen, norms=self.settings.training.bn or "train")
        try:
            found = self._solve(phase) if phase.solves else self._train(phase)
            found["val_top1"] = self._val_top1(phase)
        finally:
            self._release()
        self._equalise()
        present = self.state.phase
        outcome = Outcome(found.pop("epochs"), self._phase_seconds(), tuple(present.losses), found.pop("stopped", ""))
        outcome = processes.on_first(lambda: outcome)  # what is decided by clocks is decided by one of them
        told = {
            "stages": list(phase.stages),
            "epochs": outcome.epochs,
            "trainable_params": sum(tensor.numel() for _, tensor in trainable_parameters(self.network)),
            "seconds": round(outcome.seconds, 3),
            "images": int(self._rows(phase).sum()),
            **({"stopped": outcome.stopped} if outcome.stopped else {}),
            **found,
        }
        with held_signals():
            self.state.outcomes.append(outcome)
            if phase.listed:
                self.state.phases.append(told)
            self.state.phase = PhaseState(place=Place(parts=present.place.parts))
            self.best, self.optimizer, self.average = {}, None, None
        self.accelerator.free_memory()
        if self._due.after_step(time.monotonic()):
            self.save()
        return outcome

    def _equalise(self) -> None:
        """Make sure that all processes have the first one's weights, and say so where they had not."""
        if processes.count() == 1 or len(set(processes.gathered(fingerprint(self.network)))) == 1:
            return
        before = _copied(self.network)
        processes.broadcast(list(self.network.state_dict().values()))
        after = self.network.state_dict()
        moved = max(float((after[name].double() - before[name].double()).abs().max()) for name in before)
        self.say(f"weights had drifted apart between processes, by up to {max(processes.gathered(moved)):.1g}")

    def _phase_seconds(self) -> float:
        return self.state.phase.seconds + time.monotonic() - self.phase_began

    def _rows(self, phase: Phase) -> np.ndarray:
        """Mask of the images that a phase trains on."""
        train = self.samples.splits == "train"
        return train if phase.on_all else train & ~self.choosing

    def _solve(self, phase: Phase) -> dict[str, Any]:
        """Fit the head in closed form."""
        if self.features is None:
            self.features = self._extract()
        samples, features = self.samples, self.features
        self.head = head = processes.on_first(
            lambda: fit_closed(samples, features, self._rows(phase), self.settings.head)
        )
        with held_signals():
            fold(self.loaded, self.network, head, features)
            chosen = head.probabilities(features.values[self.choosing, 0].astype(np.float64))
            self.state.phase.losses = image_losses(chosen, self.samples.labels[self.choosing]).tolist()
            recorded = any(row["phase"] == len(self.state.phases) + 1 for row in self.state.history)
            if phase.listed and not recorded:  # by a process that was stopped before the phase's end
                losses = {f"{strength:g}": loss for strength, loss in head.losses.items()}
                self._record({"epoch": 1, "epochs": 1, "losses": losses, "strength": head.strength})
        return {"epochs": 1, "strength": head.strength, "chosen_on": head.chosen_on}

    def _extract(self) -> Features:
        dataset = self.dataset(np.ones(len(self.samples), dtype=bool), TRAIN_VIEWS[self.settings.train_views])
        found = extract(self.loaded, dataset, self.how, self.cache, self.settings.train_views)
        if found.bad:  # readable when the run began
            raise InputLost(found.bad[0].path, where=self.samples.root, reason=found.bad[0].reason)
        return found

    def _train(self, phase: Phase) -> dict[str, Any]:
        """Train by the loop."""
        training, present = self.settings.training, self.state.phase
        number = len(self.state.outcomes) + 1
        self._keep(phase)
        if training.lr == "auto" and self.state.found_rate is None:
            self.state.found_rate = self._search(phase)
        rates = {name: rate * (self.state.found_rate or 1.0) for name, rate in phase.rates.items()}
        objective, self.optimizer, batches = self._parts(phase, rates, phase.epochs, number)
        if training.ema:
            self.average = ModelEmaV3(self.network, decay=training.ema, use_warmup=True)
        self._restore_phase()
        average, images, label = self.average, int(self._rows(phase).sum()), f"phase {len(self.state.phases) + 1}"
        limit = config.seconds(training.time_limit) if training.time_limit else math.inf
        clocked = phase.seconds is not None or math.isfinite(limit)

        def after_step() -> bool:
            place = present.place
            done = images if place.step == batches.steps else place.step * batches.plan.batch_size
            self.progress(label, place.epoch * images + done, phase.epochs * images)
            if clocked:  # by the first one's clock
                late = 2 if self.seconds > limit else self._phase_seconds() > (phase.seconds or math.inf)
                present.ended = ENDS[processes.highest(int(late) if processes.is_first() else 0)]
            if not present.ended and self._due.after_step(time.monotonic()):
                self.save()
            return bool(present.ended)

        def after_epoch(losses: dict[str, float]) -> bool:
            ended = self._after_epoch(phase, losses, batches.steps)
            self.follow(self.state.history)
            return ended

        prepared, optimizer = self._prepared(objective, self.optimizer)
        try:
            fit(
                prepared,
                batches,
                optimizer,
                self._schedule(phase, batches.steps),
                accelerator=self.accelerator,
                epochs=0 if present.ended else phase.epochs,
                place=present.place,
                seed=self.settings.compute.seed + number,
                after_step=after_step,
                after_epoch=after_epoch,
                average=(lambda step: average.update(self.network, step)) if average is not None else None,
                clip=training.clip,
                say=self.say,
            )
        except Diverged as error:
            raise self._told(error, number) from error
        if present.ended and present.place.epoch < phase.epochs:  # what is shown ends here, too
            self.progress(label, present.place.epoch * images, present.place.epoch * images)
        if present.place.step:  # stopped inside an epoch
            steps = present.place.step
            losses = {name: float((total / steps).item()) for name, total in present.place.totals.items()}
            self._after_epoch(phase, losses, batches.steps)
        if present.best is not None:
            self._restore(self.best)
        elif self.average is not None:
            self._restore(_copied(self.average.module))
        chosen = {} if present.best is None else {"best_epoch": present.best}
        views = {"cached_views": self._kept.form.views} if self._kept is not None else {}
        return {"epochs": present.place.epoch, **chosen, "rates": rates, "stopped": present.ended, **views}

    def _prepared(self, objective: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        def idle() -> bool:
            images = noise(self.network, self.loaded.preprocessing, 2)
            with self.accelerator.autocast():
                return has_idle_parameters(self.network, images)

        return compute.prepare(self.accelerator, objective, optimizer, idle)

    def _schedule(self, phase: Phase, steps: int) -> Callable[[int], float]:
        return schedule(self.settings.training, phase.epochs, steps, self.state.phase.watched)

    def _parts(
        self, phase: Phase, rates: Mapping[str, float], epochs: int, number: int
    ) -> tuple[Supervised, torch.optim.Optimizer, TrainingBatches | KeptBatches]:
        """Objective, optimiser and batches of a phase."""
        samples = self.samples.take(self._rows(phase))
        kept = self._kept
        split = kept.split if kept is not None else None
        objective = make_objective(self.network, samples, self.settings, self._anchors, split)
        groups = parameter_groups(self.network, rates, self.settings.training.weight_decay)
        optimizer = create_optimizer(self.settings.training.optimizer, groups, self.settings.training.momentum)
        seed = self.settings.compute.seed + 1000 * number
        if kept is not None:
            plan = make_plan(samples, self.settings, self.accelerator, seed)
            return objective, optimizer, KeptBatches(kept, np.flatnonzero(self._rows(phase)), plan)
        batches = make_batches(samples, self.loaded.preprocessing, self.settings, self.accelerator, epochs, seed)
        return objective, optimizer, batches

    def _keep(self, phase: Phase) -> None:
        """Run what the phase leaves frozen, once; the form in which that was done is part of the state."""
        present = self.state.phase
        if present.kept == {}:
            return
        stored = Form(**present.kept) if present.kept is not None else None
        val = (self.samples.splits == "val") & (phase.listed and not phase.trial)
        while self._certain and self._certain[0].stages != phase.stages:
            self._certain.pop(0)
        watched = self._watched(phase)[1] | val
        self._kept = self._prefix.run(phase, self._certain[1:], self._rows(phase), watched, stored)
        with held_signals():
            present.kept = self._kept.form.to_dict() if self._kept is not None else {}

    def _release(self) -> None:
        if self._kept is not None:
            self._kept.close()
        self._kept = None

    def _search(self, phase: Phase) -> float:
        """The learning-rate range test on a phase's images: a factor of its rates; the network is left as it was."""
        before = _copied(self.network)
        head = max(phase.rates.values())
        unit = {name: rate / head for name, rate in phase.rates.items()}
        epochs = rate_finder.epochs(int(self._rows(phase).sum()), self.settings.batch_size)
        objective, optimizer, batches = self._parts(phase, unit, epochs, 0)
        prepared, optimizer = self._prepared(objective, optimizer)
        try:
            found = rate_finder.search(
                prepared,
                batches,
                optimizer,
                accelerator=self.accelerator,
                epochs=epochs,
                parts=self.state.phase.place.parts,
                seed=self.settings.compute.seed,
                say=self.say,
                progress=self.progress,
            )
        finally:  # also where a signal ends it: what is then stored begins the search anew
            with held_signals():
                self._restore(before)
        self.accelerator.free_memory()
        self.say(f"learning rate found: {found:.2g}")
        return found / head

    def _after_epoch(self, phase: Phase, losses: dict[str, float], steps: int) -> bool:
        """Measure, record, keep the best; True where patience has run out."""
        name, rows = self._watched(phase)
        used = self.average.module if self.average is not None else self.network
        processes.broadcast(list(used.buffers()))  # there are norms whose statistics are of each process's own images
        probabilities = self.predict(used, rows) if rows.any() else np.empty((0, 0))
        labels = self.samples.labels[rows]
        figures = metrics(probabilities, labels) if len(labels) else {}
        present = self.state.phase
        with held_signals():
            step = present.place.epoch * steps + present.place.step
            factor = self._schedule(phase, steps)(step - 1)  # an optimiser just restored has taken no step yet
            groups = self.optimizer.param_groups  # type: ignore[union-attr]
            rates = {group["stage"]: group["peak"] * factor for group in groups}
            row = {
                "epoch": present.place.epoch + 1,
                "epochs": phase.epochs,
                "step": step,
                "losses": losses,
                "rates": rates,
            }
            if figures:
                row[name] = {"loss": figures["loss"], "top1": figures["top1"]}
            self._record(row)
            present.place.epoch, present.place.step, present.place.totals = present.place.epoch + 1, 0, {}
            loss = figures.get("loss", losses["loss"])
            present.watched.append(loss)
            if phase.chooses and present.lowest is not None and loss >= present.lowest:
                present.waited += 1
            else:
                if phase.chooses:
                    present.best, present.lowest, present.waited = present.place.epoch, loss, 0
                    self.best = _copied(used)
                present.top1 = figures.get("top1")
                present.losses = image_losses(probabilities, labels).tolist() if name == "choosing" else []
            if phase.chooses and 0 < self.settings.patience <= present.waited:
                present.ended = "patience"
            present.ended = processes.on_first(lambda: present.ended)
            return bool(present.ended)

    def _watched(self, phase: Phase) -> tuple[str, np.ndarray]:
        """What the loss is watched on after each epoch (the choosing part, else val), and its mask."""
        if self.choosing.any():
            return "choosing", self.choosing & (not phase.on_all)
        return "val", self.samples.splits == "val"

    def _val_top1(self, phase: Phase) -> float | None:
        val = self.samples.splits == "val"
        if not val.any() or not phase.listed or phase.trial:
            return None
        if phase.solves:
            assert self.features is not None and self.head is not None
            probabilities = self.head.probabilities(self.features.values[val, 0].astype(np.float64))
        elif (self._watched(phase)[1] == val).all() and self.state.phase.top1 is not None:
            return self.state.phase.top1
        else:
            probabilities = self.predict(self.network, val)
        return float((probabilities.argmax(1) == self.samples.labels[val]).mean())

    def predict(self, network: nn.Module, rows: np.ndarray, progress: Progress = silent) -> np.ndarray:
        """Class probabilities (M, K) of the images in a mask (N), from the view of evaluation."""
        if self._kept is not None and self._kept.knows(rows):
            return self._kept.predict(network, rows)
        found = predict_all(network, self.dataset(rows), replace(self.how, progress=progress))
        if found.bad:
            file = found.bad[0]
            raise InputLost(file.path, where=self.samples.root, reason=file.reason)
        return found.probabilities

    def predict_all(self) -> np.ndarray:
        """Class probabilities (N, K) of all images by the network as it is now."""
        moved = any(phase.get("kept", True) for phase in self.state.phases if phase.get("rates"))
        if moved:
            return self.predict(self.network, np.ones(len(self.samples), dtype=bool), self.progress)
        if self.features is None:
            self.features = self._extract()
        features = torch.from_numpy(self.features.values[:, 0])
        with torch.no_grad():
            logits = [classify(self.network, part.to(self.accelerator.device)) for part in features.split(4096)]
        return torch.cat(logits).softmax(-1).cpu().numpy()

    def dataset(self, rows: np.ndarray, view: View = CENTER) -> ViewDataset:
        """The images in a mask (N), as evaluation sees them."""
        part = self.samples.take(rows)
        return ViewDataset(part.root, part.paths, self.loaded.preprocessing, view)

    def _record(self, row: dict[str, Any]) -> None:
        row = {"phase": len(self.state.phases) + 1, **row, "seconds": round(self.seconds, 3)}
        self.state.history.append(row)
        if processes.is_first():
            run_folder.append_metrics(self.run, row)
        if "rates" in row:
            self.say(_epoch_line(row))

    # State

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM, and a file that has gone, leave the state behind."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, InputLost):
                raise
            if self.state.outcomes or self.state.phase.begun:
                with held_signals():  # torchrun sends one of its own after that of the terminal
                    self.save()
            raise

    def save(self) -> None:
        """Store the state; on a full disk the last one stays whole, as it does where the loss has left for good.

        Between two steps all processes have the same, and one that is written by the first needs nothing of the others.
        """
        if not processes.is_first() or not all(
            torch.isfinite(total) for total in self.state.phase.place.totals.values()
        ):
            return
        try:
            write_checkpoint(self.run, self._checkpoint())
        except BaseException:
            self.say(f"the state could not be written; the last one, if any, is whole ({self.run / run_folder.STATE})")
            raise

    def _checkpoint(self) -> Checkpoint:
        if self._stored is not None:  # not taken up yet: nothing has been trained since
            memory, average = (self._stored.tensors.get(group, {}) for group in ("optimizer", "average"))
            scalars = self._stored.values["optimizer"]
        else:
            memory, scalars = optimizer_state(self.optimizer) if self.optimizer is not None else ({}, {})
            average = dict(self.average.module.state_dict()) if self.average is not None else {}
        tensors = {
            "network": dict(self.network.state_dict()),
            "best": self.best,
            "optimizer": memory,
            "average": average,
            **{f"{REMEMBERED}{name}": weights for name, weights in self.remembered.items()},
        }
        state = replace(self.state, seconds=self.seconds)
        state.phase = replace(self.state.phase, seconds=self._phase_seconds())
        return Checkpoint(tensors, {"state": state.to_dict(), "optimizer": scalars, **self._notes})

    def restore(self, stored: Checkpoint) -> None:
        """Take up a stored state; optimiser and average follow when the phase that they belong to goes on."""
        self.state = State.from_dict(stored.values["state"], self.accelerator.device)
        tensors = stored.tensors
        now = self.network.state_dict()  # its classifier is that of its weights until the first head is fitted
        if any(name not in now or now[name].shape != tensor.shape for name, tensor in tensors["network"].items()):
            self.network.reset_classifier(len(self.samples.classes))  # type: ignore[operator]
            self.network.to(self.accelerator.device)
        self._restore(tensors["network"])
        self.best = tensors.get("best", {})
        names = [group for group in tensors if group.startswith(REMEMBERED)]
        self.remembered = {group.removeprefix(REMEMBERED): tensors[group] for group in names}
        self._stored = stored
        if processes.is_first():
            rows = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.state.history)
            run_folder.write_text(self.run / run_folder.METRICS, rows)

    def _restore_phase(self) -> None:
        """Optimiser and average of the phase that a stored state was in the middle of."""
        stored = self._stored
        if stored is None:
            return
        assert self.optimizer is not None
        restore_optimizer(self.optimizer, stored.tensors.get("optimizer", {}), stored.values["optimizer"])
        if self.average is not None and "average" in stored.tensors:
            self.average.module.load_state_dict(stored.tensors["average"])
        self._stored = None

    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(weights)

    def _told(self, error: Diverged, number: int) -> TlkitError:
        epoch = self.state.phase.place.epoch + 1
        stored = (self.run / run_folder.STATE / FILE).is_file()
        good = f"the last good state is in {self.run / run_folder.STATE}" if stored else "no state had been stored yet"
        remedy = "start anew with a lower --lr, or with --clip 1"
        return TlkitError(f"{error.what} of epoch {epoch}, phase {number}; {good}", where=self.run, remedy=remedy)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _epoch_line(row: Mapping[str, Any]) -> str:
    line = f"phase {row['phase']}, epoch {row['epoch']}/{row['epochs']}: loss {row['losses']['loss']:.4f}"
    for name in ("choosing", "val"):
        if name in row:
            line += f", {name} loss {row[name]['loss']:.4f}, top-1 {row[name]['top1']:.3f}"
    return line
