"""``tlkit pretrain``: its run as a start for others, the small stem, and every way of training that an option names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import tlkit.networks  # noqa: F401 (its variants, for timm)

Tlkit = Callable[..., Any]
SMALL = ("--model", "test_resnet", "--image-size", 32, "--device", "cpu", "--precision", "fp32", "--quiet")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


@pytest.fixture
def pretrain(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> Callable[..., Any]:
    """``pretrain(name, *options)`` trains for two epochs into ``tmp_path / name`` and gives the summary."""

    def run(name: str, *options: Any) -> Any:
        epochs = () if "--epochs" in options else ("--epochs", 2)
        done = tlkit("pretrain", shapes, *SMALL, *epochs, *options, "--out", tmp_path / name, "--json")
        assert done.code == 0, done.err
        return done.json

    return run


@pytest.fixture(scope="module")
def run(tlkit: Tlkit, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    assert tlkit("pretrain", shapes, *SMALL, "--epochs", 4, "--test-fraction", 0.25, "--out", folder).code == 0
    return folder


def test_fields_of_its_json(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())
    assert (told["command"], told["strategy"], told["weights"]) == ("pretrain", "full", "random")
    (phase,) = told["phases"]
    assert phase["stages"] == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    assert phase["epochs"] == 4 and phase["seconds"] > 0
    assert phase["trainable_params"] == sum(
        tensor.numel() for name, tensor in tensors(run).items() if "running" not in name and "num_batches" not in name
    )
    assert phase["val_top1"] == told["metrics"]["val"]["top1"]
    assert {name: figures["used_for_selection"] for name, figures in told["metrics"].items()} == {
        "val": False,
        "test": False,
    }
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3, 4]
    assert all(row["val"]["loss"] > 0 for row in rows(run))


def test_it_learns(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    pretrain("run", "--epochs", 25, "--augment", "light")
    losses = [row["losses"]["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


# The stem


@pytest.mark.parametrize(
    ("options", "small"),
    [
        (("--image-size", 32), True),
        (("--image-size", 64), True),
        (("--image-size", 72), False),
        (("--image-size", 32, "--stem", "standard"), False),
        (("--image-size", 72, "--stem", "small"), True),
    ],
    ids=str,
)
def test_small_inputs_get_a_small_stem_which_is_stored(
    tlkit: Tlkit, shapes: Path, tmp_path: Path, options: tuple[Any, ...], small: bool
) -> None:
    run = tmp_path / "run"
    arguments = ("--model", "test_resnet", "--device", "cpu", "--epochs", 1, "--out", run, "--quiet")
    assert tlkit("pretrain", shapes, *arguments, *options).code == 0
    network = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert isinstance(network.maxpool, torch.nn.Identity) == small
    standard = timm.create_model("test_resnet")
    assert (network.feature_info[-1]["reduction"] < standard.feature_info[-1]["reduction"]) == small
    assert tlkit("evaluate", run, "--json").json["metrics"]["images"] == 6
    recipe = (run / "recipe.yaml").read_text()
    assert f"stem: {options[3] if len(options) > 2 else 'auto'}" in recipe


def test_a_family_without_a_small_stem_keeps_its_own(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> None:
    arguments = ("--model", "test_convnext", "--image-size", 32, "--device", "cpu", "--epochs", 1, "--quiet")
    assert tlkit("pretrain", shapes, *arguments, "--out", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architecture"] == "test_convnext"
    done = tlkit("pretrain", shapes, *arguments, "--stem", "small", "--out", tmp_path / "other")
    assert done.code == 1
    assert "test_convnext" in done.error and not (tmp_path / "other").exists()


# A start for others


@pytest.mark.parametrize("how", ["--model", "--weights", "--from"])
def test_other_commands_start_from_its_run(
    tlkit: Tlkit, make_shapes: Callable[..., Path], run: Path, tmp_path: Path, how: str
) -> None:
    data, out = make_shapes(tmp_path / "data", ("one", "two"), 8), tmp_path / "out"
    options = ("--device", "cpu", "--out", out, "--json", "--quiet")
    told = {
        "--model": lambda: tlkit("finetune", data, "--strategy", "probe", "--model", run, *options),
        "--weights": lambda: tlkit(
            *("finetune", data, "--strategy", "probe", "--model", "test_resnet", "--weights", run), *options
        ),
        "--from": lambda: tlkit("unfreeze", data, "--stages", 1, "--from", run, *options),
    }[how]().json
    assert (told["model"], told["classes"]) == ("test_resnet", ["one", "two"])
    assert told["preprocessing"]["size"] == 32
    before, after = tensors(run), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))
    assert isinstance(timm.create_model(f"local-dir:{out}", pretrained=True).maxpool, torch.nn.Identity)


def test_evaluate_and_predict_use_its_run(tlkit: Tlkit, shapes: Path, run: Path, read_csv: Any) -> None:
    told = json.loads((run / "summary.json").read_text())
    alike = ("--device", "cpu", "--precision", "fp32")
    again = tlkit("evaluate", run, *alike, "--json").json["metrics"]
    assert again["top1"] == told["metrics"]["test"]["top1"]
    assert again["loss"] == pytest.approx(told["metrics"]["test"]["loss"], rel=1e-4)
    stored = {row["path"]: row["predicted"] for row in read_csv(run / "predictions.csv")}
    found = tlkit("predict", run, shapes, *alike, "--json").json["predictions"]
    assert {Path(row["path"]).relative_to(shapes).as_posix(): row["label"] for row in found} == stored


# Options of training


def test_the_same_seed_gives_the_same_model_and_another_another(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    for name, seed in {"one": 0, "two": 0, "three": 1}.items():
        pretrain(name, "--seed", seed, "--mixup", 0.2)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


CHANGING: dict[str, tuple[Any, ...]] = {
    "an average": ("--ema", 0.9),
    "mixup": ("--mixup", 0.4),
    "cutmix": ("--cutmix", 1.0),
    "label smoothing": ("--label-smoothing", 0.1),
    "clipping": ("--clip", 0.01),
    "balanced sampling": ("--balanced-sampling",),
    "class weights": ("--class-weights", "balanced"),
    "sgd": ("--optimizer", "sgd"),
    "timm's lamb": ("--optimizer", "lamb", "--lr", 1e-3),
    "weight decay": ("--weight-decay", 10.0),
    "light": ("--augment", "light"),
    "strong": ("--augment", "strong"),
    "none": ("--augment", "none"),
    "constant": ("--schedule", "constant"),
    "one cycle": ("--schedule", "one-cycle"),
    "a floor": ("--min-lr", 0.5),
    "warm-up": ("--warmup", 0.5),
    "batches": ("--batch-size", 4),
    "a searched rate": ("--lr", "auto"),
    "frozen norms": ("--bn", "frozen"),
}


@pytest.fixture(scope="module")
def uneven(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12, 8 and 5 images. Read only."""
    return make_shapes(tmp_path_factory.mktemp("made") / "uneven", images=(12, 8, 5))


@pytest.fixture(scope="module")
def plain(tlkit: Tlkit, uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all defaults. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    assert tlkit("pretrain", uneven, *SMALL, "--epochs", 2, "--out", folder).code == 0
    return folder


@pytest.mark.parametrize("case", CHANGING)
def test_an_option_does_something(tlkit: Tlkit, uneven: Path, plain: Path, tmp_path: Path, case: str) -> None:
    out = tmp_path / "run"
    done = tlkit("pretrain", uneven, *SMALL, "--epochs", 2, *CHANGING[case], "--out", out, "--json")
    assert done.code == 0, done.err
    first, second = tensors(plain), tensors(out)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in second.values())
    option = CHANGING[case][0]
    assert f"{option[2:].replace('-', '_')}: " in (out / "recipe.yaml").read_text()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parts_of_a_batch_add_up(tlkit: Tlkit, shapes: Path, tmp_path: Path, optimizer: str) -> None:
    """Without batch statistics in training, a batch in two or three parts gives the step of the whole."""
    found = {}
    for parts in (1, 2, 3):
        out = tmp_path / str(parts)
        options = ("--epochs", 1, "--bn", "frozen", "--optimizer", optimizer, "--lr", 1e-4, "--accumulate", parts)
        assert tlkit("pretrain", shapes, *SMALL, *options, "--out", out).code == 0
        found[parts] = tensors(out)
    for parts in (2, 3):
        assert any(not torch.equal(found[1][name], found[parts][name]) for name in found[1]), "it is in parts"
        for name, tensor in found[1].items():
            torch.testing.assert_close(found[parts][name], tensor, rtol=1e-3, atol=2e-5)


def rates_of(run: Path) -> list[float]:
    return [row["rates"]["head"] for row in rows(run)]


SHAPES: dict[str, tuple[tuple[Any, ...], list[float]]] = {
    # rates of the last of three steps of each epoch, from the formulas
    "constant": (("--schedule", "constant", "--warmup", 0), [1, 1, 1, 1]),
    "step": (("--schedule", "step", "--step-every", 2, "--gamma", 0.5, "--warmup", 0), [1, 1, 0.5, 0.5]),
    "cosine": (
        ("--schedule", "cosine", "--warmup", 0),
        [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / 12)))) for step in (2, 5, 8, 11)],
    ),
    "cosine to a half": (
        ("--schedule", "cosine", "--warmup", 0, "--min-lr", 0.5),
        [0.5 + 0.25 * (1 + float(torch.cos(torch.tensor(torch.pi * step / 12)))) for step in (2, 5, 8, 11)],
    ),
    "warm-up": (("--schedule", "constant", "--warmup", 0.5), [3 / 7, 6 / 7, 1, 1]),
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_schedules(pretrain: Callable[..., Any], tmp_path: Path, schedule: str) -> None:
    options, expected = SHAPES[schedule]
    pretrain("run", "--epochs", 4, "--lr", 0.001, "--batch-size", 10, *options)
    assert [row["step"] for row in rows(tmp_path / "run")] == [3, 6, 9, 12]
    assert rates_of(tmp_path / "run") == pytest.approx([0.001 * factor for factor in expected], rel=1e-4)


def test_one_cycle_is_torchs(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    pretrain("run", "--epochs", 4, "--lr", 0.001, "--batch-size", 10, "--schedule", "one-cycle")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.001, total_steps=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates_of(tmp_path / "run") == pytest.approx(expected[2::3], rel=1e-4)


def test_plateau_lowers_the_rate_when_the_loss_does_not_fall(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--schedule", "plateau", "--step-every", 1, "--gamma", 0.5, "--warmup", 0, "--lr", 0.05)
    pretrain("run", "--epochs", 8, *options)
    found, best, rate = rows(tmp_path / "run"), float("inf"), 0.05
    for row in found:
        assert row["rates"]["head"] == pytest.approx(rate)
        loss = row["val"]["loss"]
        rate, best = (rate, loss) if loss < best else (rate * 0.5, best)
    assert rate < 0.05, "the case that this test is about"


@pytest.mark.slow
def test_a_rate_is_searched_for_alike_each_time_and_stored(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    first, second = (pretrain(name, "--lr", "auto") for name in ("one", "two"))
    rate = first["phases"][0]["rates"]["head"]
    assert 1e-6 < rate < 1
    assert second["phases"][0]["rates"]["head"] == rate
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    pretrain("given", "--lr", repr(rate))
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == one, "the search leaves nothing else behind"


def test_an_anchor_holds_weights_where_they_started(tlkit: Tlkit, shapes: Path, start: Path, tmp_path: Path) -> None:
    before, moved = safetensors.torch.load_file(start), {}
    for anchor in (0, 1.0, 100.0):
        out = tmp_path / str(anchor)
        arguments = ("--model", "test_resnet", "--weights", start, "--image-size", 32, "--device", "cpu", "--quiet")
        options = ("--strategy", "full", "--epochs", 3, "--weight-decay", 0, "--anchor", anchor, "--out", out)
        assert tlkit("finetune", shapes, *arguments, *options).code == 0
        after = tensors(out)
        kept = [name for name in before if before[name].ndim > 1 and not name.startswith("fc.")]
        moved[anchor] = sum(float((after[name] - before[name]).square().sum()) for name in kept)
        if anchor:
            (*_, last) = rows(out)
            assert set(last["losses"]) == {"loss", "task", "anchor"}
            assert last["losses"]["loss"] == pytest.approx(last["losses"]["task"] + last["losses"]["anchor"], rel=1e-3)
    assert moved[0] > moved[1.0] > moved[100.0] > 0


# The end


def test_a_time_limit_ends_it_early_and_says_so(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--epochs", 10000, "--time-limit", "2s", "--out", tmp_path / "run")
    done = tlkit("pretrain", shapes, *arguments)
    assert done.code == 0
    assert "stopped by the time limit" in done.out
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told["stopped"] == told["phases"][0]["stopped"] == "time limit"
    assert told["phases"][0]["epochs"] < 10000
    assert told["seconds"] < 30
    assert len(rows(tmp_path / "run")) == told["phases"][0]["epochs"]


def test_patience_ends_it_and_keeps_the_best_epoch(pretrain: Callable[..., Any], tmp_path: Path) -> None:
    told = pretrain("run", "--epochs", 60, "--patience", 2, "--test-fraction", 0.25, "--lr", 0.05)
    (phase,) = told["phases"]
    losses = [row["choosing"]["loss"] for row in rows(tmp_path / "run")]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert phase["stopped"] == "patience"
    assert phase["best_epoch"] == best + 1 == len(losses) - 2
    assert told["metrics"]["val"]["loss"] == pytest.approx(losses[best], rel=1e-4), "the best epoch's weights"
    assert told["metrics"]["val"]["used_for_selection"] is True
    assert told["metrics"]["test"]["used_for_selection"] is False


@pytest.mark.parametrize(
    ("option", "flag"),
    [(("--anchor", 0.1), "--anchor"), (("--layer-decay", 0.5), "--layer-decay"), (("--gamma", 0.5), "--gamma")],
)
def test_what_would_do_nothing_is_refused(
    tlkit: Tlkit, shapes: Path, tmp_path: Path, option: tuple[Any, ...], flag: str
) -> None:
    done = tlkit("pretrain", shapes, *SMALL, *option, "--out", tmp_path / "run")
    assert done.code == 1
    assert done.error.startswith(f"{flag}: does nothing with ")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_rate_nobody_knows_is_asked_for_one(tlkit: Tlkit, shapes: Path, tmp_path: Path) -> None:
    done = tlkit("pretrain", shapes, *SMALL, "--optimizer", "lion", "--out", tmp_path / "run")
    assert done.code == 1
    assert "lion" in done.error and "give --lr NUMBER" in done.error
    assert not (tmp_path / "run").exists()


def test_a_plan_of_it(tlkit: Tlkit, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = tlkit("pretrain", shapes, *SMALL, "--epochs", 7, "--plan", "--json").json
    (phase,) = told["plan"]["phases"]
    assert phase["epochs"] == 7 and set(phase["rates"].values()) == {1e-3}
    assert phase["trainable_params"] == sum(told["plan"]["stages"].values())
    assert list(tmp_path.iterdir()) == []
