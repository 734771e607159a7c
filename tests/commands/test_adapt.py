"""``adapt``: from labelled images of one domain to unlabelled ones of another, through the real command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image, ImageOps

from tlkit import config
from tlkit.training.fit import fit

Tlkit = Callable[..., Any]
MakeShapes = Callable[..., Path]
FIT = "tlkit.adaptation.learn.fit"
QUIET = ("--precision", "fp32", "--quiet")


@pytest.fixture(scope="module")
def domains(make_shapes: MakeShapes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and target: the same shapes, the target's colours turned into their opposites. Read only."""
    folder = tmp_path_factory.mktemp("domains")
    source, target = (make_shapes(folder / name, seed=seed) for seed, name in enumerate(("source", "target")))
    for path in sorted(target.rglob("*.*")):
        with Image.open(path) as image:
            changed = ImageOps.invert(image.convert("RGB"))
        changed.save(path)
    return source, target


@pytest.fixture(scope="module")
def options(small: tuple[str, ...], domains: tuple[Path, Path]) -> tuple[Any, ...]:
    """A probe with a bottleneck that takes no time."""
    probe = ("--strategy", "probe", "--bottleneck", 16, "--epochs", 4, "--batch-size", 16)
    return ("adapt", "--source", domains[0], "--target", domains[1], *small, *probe, *QUIET)


@pytest.fixture(scope="module")
def adapted(tlkit: Tlkit, options: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one method and seed. Read only."""
    run = tmp_path_factory.mktemp("runs") / "adapted"
    done = tlkit(*options, "--method", "dann", "--out", run)
    assert done.code == 0, done.err
    return run


def summary_of(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def test_one_method_tells_what_scripts_depend_on(adapted: Path) -> None:
    told = summary_of(adapted)
    assert told["command"] == "adapt"
    assert told["method"] == "dann"
    assert set(told["metrics"]) == {"source_val", "target", "target_last", "target_oracle", "target_source_only"}
    for name, figures in told["metrics"].items():
        assert {"images", "top1", "top1_ci95", "balanced_accuracy", "loss", "ece"} <= set(figures), name
    assert told["metrics"]["target"]["images"] == 36
    assert set(told["mmd2"]) == {"before", "after", "p_before", "p_after"}
    assert 1 <= told["selected_epoch"] <= told["epochs"] == 4
    assert told["metrics"]["target_oracle"]["top1"] >= told["metrics"]["target"]["top1"]
    assert len(told["results"]) == 1
    assert told["table"][0]["target"] == {"mean": told["metrics"]["target"]["top1"], "sd": None}


def test_the_run_holds_what_every_run_does(
    tlkit: Tlkit, adapted: Path, domains: tuple[Path, Path], read_csv: Any
) -> None:
    names = {path.name for path in adapted.iterdir()}
    wanted = {"recipe.yaml", "metrics.jsonl", "model.safetensors", "config.json", "summary.json", "report.html"}
    assert wanted | {"predictions.csv", "splits.csv", "target.csv"} == names
    rows = read_csv(adapted / "predictions.csv")
    assert len(rows) == 36
    top1 = np.mean([row["label"] == row["predicted"] for row in rows])
    assert top1 == pytest.approx(summary_of(adapted)["metrics"]["target"]["top1"])
    measured = tlkit("evaluate", adapted, domains[1], "--device", "cpu", *QUIET, "--json").json
    assert measured["metrics"]["top1"] == pytest.approx(top1)
    guesses = tlkit("predict", adapted, domains[1], "--device", "cpu", *QUIET, "--json").json["predictions"]
    assert [Path(guess["path"]).name for guess in guesses] == [Path(row["path"]).name for row in rows]
    assert [guess["label"] for guess in guesses] == [row["predicted"] for row in rows]
    history = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    assert [(row["method"], row["epoch"]) for row in history] == [
        (name, epoch) for name in ("source-only", "dann") for epoch in range(1, 5)
    ]


def test_the_network_can_be_gone_on_with(tlkit: Tlkit, adapted: Path, shapes: Path, tmp_path: Path) -> None:
    """With its bottleneck it is a network like any other to the other commands."""
    counted = tlkit("count-params", adapted, "--json").json["models"][0]
    stored = safetensors.torch.load_file(adapted / "model.safetensors")
    weights = [tensor for name, tensor in stored.items() if "running" not in name and "num_batches" not in name]
    assert counted["params"] == sum(tensor.numel() for tensor in weights)
    tuned = tlkit("finetune", shapes, "--model", adapted, "--strategy", "probe", "--out", tmp_path / "t", *QUIET)
    assert tuned.code == 0, tuned.err
    features = tlkit("extract-features", shapes, "--model", adapted, "--out", tmp_path / "f.npz", *QUIET, "--json")
    assert features.json["dim"] == 16
    again = ("--source", shapes, "--target", shapes / "disc", "--strategy", "probe", "--epochs", 1, *QUIET)
    done = tlkit("adapt", *again, "--model", adapted, "--out", tmp_path / "again", "--json")
    assert done.json["model"] == "test_resnet"


def test_a_recipe_repeats_a_run(tlkit: Tlkit, adapted: Path, outcome: Any, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert tlkit("adapt", "--recipe", adapted / "recipe.yaml", "--out", again, "--quiet").code == 0
    assert outcome(again) == outcome(adapted)


def test_the_targets_labels_are_never_learnt_from(
    tlkit: Tlkit, options: tuple[Any, ...], adapted: Path, domains: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without class folders, in the same order, the same network comes out."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(domains[1].rglob("*.*"))):
        shutil.copy(path, flat / f"{number:03d}{path.suffix}")
    changed = [flat if value is domains[1] else value for value in options]
    told = tlkit(*changed, "--method", "dann", "--out", tmp_path / "run", "--json").json
    files = [run / "model.safetensors" for run in (tmp_path / "run", adapted)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(told["metrics"]) == {"source_val"}
    assert told["target"]["labelled"] is False
    assert {"before", "after"} <= set(told["mmd2"])
    assert "paired" not in told
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.fixture(scope="module")
def everything(tlkit: Tlkit, options: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The summary of all methods with two seeds. Read only."""
    run = tmp_path_factory.mktemp("runs") / "all"
    return tlkit(*options, "--epochs", 2, "--method", "all", "--seeds", 2, "--out", run, "--json").json


def test_all_methods_make_one_table(everything: Any) -> None:
    pairs = [(result["method"], result["seed"]) for result in everything["results"]]
    assert sorted(pairs) == sorted((name, seed) for name in config.METHODS for seed in (0, 1))
    assert [row["method"] for row in everything["table"]] == list(config.METHODS)
    for row in everything["table"]:
        values = [one["metrics"]["target"]["top1"] for one in everything["results"] if one["method"] == row["method"]]
        assert row["target"]["mean"] == pytest.approx(np.mean(values))
        assert row["target"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert "metrics" not in everything


def test_each_is_compared_with_the_source_only_of_its_seed(everything: Any) -> None:
    alone = {one["seed"]: one for one in everything["results"] if one["method"] == "source-only"}
    assert alone[0]["metrics"]["target"]["loss"] != alone[1]["metrics"]["target"]["loss"]
    for result in everything["results"]:
        own = alone[result["seed"]]
        assert result["metrics"]["target_source_only"]["loss"] == pytest.approx(own["metrics"]["target"]["loss"])
        assert ("paired" in result) == (result["method"] != "source-only")
    before = {(one["seed"], one["mmd2"]["before"]) for one in everything["results"] if one["method"] != "source-only"}
    assert len(before) == 2  # of each seed the same network, by the same kernel


def test_every_network_of_a_table_is_a_run(tlkit: Tlkit, everything: Any, domains: tuple[Path, Path]) -> None:
    """Of each seed: what was measured on features is what the whole network makes of images."""
    for result in everything["results"][:: len(config.METHODS) + 1]:
        done = tlkit("evaluate", result["run"], domains[1], "--device", "cpu", *QUIET, "--json").json
        assert done["metrics"]["top1"] == pytest.approx(result["metrics"]["target"]["top1"])


def test_adabn_moves_statistics_and_nothing_else(everything: Any) -> None:
    runs = {one["method"]: Path(one["run"]) for one in everything["results"] if one["seed"] == 0}
    alone, moved = (safetensors.torch.load_file(runs[name] / "model.safetensors") for name in ("source-only", "adabn"))
    epochs = {one["method"]: one["selected_epoch"] for one in everything["results"] if one["seed"] == 0}
    changed = {name for name in alone if not alone[name].equal(moved[name])}
    if epochs["source-only"] == epochs["adabn"]:
        assert changed == {"bottleneck.1.running_mean", "bottleneck.1.running_var"}


@pytest.mark.parametrize("select", ["last", "entropy", "snd", "source-val"])
def test_the_epoch_is_chosen_by_what_was_asked(
    tlkit: Tlkit, options: tuple[Any, ...], tmp_path: Path, select: str
) -> None:
    run = tmp_path / "run"
    told = tlkit(*options, "--method", "source-only", "--select", select, "--out", run, "--json").json
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows]
    assert told["selected_epoch"] == int(np.argmax(scores)) + 1
    if select == "last":
        assert told["selected_epoch"] == 4
    if select == "source-val":
        assert scores == [-row["source_val"]["loss"] for row in rows]


def test_the_whole_network_adapts_from_random_weights(
    tlkit: Tlkit, small: tuple[str, ...], domains: tuple[Path, Path], tmp_path: Path
) -> None:
    """Inverted colours are learnt to be the same shapes: better than without adaptation, seed by seed."""
    words = ("--source", domains[0], "--target", domains[1], "--method", "mmd,adabn", "--epochs", 2)
    told = tlkit("adapt", *words, *small, *QUIET, "--out", tmp_path / "run", "--json").json
    assert told["strategy"] == "full"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {stage for row in rows for stage in row["rates"]} == {"stem", "stage1", "stage2", "stage3", "stage4", "head"}


def test_frozen_stages_stay_bit_for_bit(tlkit: Tlkit, start: Path, domains: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("--source", domains[0], "--target", domains[1], "--method", "coral", "--epochs", 1, "--stages", 2)
    model = ("--model", "test_resnet", "--weights", start, "--image-size", 64, "--device", "cpu")
    run = tmp_path / "run"
    done = tlkit("adapt", *words, *model, "--strategy", "differential", *QUIET, "--out", run)
    assert done.code == 0, done.err
    before, after = (safetensors.torch.load_file(path) for path in (start, run / "model.safetensors"))
    same = {name for name in before if name in after and before[name].equal(after[name])}
    assert {name for name in before if name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))} <= same
    assert not [name for name in same if name.startswith("layer4") and name.endswith("weight")]
    assert after["bottleneck.0.weight"].shape[0] == 256


def test_classes_of_one_domain_alone_are_said(
    tlkit: Tlkit, options: tuple[Any, ...], make_shapes: MakeShapes, domains: tuple[Path, Path], tmp_path: Path
) -> None:
    target = make_shapes(tmp_path / "target", ("disc", "square", "cross", "star"), 8)
    changed = [target if value is domains[1] else value for value in options]
    done = tlkit(*changed, "--method", "mcc", "--out", tmp_path / "run", "--json")
    told = done.json
    assert told["only_in_source"] == ["triangle"]
    assert told["only_in_target"] == ["cross", "star"]
    assert told["target"] | {"data": ""} == {"data": "", "images": 32, "labelled": True, "reported": 16}
    assert told["metrics"]["target"]["images"] == 16
    assert "only in the source: triangle" in done.err
    assert "only in the target: cross, star" in done.err


def test_bad_files_are_named_or_left_out(
    tlkit: Tlkit, options: tuple[Any, ...], domains: tuple[Path, Path], tmp_path: Path
) -> None:
    target = shutil.copytree(domains[1], tmp_path / "target")
    (target / "disc" / "broken.png").write_bytes(b"nothing")
    changed = [target if value is domains[1] else value for value in options]
    for strategy in ("probe", "full"):
        refused = tlkit(
            *changed, "--strategy", strategy, "--bottleneck", 0, "--out", tmp_path / "no", "--method", "mmd"
        )
        assert refused.code == 1
        assert "disc/broken.png" in refused.error
        assert not (tmp_path / "no").exists()
    words = ("--on-error", "skip", "--epochs", 1, "--method", "mmd", "--out", tmp_path / "run", "--json")
    told = tlkit(*changed, *words).json
    assert [file["path"] for file in told["skipped_files"]] == ["disc/broken.png"]
    assert told["target"]["images"] == 36
    assert (tmp_path / "run" / "skipped_files.csv").is_file()


def test_a_plan_does_nothing(tlkit: Tlkit, options: tuple[Any, ...], tmp_path: Path) -> None:
    told = tlkit(*options, "--method", "all", "--seeds", 3, "--out", tmp_path / "run", "--plan", "--json").json
    assert told["plan"]["methods"] == list(config.METHODS)
    assert told["plan"]["seeds"] == [0, 1, 2]
    assert told["plan"]["images_per_domain_and_step"] == 8
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("--method", "dan"), "--method: unknown method 'dan'; did you mean 'dann'"),
        (("--lr", "auto"), "--lr"),
        (("--batch-size", 100), "training images, and a step takes 50 of each domain; give --batch-size"),
        (("--batch-size", 2), "--batch-size: a step of 2 images is not two or more of each domain"),
        (("--batch-size", 9), "give an even number from 4 on"),
        (
            ("--strategy", "full", "--model", "levit_128s", "--bottleneck", 0, "--image-size", 224),
            "is not linear in pooled",
        ),
        (("--strategy", "full", "--stages", 9), "the network has 6 stages (stem, stage1"),
        (("--layer-decay", 0.5), "does nothing with --strategy probe; leave --layer-decay out"),
        (("--method", "adabn", "--bottleneck", 0), "the network has no batch norm"),
        (("--augment", "light"), "does nothing with --strategy probe"),
    ],
)
def test_what_cannot_be_is_one_line(
    tlkit: Tlkit, options: tuple[Any, ...], tmp_path: Path, changed: tuple[Any, ...], told: str
) -> None:
    done = tlkit(*options, *changed, "--out", tmp_path / "run")
    assert done.code == 1
    assert told in done.error
    assert not (tmp_path / "run").exists()


def test_all_methods_are_those_that_the_network_can_be_adapted_by(
    tlkit: Tlkit, options: tuple[Any, ...], tmp_path: Path
) -> None:
    done = tlkit(*options, "--bottleneck", 0, "--method", "all", "--plan", "--json")
    assert "adabn" not in done.json["plan"]["methods"]
    assert len(done.json["plan"]["methods"]) == len(config.METHODS) - 1


def test_a_training_that_left_for_good_is_one_line(
    tlkit: Tlkit, small: tuple[str, ...], domains: tuple[Path, Path], tmp_path: Path
) -> None:
    words = (
        "--source",
        domains[0],
        "--target",
        domains[1],
        "--optimizer",
        "sgd",
        "--lr",
        1e6,
        "--epochs",
        3,
        "--quiet",
    )
    done = tlkit("adapt", *words, *small, "--out", tmp_path / "run")
    assert done.code == 1
    assert "lower --lr" in done.error


def test_missing_and_unusable_domains_are_one_line(
    tlkit: Tlkit, small: tuple[str, ...], domains: tuple[Path, Path], make_shapes: MakeShapes, tmp_path: Path
) -> None:
    source, target = domains
    other = make_shapes(tmp_path / "other", ("discs", "squares"), 6)
    flat, empty = source / "disc", tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (("--target", target), 2, "missing option --source"),
        (("--source", source), 2, "missing option --target"),
        (("--source", flat, "--target", target), 1, "12 images, but no class folders"),
        (("--source", source, "--target", other), 1, "shares no class with the source (discs, squares)"),
        (("--source", source, "--target", empty), 1, "no images"),
        (("--source", source, "--target", tmp_path / "nowhere"), 1, "no such file or folder"),
        (("--source", make_shapes(tmp_path / "one", ("disc",), 6), "--target", target), 1, "only one class"),
    ]
    for words, code, said in cases:
        done = tlkit("adapt", *words, *small, "--out", tmp_path / "run", "--quiet")
        assert done.code == code, done.err
        assert said in done.error
    assert not (tmp_path / "run").exists()


def test_files_of_the_source_in_the_target_are_said(
    tlkit: Tlkit, options: tuple[Any, ...], domains: tuple[Path, Path], tmp_path: Path
) -> None:
    changed = [domains[0] / "disc" if value is domains[1] else value for value in options]
    done = tlkit(*changed, "--plan", "--out", tmp_path / "run")
    assert "12 of the target's images are files of the source, too" in done.err


def test_a_run_does_not_go_on_with_other_images(
    tlkit: Tlkit,
    options: tuple[Any, ...],
    domains: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = shutil.copytree(domains[1], tmp_path / "target")
    changed = [target if value is domains[1] else value for value in options]

    def stopping(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FIT, stopping)
        assert tlkit(*changed, "--out", tmp_path / "run").code == 130
    (target / "disc" / "00.png").unlink()
    done = tlkit("adapt", "--resume", tmp_path / "run")
    assert done.code == 1
    assert "the target's images are not those that the run was begun with" in done.error
    assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.parametrize("strategy", ["probe", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_end(
    tlkit: Tlkit,
    options: tuple[Any, ...],
    outcome: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    """Stopped twice, in the source-only training and in the other one."""
    words = (*options, "--strategy", strategy, "--bottleneck", 0 if strategy == "full" else 16, "--epochs", 3)
    words += ("--method", "cdan")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tlkit(*words, "--out", whole).code == 0
    steps: list[int] = []

    def stopping(*arguments: Any, after_step: Callable[[], bool], **named: Any) -> None:
        def step() -> bool:
            steps.append(1)
            if len(steps) in (5, 14):
                raise KeyboardInterrupt
            return after_step()

        fit(*arguments, after_step=step, **named)

    monkeypatch.setattr(FIT, stopping)
    first = tlkit(*words, "--out", run)
    assert first.code == 130
    assert f"tlkit adapt --resume {run}" in first.err
    assert tlkit("adapt", "--resume", run, "--quiet").code == 130
    done = tlkit("adapt", "--resume", run, "--quiet")
    assert done.code == 0, done.err
    assert len(steps) == 24  # none is repeated
    assert outcome(run) == outcome(whole)
    again = tlkit("adapt", "--resume", run)
    assert "is finished" in again.out
