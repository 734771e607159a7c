"""What a pipeline has to know of a command: its options, what it needs, and where its result is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from tlkit.config import hints_of

RUNS = ("adapt", "evaluate", "finetune", "pretrain", "unfreeze", "update-bn")
"""Commands whose ``--out`` is the folder of a run."""
FILES = {
    "check-data": "page.html",
    "compare": "comparison.html",
    "count-params": "parameters.csv",
    "demo": "demo",
    "export": "model.onnx",
    "extract-features": "features.npz",
    "models": "models.csv",
    "predict": "labels.csv",
    "shard": "shards",
}
"""Commands whose ``--out`` is a file (or a folder of another kind), and what it is called."""
PLAIN = ("cache", "doctor", "recipes")
"""Commands that are called without ``--out``."""
ENDINGS = {"json": ".json", "csv": ".csv", "markdown": ".md", "html": ".html", "table": ".txt"}
ENDINGS |= {"onnx": ".onnx", "torch-export": ".pt2", "hub": ""}
OWN = ("out", "json", "plan", "quiet", "resume")
"""Options that the pipeline gives."""


@dataclass(frozen=True)
class Command:
    """A command that a step can be.

    Args:
        name: As it is called.
        options: Those that a step may give: field name to ``Annotated[type, Opt]``.
        needed: Fields that a step must give.
        resumes: Whether a run of it that was cut can be gone on with by ``--resume``.
    """

    name: str
    options: dict[str, Any]
    needed: tuple[str, ...]
    resumes: bool

    @property
    def makes_run(self) -> bool:
        """Whether the result is a run folder."""
        return self.name in RUNS

    def file(self, values: dict[str, Any]) -> str | None:
        """What the file is called that it writes with these options; None where it writes none."""
        name = FILES.get(self.name)
        if name is None or "format" not in values:
            return name
        return str(Path(name).with_suffix(ENDINGS[values["format"]]))

    def is_flag(self, name: str) -> bool:
        """Whether the option is no part of a recipe, and given on the command line."""
        return not get_args(self.options[name])[1].stored

    def names_place(self, name: str) -> bool:
        """Whether the option's value may be a file or folder."""
        kind, opt = get_args(self.options[name])[:2]
        return is_path(kind) or any(word in (opt.metavar or "") for word in ("RUN", "FILE", "DATA"))


def is_path(kind: Any) -> bool:
    """Whether an option's type is a path, or a list of them."""
    return kind is Path or any(is_path(part) for part in get_args(kind))


def command_of(name: str, groups: Iterable[Any]) -> Command:
    """What a pipeline knows of the command that takes these option groups."""
    groups = tuple(groups)
    hints = {field: hint for group in groups for field, hint in hints_of(group).items()}
    needed = [field.name for group in groups for field in fields(group) if field.default is MISSING]
    if "resume" in hints:  # which brings its own images, so that nothing need be given on the command line
        needed += [field for field in ("data", "source", "target") if field in hints]
    options = {field: hint for field, hint in hints.items() if field not in OWN}
    return Command(name, options, tuple(needed), "resume" in hints and name in RUNS)
