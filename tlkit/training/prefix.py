"""The frozen lower stages of a network in training: run once for each view of an image, their outputs kept on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlkit import config, processes
from tlkit.data.batches import BatchPlan
from tlkit.data.content import digests
from tlkit.data.folders import Samples
from tlkit.data.loading import ViewDataset
from tlkit.data.training import VariedViews, seed_of
from tlkit.data.transforms import View
from tlkit.errors import InputLost, TlkitError
from tlkit.networks.build import Loaded
from tlkit.networks.complexity import noise
from tlkit.networks.forward import logits_of, splits_at_head
from tlkit.networks.frozen_pass import FrozenPass, How
from tlkit.networks.quick import FOLDED_FROM
from tlkit.networks.splitting import CannotSplit, Split, outputs_at, split_at
from tlkit.networks.stages import Stage, stages
from tlkit.training.cache import Entry, FeatureCache, NoRoom, Writer
from tlkit.training.features import key_of
from tlkit.training.phases import Phase

LARGEST = 6e4  # what is kept in float16 must be below 65504
CENTER = "center"


@dataclass(frozen=True)
class Form:
    """What a phase trains on in place of images, as the stored state has it.

    Args:
        stage: Last stage of the frozen ones, whose output is kept.
        views: How many varied views of each training image; epoch ``e`` sees view ``e % views``.
        dtype: Of what is kept, in torch's words.
    """

    stage: str
    views: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Map:
    """What a module puts out for one image.

    Args:
        stage: Whose output it is.
        shape: Without the image's own axis.
        live: Its type as the network computes it.
        kept: The 16-bit type that it is kept in.
        last: Whether channels lie last in memory.
    """

    stage: Stage
    shape: tuple[int, ...]
    live: torch.dtype
    kept: torch.dtype
    last: bool

    @property
    def bytes(self) -> int:
        """Of one image."""
        return 2 * int(np.prod(self.shape))

    def pack(self, values: Tensor) -> np.ndarray:
        """Outputs (B, ...) to bytes (B, n)."""
        values = values.permute(0, 2, 3, 1) if self.last else values
        if self.kept == torch.float16:
            values = values.float().clamp(-LARGEST, LARGEST)
        return values.to(self.kept).contiguous().flatten(1).view(torch.uint8).numpy()

    def unpack(self, rows: np.ndarray) -> Tensor:
        """The inverse of `pack`."""
        channels, *places = self.shape
        shape = (*places, channels) if self.last else self.shape
        values = torch.from_numpy(rows).view(self.kept).view(len(rows), *shape).to(self.live)
        return values.permute(0, 3, 1, 2) if self.last else values


class Kept:
    """A phase's frozen stages, run: what the others train on and are measured on.

    Args:
        form: What was chosen.
        split: Of the network, at the last frozen stage.
    """

    def __init__(self, form: Form, split: Split, output: _Map, how: How) -> None:
        self.form, self.split, self.output, self.how = form, split, output, how
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, np.ndarray] = {}

    def outputs(self, view: str, rows: np.ndarray) -> Tensor:
        """What the frozen stages make of a view of the images in some rows: (B, ...), on the device."""
        places = self.places[view][rows]
        assert (places >= 0).all(), "not kept"
        return self.output.unpack(self.entries[view].read(places)).to(self.how.accelerator.device)

    def knows(self, rows: np.ndarray) -> bool:
        """Whether the evaluation's view of the images in a mask (N) is there."""
        return bool((self.places[CENTER][rows] >= 0).all())

    def predict(self, network: nn.Module, rows: np.ndarray) -> np.ndarray:
        """Class probabilities (M, K) of the images in a mask (N) by a network that shares the frozen stages.

        Several processes take parts of them, and all are given all.
        """
        network.eval()
        found: list[Tensor] = []
        parts = np.array_split(np.flatnonzero(rows), max(1, -(-int(rows.sum()) // (4 * self.how.size))))
        for some in processes.share(parts):
            given = self.outputs(CENTER, some)
            with torch.inference_mode(), self.how.accelerator.autocast(), self.split.spliced(network, given) as images:
                found.append(logits_of(network, images).softmax(-1).cpu())
        return np.concatenate([part.numpy() for of_one in processes.gathered(found) for part in of_one])

    def close(self) -> None:
        """Others may remove what this phase used."""
        for entry in self.entries.values():
            entry.close()


class KeptBatches:
    """Batches ``(outputs, labels)`` of the frozen stages, on the device, epoch by epoch, from any step on.

    Args:
        kept: Where they come from.
        rows: Of the training images among all images (N).
        plan: Which of these each step sees, the same as it would see of images.
    """

    def __init__(self, kept: Kept, rows: np.ndarray, plan: BatchPlan) -> None:
        self.kept, self.rows, self.plan = kept, rows, plan
        self.labels = torch.from_numpy(plan.labels)
        self._cut: tuple[int, list[np.ndarray]] = -1, []

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.plan.steps

    def weight(self, epoch: int, step: int) -> float:
        """What this process's part of a batch counts for; 1 for a single process."""
        return self.plan.weight(self._of(epoch)[step])

    def _of(self, epoch: int) -> list[np.ndarray]:
        if self._cut[0] != epoch:  # an epoch's order is drawn once, not at every step
            self._cut = epoch, self.plan.batches(epoch)
        return self._cut[1]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step ``first`` on."""
        view = str(epoch % self.kept.form.views)
        device = self.kept.how.accelerator.device
        for batch in self._of(epoch)[first:]:
            part = self.plan.part(batch)
            yield self.kept.outputs(view, self.rows[part]), self.labels[part].to(device)


class Prefix:
    """Runs the frozen stages of a network, where that is possible and there is room for what comes out.

    Args:
        loaded: The network, on its device.
        samples: All images (N).
        caching: How many views.
        cache: Where outputs are kept.
        preset: How training images are varied.
        mixes: Whether images of a batch are mixed with each other, which must happen before the first layer.
        seed: Of the views.
        how: Device, precision, processes.
    """

    def __init__(
        self,
        loaded: Loaded,
        samples: Samples,
        caching: config.Caching,
        cache: FeatureCache,
        *,
        preset: str,
        mixes: bool,
        seed: int,
        how: How,
    ) -> None:
        self.loaded, self.network, self.samples, self.caching = loaded, loaded.network, samples, caching
        self.preset, self.mixes, self.seed = preset, mixes, seed
        self.how = replace(how, compile="never")
        self.cache = cache
        self._files: list[str] | None = None

    def run(
        self, phase: Phase, ahead: Sequence[Phase], training: np.ndarray, watched: np.ndarray, stored: Form | None
    ) -> Kept | None:
        """Run the stages that a phase leaves frozen, and keep what they put out; None where it trains on images.

        Args:
            phase: The phase.
            ahead: Phases that will follow, and unfreeze more: what they train on is made in the same pass.
            training: Mask of the images trained on (N).
            watched: Mask of the images measured on while it trains (N).
            stored: What an earlier process chose for this phase, from whose state it goes on.

        Raises:
            TlkitError: There is no room any more for what was chosen before.
        """
        if not self.caching.cached_views:
            return None
        outputs = [output for output in map(self._last_frozen, (phase, *ahead)) if output is not None]
        if not outputs or self._last_frozen(phase) is None:
            return None
        try:
            if self.mixes:
                raise CannotSplit("images are mixed with each other")
            split, maps = processes.each(lambda: (self._split(outputs[0]), self._maps(outputs)))
        except CannotSplit as why:
            self.how.say(f"frozen stages run in every epoch, not once: {why}")
            return None
        views = min(self.caching.cached_views, max(one.epochs for one in (phase, *ahead)))
        plans = [(maps, views), *((maps[:1], fewer) for fewer in range(views, 0, -1))]
        if stored is not None:
            plans = [(maps[:1], stored.views)]
        refused = None
        for wanted, count in plans:
            form = Form(outputs[0].name, count, str(maps[0].kept).removeprefix("torch."))
            kept = Kept(form, split, maps[0], self.how)
            try:
                self._make(kept, wanted, training, watched)
            except NoRoom as error:
                refused = refused or error
                continue
            if count < views and stored is None:
                self.how.say(f"{count} views of each image are kept instead of {views}: {refused}")
            return kept
        assert refused is not None
        if stored is not None:
            remedy = "make room (tlkit cache --clear, or free some disk)"
            what = f"what the frozen stages put out cannot be kept any more: {refused}"
            raise TlkitError(what, where=self.cache.folder, remedy=remedy)
        self.how.say(f"frozen stages run in every epoch, not once: {refused}")
        return None

    def _last_frozen(self, phase: Phase) -> Stage | None:
        """The last of the lowest stages that a phase leaves frozen, if there is one whose output can be taken."""
        last = None
        for stage in stages(self.network):
            if stage.name in phase.stages:
                return last
            last = stage if stage.output else last
        return last

    def _split(self, stage: Stage) -> Split:
        split = split_at(self.network.eval(), stage.output, self._noise())
        splits_at_head(self.network, self._noise())  # known from now on: it cannot be tried on half a network
        trained = {name for name, tensor in self.network.named_parameters() if tensor.requires_grad}
        if early := [name for name in split.before if any(other.startswith(f"{name}.") for other in trained)]:
            raise CannotSplit(f"{early[0]}, which trains, runs before the end of {stage.name}")
        return split

    def _noise(self) -> Tensor:
        return noise(self.network, self.loaded.preprocessing, 2)

    def _maps(self, outputs: Sequence[Stage]) -> list[_Map]:
        """What stages put out, tried on noise."""
        images = self._noise().contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), self.how.accelerator.autocast():
            found = outputs_at(self.network, [stage.output for stage in outputs], images)
        maps = []
        for stage, output in zip(outputs, found, strict=True):
            # 11 bits of mantissa where numbers are small enough, unless the network itself computes with 8
            small = float(output.abs().max()) < LARGEST / 10
            kept = output.dtype if output.itemsize == 2 else torch.float16 if small else torch.bfloat16
            last = output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)
            maps.append(_Map(stage, tuple(output.shape[1:]), output.dtype, kept, last))
        return maps

    def _make(self, kept: Kept, maps: Sequence[_Map], training: np.ndarray, watched: np.ndarray) -> None:
        """See to it that everything is in the cache, and open what this phase uses.

        Raises:
            NoRoom: It would not fit.
        """
        varied = [str(number) for number in range(kept.form.views)]
        with ExitStack() as stack:
            todo = processes.each(
                lambda: [self._room(maps, varied, training, stack), self._room(maps, [CENTER], watched, stack)]
            )
            for views, lacking, writers in todo:  # room for everything before anything is computed
                self._pass(maps, views, lacking, writers)
        processes.gathered(None)  # what the others wrote is there from here on
        parts = {**dict.fromkeys(varied, training), CENTER: watched}
        processes.each(lambda: self._open(kept, maps[0], parts))

    def _open(self, kept: Kept, output: _Map, parts: Mapping[str, np.ndarray]) -> None:
        """Open what a phase uses: of each view the images in a mask (N).

        Raises:
            NoRoom: It is not there any more.
        """
        for view, rows in parts.items():
            entry = self.cache.open(self._key(output, view))
            kept.entries[view], kept.places[view] = entry, entry.find(self._digests())
            if (kept.places[view][rows] < 0).any():  # in the moment when nobody held it
                kept.close()
                raise NoRoom(f"{self.cache.folder} was cleared meanwhile")

    def _room(
        self, maps: Sequence[_Map], views: Sequence[str], rows: np.ndarray, stack: ExitStack
    ) -> tuple[Sequence[str], dict[tuple[str, str], np.ndarray], dict[tuple[str, str], Writer]]:
        """What is lacking of each map and view, as masks (N), and room for it; what is there stays until all is made.

        Of the processes of a machine, which share its cache, one writes.

        Raises:
            NoRoom: There is none.
        """
        lacking, writers = {}, {}
        for output in maps:
            for view in views:
                entry = stack.enter_context(self.cache.open(self._key(output, view)))
                which = output.stage.name, view
                lacking[which] = rows & (entry.find(self._digests()) < 0)
                if (count := int(lacking[which].sum())) and processes.is_first_here():
                    writers[which] = stack.enter_context(self.cache.write(self._key(output, view), count, output.bytes))
        return views, lacking, writers

    def _pass(
        self,
        maps: Sequence[_Map],
        views: Sequence[str],
        lacking: Mapping[tuple[str, str], np.ndarray],
        writers: Mapping[tuple[str, str], Writer],
    ) -> None:
        """Pass images through the frozen stages, as far as their outputs are not there yet."""
        anywhere = processes.gathered(np.any(list(lacking.values()), axis=0))
        todo = np.flatnonzero(np.any(anywhere, axis=0))
        if not len(todo):
            return
        files, dataset = self._digests(), self._dataset(todo, views)
        modules = [output.stage.output for output in maps]

        def compute(network: nn.Module, images: Tensor) -> Any:
            return outputs_at(network, modules, images)

        # one form whatever is there already: an output must not depend on what else was lacking
        whole = max(FOLDED_FROM, len(todo))
        passed = FrozenPass(self.network, dataset, compute, self.how, label="frozen stages", whole=whole)
        for found, outputs, bad in passed:
            if bad:
                file = bad[0][1]
                raise InputLost(file.path, where=self.samples.root, reason=file.reason)
            here = todo[found.numpy()]
            for output, values in zip(maps, outputs, strict=True):
                for number, view in enumerate(views):
                    new = lacking[output.stage.name, view][here]
                    if new.any() and (output.stage.name, view) in writers:
                        packed = output.pack(values[:, number][torch.from_numpy(new)])
                        writers[output.stage.name, view].add([files[row] for row in here[new]], packed)

    def _dataset(self, rows: np.ndarray, views: Sequence[str]) -> Any:
        part = self.samples.take(rows)
        if views == [CENTER]:
            return ViewDataset(part.root, part.paths, self.loaded.preprocessing, View())
        files = self._digests()
        draws = [[seed_of(self.seed, int(view), int(files[row], 16)) for view in views] for row in rows]
        return VariedViews(part.root, part.paths, self.loaded.preprocessing, self.preset, draws)

    def _digests(self) -> list[str]:
        """Of all images' content."""
        if self._files is None:
            found = digests(self.samples.root, self.samples.paths)
            for path, file in zip(self.samples.paths, found, strict=True):
                if file is None:
                    raise InputLost(path, where=self.samples.root, reason="it has gone, or may not be read")
            self._files = [file for file in found if file is not None]
        return self._files

    def _key(self, output: _Map, view: str) -> Mapping[str, Any]:
        """Everything that a kept output depends on, but for the image's content."""
        what, seen = f"output of {output.stage.name}", f"{self.preset}, seed {self.seed}, number {view}"
        key = key_of(self.loaded, self.how, what, view if view == CENTER else seen, self._below(output.stage))
        return key | {"shape": output.shape, "dtype": str(output.kept)}

    def _below(self, last: Stage) -> Collection[str]:
        """Names of the tensors of all stages up to one."""
        names: set[str] = set()
        for stage in stages(self.network):
            for module in stage.modules:
                tensors = self.network.get_submodule(module).state_dict(prefix=f"{module}." if module else "")
                own = [name for name in tensors if name.rpartition(".")[0] == module]
                names |= set(own)
            names |= set(stage.parameters)
            if stage.name == last.name:
                break
        return names
