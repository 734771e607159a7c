"""``--track``: TensorBoard's files read back, stopped runs, other trackers, and trackers that fail."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from accelerate import Accelerator
from accelerate import tracking as accelerate_tracking

from tlkit.errors import TlkitError
from tlkit.training.tracking import Tracking, points

Tlkit = Callable[..., Any]
Curves = dict[str, list[tuple[int, float]]]
FULL = ("--strategy", "full", "--epochs", 2, "--precision", "fp32", "--workers", 0, "--quiet")
FAILS = "notebook fails (the server has gone): the run goes on without it"
ADAPT = ("--strategy", "probe", "--bottleneck", 8, "--epochs", 3, "--batch-size", 16, "--method", "dann", "--quiet")


@pytest.fixture(scope="module")
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'tlkit[tensorboard]'")


@pytest.fixture(scope="module")
def options(shapes: Path, small: tuple[str, ...]) -> tuple[Any, ...]:
    """A run of two phases, the first in closed form."""
    more = ("--strategy", "lp-ft", "--test-fraction", 0.25, "--mean", 0.5, 0.5, 0.5)
    return ("finetune", shapes, *small, *FULL, *more, "--track", "tensorboard")


@pytest.fixture(scope="module")
def tracked(
    tensorboard: None, tlkit: Tlkit, options: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of such a run. Read only."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    done = tlkit(*options, "--out", run)
    assert done.code == 0, done.err
    return run


def curves(folder: Path) -> Curves:
    """All scalars of the event files in a folder: step and value by name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {name: [(point.step, point.value) for point in found.Scalars(name)] for name in found.Tags()[SCALARS]}


def expected(history: list[dict[str, Any]], metrics: dict[str, dict[str, Any]]) -> Curves:
    """The curves of ``metrics.jsonl`` and of the metrics in ``summary.json``, in single precision."""
    curves: Curves = {}
    last = 0
    for step, found in points(history):
        last = step
        for name, value in found.items():
            curves.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6, abs=1e-12)))
    for part, figures in metrics.items():
        plain = {name: value for name, value in figures.items() if isinstance(value, float)}
        curves |= {f"final/{part}_{name}": [(last, pytest.approx(value, rel=1e-6))] for name, value in plain.items()}
    return curves


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())["metrics"]


# TensorBoard


def test_what_tensorboard_reads_is_what_the_run_says(tracked: Path) -> None:
    read, steps = curves(tracked / "tracking" / "tensorboard"), rows(tracked)[1]["step"]
    assert read == expected(rows(tracked), metrics(tracked))
    assert [step for step, _ in read["loss/train"]] == [1 + steps, 1 + 2 * steps], "the closed form is one step"
    assert {"head/strength", "val/loss", "val/top1", "rate/stem", "rate/head"} <= set(read)
    assert {"final/val_top1", "final/test_top1", "final/test_loss", "final/test_ece"} <= set(read)


def test_the_recipe_is_stored_as_hyper_parameters(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (folder,) = {path.parent for path in tracked.glob("tracking/tensorboard/*/events*")}
    found = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"]
    stored = HParamsPluginData.FromString(found.plugin_data.content).session_start_info.hparams
    recipe = yaml.safe_load((tracked / "recipe.yaml").read_text())
    assert recipe["track"] == "tensorboard", "repeating the run tracks it, too"
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in stored.items()} == recipe | {
        "mean": "0.5, 0.5, 0.5"
    }


def test_nothing_is_tracked_unasked(trained: Path) -> None:
    assert not (trained / "tracking").exists()


class Killed(Exception):
    """Ends a run at once, as a kill does: no state is stored, nobody is told."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``killed_after(3)`` ends the next command once so many epochs are drawn."""
    follow, count = Tracking.follow, 0

    def arm(epochs: int) -> None:
        def stop(tracking: Tracking, history: Any) -> None:
            nonlocal count
            follow(tracking, history)
            count += 1
            if count == epochs:
                monkeypatch.setattr(Tracking, "follow", follow)
                raise Killed

        monkeypatch.setattr(Tracking, "follow", stop)

    yield arm
    assert Tracking.follow is follow, "nothing was killed"


def test_a_run_killed_and_resumed_draws_the_same_curves(
    tlkit: Tlkit,
    tracked: Path,
    options: tuple[Any, ...],
    tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:
    """The curves had come further than the last stored state."""
    run, whole = tmp_path / "run", curves(tracked / "tracking" / "tensorboard")
    killed_after(1)
    with pytest.raises(Killed):
        tlkit(*options, "--out", run, "--checkpoint-every", "3steps")
    drawn = curves(run / "tracking" / "tensorboard")["loss/train"]
    assert drawn == whole["loss/train"][:1]
    assert tlkit("finetune", "--resume", run, "--quiet").code == 0
    assert curves(run / "tracking" / "tensorboard") == whole
    assert len(list(run.glob("tracking/tensorboard/events*"))) == 1, "the old files are gone"


def test_adapt_tracks_each_training(
    tensorboard: None,
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:
    """Killed in the second one: the first one's files stay as they are, the others are drawn anew."""
    run = tmp_path / "run"
    killed_after(3 + 1 + 2)  # the end of a training is one, too
    with pytest.raises(Killed):
        tlkit("adapt", "--source", shapes, "--target", shapes, *small, *ADAPT, "--track", "tensorboard", "--out", run)
    folder = run / "tracking" / "tensorboard"
    first = {path: path.stat().st_mtime_ns for path in (folder / "source-only-0").rglob("*")}
    done = tlkit("adapt", "--resume", run, "--json", "--quiet")
    assert done.code == 0, done.err
    assert {path: path.stat().st_mtime_ns for path in (folder / "source-only-0").rglob("*")} == first
    history = [row for row in rows(run) if row["method"] == "dann"]
    read = curves(folder / "dann-0")
    assert read == expected(history, done.json["metrics"])
    assert len(read["loss/train"]) == 3
    assert {"loss/transfer", "source_val/top1", "target/top1", "selection/score", "final/target_top1"} <= set(read)
    assert len(curves(folder / "source-only-0")["loss/train"]) == 3


# Names


@pytest.mark.parametrize("command", ["finetune", "unfreeze", "pretrain", "adapt"])
def test_an_unknown_tracker_is_refused_before_any_work(
    tlkit: Tlkit, shapes: Path, tmp_path: Path, command: str
) -> None:
    data = ("--source", shapes, "--target", shapes) if command == "adapt" else (shapes,)
    done = tlkit(command, *data, "--track", "tensorbord", "--out", tmp_path / "run", "--quiet")
    assert done.code == 1
    assert done.error == "--track: unknown tracker 'tensorbord'; did you mean 'tensorboard'?"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorboard", "pip install 'tlkit[tensorboard]'"), ("mlflow", "pip install mlflow")]
)
def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(
    tlkit: Tlkit, shapes: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    done = tlkit("finetune", shapes, "--plan", "--track", name, "--quiet")
    assert (done.code, done.error) == (1, f"--track: {name} is not installed; {remedy}")


# Other trackers


class Notebook(accelerate_tracking.GeneralTracker):
    """A tracker of somebody else: notes what it is told, and fails where it is asked to."""

    name = "notebook"
    requires_logging_directory = True
    notebooks: ClassVar[list[Notebook]] = []
    fails_at: ClassVar[str] = ""

    def __init__(self, project: str, folder: str) -> None:
        super().__init__()
        self.project, self.folder, self.finished = project, folder, 0
        self.points: list[tuple[int | None, dict[str, float]]] = []
        self.notebooks.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        print("on stdout, where the command's result belongs")
        self._fail("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.hyper_parameters = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.points.append((step, values))
        self._fail(f"log {len(self.points)}")

    def finish(self) -> None:
        self.finished += 1
        self._fail("finish")

    def _fail(self, place: str) -> None:
        if place == self.fails_at:
            raise ConnectionError("the server has gone")


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    """Those that are made by the commands of a test."""
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "notebooks", made := [])
    return made


def track(names: str, run: Path, warned: list[str]) -> None:
    """What a training of two epochs does."""
    row = {"epoch": 1, "epochs": 2, "step": 4, "losses": {"loss": 1.5}}
    history = [row, row | {"epoch": 2, "step": 8}]
    tracking = Tracking(names, run, {"seed": 0}, accelerator=Accelerator(cpu=True), warn=warned.append)
    with tracking.started(fresh=True):
        tracking.follow(history[:1])
        tracking.finish(history, {"val": {"top1": 0.5}})


def test_any_tracker_that_accelerate_knows_serves_and_each_run_has_its_own(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, notebooks: list[Notebook]
) -> None:
    for number in range(2):
        run = tmp_path / str(number)
        words = (*FULL, "--seed", number, "--track", "notebook", "--out", run, "--json")
        assert tlkit("finetune", shapes, *small, *words).json["run"] == str(run)
        (made,) = notebooks[number:]
        assert (made.project, made.folder, made.finished) == ("tlkit", str(run / "tracking" / "notebook"), 1)
        assert made.hyper_parameters == yaml.safe_load((run / "recipe.yaml").read_text())
        assert made.points[:-1] == [(step, found) for step, found in points(rows(run))]
        assert made.points[-1][1]["final/val_top1"] == metrics(run)["val"]["top1"]


@pytest.mark.slow
def test_each_fold_is_tracked_in_its_own_run(
    tlkit: Tlkit, shapes: Path, small: tuple[str, ...], tmp_path: Path, notebooks: list[Notebook]
) -> None:
    run = tmp_path / "run"
    words = ("--strategy", "probe", "--folds", 2, "--track", "notebook", "--quiet", "--out", run)
    assert tlkit("finetune", shapes, *small, *words).code == 0
    folders = [run / "folds" / "1", run / "folds" / "2", run]
    assert [made.folder for made in notebooks] == [str(folder / "tracking" / "notebook") for folder in folders]
    for made, folder in zip(notebooks, folders, strict=True):
        assert made.points[-1][1]["final/val_top1"] == metrics(folder)["val"]["top1"]


@pytest.mark.slow
def test_a_tracker_that_cannot_be_started_for_a_later_fold_costs_no_earlier_one(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    notebooks: list[Notebook],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(notebook: Notebook) -> None:
        if notebook is not notebooks[0]:
            raise ConnectionError("the server has gone")

    monkeypatch.setattr(Notebook, "start", start)
    words = ("--strategy", "probe", "--folds", 2, "--track", "notebook", "--quiet", "--out", tmp_path / "run")
    done = tlkit("finetune", shapes, *small, *words)
    assert done.code == 0, done.err
    assert done.err.count(FAILS) == 2


def test_a_tracker_that_fails_costs_one_warning(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    notebooks: list[Notebook],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Notebook, "fails_at", "log 1")
    done = tlkit("finetune", shapes, *small, *FULL, "--track", "notebook", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if "notebook" in line] == [f"note: {FAILS}"]
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("place", ["log 1", "log 2", "log 3", "finish"])
def test_whenever_a_tracker_fails_the_others_are_told_on(
    tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    class Other(Notebook):
        name = "other"

    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "other", Other)
    monkeypatch.setattr(Notebook, "fails_at", place)
    monkeypatch.setattr(Other, "fails_at", "")
    warned: list[str] = []
    track("notebook,other", tmp_path, warned)
    assert warned == [FAILS]
    failed, other = notebooks
    assert failed.finished >= 1, "a run that was begun somewhere is ended there"
    assert (len(other.points), other.finished) == (3, 1)


def test_a_tracker_that_cannot_be_started_stops_a_new_run_and_not_one_that_goes_on(
    tlkit: Tlkit,
    shapes: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    notebooks: list[Notebook],
    monkeypatch: pytest.MonkeyPatch,
    killed_after: Callable[[int], None],
) -> None:
    run, words = tmp_path / "run", ("finetune", shapes, *small, *FULL, "--track", "notebook", "--out")
    monkeypatch.setattr(Notebook, "fails_at", "start")
    done = tlkit(*words, run)
    assert done.error == ("--track: notebook cannot be started (the server has gone); set notebook up, or leave it out")
    assert not run.exists(), "the same command can be given again"
    monkeypatch.setattr(Notebook, "fails_at", "")
    killed_after(1)
    with pytest.raises(Killed):
        tlkit(*words, run, "--checkpoint-every", "1steps")
    monkeypatch.setattr(Notebook, "fails_at", "start")
    done = tlkit("finetune", "--resume", run, "--quiet")
    assert done.code == 0, done.err
    assert f"note: {FAILS}" in done.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("events", range(2, 12))
def test_a_full_disk_costs_tensorboard_one_warning(
    tensorboard: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    """TensorBoard writes in a thread of its own, which ends; nobody may wait for it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def full(writer: Any, data: bytes) -> None:
        calls.append(1)
        if len(calls) > events:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    warned: list[str] = []
    try:
        track("tensorboard", tmp_path, warned)
    except TlkitError as error:
        warned.append(error.what)
    assert len(warned) == (len(calls) > events)
    assert all("No space left on device" in line for line in warned)
