"""Config dataclasses as Typer options, and recipes as their defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
import yaml

from tlkit.config import Opt, check_value, literal_choices, option_name
from tlkit.errors import TlkitError, did_you_mean


def options_from_configs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a command whose parameters are config dataclasses into one that Typer can read.

    Every dataclass field becomes an option (or argument), grouped in the help page under the first words of its
    dataclass's docstring, and ``--recipe`` is added. The function is called with the dataclasses made from the values.
    """
    configs = {name: hint for name, hint in get_type_hints(function).items() if is_dataclass(hint)}

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
    hints = get_type_hints(config, include_extras=True)
    panel = (config.__doc__ or config.__name__).split("\n")[0].rstrip(".").split(",")[0]
    for field in fields(config):
        kind, opt = get_args(hints[field.name])
        shown: Any
        if opt.positional:
            shown = typer.Argument(help=opt.help, metavar=opt.metavar, show_default=False)
        else:
            names = [option_name(field.name)] if kind is bool and not opt.stored else []  # no --no-json and the like
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
    """Choices are parsed as text: `tlkit.config` refuses the unknown ones, with a suggestion, as it does for recipes."""
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
            hints |= get_type_hints(config, include_extras=True)
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
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            remedy = did_you_mean(name, known) or f"known keys: {', '.join(sorted(known))}"
            raise TlkitError(f"unknown key '{key}'", where=path, remedy=remedy)
        _check_recipe_value(path, name, known[name], value)
    return {str(key).replace("-", "_"): value for key, value in values.items() if value is not None}


def _check_recipe_value(path: Path, name: str, hint: Any, value: Any) -> None:
    kind = get_args(hint)[0]
    wanted = {int: (int,), float: (int, float), bool: (bool,), str: (str,), Path: (str,)}
    parts = get_args(kind) if type(None) in get_args(kind) else (kind,)
    simple = next((wanted[part] for part in parts if part in wanted), (str,) if literal_choices(kind) else None)
    mistyped = simple is not None and (
        not isinstance(value, simple) or (isinstance(value, bool) and bool not in simple)
    )
    if value is not None and mistyped:
        raise TlkitError(f"key '{name}' has a value of the wrong type: {value!r}", where=path, remedy=_wanted(kind))
    try:
        check_value(name, hint, value)
    except TlkitError as error:
        raise TlkitError(f"key '{name}': {error.what}", where=path, remedy=error.remedy) from error


def _wanted(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return f"give {next((word for part, word in names.items() if part is kind or part in get_args(kind)), 'text')}"
