"""What tests of pipelines share: commands as the command line has them, and pipelines from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tlkit.cli.app import _commands_of_steps
from tlkit.pipelines.command import Command, command_of
from tlkit.pipelines.reading import Step, read_pipeline

Read = Callable[[str], tuple[Step, ...]]


@pytest.fixture(scope="session")
def commands() -> dict[str, Command]:
    """What steps can be."""
    return {name: command_of(name, groups) for name, groups in _commands_of_steps().items()}


@pytest.fixture
def read(commands: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The steps of a pipeline that is written to ``night.yaml`` in an empty folder with images in ``photos``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a")

    def from_text(text: str) -> tuple[Step, ...]:
        Path("night.yaml").write_text(text, encoding="utf-8")
        return read_pipeline(Path("night.yaml"), commands, Path)

    return from_text
