"""Config dataclasses as Typer options, and recipes as their defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from tlkit.config import Opt, hints_of, key, literal_choices, option_name
from tlkit.option_values import read_recipe


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


def groups_of(function: Callable[..., Any]) -> tuple[Any, ...]:
    """The config dataclasses that a command takes."""
    hints = get_type_hints(inspect.unwrap(function))
    return tuple(hint for hint in hints.values() if is_dataclass(hint))


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
    hints = {name: hint for group in groups_of(function) for name, hint in hints_of(group).items()}
    stored = {name: hint for name, hint in hints.items() if get_args(hint)[1].stored}
    command = key(function.__name__).replace("_", "-")

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
