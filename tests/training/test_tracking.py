"""What is drawn of a history, and trackers of one process among several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tlkit.training.tracking import Tracking, points

ROW = {"epoch": 1, "epochs": 2, "step": 4, "losses": {"loss": 1.5}, "rates": {"head": 0.1}}


def test_steps_are_counted_on_over_phases() -> None:
    """The closed form, two epochs, a phase that was stopped in its first epoch, and one more."""
    head = {"phase": 1, "epoch": 1, "epochs": 1, "losses": {"0.1": 0.7, "1": 0.8}, "strength": 0.1}
    history: list[dict[str, Any]] = [head, ROW, ROW | {"epoch": 2, "step": 8}, ROW | {"step": 3}, ROW]
    assert [step for step, _ in points(history)] == [1, 5, 9, 12, 16]


def test_each_figure_has_a_name_in_the_group_that_it_is_shown_in() -> None:
    brief = {"loss": 0.5, "top1": 0.9}
    row = ROW | {"losses": {"loss": 1.5, "task": 1.0, "transfer": 0.5}, "source_val": brief, "score": 0.3}
    ((_, found),) = points([row])
    assert found == {
        "loss/train": 1.5,
        "loss/task": 1.0,
        "loss/transfer": 0.5,
        "source_val/loss": 0.5,
        "source_val/top1": 0.9,
        "rate/head": 0.1,
        "selection/score": 0.3,
    }
    head = {"epoch": 1, "epochs": 1, "losses": {"0.1": 0.7, "1": 0.8}, "strength": 0.1}
    assert [found for _, found in points([head])] == [{"head/loss": 0.7, "head/strength": 0.1}]


def test_of_several_processes_only_the_first_tracks(tmp_path: Path) -> None:
    another: Any = SimpleNamespace(is_main_process=False)
    tracking = Tracking("tensorboard", tmp_path, {}, accelerator=another, warn=print)
    with tracking.started(fresh=True):
        tracking.follow([ROW])
        tracking.finish([ROW], {"val": {"top1": 0.5}})
    assert not any(tmp_path.iterdir())
