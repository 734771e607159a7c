"""Config dataclasses as Typer options, and recipes as their defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import cycle
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tlkit.config import Opt, check_value, hints_of, key, literal_choices, option_name
from tlkit.errors import TlkitError, did_you_mean


def options_from_configs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a command whose parameters are config dataclasses into one that Typer can read.

    Every dataclass field becomes an option (or argument), grouped in the help page under the first words of its
    dataclass's docstring, and ``--recipe`` is added. The function is called with the dataclasses made from the values.
    """
    configs: dict[str, Any] = {name: hint for name, hint in get_type_hints(function).items() if is_dataclass(hint)}

    @functools.wraps(function)
    def run(recipe: Path | None = None, **values: Any) -> Any:
        groups = {
            name: config(**{field.name: values[field.name] for field in fields(config)})
            for name, config in configs.items()
        }
        return function(**groups)

    parameters = [parameter for config in configs.values() for parameter in _parameters(config)]
    positional = [p for p in parameters if isinstance(get_args(p.annotation)[1], type(typer.Argument()))]
    rest = [p for p in parameters if p not in positional]
    recipe = inspect.Parameter(
        "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_recipe_option(function)
    )
    run.__signature__ = inspect.Signature([*positional, recipe, *rest])  # type: ignore[attr-defined]
    return run


def _parameters(config: Any) -> Iterator[inspect.Parameter]:
    hints = hints_of(config)
    panel = (config.__doc__ or config.__name__).split("\n")[0].rstrip(".").split(",")[0]
    for field in fields(config):
        kind, opt = get_args(hints[field.name])
        shown: Any
        if opt.positional:
            shown = typer.Argument(help=opt.help, metavar=opt.metavar, show_default=False)
        else:
            plain = kind is bool or field.name.endswith("_")  # no --no-json and the like
            names = [option_name(field.name)] if plain else []
            shown = typer.Option(
                *names,
                help=_help(opt),
                metavar=opt.metavar or "|".join(literal_choices(kind)) or None,
                rich_help_panel=panel,
                show_default=True if field.default is not None else "auto",
            )
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[_parsed(kind), shown]
        )


def _parsed(kind: Any) -> Any:
    """Choices are parsed as text: `tlkit.config` refuses unknown ones with a suggestion, as it does for recipes."""
    if literal_choices(kind):
        return str if type(None) not in get_args(kind) else str | None
    return kind


def _help(opt: Opt) -> str:
    if opt.min is not None and opt.max is not None:
        return f"{opt.help} \\[{opt.min:g} to {opt.max:g}]"
    return f"{opt.help} \\[at least {opt.min:g}]" if opt.min is not None else opt.help


def _recipe_option(function: Callable[..., Any]) -> Any:
    hints: dict[str, Any] = {}
    for config in get_type_hints(function).values():
        if is_dataclass(config):
            hints |= hints_of(config)
    stored = {name: hint for name, hint in hints.items() if get_args(hint)[1].stored}
    command = function.__name__.replace("_", "-")

    def use(context: typer.Context, path: Path | None) -> Path | None:
        """Make the recipe's values this command's defaults; flags on the command line still win."""
        if path is not None:
            context.default_map = read_recipe(path, command, stored)
        return path

    return Annotated[
        Path | None,
        typer.Option(
            help="YAML file with option values; flags win over it.", is_eager=True, callback=use, show_default=False
        ),
    ]


def read_recipe(path: Path, command: str, known: dict[str, Any]) -> dict[str, Any]:
    """The option values in a recipe file.

    Args:
        path: A YAML mapping of option names to values, with an optional key ``command``.
        command: The command that is about to use it.
        known: The command's options: name to ``Annotated[type, Opt]``.

    Raises:
        TlkitError: The file cannot be read, belongs to another command, or has an unknown key or a bad value.
    """
    import yaml  # not where --help waits for it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TlkitError(
            f"the recipe cannot be read ({error.strerror})", where=path, remedy="check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TlkitError(f"not a YAML file ({error})", where=path, remedy="write 'key: value' lines") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise TlkitError("a recipe is a mapping of options to values", where=path, remedy="write 'key: value' lines")
    if (other := values.pop("command", command)) != command:
        raise TlkitError(f"this recipe is for '{other}', not '{command}'", where=path, remedy=f"run 'tlkit {other}'")
    found = {}
    for word, value in values.items():
        name = str(word).replace("-", "_")
        name = f"{name}_" if f"{name}_" in known else name  # a word of Python's, such as from
        if name not in known:
            keys = sorted(map(key, known))
            remedy = did_you_mean(name, keys) or f"known keys: {', '.join(keys)}"
            raise TlkitError(f"unknown key '{word}'", where=path, remedy=remedy)
        if value is not None:
            found[name] = _recipe_value(path, name, known[name], value)
    return found


def _recipe_value(path: Path, name: str, hint: Any, value: Any) -> Any:
    kind = get_args(hint)[0]
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        value = str(value) if get_args(hint)[1].pattern and number else _as(kind, value)  # lr: 0.01
    except ValueError:
        what = f"key '{key(name)}' has a value of the wrong type: {value!r}"
        raise TlkitError(what, where=path, remedy=f"give {_wanted(kind)}") from None
    try:
        check_value(name, hint, value)
    except TlkitError as error:
        raise TlkitError(f"key '{key(name)}': {error.what}", where=path, remedy=error.remedy) from error
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
