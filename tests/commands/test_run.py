"""``run``: steps in order, skipped when done, gone on with when cut, redone when what they depend on has changed.

Where the steps themselves do not matter, a stand-in makes their results in this process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tlkit.commands import run as run_module
from tlkit.pipelines.child import Ended, command_line

Tlkit = Callable[..., Any]
ROOT = Path(__file__).parents[2]
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks are of Unix")
NIGHT = """
steps:
  pretrain: {data: photos, epochs: 3}
  finetune: {data: photos, model: "${pretrain.run}", lr: 0.01}
  evaluate: {model: "${finetune.run}"}
"""
MATRIX = """
steps:
  pretrain: {data: photos, matrix: {lr: [0.1, 0.2], seed: [0, 1, 2]}}
  evaluate: {model: "${pretrain.run}"}
"""


def accuracy(recipe: dict[str, Any]) -> float:
    """What the stand-in's runs reach."""
    return float(recipe.get("lr", 0.5)) + recipe.get("seed", 0) ** 2 / 100


@dataclass
class Steps:
    """The stand-in: remembers what was run, and fails or is cut where it is told to.

    Args:
        calls: What followed ``tlkit``.
        recipes: The recipe of each, or the run that it went on with.
        failing: Learning rates that fail.
        cut: Commands that are stopped once they have a recipe.
    """

    calls: list[str] = field(default_factory=list)
    recipes: list[Any] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)

    def run(self, command: list[str], log: Path, tell: Callable[[str], None], _: Any) -> Ended:
        """In the place of `tlkit.pipelines.child.run_child`."""
        words = command[command.index("tlkit") + 1 :]
        options = dict(pairwise(words))
        self.calls.append(words[0])
        tell("note: it works")
        log.write_text("it works\n")
        if "--resume" in options:
            out, recipe = Path(options["--resume"]), {}
        else:
            out, recipe = Path(options.get("--out", "")), yaml.safe_load(Path(options["--recipe"]).read_text()) or {}
        self.recipes.append(options.get("--resume", recipe))
        if str(recipe.get("lr")) in self.failing:
            error = {"what": "the loss became nan", "where": "step 3", "remedy": "lower --lr", "details": []}
            return Ended(1, {"error": error, "exit_code": 1})
        told = {"command": words[0], "metrics": {"test": {"top1": accuracy(recipe)}}, "classes": ["a"], "images": 3}
        if words[0] in ("extract-features", "predict"):
            assert not out.exists()
            out.write_text("made")
            return Ended(0, told | {"out": str(out), "predictions": ["many"]})
        if words[0] != "doctor":
            assert "--resume" in options or not out.exists()
            out.mkdir(exist_ok=True)
            (out / "recipe.yaml").write_text(yaml.safe_dump({"command": words[0]}))
            if words[0] in self.cut:
                raise KeyboardInterrupt
            (out / "summary.json").write_text(json.dumps(told | {"run": str(out)}))
        return Ended(0, told)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    made = Steps()
    monkeypatch.setattr(run_module, "run_child", made.run)
    return made


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes ``night.yaml`` into an empty working folder with images in ``photos``."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos", "a.png").write_text("a")

    def write(text: str) -> Path:
        Path("night.yaml").write_text(text, encoding="utf-8")
        return Path("night.yaml")

    return write


Night = Callable[[str], Path]


def states(told: Any) -> list[str]:
    return [step["state"] for step in told["steps"]]


def test_steps_run_in_order_with_the_results_of_those_before(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    done = tlkit("run", night(NIGHT), "--json")
    told = done.json
    assert steps.calls == ["pretrain", "finetune", "evaluate"]
    pretrain, finetune, evaluate = told["steps"]
    assert steps.recipes == [
        {"data": "photos", "epochs": 3},
        {"data": "photos", "model": pretrain["run"], "lr": "0.01"},
        {"model": finetune["run"]},
    ]
    assert states(told) == ["done"] * 3
    assert (told["command"], told["out"], evaluate["command"]) == ("run", "runs/night", "evaluate")
    assert Path(pretrain["run"]).parent == Path("runs/night") and Path(pretrain["run"]).name.startswith("pretrain-")
    assert finetune["metrics"]["test"]["top1"] == 0.01
    written = json.loads(Path("runs/night/summary.json").read_text())
    assert written.pop("exit_code") == 0
    assert {**written, "seconds": 0} == {**told, "seconds": 0}
    assert all(" | " in line and line[2] == line[5] == ":" for line in done.err.splitlines()), done.err


def test_again_nothing_is_done_twice(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    path = night(NIGHT)
    tlkit("run", path)
    done = tlkit("run", path)
    assert (done.code, len(steps.calls)) == (0, 3)
    assert done.err.count("done before: 0.500 test top-1") == 2
    shutil.move("runs/night", "elsewhere")
    assert states(tlkit("run", path, "--out", "elsewhere", "--json").json) == ["skipped"] * 3


def test_what_has_changed_is_done_anew_with_what_depends_on_it(
    tlkit: Tlkit, steps: Steps, night: Night, contents: Callable[[Path], Any]
) -> None:
    tlkit("run", night(NIGHT))
    before = {name: held for name, held in contents(Path("runs/night")).items() if "/" in name}
    told = tlkit("run", night(NIGHT.replace("0.01", "0.02")), "--json").json
    assert states(told) == ["skipped", "done", "done"]
    after = contents(Path("runs/night"))
    assert {name: after[name] for name in before} == before, "nothing was overwritten"
    assert states(tlkit("run", night(NIGHT), "--json").json) == ["skipped"] * 3, "what was done before is still there"
    Path("photos", "b.png").write_text("b")
    assert states(tlkit("run", night(NIGHT), "--json").json) == ["done"] * 3


def test_what_was_cut_is_gone_on_with_and_what_has_not_begun_is_begun_anew(
    tlkit: Tlkit, steps: Steps, night: Night
) -> None:
    path = night(NIGHT)
    steps.cut = {"finetune"}
    stopped = tlkit("run", path, "--json")
    assert stopped.code == 130
    assert json.loads(stopped.out)["exit_code"] == 130
    assert stopped.err.splitlines()[-2:] == [
        "note: go on with: tlkit run night.yaml",
        "tlkit: error: interrupted",
    ]
    summary = json.loads(Path("runs/night/summary.json").read_text())
    assert (states(summary), summary["exit_code"]) == (["done", "stopped", "waiting"], 130)
    plan = tlkit("run", path, "--plan", "--json").json["plan"]
    assert [step["state"] for step in plan] == ["done", "to go on with", "to do"]
    steps.cut, steps.calls = {"evaluate"}, []
    assert tlkit("run", path).code == 130
    assert steps.recipes[-2] == plan[1]["run"], "resumed"
    steps.cut, steps.calls = set(), []
    assert tlkit("run", path).code == 0
    assert steps.calls == ["evaluate"], "which has no --resume, and was begun anew"
    pretrained = Path(plan[0]["run"])
    (pretrained / "summary.json").write_text('{"broken')
    assert tlkit("run", path).code == 0
    assert steps.recipes[-1] == {"data": "photos", "epochs": 3}
    (pretrained / "summary.json").unlink()
    (pretrained / "recipe.yaml").unlink()
    assert tlkit("run", path).code == 0
    assert steps.recipes[-1] == {"data": "photos", "epochs": 3}


def test_a_failing_step_is_one_line(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    steps.failing = {"0.01"}
    done = tlkit("run", night(NIGHT), "--json")
    assert done.code == 1
    log = next(Path("runs/night/logs").glob("finetune-*.log"))
    line = f"step 'finetune': exit code 1: step 3: the loss became nan; lower --lr; its log is {log}"
    assert done.error == line
    told = json.loads(done.out)
    assert states(told) == ["done", "failed", "waiting"]
    assert (told["exit_code"], told["error"]["what"]) == (1, line)
    assert told["seconds"] >= 0
    assert line == f"step 'finetune': {told['steps'][1]['error']}"
    assert json.loads(Path("runs/night/summary.json").read_text())["exit_code"] == 1
    assert steps.calls == ["pretrain", "finetune"]


def test_keep_going_runs_what_does_not_depend_on_it(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    steps.failing = {"0.1"}
    path = night(MATRIX)
    done = tlkit("run", path, "--keep-going", "--json")
    assert done.code == 1
    assert states(json.loads(done.out)) == ["failed"] * 3 + ["done"] * 3 + ["blocked"] * 3 + ["done"] * 3
    assert (
        done.error
        == "runs/night: 3 of 12 steps failed, 3 could not be run; mend what their logs say; the same command goes on"
    )
    assert done.err.count("tlkit: step 'pretrain lr=0.1 seed=") == 3
    steps.failing, steps.calls = set(), []
    assert tlkit("run", path).code == 0
    assert steps.calls == ["pretrain"] * 3 + ["evaluate"] * 3


def test_a_matrix_ends_in_mean_and_spread(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    path = night(MATRIX)
    done = tlkit("run", path)
    told = tlkit("run", path, "--json").json
    row = told["table"][0]
    values = [accuracy({"lr": 0.1, "seed": seed}) for seed in range(3)]
    assert (row["step"], row["setting"], row["n"]) == ("pretrain", {"lr": 0.1}, 3)
    assert row["mean"]["test.top1"] == pytest.approx(statistics.mean(values))
    assert row["sd"]["test.top1"] == pytest.approx(statistics.stdev(values))
    lines = [line.split() for line in done.out.splitlines()]
    mean, spread = f"{statistics.mean(values):.3f}", f"{statistics.stdev(values):.3f}"
    assert ["pretrain", "lr=0.1", "│", "test", "top-1", "│", mean, "±", spread, "│", "3"] in lines
    assert told["steps"][7]["cell"] == {"lr": 0.1, "seed": 1}
    assert "pretrain.lr" not in json.dumps(told), "each option is varied once"


def test_a_plan_writes_nothing(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    done = tlkit("run", night(MATRIX), "--plan")
    assert done.code == 0
    assert done.out.count("to do") == 12 and "evaluate lr=0.2 seed=2" in done.out
    assert not Path("runs").exists() and not steps.calls


def test_files_lie_in_folders_of_their_own(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    path = night(
        "steps:\n  extract-features: {data: photos}\n  predict: {model: resnet18, paths: [photos]}\n  doctor:\n"
        "  finetune: {data: photos, lr: '${predict.images}', group_regex: 'of ${extract-features.out} $${x}'}\n"
    )
    told = tlkit("run", path, "--json").json
    features, labels, doctor = told["steps"][:3]
    assert Path(features["out"]).is_file() and Path(features["out"]).name == "features.npz"
    assert Path(labels["out"]).is_file() and "out" not in doctor and "run" not in doctor
    assert "predictions" not in json.loads(Path(labels["out"]).with_name("summary.json").read_text())
    assert steps.recipes[-1] == {"data": "photos", "lr": "3", "group_regex": f"of {features['out']} ${{x}}"}
    Path(labels["out"]).with_name("summary.json").unlink()
    assert states(tlkit("run", path, "--json").json) == ["skipped", "done", "skipped", "skipped"]


def test_all_cells_at_once(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    path = night(
        "steps:\n  pretrain: {data: photos, matrix: {seed: [0, 1]}}\n"
        "  compare: {command: evaluate, model: '${pretrain.run}'}\n"
        "  best: {command: predict, model: a, paths: ['${pretrain.*.run}', photos]}\n"
    )
    told = tlkit("run", path, "--json").json
    assert steps.recipes[-1]["paths"] == [*(step["run"] for step in told["steps"][:2]), "photos"]


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("${pretrain.metric}", "step 'pretrain' has no 'metric' in its result; did you mean 'metrics'?"),
        ("${pretrain.classes}", "key 'model' has a value of the wrong type: ['a']; give text"),
    ],
)
def test_a_result_that_is_not_there_is_one_line(
    tlkit: Tlkit, steps: Steps, night: Night, reference: str, told: str
) -> None:
    done = tlkit("run", night(NIGHT.replace("${pretrain.run}", reference)))
    assert done.code == 1
    assert told in done.error and "finetune" in done.error
    assert steps.calls == ["pretrain"]


def test_what_is_not_the_pipelines_is_left_alone(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    path = night(NIGHT)
    Path("mine").mkdir()
    Path("mine", "file").write_text("mine")
    assert "is not the folder of a pipeline" in tlkit("run", path, "--out", "mine").error
    assert "is not the folder of a pipeline" in tlkit("run", path, "--out", path).error
    assert tlkit("run", path).code == 0
    other = Path("photos.yaml")
    other.write_text(NIGHT)
    assert "belongs to another pipeline" in tlkit("run", other, "--out", "runs/night").error
    path.rename("kept.yaml")
    assert tlkit("run", "kept.yaml", "--out", "runs/night").code == 0, "a file may be renamed"
    Path("runs/night/summary.json").write_text('{"command": "finetune"}')
    assert "is not the folder of a pipeline" in tlkit("run", "kept.yaml", "--out", "runs/night").error


def test_names_may_be_anything_readable(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    Path("süße katzen [x]").mkdir()
    Path("süße katzen [x]", "a.png").write_text("a")
    path = night(
        "steps:\n  süße katzen: {command: pretrain, data: 'süße katzen [x]'}\n"
        "  evaluate: {model: '${süße katzen.run}', matrix: {tta: [flip+ten-crop]}}\n"
    )
    told = tlkit("run", path, "--out", "a [b] ü", "--json").json
    assert steps.recipes[1]["model"] == told["steps"][0]["run"]
    assert Path(told["steps"][0]["run"]).name.startswith("süße-katzen-")


def test_quiet_still_tells_what_changes_how_results_are_read(tlkit: Tlkit, steps: Steps, night: Night) -> None:
    done = tlkit("run", night(NIGHT), "--quiet")
    assert done.err.splitlines() == [f"note: {step} | it works" for step in ("pretrain", "finetune", "evaluate")]


def test_several_processes_are_started_by_torchs_own_launcher() -> None:
    words = command_line(["finetune", "--json"], 2)
    assert words[0] == sys.executable
    assert words[-8:] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tlkit", "finetune", "--json"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_pipelines_that_come_with_tlkit(tlkit: Tlkit, steps: Steps, night: Night, path: Path) -> None:
    shutil.copytree("photos", "runs/demo/digits")
    done = tlkit("run", path, "--json")
    assert states(done.json) == ["done"] * len(steps.calls)
    header = path.read_text(encoding="utf-8").split("steps:")[0]
    for word in ("# command", "# expected", "# time", "# source"):
        assert word in header


# Real processes


def real(data: Path, epochs: int = 1) -> str:
    """Two steps on a network that takes no time."""
    common = {"data": str(data), "device": "cpu", "precision": "fp32"}
    size = {"image_size": 64, "batch_size": 8}
    steps = {
        "pretrain": common | size | {"model": "test_resnet", "epochs": 4 * epochs, "checkpoint_every": "2steps"},
        "unfreeze": common | {"from": "${pretrain.run}", "stages": 2, "epochs_per_stage": epochs},
        "predict": {"model": "${unfreeze.run}", "paths": [str(data)], "device": "cpu", "precision": "fp32"},
    }
    return yaml.safe_dump({"steps": steps}, sort_keys=False)


def started(path: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tlkit", "run", str(path), "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def results(out: Path) -> dict[str, bytes]:
    """What a pipeline has made that does not depend on the clock, by the name of its place."""
    names = ("model.safetensors", "predictions.csv", "splits.csv", "labels.csv")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(f"*/{name}")}


@pytest.mark.slow
def test_real_steps(tlkit: Tlkit, night: Night, shapes: Path, tmp_path: Path) -> None:
    """One command that reads positional options from a recipe, and one whose mistake it tells."""
    path = night(
        "steps:\n  count-params: {models: [test_resnet], format: json}\n"
        "  predict: {model: test_rsnet, paths: [photos]}\n"
    )
    done = tlkit("run", path, "--json")
    told = json.loads(done.out)
    assert states(told) == ["done", "failed"]
    assert json.loads(Path(told["steps"][0]["out"]).read_text())
    assert "step 'predict': exit code 1: " in done.error and "test_resnet" in done.error
    log = Path(told["steps"][1]["log"]).read_text()
    assert "tlkit: error: " in log and " predict --recipe " in log.splitlines()[0]


def test_the_summary_tells_what_runs(tlkit: Tlkit, steps: Steps, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def looking(*arguments: Any) -> Ended:
        seen.append(states(json.loads(Path("runs/night/summary.json").read_text())))
        return steps.run(*arguments)

    monkeypatch.setattr(run_module, "run_child", looking)
    assert tlkit("run", night(NIGHT)).code == 0
    assert seen == [["running", "waiting", "waiting"], ["done", "running", "waiting"], ["done", "done", "running"]]


@unix
def test_one_at_a_time(tlkit: Tlkit, steps: Steps, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    from tlkit.pipelines import locks

    path = night(NIGHT)
    assert tlkit("run", path).code == 0
    with locks.locked(Path("runs/night"), print) as descriptors:
        assert "another 'tlkit run' is at work" in tlkit("run", path).error
        holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=descriptors)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    refused = tlkit("run", path)
    assert "waiting for a step to end" in refused.err and "at work in this folder" in refused.error
    holder.communicate(b"\n")
    assert tlkit("run", path).code == 0


@dataclass(frozen=True)
class Undisturbed:
    """A pipeline of real steps that was left alone: its text, its folder, and how long it took."""

    text: str
    out: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(make_shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    text = real(make_shapes(folder / "data", images=12), epochs=4)
    (folder / "night.yaml").write_text(text)
    began = time.monotonic()
    alone = started(folder / "night.yaml", folder / "out", "--quiet")
    assert "note: go on" not in alone.communicate()[1] and alone.returncode == 0
    return Undisturbed(text, folder / "out", time.monotonic() - began)


@unix
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)])
def test_stopped_it_saves_and_goes_on_to_the_same_results(
    night: Night, undisturbed: Undisturbed, tmp_path: Path, number: int, code: int, group: bool
) -> None:
    """The signal comes to the pipeline alone, or to its step as well, as from a terminal or a batch system."""
    path, out = night(undisturbed.text), tmp_path / "out"
    process = started(path, out, "--json")
    while not list(out.glob("pretrain-*/state/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert json.loads(stdout)["exit_code"] == code
    assert stderr.splitlines()[-2:] == [
        f"note: go on with: tlkit run {path} --out {out}",
        f"tlkit: error: {'interrupted' if code == 130 else 'terminated'}",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert (states(summary), summary["exit_code"]) == (["stopped", "waiting", "waiting"], code)
    again = started(path, out)
    stderr = again.communicate()[1]
    assert again.returncode == 0, stderr
    # a busy machine may let the step end in between: then nothing of it is left to do
    assert "going on with what was stopped" in stderr or "pretrain | done before" in stderr
    assert results(out) == results(undisturbed.out)
    assert len(results(out)) == 7


@unix
@pytest.mark.slow
@pytest.mark.parametrize("only_the_pipeline", [False, True])
def test_killed_three_times_it_ends_with_the_same_results(
    night: Night, undisturbed: Undisturbed, tmp_path: Path, only_the_pipeline: bool
) -> None:
    """SIGKILL at moments drawn from all of its time; a step may outlive its pipeline for a moment."""
    path, out, draw = night(undisturbed.text), tmp_path / "out", random.Random(only_the_pipeline)
    for _ in range(3):
        process = started(path, out, "--quiet")
        try:
            process.wait(timeout=draw.uniform(0, undisturbed.seconds / 2))
        except subprocess.TimeoutExpired:
            (os.kill if only_the_pipeline else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
    last = started(path, out, "--quiet")
    stderr = last.communicate()[1]
    assert last.returncode == 0, stderr
    assert results(out) == results(undisturbed.out)
