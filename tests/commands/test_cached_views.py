"""Runs whose frozen stages run once: the same model whatever is in the cache, also where one is stopped and goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from tlkit.data import loading, training
from tlkit.data.decode import decode
from tlkit.networks.stages import stages
from tlkit.training import trainer as trainer_module

Tlkit = Callable[..., Any]
Outcome = Callable[[Path], dict[str, Any]]
UNFREEZE = ("unfreeze", "--stages", 3, "--epochs-per-stage", 3, "--patience", 0)
TWO = ("unfreeze", "--stages", 2, "--epochs-per-stage", 2, "--patience", 0)
SGD = ("--optimizer", "sgd", "--lr", 0.01)
MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def start_run(shapes: Path, start: Path, tlkit: Tlkit) -> Callable[..., Any]:
    """``start_run(run, *options)`` starts one on the CPU in float32, of `shapes` unless told otherwise."""

    def begin(run: Path, *options: Any, data: Path = shapes, weights: Any = start, workers: int = 0) -> Any:
        command, *rest = options
        arguments = ("--model", "test_resnet", "--weights", weights, "--image-size", 64, "--device", "cpu")
        if "--precision" not in rest:
            arguments += ("--precision", "fp32")
        return tlkit(command, data, *arguments, "--workers", workers, "--out", run, *rest)

    return begin


class Decoded:
    """What was decoded: for training by a run's loop or its frozen stages, and for evaluation and the probe."""

    def __init__(self) -> None:
        self.training: list[str] = []
        self.evaluation: list[str] = []

    def clear(self) -> None:
        self.training.clear()
        self.evaluation.clear()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    found = Decoded()
    for module, names in ((training, found.training), (loading, found.evaluation)):

        def counted(path: Path, min_side: int = 0, names: list[str] = names) -> Any:
            names.append("/".join(path.parts[-2:]))
            return decode(path, min_side=min_side)

        monkeypatch.setattr(module, "decode", counted)
    return found


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after so many steps."""
    fit, done = trainer_module.fit, []

    def stopping(*arguments: Any, after_step: Callable[[], bool], **named: Any) -> None:
        def after() -> bool:
            done.append(1)
            if len(done) == step:
                raise KeyboardInterrupt
            return after_step()

        fit(*arguments, after_step=after, **named)

    monkeypatch.setattr(trainer_module, "fit", stopping)


def weights(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / MODEL)


def phases(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "summary.json").read_text())["phases"]


def of_stages(*names: str) -> set[str]:
    network = timm.create_model("test_resnet")
    return {parameter for stage in stages(network) if stage.name in names for parameter in stage.parameters}


# The same training


APART = {
    ("fp32", "sgd"): (SGD, 0.02),
    ("fp32", "adamw"): ((), 0.02),
    ("bf16", "sgd"): (SGD, 0.4),
}
"""Options, and how far weights may end from those trained on images, as a part of how far they moved.

What is kept of float32 has 11 bits of mantissa; in bfloat16 it has the network's own 8, of which sums in another order
cost the last. AdamW takes steps of one size however small the gradient: in bfloat16, of such differences alone.
"""


@pytest.mark.parametrize(
    "case",
    [case if case == ("fp32", "sgd") else pytest.param(case, marks=pytest.mark.slow) for case in APART],
    ids="-".join,
)
def test_without_variation_it_ends_where_training_on_images_ends(
    start_run: Callable[..., Any], start: Path, tmp_path: Path, case: tuple[str, str]
) -> None:
    (optimizer, tolerance), precision = APART[case], case[0]
    options = (*UNFREEZE, *optimizer, "--augment", "none", "--precision", precision, "--quiet")
    for views in (0, 1):
        done = start_run(tmp_path / f"{views}", *options, "--cached-views", views)
        assert done.code == 0, done.err
    before, images, kept = safetensors.torch.load_file(start), weights(tmp_path / "0"), weights(tmp_path / "1")
    moving = of_stages("stage3", "stage4")
    for found in (images, kept):
        differing = {name for name in found if "fc" not in name and not torch.equal(found[name], before[name])}
        assert differing and differing <= moving
    moved = torch.cat([(images[name] - before[name]).flatten() for name in sorted(moving)]).norm()
    apart = torch.cat([(images[name] - kept[name]).flatten() for name in sorted(moving)]).norm()
    assert moved > 0 and apart / moved < tolerance
    torch.testing.assert_close(kept["fc.weight"], images["fc.weight"], rtol=1e-3, atol=1e-3)
    assert [phase.get("cached_views") for phase in phases(tmp_path / "1")] == [None, 1, 1]
    assert [phase.get("cached_views") for phase in phases(tmp_path / "0")] == [None, None, None]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "01"
    ]
    for one, other in zip(*rows, strict=True):
        assert (one["phase"], one["epoch"], one.get("step")) == (other["phase"], other["epoch"], other.get("step"))
        assert one["losses"].get("loss", 0) == pytest.approx(other["losses"].get("loss", 0), rel=0.2, abs=1e-2)
        assert one.get("val", {}).get("loss", 0) == pytest.approx(
            other.get("val", {}).get("loss", 0), rel=0.2, abs=1e-2
        )


@pytest.mark.parametrize("bn", ["train", pytest.param("frozen", marks=pytest.mark.slow)])
def test_frozen_stages_stay_bit_identical(start_run: Callable[..., Any], start: Path, tmp_path: Path, bn: str) -> None:
    """Statistics of batch norm included, and batches counted."""
    assert start_run(tmp_path / "run", *TWO, "--bn", bn, "--quiet").code == 0
    before, after = safetensors.torch.load_file(start), weights(tmp_path / "run")
    assert phases(tmp_path / "run")[1]["cached_views"] > 0
    moved = {name for name in before if "fc" not in name and not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("layer4.") for name in moved)
    assert any("running_mean" in name for name in moved) == (bn == "train")


@pytest.mark.parametrize("views", [4, *(pytest.param(views, marks=pytest.mark.slow) for views in (1, 2))])
def test_a_summary_says_how_many_views_there_were(start_run: Callable[..., Any], tmp_path: Path, views: int) -> None:
    assert start_run(tmp_path / "run", *UNFREEZE, "--cached-views", views, "--quiet").code == 0
    assert [phase.get("cached_views") for phase in phases(tmp_path / "run")] == [None, min(views, 3), min(views, 3)]


@pytest.mark.parametrize(
    "options",
    [("finetune", "--strategy", "full", "--epochs", 1), (*TWO, "--order", "bottom-up")],
    ids=["full", "bottom-up"],
)
def test_a_phase_whose_lowest_stage_trains_has_no_cache(
    start_run: Callable[..., Any], tmp_path: Path, cache: Path, options: tuple[Any, ...]
) -> None:
    done = start_run(tmp_path / "run", *options)
    assert done.code == 0
    assert "frozen stages" not in done.err
    assert all("cached_views" not in phase for phase in phases(tmp_path / "run"))
    kept = [json.loads(about.read_text())["what"] for about in cache.glob("*/about.json")]
    assert all(what == "pooled features" for what in kept)


# Where it does not work


def test_mixing_falls_back_and_says_so(start_run: Callable[..., Any], tmp_path: Path) -> None:
    done = start_run(tmp_path / "run", *TWO, "--mixup", 0.2)
    assert done.code == 0
    assert done.err.count("frozen stages run in every epoch, not once: images are mixed with each other") == 1
    assert "cached_views" not in phases(tmp_path / "run")[1]


def test_a_network_that_cannot_be_cut_falls_back_and_says_so(
    tlkit: Tlkit, make_shapes: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_shapes(tmp_path / "data", ("disc", "square"), 8)
    words = ("--model", "xcit_nano_12_p16_224", "--weights", "random", "--image-size", 32, "--device", "cpu")
    options = ("--stages", 2, "--epochs-per-stage", 1, "--precision", "fp32")
    done = tlkit("unfreeze", data, *words, *options, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.err.count("frozen stages run in every epoch, not once: patch_embed") == 1
    assert "cached_views" not in phases(tmp_path / "run")[1]


@pytest.mark.slow
def test_budgets_that_are_too_small(start_run: Callable[..., Any], tmp_path: Path, cache: Path) -> None:
    """Fewer views; then none, and the run is what it is without a cache."""
    without = ("--cached-views", 0, "--cache-budget", "0MB")
    assert start_run(tmp_path / "none", *UNFREEZE, *without, "--quiet").code == 0
    assert start_run(tmp_path / "whole", *UNFREEZE, "--quiet").code == 0
    size = sum(path.stat().st_size for path in cache.rglob("*.*")) / 1e6
    found = []
    for share in (0.4, 0.2, 0.1, 0.0):
        shutil.rmtree(cache)
        done = start_run(tmp_path / f"{share}", *UNFREEZE, "--cache-budget", f"{size * share:.2f}MB")
        assert done.code == 0, done.err
        views = [phase.get("cached_views", 0) for phase in phases(tmp_path / f"{share}")[1:]]
        used = sum(path.stat().st_size for path in cache.rglob("*.*")) / 1e6 if cache.exists() else 0
        assert used <= size * share + 0.01
        told = [line for line in done.err.splitlines() if "--cache-budget" in line and "features" not in line]
        assert [line.split()[0] for line in told] == [str(count) if count else "frozen" for count in views if count < 3]
        for line in told:
            assert " views of each image are kept instead of 3: " in line or "run in every epoch, not once: " in line
        found.append(views)
    assert {1, 2} & {count for views in found for count in views}, found
    assert found[-1] == [0, 0]
    assert [views[0] for views in found] == sorted((views[0] for views in found), reverse=True)
    assert (tmp_path / "0.0" / MODEL).read_bytes() == (tmp_path / "none" / MODEL).read_bytes()


# The same bytes


def test_cold_warm_and_partly_warm_give_the_same_model(
    start_run: Callable[..., Any],
    shapes: Path,
    outcome: Outcome,
    tmp_path: Path,
    cache: Path,
    decoded: Decoded,
) -> None:
    """The last after a run on some of the images."""
    assert start_run(tmp_path / "cold", *UNFREEZE, "--quiet").code == 0
    expected = outcome(tmp_path / "cold")
    assert Counter(decoded.training).most_common(1)[0][1] == 1, "phases of one run share one pass"
    train = sum(",train," in line for line in (tmp_path / "cold" / "splits.csv").read_text().splitlines())
    assert len(decoded.training) == train
    decoded.clear()
    assert start_run(tmp_path / "warm", *UNFREEZE, "--quiet").code == 0
    assert decoded.training == []
    assert len(decoded.evaluation) <= 36, "the last prediction of all images alone"
    assert outcome(tmp_path / "warm") == expected
    shutil.rmtree(cache)
    some = shutil.copytree(shapes, tmp_path / "some")
    for name in ("disc/00.png", "square/03.jpg", "square/04.png", "triangle/11.jpg"):
        (some / name).unlink()
    assert start_run(tmp_path / "subset", *TWO, "--quiet", data=some).code == 0
    decoded.clear()
    assert start_run(tmp_path / "partly", *UNFREEZE, "--quiet").code == 0
    assert outcome(tmp_path / "partly") == expected


@pytest.mark.slow
def test_a_second_view_is_another_model(start_run: Callable[..., Any], tmp_path: Path) -> None:
    """The epochs do take turns."""
    for views in (1, 2):
        assert start_run(tmp_path / f"{views}", *UNFREEZE, "--cached-views", views, "--quiet").code == 0
    assert (tmp_path / "1" / MODEL).read_bytes() != (tmp_path / "2" / MODEL).read_bytes()


def test_any_number_of_workers_gives_the_same_model(start_run: Callable[..., Any], tmp_path: Path, cache: Path) -> None:
    for workers in (0, 2):
        assert start_run(tmp_path / f"{workers}", *UNFREEZE, "--quiet", workers=workers).code == 0
        shutil.rmtree(cache)
    assert (tmp_path / "0" / MODEL).read_bytes() == (tmp_path / "2" / MODEL).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("finetune", "--epochs", 4),
        ("finetune", "--strategy", "gradual", "--stages", 4, "--epochs-per-stage", 2),
        (*UNFREEZE, "--ema", 0.9, "--accumulate", 2, "--balanced-sampling", "--augment", "strong"),
        ("unfreeze", "--stages", 3, "--epochs-per-stage", 2, "--lr", "auto"),
        ("unfreeze", "--stages", 3, "--epochs-per-stage", 2, "--test-fraction", 0.2, "--precision", "bf16"),
    ],
    ids=["auto", "gradual", "average", "a rate searched for", "test split, bf16"],
)
def test_runs_of_all_kinds_with_a_cold_and_a_warm_cache(
    start_run: Callable[..., Any], outcome: Outcome, tmp_path: Path, options: tuple[Any, ...]
) -> None:
    for name in ("cold", "warm"):
        done = start_run(tmp_path / name, *options, "--quiet")
        assert done.code == 0, done.err
    assert outcome(tmp_path / "cold") == outcome(tmp_path / "warm")


CHANGES: dict[str, tuple[Any, ...]] = {
    "seed": ("--seed", 3),
    "preset": ("--augment", "strong"),
    "precision": ("--precision", "bf16"),
    "image size": ("--image-size", 96),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_a_cache_of_other_runs_changes_nothing(
    start_run: Callable[..., Any], outcome: Outcome, tmp_path: Path, cache: Path, case: str
) -> None:
    options = (*UNFREEZE, *CHANGES[case], "--quiet")
    assert start_run(tmp_path / "alone", *options).code == 0
    shutil.rmtree(cache)
    assert start_run(tmp_path / "before", *UNFREEZE, "--quiet").code == 0
    assert start_run(tmp_path / "run", *options).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


# Stopped, and gone on with


@pytest.mark.parametrize("cleared", [False, True], ids=["cache there", "cache gone"])
@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (9, 16))])
def test_a_run_stopped_in_a_cached_phase_goes_on_to_the_same_bytes(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: Decoded,
    step: int,
    cleared: bool,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start_run(whole, *UNFREEZE, "--quiet").code == 0
    shutil.rmtree(cache)
    with monkeypatch.context() as context:
        stopped_at(step, context)
        assert start_run(run, *UNFREEZE, "--quiet").code == 130
    if cleared:
        shutil.rmtree(cache)
    decoded.clear()
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert bool(decoded.training) == cleared
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("images", [17, *(pytest.param(images, marks=pytest.mark.slow) for images in (1, 29))])
def test_a_run_stopped_while_frozen_stages_are_passed_goes_on(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: Decoded,
    images: int,
) -> None:
    """After whole batches of 16, of which none is made again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start_run(whole, *UNFREEZE, "--quiet").code == 0
    train = len(decoded.training)
    shutil.rmtree(cache)
    decoded.clear()
    with monkeypatch.context() as context:
        count = training.decode

        def stops(path: Path, min_side: int = 0) -> Any:
            if len(decoded.training) == images:
                raise KeyboardInterrupt
            return count(path, min_side=min_side)

        context.setattr(training, "decode", stops)
        assert start_run(run, *UNFREEZE, "--quiet").code == 130
    assert not list(cache.glob("*/*.part"))
    decoded.clear()
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert len(decoded.training) == train - images // 16 * 16
    assert outcome(run) == outcome(whole)


@pytest.mark.parametrize("why", ["budget", *(pytest.param(why, marks=pytest.mark.slow) for why in ("disk", "folder"))])
def test_a_resume_without_room_is_one_clear_line(
    tlkit: Tlkit,
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """And once there is room again, the run goes on as if nothing had been."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start_run(whole, *UNFREEZE, "--quiet").code == 0
    shutil.rmtree(cache)
    with monkeypatch.context() as context:
        stopped_at(3, context)
        assert start_run(run, *UNFREEZE, "--quiet").code == 130
    shutil.rmtree(cache)
    recipe, kept = run / "recipe.yaml", (run / "recipe.yaml").read_text()
    with monkeypatch.context() as context:
        match why:
            case "budget":
                assert "cache_budget: 10GB" in kept
                recipe.write_text(kept.replace("cache_budget: 10GB", "cache_budget: 0.01MB"))
            case "disk":
                usage = shutil._ntuple_diskusage(10**12, 10**12, 10**6)  # type: ignore[attr-defined]
                real = shutil.disk_usage
                context.setattr(shutil, "disk_usage", lambda path: usage if Path(path) == cache else real(path))
            case "folder":
                cache.write_text("a file is in the way")
        done = tlkit("unfreeze", "--resume", run)
    assert done.code == 1
    assert "what the frozen stages put out cannot be kept any more" in done.error
    assert str(cache) in done.error and "tlkit cache --clear" in done.error
    assert "Traceback" not in done.err
    recipe.write_text(kept)
    cache.unlink() if cache.is_file() else shutil.rmtree(cache, ignore_errors=True)
    assert tlkit("unfreeze", "--resume", run, "--quiet").code == 0
    assert outcome(run) == outcome(whole)


# A probe's features


PROBE = ("finetune", "--strategy", "probe", "--quiet")


def test_a_second_probe_decodes_nothing(
    start_run: Callable[..., Any], outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start_run(tmp_path / "one", *PROBE).code == 0

    def fails(path: Path, min_side: int = 0) -> Any:
        raise AssertionError(f"{path} is decoded")

    with monkeypatch.context() as context:
        context.setattr(loading, "decode", fails)
        context.setattr(training, "decode", fails)
        done = start_run(tmp_path / "two", *PROBE)
    assert done.code == 0, done.err
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


def test_it_says_that_features_were_there(start_run: Callable[..., Any], tmp_path: Path) -> None:
    for name, expected in {"one": 0, "two": 1}.items():
        done = start_run(tmp_path / name, *PROBE[:-1])
        assert done.code == 0
        assert done.err.count("features of 36 of 36 images were there from an earlier run") == expected


@pytest.mark.parametrize("images", [33, *(pytest.param(images, marks=pytest.mark.slow) for images in (1, 16))])
def test_an_interrupted_first_pass_goes_on_where_it_was(
    start_run: Callable[..., Any],
    outcome: Outcome,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
) -> None:
    """Whole batches of 16 are kept."""
    assert start_run(tmp_path / "whole", *PROBE).code == 0
    shutil.rmtree(cache)
    count: list[Path] = []

    def stops(path: Path, min_side: int = 0) -> Any:
        if len(count) == images:
            raise KeyboardInterrupt
        count.append(path)
        return decode(path, min_side=min_side)

    with monkeypatch.context() as context:
        context.setattr(loading, "decode", stops)
        assert start_run(tmp_path / "stopped", *PROBE).code == 130
    count.clear()
    with monkeypatch.context() as context:
        context.setattr(loading, "decode", lambda path, min_side=0: count.append(path) or decode(path, min_side))
        assert start_run(tmp_path / "run", *PROBE).code == 0
    assert len(count) == 36 - images // 16 * 16
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_files_that_cannot_be_read_are_told_each_time(
    start_run: Callable[..., Any], shapes: Path, outcome: Outcome, tmp_path: Path, decoded: Decoded
) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    (data / "square" / "05.jpg").write_bytes(b"no image")
    (data / "disc" / "02.png").write_bytes(b"")
    for name in ("one", "two"):
        decoded.clear()
        done = start_run(tmp_path / name, *PROBE[:-1], "--on-error", "skip", data=data)
        assert done.code == 0, done.err
        assert "square/05.jpg" in done.err and "disc/02.png" in done.err
        told = json.loads((tmp_path / name / "summary.json").read_text())
        assert sorted(file["path"] for file in told["skipped_files"]) == ["disc/02.png", "square/05.jpg"]
    assert sorted(set(decoded.evaluation)) == ["disc/02.png", "square/05.jpg"]
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    refused = start_run(tmp_path / "three", *PROBE, data=data)
    assert refused.code == 1 and "2 of 36 images cannot be read" in refused.error


def test_a_mended_file_is_read(start_run: Callable[..., Any], shapes: Path, tmp_path: Path, decoded: Decoded) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    broken = data / "square" / "05.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    assert start_run(tmp_path / "one", *PROBE, "--on-error", "skip", data=data).code == 0
    broken.write_bytes(whole)
    decoded.clear()
    assert start_run(tmp_path / "two", *PROBE, data=data).code == 0
    assert set(decoded.evaluation) == {"square/05.jpg"}
    assert start_run(tmp_path / "three", *PROBE, data=shapes).code == 0
    assert (tmp_path / "two" / MODEL).read_bytes() == (tmp_path / "three" / MODEL).read_bytes()
