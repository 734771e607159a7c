"""``${step.field}``: what a step's value takes from the result of an earlier one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tlkit.errors import TlkitError, did_you_mean

ENVIRONMENT = "env"
"""``${env.NAME}`` is a variable of the environment: no step is called so."""
EVERY = "*"
_MARK = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")


@dataclass(frozen=True)
class Reference:
    """What ``${step.field}`` stands for.

    Args:
        step: Name of the step.
        field: Where in its JSON object, from outside in.
        every: ``${step.*.field}``: of every cell of the step's matrix, as a list.
    """

    step: str
    field: tuple[str, ...]
    every: bool = False

    def __str__(self) -> str:
        return f"${{{'.'.join((self.step, *(EVERY,) * self.every, *self.field))}}}"


def references(value: Any) -> Iterator[Reference]:
    """All references in a value, lists searched through.

    Raises:
        TlkitError: One is not whole.
    """
    if isinstance(value, str):
        yield from (part for part in _parts(value) if isinstance(part, Reference))
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def replaced(value: Any, resolve: Callable[[Reference], Any]) -> Any:
    """A value with what its references stand for.

    A text that is one reference alone takes the type of what it stands for; in a longer text it becomes text. In a
    list, all that ``${step.*.field}`` stands for are items.

    Raises:
        TlkitError: A reference is not whole.
    """
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            found = replaced(item, resolve)
            gathers = isinstance(item, str) and any(reference.every for reference in references(item))
            items += found if gathers and isinstance(found, list) else [found]
        return items
    if not isinstance(value, str):
        return value
    parts = list(_parts(value))
    if len(parts) == 1 and isinstance(parts[0], Reference):
        return resolve(parts[0])
    return "".join(str(resolve(part)) if isinstance(part, Reference) else part for part in parts)


def escaped(value: Any) -> Any:
    """A value that is to be taken as it is, written so that nothing in it is a reference."""
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def with_environment(value: Any) -> Any:
    """A value with the environment's variables in it.

    Raises:
        TlkitError: There is no such variable.
    """

    def resolve(reference: Reference) -> Any:
        if reference.step != ENVIRONMENT:
            return str(reference)
        name = ".".join(reference.field)
        if name not in os.environ:
            raise TlkitError("there is no such environment variable", where=name, remedy="set it before you start")
        return escaped(os.environ[name])

    if isinstance(value, list):
        return [with_environment(item) for item in value]
    if not isinstance(value, str):
        return value
    return "".join(resolve(part) if isinstance(part, Reference) else escaped(part) for part in _parts(value))


def field_of(told: Mapping[str, Any], reference: Reference) -> Any:
    """What a reference stands for in the step's JSON object.

    Raises:
        TlkitError: The object has no such field.
    """
    found: Any = told
    for name in reference.field:
        if isinstance(found, list) and re.fullmatch(r"-?\d+", name) and -len(found) <= int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            known = list(found) if isinstance(found, Mapping) else []
            remedy = did_you_mean(name, known) or (f"there are {', '.join(known)}" if known else "refer to what it has")
            raise TlkitError(f"step '{reference.step}' has no '{name}' in its result", where=reference, remedy=remedy)
    return found


def _parts(text: str) -> Iterator[str | Reference]:
    end = 0
    for mark in _MARK.finditer(text):
        if mark.start() > end:
            yield text[end : mark.start()]
        end = mark.end()
        yield "${" if mark[0] == "$${" else _reference(mark[1], text)
    if end < len(text):
        yield text[end:]


def _reference(inside: str | None, text: str) -> Reference:
    step, *field = (part.strip() for part in (inside or "").split("."))
    every = field[:1] == [EVERY]
    field = field[every:]
    if not (step and field and all(field)):
        remedy = "write ${STEP.FIELD}, such as ${pretrain.run}, or $${ for the two characters themselves"
        raise TlkitError("a reference that is not whole", where=text, remedy=remedy)
    return Reference(step, tuple(field), every)
