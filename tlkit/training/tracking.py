"""A training's curves in other programs (TensorBoard, Weights & Biases, MLflow ...), by Accelerate's trackers.

They are drawn from the history that the run's state holds. A run that goes on begins them anew from there: nothing is
doubled where it had come further than its last stored state.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlkit import run_folder
from tlkit.errors import TlkitError, did_you_mean, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator

History = Sequence[Mapping[str, Any]]
PROJECT = "tlkit"
"""Project or experiment that a tracker puts all runs into."""
EXTRAS = ("tensorboard",)
"""Trackers that are extras of ours."""
MEASURED_ON = ("choosing", "val", "source_val", "target")


def chosen_trackers(text: str | None) -> list[str]:
    """Names of the trackers that ``--track`` asks for: one, or several with commas between; none where it is empty.

    Raises:
        TlkitError: There is none of that name, or its package is not installed.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if not names:
        return []
    from accelerate import tracking
    from accelerate.utils import LoggerType

    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    for name in names:
        if name not in known:
            remedy = did_you_mean(name, known) or f"choose of {', '.join(known)}"
            raise TlkitError(f"unknown tracker '{name}'", where="--track", remedy=remedy)
        if name in LoggerType.list() and name not in map(str, tracking.get_available_trackers()):
            package = f"'tlkit[{name}]'" if name in EXTRAS else name
            raise TlkitError(f"{name} is not installed", where="--track", remedy=f"pip install {package}")
    return list(dict.fromkeys(names))


def points(history: History) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and values of each epoch; each phase counts its steps on from the one before.

    A head that is fitted in closed form counts as one step.
    """
    before = last = 0
    for row in history:
        if row["epoch"] == 1:
            before = last
        last = before + row.get("step", 1)
        yield last, values(row)


def values(row: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of an epoch, by names whose first word is the group that they are shown in."""
    losses = row["losses"]
    if "strength" in row:  # the losses are those of all strengths of regularisation
        chosen = {"loss": losses.get(f"{row['strength']:g}"), "strength": row["strength"]}
        return {f"head/{name}": value for name, value in chosen.items() if value is not None}
    found = {f"loss/{'train' if name == 'loss' else name}": value for name, value in losses.items()}
    found |= {f"{part}/{name}": value for part in MEASURED_ON for name, value in row.get(part, {}).items()}
    found |= {f"rate/{stage}": rate for stage, rate in row.get("rates", {}).items()}
    return found | ({"selection/score": row["score"]} if "score" in row else {})


class Tracking:
    """The trackers of one training; of several processes only the first has any.

    Args:
        names: As ``--track`` has them.
        run: The run's folder; files go to ``tracking/NAME`` in it.
        recipe: What is stored as hyper-parameters.
        accelerator: Makes the trackers.
        warn: Told where one fails: the training goes on without it.
        part: Which of the run's trainings it is, where there are several.
        done: A file that is made when all is tracked, and where it exists nothing is done again.
    """

    def __init__(
        self,
        names: str | None,
        run: Path,
        recipe: Mapping[str, Any],
        *,
        accelerator: Accelerator,
        warn: Callable[[str], None],
        part: str = "",
        done: Path | None = None,
    ) -> None:
        self.names = chosen_trackers(names) if accelerator.is_main_process else []
        self.run, self.recipe, self.accelerator, self.warn = run, recipe, accelerator, warn
        self.part, self.done = part, done
        self._trackers: list[Any] = []
        self._drawn = self._step = 0

    @contextmanager
    def started(self, *, fresh: bool) -> Iterator[None]:
        """Trackers are started, and finished at the end.

        Args:
            fresh: Whether the run has just begun, so that it is better not to go on where one cannot be started.

        Raises:
            TlkitError: One cannot be started.
        """
        try:
            if self.done is None or not self.done.exists():
                for name in self.names:
                    self._start(name, fresh)
            yield
        finally:
            self._tell(lambda tracker: tracker.finish())

    def follow(self, history: History) -> None:
        """Draw the epochs that have come since."""
        for number, (step, found) in enumerate(points(history)):
            if number >= self._drawn and self._trackers:
                self._log(found, step)
            self._step = step
        self._drawn = len(history)

    def finish(self, history: History, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Draw what is left, and the figures of the finished training.

        Args:
            history: One row for each epoch.
            metrics: Figures by what they were measured on.
        """
        self.follow(history)
        figures = {f"{part}_{name}": value for part, named in metrics.items() for name, value in named.items()}
        self._log({f"final/{name}": value for name, value in figures.items() if isinstance(value, float)}, self._step)
        if self.done is not None and self._trackers:
            self.done.touch()

    def _start(self, name: str, fresh: bool) -> None:
        place, accelerator = self.run / run_folder.TRACKING / name / self.part, self.accelerator
        accelerator.log_with = [name]
        accelerator.project_configuration.logging_dir = str(place)
        settings = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in self.recipe.items()
        }
        try:
            with redirect_stdout(sys.stderr):  # what stands on stdout is the command's result
                shutil.rmtree(place, ignore_errors=True)  # of a process that was stopped
                place.mkdir(parents=True)
                project = "" if name == "tensorboard" else PROJECT  # there, the name of a folder in this one
                accelerator.init_trackers(project, settings, {name: _options(name, place, str(self.run / self.part))})
            self._trackers += accelerator.trackers
        except Exception as error:  # whatever the package of somebody else raises
            for tracker in accelerator.trackers:
                with suppress(Exception):
                    tracker.finish()
            if fresh:
                what, remedy = f"{name} cannot be started ({first_line(error)})", f"set {name} up, or leave it out"
                raise TlkitError(what, where="--track", remedy=remedy) from error
            self._warn(name, error)
        finally:
            accelerator.log_with, accelerator.trackers = [], []  # the next training has trackers of its own

    def _log(self, found: Mapping[str, float], step: int) -> None:
        if found:
            self._tell(lambda tracker: tracker.log(found, step=step))

    def _tell(self, act: Callable[[Any], None]) -> None:
        """Let each tracker do something; one that fails is left out from then on."""
        for tracker in list(self._trackers):
            try:
                with redirect_stdout(sys.stderr):
                    act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self._warn(tracker.name, error)
                with suppress(Exception):
                    tracker.finish()

    def _warn(self, name: str, error: Exception) -> None:
        self.warn(f"{name} fails ({first_line(error)}): the run goes on without it")


def _options(name: str, place: Path, title: str) -> dict[str, Any]:
    """How a tracker is told its folder and the run's name, where Accelerate does not."""
    options: dict[str, dict[str, Any]] = {
        "clearml": {"task_name": title},
        "dvclive": {"dir": str(place), "dvcyaml": None, "save_dvc_exp": False},
        "mlflow": {"run_name": title},
        "swanlab": {"experiment_name": title, "logdir": str(place)},
        "trackio": {"name": title},
        "wandb": {"name": title, "dir": str(place)},
    }
    if name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:  # else it would write into the working folder
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{place.absolute() / 'mlflow.db'}")
        options[name]["logging_dir"] = place.absolute().as_uri()
    return options.get(name, {})
