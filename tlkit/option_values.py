"""Option values as YAML files have them: checked, and what is wrong told by its key."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from tlkit.config import check_value, key, literal_choices
from tlkit.errors import TlkitError, did_you_mean


def read_recipe(path: Path, command: str, known: dict[str, Any]) -> dict[str, Any]:
    """The option values in a recipe file.

    Args:
        path: A YAML mapping of option names to values, with an optional key ``command``.
        command: The command that is about to use it.
        known: The command's options: name to ``Annotated[type, Opt]``.

    Raises:
        TlkitError: The file cannot be read, belongs to another command, or has an unknown key or a bad value.
    """
    values = read_yaml(path, "the recipe")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise TlkitError("a recipe is a mapping of options to values", where=path, remedy="write 'key: value' lines")
    if (other := values.pop("command", command)) != command:
        raise TlkitError(f"this recipe is for '{other}', not '{command}'", where=path, remedy=f"run 'tlkit {other}'")
    return option_values(values, known, path)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds.

    Args:
        path: The file.
        what: What people call it.

    Raises:
        TlkitError: It cannot be read, or is not YAML.
    """
    import yaml  # not where --help waits for it

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TlkitError(f"{what} cannot be read ({error.strerror})", where=path, remedy="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise TlkitError(f"not a YAML file ({reason})", where=path, remedy="write 'key: value' lines") from error


def option_values(values: dict[Any, Any], known: dict[str, Any], where: object) -> dict[str, Any]:
    """Option values by field name, of the types that the options have; what is None is left out.

    Args:
        values: By key, as a person wrote them.
        known: The options that there are: name to ``Annotated[type, Opt]``.
        where: What an error names.

    Raises:
        TlkitError: An unknown key or a bad value.
    """
    found = {}
    for word, value in values.items():
        name = option_named(word, known, where)
        if value is not None:
            found[name] = _recipe_value(where, name, known[name], value)
    return found


def option_named(word: object, known: dict[str, Any], where: object) -> str:
    """The field name of an option that a person wrote as ``word``.

    Raises:
        TlkitError: There is none.
    """
    name = str(word).replace("-", "_")
    name = f"{name}_" if f"{name}_" in known else name  # a word of Python's, such as from
    if name not in known:
        keys = sorted(map(key, known))
        remedy = did_you_mean(name, keys) or f"known keys: {', '.join(keys)}"
        raise TlkitError(f"unknown key '{word}'", where=where, remedy=remedy)
    return name


def _recipe_value(where: object, name: str, hint: Any, value: Any) -> Any:
    kind = get_args(hint)[0]
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        value = str(value) if get_args(hint)[1].pattern and number else _as(kind, value)  # lr: 0.01
    except ValueError:
        what = f"key '{key(name)}' has a value of the wrong type: {value!r}"
        raise TlkitError(what, where=where, remedy=f"give {_wanted(kind)}") from None
    try:
        check_value(name, hint, value)
    except TlkitError as error:
        raise TlkitError(f"key '{key(name)}': {error.what}", where=where, remedy=error.remedy) from error
    return value


def _as(kind: Any, value: Any) -> Any:
    """``value`` as an option of type ``kind`` takes it; `ValueError` where YAML gave another type."""
    kind, parts = _one(kind), get_args(_one(kind))
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, list) or (get_origin(kind) is tuple and len(value) != len(parts)):
            raise ValueError
        return [_as(part, item) for part, item in zip(cycle(parts), value, strict=False)]
    if kind is float and isinstance(value, str):
        return float(value)  # YAML reads 1e-3, unlike 1.0e-3, as text
    wanted = {int: (int,), float: (int, float), bool: (bool,), str: (str,), Path: (str,)}
    simple = wanted.get(kind, tuple({type(choice) for choice in literal_choices(kind)}) or (object,))
    if not isinstance(value, simple) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError
    return value


def _one(kind: Any) -> Any:
    """``X`` for ``X | None``."""
    return next(part for part in get_args(kind) if part is not NoneType) if NoneType in get_args(kind) else kind


def _wanted(kind: Any) -> str:
    kind, parts = _one(kind), get_args(_one(kind))
    if get_origin(kind) in (list, tuple):
        return f"a list{f' of {len(parts)}' if get_origin(kind) is tuple else ''}, each {_wanted(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, "text")
