"""A pipeline file, read and checked as far as can be before anything is run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from tlkit.config import key
from tlkit.errors import TlkitError, did_you_mean
from tlkit.option_values import option_named, option_values, read_recipe, read_yaml
from tlkit.pipelines.command import OWN, PLAIN, Command, is_path
from tlkit.pipelines.references import ENVIRONMENT, Reference, escaped, references, replaced, with_environment

STEP_KEYS = ("command", "recipe", "matrix", "processes")
_NAME = re.compile(r"\w[\w -]*")
_PATTERN = re.compile(r"[*?\[{]|://")  # names several files, or none on this machine


@dataclass(frozen=True)
class Axis:
    """An option that a matrix varies.

    Args:
        owner: The step whose matrix it is; empty for the pipeline's own.
        option: Its field name.
        values: As a person wrote them.
    """

    owner: str
    option: str
    values: tuple[Any, ...] = field(compare=False)


@dataclass(frozen=True)
class Step:
    """A command of a pipeline.

    Args:
        name: What it is called.
        command: What is run.
        values: Options by field name, as the file has them: with references, and checked where they have none.
        axes: What it is varied over, the pipeline's matrix before its own.
        processes: How many processes do it together.
        where: What an error names.
    """

    name: str
    command: Command
    values: dict[str, Any]
    axes: tuple[Axis, ...]
    processes: int
    where: str

    def checked(self, option: str, value: Any) -> Any:
        """The value in the type of the option, still written as in the file; None where the option is left out.

        Raises:
            TlkitError: A bad value, or a file that is not there.
        """
        if any(references(value)):
            return value
        given = {key(option): replaced(value, _no_reference)}
        found = option_values(given, self.command.options, self.where).get(option)
        if found is not None and not self.command.is_flag(option):
            self._refuse_missing_files(option, found)
        return escaped(found)

    def _refuse_missing_files(self, option: str, value: Any) -> None:
        if not is_path(get_args(self.command.options[option])[0]):
            return
        for path in value if isinstance(value, list) else [value]:
            if not _PATTERN.search(path) and not os.path.lexists(path):
                what = f"key '{key(option)}': there is no {path}"
                raise TlkitError(what, where=self.where, remedy=f"check the path, which is taken from {Path.cwd()}")


def read_pipeline(path: Path, commands: Mapping[str, Command], find_recipe: Callable[[str], Path]) -> tuple[Step, ...]:
    """The steps of a pipeline file.

    Args:
        path: The file.
        commands: What steps can be.
        find_recipe: From a recipe's file or name to its file.

    Raises:
        TlkitError: The file cannot be read; an unknown command, option, step or file; a bad value; a reference to what
            comes later.
    """
    whole = read_yaml(path, "the pipeline")
    _refuse_duplicates(path)
    if not isinstance(whole, dict) or not isinstance(whole.get("steps"), dict) or not whole["steps"]:
        remedy = "write 'steps:', and below it a name and options for each"
        raise TlkitError("no steps: a pipeline is a mapping of names to options", where=path, remedy=remedy)
    for word in whole:
        if word not in ("steps", "matrix"):
            remedy = did_you_mean(str(word), ("steps", "matrix")) or "known keys: matrix, steps"
            raise TlkitError(f"unknown key '{word}'", where=path, remedy=remedy)
    shared = _matrix(whole.get("matrix"), str(path))
    steps: dict[str, Step] = {}
    for name, given in whole["steps"].items():
        step = _step(path, str(name), given, shared, commands, find_recipe)
        _check_references(step, steps, [str(other) for other in whole["steps"]])
        steps[step.name] = step
    used = {axis.option for step in steps.values() for axis in step.axes if not axis.owner}
    for word in shared:
        if word.replace("-", "_") not in {key(option) for option in used}:
            known = sorted({key(option) for step in steps.values() for option in step.command.options})
            remedy = did_you_mean(word, known) or "a matrix varies an option that steps do not give themselves"
            raise TlkitError(f"matrix: '{word}' is an option of no step", where=path, remedy=remedy)
    return tuple(steps.values())


def _step(
    path: Path,
    name: str,
    given: Any,
    shared: dict[str, tuple[Any, ...]],
    commands: Mapping[str, Command],
    find_recipe: Callable[[str], Path],
) -> Step:
    where = f"{path}, step '{name}'"
    if not _NAME.fullmatch(name) or name == ENVIRONMENT:
        raise TlkitError("a step cannot be called so", where=where, remedy="use letters, digits, '-' and '_'")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise TlkitError("a step is a mapping of options to values", where=where, remedy="write 'key: value' lines")
    given = {str(word): _from_environment(value, where) for word, value in given.items()}
    command = _command(str(given.pop("command", name)), "command" in given, commands, where)
    recipe, matrix, processes = given.pop("recipe", None), given.pop("matrix", None), given.pop("processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise TlkitError(f"processes: {processes!r} is no number of them", where=where, remedy="give at least 1")
    options = {_option(word, command, where): value for word, value in given.items()}
    own = {_option(word, command, where): value for word, value in _matrix(matrix, where).items()}
    for option in own.keys() & options.keys():
        what = f"key '{key(option)}' is given beside the matrix that varies it"
        raise TlkitError(what, where=where, remedy="give it once")
    axes = [Axis("", option, values) for option, values in _shared(shared, command) if option not in {*options, *own}]
    axes += [Axis(name, option, values) for option, values in own.items()]
    step = Step(name, command, {}, tuple(axes), processes, where)
    if recipe is not None:
        stored = {option: hint for option, hint in command.options.items() if not command.is_flag(option)}
        found = read_recipe(find_recipe(str(recipe)), command.name, stored)
        step.values.update({option: escaped(value) for option, value in found.items()})
    for option, value in options.items():
        step.values[option] = step.checked(option, value)
    for axis in axes:
        _check_axis(step, axis)
    varied = {axis.option for axis in axes}
    for option in command.needed:
        if step.values.get(option) is None and option not in varied:
            remedy = f"give '{key(option)}:'"
            raise TlkitError(f"'{key(option)}' is missing, which {command.name} needs", where=where, remedy=remedy)
    return step


def _from_environment(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {word: _from_environment(one, where) for word, one in value.items()}
    try:
        return with_environment(value)
    except TlkitError as error:
        raise TlkitError(f"{error.where}: {error.what}", where=where, remedy=error.remedy) from error


def _command(name: str, is_given: bool, commands: Mapping[str, Command], where: str) -> Command:
    whole = name.replace("_", "-")
    if whole in commands:
        return commands[whole]
    remedy = did_you_mean(whole, commands) or f"choose one of {', '.join(commands)}"
    if not is_given:
        remedy = f"{remedy.removesuffix('?')}? or give 'command:'" if remedy.endswith("?") else "give 'command:'"
    raise TlkitError(f"no command of a step is called '{name}'", where=where, remedy=remedy)


def _option(word: str, command: Command, where: str) -> str:
    if word.replace("-", "_") in OWN:
        raise TlkitError(f"key '{word}' is given by the pipeline", where=where, remedy="leave it out")
    known = {**command.options, **dict.fromkeys(STEP_KEYS)}
    return option_named(word, known, where)


def _shared(matrix: dict[str, tuple[Any, ...]], command: Command) -> list[tuple[str, tuple[Any, ...]]]:
    """The part of the pipeline's matrix that a command has options for."""
    fields = {key(option): option for option in command.options}
    words = {word.replace("-", "_"): values for word, values in matrix.items()}
    return [(fields[word], values) for word, values in words.items() if word in fields]


def _matrix(given: Any, where: str) -> dict[str, tuple[Any, ...]]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        remedy = "write 'matrix: {seed: [0, 1, 2]}'"
        raise TlkitError("a matrix is a mapping of options to lists of values", where=where, remedy=remedy)
    for word, values in given.items():
        if not isinstance(values, list) or not values:
            what = f"matrix: '{word}' has no list of values"
            raise TlkitError(what, where=where, remedy=f"write '{word}: [VALUE, VALUE]'")
    return {str(word): tuple(_from_environment(values, where)) for word, values in given.items()}


def _check_axis(step: Step, axis: Axis) -> None:
    seen = []
    for raw in axis.values:
        value = step.checked(axis.option, raw)
        if value in seen:
            what = f"matrix: '{key(axis.option)}' has the value {raw} twice"
            raise TlkitError(what, where=step.where, remedy="give it once")
        seen.append(value)


def _check_references(step: Step, earlier: Mapping[str, Step], names: list[str]) -> None:
    values = [*step.values.values(), *(list(axis.values) for axis in step.axes)]
    for value in values:
        try:
            found = list(references(value))
        except TlkitError as error:
            raise TlkitError(f"{error.where}: {error.what}", where=step.where, remedy=error.remedy) from error
        for reference in found:
            _check_reference(reference, step, earlier, names)


def _check_reference(reference: Reference, step: Step, earlier: Mapping[str, Step], names: list[str]) -> None:
    name = reference.step
    if name == step.name:
        raise TlkitError(f"{reference} refers to the step itself", where=step.where, remedy="refer to an earlier step")
    if name not in earlier:
        if name in names:
            what, remedy = f"{reference} refers to a step that comes later", f"put '{name}' before '{step.name}'"
        else:
            what = f"{reference} refers to an unknown step"
            remedy = did_you_mean(name, names) or (f"earlier steps: {', '.join(earlier)}" if earlier else "name a step")
        raise TlkitError(what, where=step.where, remedy=remedy)
    command = earlier[name].command
    has_run, has_file = command.makes_run or command.name == "demo", not command.makes_run and command.name not in PLAIN
    for name, there, other in (("run", has_run, "out" * has_file), ("out", has_file, "run" * has_run)):
        if reference.field[0] == name and not there:
            remedy = f"did you mean '{other}'?" if other else "refer to what it has"
            raise TlkitError(f"{reference}: {command.name} gives no '{name}'", where=step.where, remedy=remedy)


def _no_reference(reference: Reference) -> Any:
    raise AssertionError(reference)  # only asked for values without any


def _refuse_duplicates(path: Path) -> None:
    """YAML takes the last of two equal keys in silence: here one of two steps, or of two values, would be lost.

    Raises:
        TlkitError: Names the key and its line.
    """
    nodes = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for word, value in node.value:
                if word.value in seen:
                    what = f"line {word.start_mark.line + 1}: '{word.value}' is given twice"
                    raise TlkitError(what, where=path, remedy="give it once, or another name")
                if isinstance(word, yaml.ScalarNode):
                    seen.add(word.value)
                nodes.append(value)
