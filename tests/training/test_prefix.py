"""Frozen stages run once: what is kept is what they put out, made anew where something that it depends on changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tlkit import compute, config
from tlkit.data import loading, training
from tlkit.data.augment import augment, least_side_for
from tlkit.data.batches import BatchPlan
from tlkit.data.content import digest
from tlkit.data.decode import decode
from tlkit.data.folders import Samples, read_samples
from tlkit.data.training import TrainingBatches, TrainingDataset, seed_of
from tlkit.data.transforms import View, normalise
from tlkit.errors import TlkitError
from tlkit.evaluation.predict import collect, predict_batches
from tlkit.networks.build import Loaded, build
from tlkit.networks.freezing import freeze
from tlkit.networks.frozen_pass import How
from tlkit.networks.splitting import outputs_at
from tlkit.networks.stages import stages
from tlkit.training.cache import FeatureCache
from tlkit.training.phases import Phase
from tlkit.training.prefix import CENTER, Form, Kept, KeptBatches, Prefix

GB = 10**9
NAMES = ("stem", "stage1", "stage2", "stage3", "stage4", "head")
TRAINING, WATCHED = 10, 3  # images


@pytest.fixture
def samples(make_shapes: Callable[..., Path], tmp_path: Path) -> Samples:
    found = read_samples(make_shapes(tmp_path / "shapes", images=[5, 4, 4]))
    assert len(found) == TRAINING + WATCHED
    return found


def phase(lowest: int, epochs: int = 3) -> Phase:
    """One that trains ``NAMES[lowest:]``."""
    return Phase(NAMES[lowest:], epochs, dict.fromkeys(NAMES[lowest:], 1e-3))


def rows(*kept: int) -> np.ndarray:
    mask = np.zeros(TRAINING + WATCHED, dtype=bool)
    mask[list(kept)] = True
    return mask


TRAIN, WATCH = rows(*range(TRAINING)), rows(*range(TRAINING, TRAINING + WATCHED))


class Made:
    """A `Prefix` with all it needs; any of it may be another.

    Args:
        samples: All images.
        folder: Of the cache.
        weights: A file.
    """

    def __init__(self, samples: Samples, folder: Path, weights: Path) -> None:
        self.samples, self.folder, self.weights = samples, folder, weights
        self.said: list[str] = []

    def loaded(self, size: int = 64, model: str = "test_resnet", weights: Any = None) -> Loaded:
        torch.manual_seed(0)
        loaded = build(model, str(weights or self.weights), config.Preprocess(image_size=size))
        loaded.network.reset_classifier(3)  # type: ignore[operator]
        return loaded

    def __call__(
        self,
        loaded: Loaded | None = None,
        *,
        lowest: int = 4,
        ahead: Sequence[Phase] = (),
        views: int = 2,
        budget: int = GB,
        preset: str = "light",
        mixes: bool = False,
        seed: int = 0,
        precision: Any = "fp32",
        workers: int | None = 0,
        batch_size: int = 4,
        train: np.ndarray = TRAIN,
        watch: np.ndarray = WATCH,
        stored: Form | None = None,
        **how: Any,
    ) -> Kept | None:
        """What `Prefix.run` gives for a phase that trains ``NAMES[lowest:]``."""
        loaded = loaded or self.loaded()
        names = tuple(stage.name for stage in stages(loaded.network))
        lowest += len(names) - len(NAMES)
        freeze(loaded.network, names[:lowest])
        how.setdefault("accelerator", compute.accelerator(config.Compute(device="cpu", precision=precision)))
        passes = How(batch_size=batch_size, workers=workers, say=self.said.append, **how)
        prefix = Prefix(
            loaded,
            self.samples,
            config.Caching(cached_views=views),
            FeatureCache(self.folder, budget),
            preset=preset,
            mixes=mixes,
            seed=seed,
            how=passes,
        )
        first = Phase(names[lowest:], 3, dict.fromkeys(names[lowest:], 1e-3))
        return prefix.run(first, ahead, train, watch, stored)

    def kept(self, *arguments: Any, **named: Any) -> Kept:
        found = self(*arguments, **named)
        assert found is not None, self.said
        return found


@pytest.fixture
def made(samples: Samples, tmp_path: Path, start: Path) -> Made:
    return Made(samples, tmp_path / "cache", start)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images decoded so far, in this process."""
    names: list[str] = []

    def counted(path: Path, min_side: int = 0) -> Any:
        names.append("/".join(path.parts[-2:]))
        return decode(path, min_side=min_side)

    monkeypatch.setattr(training, "decode", counted)
    monkeypatch.setattr(loading, "decode", counted)
    return names


def everything(kept: Kept) -> dict[str, Tensor]:
    """All that a phase can ask for."""
    views = {str(number): np.flatnonzero(TRAIN) for number in range(kept.form.views)}
    return {view: kept.outputs(view, some) for view, some in (views | {CENTER: np.flatnonzero(WATCH)}).items()}


def assert_same(found: Kept, expected: dict[str, Tensor]) -> None:
    other = everything(found)
    assert other.keys() == expected.keys()
    assert [view for view in expected if not torch.equal(other[view], expected[view])] == []


# What is kept


@pytest.mark.parametrize("preset", ["none", "light", "strong"])
def test_what_is_kept_is_what_the_frozen_stages_make_of_each_view(made: Made, samples: Samples, preset: str) -> None:
    """By hand: each image decoded, varied by a seed of the run's, the view's number and the file's content, passed."""
    loaded = made.loaded()
    kept = made.kept(loaded, preset=preset, seed=7)
    assert kept.form == Form("stage3", 2, "float16")
    output = next(stage.output for stage in stages(loaded.network) if stage.name == "stage3")
    for view in ("0", "1", CENTER):
        pixels = []
        some = np.flatnonzero(WATCH if view == CENTER else TRAIN)
        for row in some:
            path = samples.root / samples.paths[row]
            which = "none" if view == CENTER else preset
            if view != CENTER:
                torch.manual_seed(seed_of(7, int(view), int(digest(path) or "", 16)))
            image = decode(path, min_side=least_side_for(which, loaded.preprocessing))
            pixels.append(augment(image, loaded.preprocessing, which))
        images = normalise(torch.stack(pixels), loaded.preprocessing)
        with torch.no_grad():
            (expected,) = outputs_at(loaded.network, [output], images)
        found = kept.outputs(view, some)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-4)
        assert expected.std() > 0
    if preset != "none":
        assert not torch.equal(*(kept.outputs(view, np.flatnonzero(TRAIN)) for view in "01"))


@pytest.mark.parametrize(("views", "expected"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_there_are_no_more_views_than_epochs(made: Made, views: int, expected: int) -> None:
    assert made.kept(views=views).form.views == expected


def test_bf16_is_kept_bit_for_bit(made: Made) -> None:
    loaded = made.loaded()
    kept = made.kept(loaded, precision="bf16", preset="none", watch=TRAIN)
    assert kept.form.dtype == "bfloat16"
    some = np.flatnonzero(TRAIN)
    found = kept.outputs("0", some)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, kept.outputs(CENTER, some)), "the same view, made in another pass"


def test_numbers_that_float16_does_not_hold_are_kept_in_bfloat16(made: Made) -> None:
    loaded = made.loaded()
    torch.manual_seed(0)
    with torch.no_grad():
        for module in loaded.network.get_submodule("layer3").modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(mean=1e5)
    kept = made.kept(loaded)
    assert kept.form.dtype == "bfloat16"
    found = kept.outputs("0", np.flatnonzero(TRAIN))
    assert found.isfinite().all() and found.abs().max() > 65504


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_predictions_from_kept_outputs_are_the_networks_own(made: Made, model: str) -> None:
    loaded = made.loaded(model=model, weights=made.weights if model == "test_resnet" else "random", size=64)
    kept = made.kept(loaded)
    assert kept.knows(WATCH) and not kept.knows(TRAIN)
    samples = made.samples.take(WATCH)
    dataset = loading.ViewDataset(samples.root, samples.paths, loaded.preprocessing, View())
    expected = collect(predict_batches(loaded.network, dataset, kept.how)).probabilities
    np.testing.assert_allclose(kept.predict(loaded.network, WATCH), expected, rtol=2e-2, atol=2e-3)


def test_batches_are_those_of_images_in_the_same_order(made: Made, samples: Samples) -> None:
    kept = made.kept(views=2)
    part = samples.take(TRAIN)
    batches = KeptBatches(kept, np.flatnonzero(TRAIN), BatchPlan(part.labels, 4, seed=5))
    plan = BatchPlan(part.labels, 4, seed=5)
    images = TrainingBatches(
        TrainingDataset(part, made.loaded().preprocessing, "light", 0),
        plan,
        epochs=3,
        device=torch.device("cpu"),
        workers=0,
    )
    assert batches.steps == images.steps == 3
    for epoch in range(3):
        found, expected = list(batches.epoch(epoch)), list(images.epoch(epoch))
        for (outputs, labels), (_, wanted), some in zip(found, expected, plan.batches(epoch), strict=True):
            assert torch.equal(labels, wanted)
            assert torch.equal(outputs, kept.outputs(str(epoch % 2), np.flatnonzero(TRAIN)[some]))
        for (outputs, _), (others, _) in zip(batches.epoch(epoch, 1), found[1:], strict=True):
            assert torch.equal(outputs, others)


@pytest.mark.parametrize("workers", [None, 2])
def test_whoever_decodes_it_is_the_same(made: Made, tmp_path: Path, workers: int | None) -> None:
    expected = everything(made.kept(workers=0))
    made.folder = tmp_path / "other"
    assert_same(made.kept(workers=workers), expected)


# Where there is nothing to keep


@pytest.mark.parametrize("case", ["no views", "the stem trains", "the stem alone is frozen"])
def test_a_phase_without_frozen_stages_below_has_no_cache(made: Made, decoded: list[str], case: str) -> None:
    options = {"views": 0} if case == "no views" else {"lowest": int("alone" in case)}
    assert made(**options) is None
    assert made.said == [] and decoded == [] and not made.folder.exists()


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "mixing": ({"mixes": True}, "images are mixed with each other"),
}


@pytest.mark.parametrize("case", REASONS)
def test_it_is_said_why_frozen_stages_run_in_every_epoch(made: Made, decoded: list[str], case: str) -> None:
    options, reason = REASONS[case]
    assert made(**options) is None
    assert made.said == [f"frozen stages run in every epoch, not once: {reason}"]
    assert decoded == [] and not made.folder.exists()


def test_a_network_that_cannot_be_cut_is_told(made: Made, decoded: list[str]) -> None:
    assert made(made.loaded(model="xcit_nano_12_p16_224", weights="random", size=32)) is None
    (line,) = made.said
    assert line.startswith("frozen stages run in every epoch, not once: patch_embed, before it, puts out")
    assert decoded == [] and not made.folder.exists()


def test_a_later_stage_that_runs_early_is_told(made: Made) -> None:
    """What trains must not be run before the cut."""
    loaded = made.loaded()
    loaded.network.get_submodule("layer1").requires_grad_(True)
    freeze(loaded.network, NAMES[:4])
    torch.manual_seed(0)
    prefix = Prefix(
        loaded,
        made.samples,
        config.Caching(),
        FeatureCache(made.folder, GB),
        preset="light",
        mixes=False,
        seed=0,
        how=How(compute.accelerator(config.Compute(device="cpu", precision="fp32")), workers=0, say=made.said.append),
    )
    loaded.network.get_submodule("layer1").requires_grad_(True)
    assert prefix.run(phase(4), (), TRAIN, WATCH, None) is None
    assert made.said == [
        "frozen stages run in every epoch, not once: layer1, which trains, runs before the end of stage3"
    ]


# Room


def test_too_little_room_is_fewer_views_then_none(made: Made, decoded: list[str]) -> None:
    made.kept(views=3)
    whole = FeatureCache(made.folder, GB).used()
    shutil.rmtree(made.folder)
    found = []
    for share in (1.3, 0.9, 0.65, 0.4, 0.2, 0.01, 0):
        made.said.clear()
        decoded.clear()
        budget = int(whole * share)
        kept = made(views=3, budget=budget)
        views = kept.form.views if kept is not None else 0
        found.append(views)
        cache = FeatureCache(made.folder, budget)
        if views == 3:
            assert made.said == []
        elif views:
            (line,) = made.said
            assert line.startswith(f"{views} views of each image are kept instead of 3: ")
            assert "--cache-budget" in line
        else:
            (line,) = made.said
            assert line.startswith("frozen stages run in every epoch, not once: ") and "--cache-budget" in line
        if kept is not None:
            assert cache.used() <= budget
            everything(kept)
            kept.close()
            assert len(decoded) == TRAINING + WATCHED
        else:
            assert decoded == [], share
        shutil.rmtree(made.folder, ignore_errors=True)
    assert found[0] == 3 and found[-1] == found[-2] == 0
    assert found == sorted(found, reverse=True) and {1, 2} <= set(found)


@pytest.mark.parametrize("share", [1.5, 1.2, 1.0, 0.8, 0.5, 0.1])
def test_a_tight_budget_never_takes_what_the_phase_itself_uses(made: Made, share: float) -> None:
    """Two views are there already, and three are asked for: room for the third is not made of the first."""
    made.kept(views=2).close()
    budget = int(share * FeatureCache(made.folder, GB).used())
    kept = made(views=3, budget=budget)
    if kept is not None:
        found = everything(kept)
        assert len(found) == kept.form.views + 1
        kept.close()


def test_phases_ahead_give_way_to_the_views_of_this_one(made: Made) -> None:
    made.kept(views=3)
    alone = FeatureCache(made.folder, GB).used()
    shutil.rmtree(made.folder)
    kept = made.kept(views=3, ahead=[phase(3)], budget=int(1.1 * alone))
    assert kept.form.views == 3
    assert made.said == []


@pytest.mark.parametrize("kind", ["the budget", "the disk", "the folder"])
def test_no_room_any_more_for_what_was_chosen_before_is_an_error(
    made: Made, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stored = made.kept().form
    shutil.rmtree(made.folder)
    budget = 10_000 if kind == "the budget" else GB
    if kind == "the disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    if kind == "the folder":
        made.folder.write_text("a file")
    with pytest.raises(TlkitError, match="cannot be kept any more") as caught:
        made(stored=stored, budget=budget)
    assert caught.value.where == str(made.folder)
    assert "tlkit cache --clear" in caught.value.remedy


def test_what_was_chosen_before_is_kept_to(made: Made) -> None:
    kept = made.kept(views=3, stored=Form("stage3", 1, "float16"))
    assert kept.form.views == 1 and made.said == []


# Made anew, or not


def test_nothing_is_made_twice(made: Made, decoded: list[str]) -> None:
    expected = everything(made.kept())
    assert sorted(decoded) == sorted(made.samples.paths), "each once, all views of it together"
    decoded.clear()
    assert_same(made.kept(), expected)
    assert decoded == []


def other_head(made: Made, tmp_path: Path) -> dict[str, Any]:
    loaded = made.loaded()
    with torch.no_grad():
        for name in ("layer4.0.conv1.weight", "fc.weight"):
            loaded.network.get_parameter(name).mul_(2)
    return {"loaded": loaded}


def other_weights(made: Made, tmp_path: Path) -> dict[str, Any]:
    tensors = safetensors.torch.load_file(made.weights)
    tensors["layer3.0.bn1.running_mean"] = tensors["layer3.0.bn1.running_mean"] + 1e-3
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    return {"loaded": made.loaded(weights=tmp_path / "other.safetensors")}


def same_weights_elsewhere(made: Made, tmp_path: Path) -> dict[str, Any]:
    return {"loaded": made.loaded(weights=shutil.copy(made.weights, tmp_path / "copy.safetensors"))}


CHANGES: dict[str, tuple[Callable[[Made, Path], dict[str, Any]], int]] = {
    "nothing": (lambda *_: {}, 0),
    "fewer views": (lambda *_: {"views": 1}, 0),
    "weights above": (other_head, 0),
    "the weights' place": (same_weights_elsewhere, 0),
    "workers": (lambda *_: {"workers": None}, 0),
    "another cut below": (lambda *_: {"lowest": 3}, TRAINING + WATCHED),
    "weights": (other_weights, TRAINING + WATCHED),
    "size": (lambda made, _: {"loaded": made.loaded(size=96)}, TRAINING + WATCHED),
    "precision": (lambda *_: {"precision": "bf16"}, TRAINING + WATCHED),
    "more views": (lambda *_: {"views": 3}, TRAINING),
    "seed": (lambda *_: {"seed": 1}, TRAINING),
    "preset": (lambda *_: {"preset": "standard"}, TRAINING),
    "parts of training and watched swapped": (lambda *_: {"train": WATCH, "watch": TRAIN}, TRAINING + WATCHED),
}
"""What is changed, and how many images are then decoded."""


@pytest.mark.parametrize("case", CHANGES)
def test_what_depends_on_a_change_is_made_anew(made: Made, decoded: list[str], tmp_path: Path, case: str) -> None:
    change, count = CHANGES[case]
    made.kept().close()
    options = change(made, tmp_path)
    decoded.clear()
    kept = made.kept(options.pop("loaded", None), **options)
    assert len(decoded) == count
    kept.close()


def test_an_image_whose_content_changed_is_made_anew_alone(made: Made, samples: Samples, decoded: list[str]) -> None:
    expected = everything(made.kept())
    changed, watched = samples.paths[3], samples.paths[TRAINING]
    shutil.copy(samples.root / samples.paths[11], samples.root / changed)
    shutil.copy(samples.root / samples.paths[12], samples.root / watched)  # watched before, too: nothing to do
    decoded.clear()
    kept = made.kept()
    assert decoded == [changed]
    found = everything(kept)
    for view in "01":
        same = [row for row in range(TRAINING) if torch.equal(found[view][row], expected[view][row])]
        assert same == [row for row in range(TRAINING) if row != 3]
    assert torch.equal(found[CENTER][0], expected[CENTER][2])


def test_a_file_of_another_name_is_known_by_its_content(made: Made, samples: Samples, decoded: list[str]) -> None:
    made.kept()
    renamed = ["x" + path.replace("/", "/y") for path in samples.paths]
    for old, new in zip(samples.paths, renamed, strict=True):
        (samples.root / new).parent.mkdir(exist_ok=True)
        (samples.root / old).rename(samples.root / new)
    made.samples = replace(samples, paths=renamed)
    decoded.clear()
    made.kept()
    assert decoded == []


@pytest.mark.parametrize("first", [rows(0, 4, 5), rows(9), TRAIN], ids=["three", "one", "all"])
def test_a_partly_warm_cache_gives_the_same_bytes(
    made: Made, decoded: list[str], tmp_path: Path, first: np.ndarray
) -> None:
    expected = everything(made.kept())
    made.folder = tmp_path / "other"
    made.kept(train=first, watch=rows(12), views=1)
    decoded.clear()
    kept = made.kept()
    assert_same(kept, expected)
    assert len(decoded) == TRAINING + WATCHED - 1, "the second view of each is new"


def test_an_interrupted_pass_goes_on_where_it_was(
    made: Made, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 4: of nine images decoded, eight are kept."""
    expected = everything(made.kept())
    made.folder = tmp_path / "other"
    decoded.clear()

    def stops(path: Path, min_side: int = 0) -> Any:
        if len(decoded) == 9:
            raise KeyboardInterrupt
        decoded.append(path.name)
        return decode(path, min_side=min_side)

    with monkeypatch.context() as context:
        context.setattr(training, "decode", stops)
        with pytest.raises(KeyboardInterrupt):
            made()
    decoded.clear()
    kept = made.kept()
    assert len(decoded) == TRAINING - 8 + WATCHED
    assert_same(kept, expected)


@pytest.mark.parametrize("lowest", [(4, 3), (4, 3, 2), (3, 2)])
def test_phases_to_come_share_the_pass(made: Made, decoded: list[str], tmp_path: Path, lowest: tuple[int, ...]) -> None:
    """And what it makes for them is what they would have made."""
    made.kept(lowest=lowest[0], ahead=[phase(number) for number in lowest[1:]])
    assert len(decoded) == TRAINING + WATCHED
    decoded.clear()
    shared = {number: everything(made.kept(lowest=number)) for number in lowest}
    assert decoded == []
    for number, expected in shared.items():
        made.folder = tmp_path / str(number)
        assert_same(made.kept(lowest=number), expected)


def test_a_file_that_cannot_be_read_any_more_is_named(
    made: Made, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    (samples.root / samples.paths[2]).write_bytes(b"no image")
    with pytest.raises(TlkitError, match=samples.paths[2]) as caught:
        made()
    assert "--resume" in caught.value.remedy
    (samples.root / samples.paths[2]).unlink()
    with pytest.raises(TlkitError, match=samples.paths[2]):
        made()


def test_what_a_phase_uses_is_not_removed(made: Made) -> None:
    kept = made.kept()
    expected = everything(kept)
    cache = FeatureCache(made.folder, GB)
    assert cache.clear().in_use > 0
    assert_same(kept, expected)
    kept.close()
    assert cache.clear().in_use == 0
    assert cache.entries() == []
