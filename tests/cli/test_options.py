"""Options made from config dataclasses, for every command: their help, and recipes as their defaults."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from tlkit.cli import app as app_module
from tlkit.cli.app import app, run
from tlkit.config import Opt, effective_recipe, literal_choices, option_name


def commands() -> dict[str, list[Any]]:
    """Each command's config dataclasses, found rather than listed: a new command is tested as it comes."""
    found = {}
    for info in app.registered_commands:
        assert info.callback is not None
        function = getattr(info.callback, "__wrapped__", info.callback)
        name = info.name or info.callback.__name__.replace("_", "-")
        found[name] = [hint for hint in get_type_hints(function).values() if is_dataclass(hint)]
    return found


COMMANDS = commands()
every_command = pytest.mark.parametrize("command", COMMANDS)


def options(command: str) -> list[tuple[Any, Any, Opt]]:
    """``(field, type, Opt)`` of each of a command's options."""
    found = []
    for group in COMMANDS[command]:
        hints = get_type_hints(group, include_extras=True)
        found += [(field, *get_args(hints[field.name])[:2]) for field in fields(group)]
    return found


@pytest.fixture(autouse=True)
def _keep_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module.signal, "signal", lambda *_: None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The config groups that each command line ends in; nothing is run."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(app_module, "_start", lambda _, groups: calls.append(groups))
    return calls


def help_page(command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([command, "--help"]) == 0
    return capsys.readouterr().out


# Help


def test_there_are_commands() -> None:
    assert {"finetune", "doctor"} <= set(COMMANDS)


@every_command
def test_help_lists_every_option_with_its_help_and_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = " ".join(help_page(command, 400, capsys, monkeypatch).split())
    assert "--recipe" in page
    for field, kind, opt in options(command):
        assert opt.positional or f" {option_name(field.name)} " in page
        assert " ".join(opt.help.split()) in page, "as written: nothing in it was taken for markup"
        for choice in literal_choices(kind):
            assert choice in page
        if not opt.positional and isinstance(field.default, str | int | float) and kind is not bool:
            assert f"[default: {field.default}]" in page
        if opt.min is not None and opt.max is not None:
            assert f"[{opt.min:g} to {opt.max:g}]" in page


@every_command
@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_readable_on_a_terminal(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = help_page(command, columns, capsys, monkeypatch)
    assert max(len(line) for line in page.splitlines()) <= columns
    assert "…" not in page, "nothing is cut off"
    for field, _, opt in options(command):
        assert opt.positional or re.search(rf"^│[ *]*{option_name(field.name)} ", page, re.MULTILINE)


@every_command
def test_no_two_groups_of_a_command_share_a_field(command: str) -> None:
    counts = Counter(field.name for field, _, _ in options(command))
    assert [name for name, count in counts.items() if count > 1] == []
    assert "recipe" not in counts


# Recipes


def sample(field: Any, kind: Any, opt: Opt, folder: Path) -> Any:
    """An allowed value that is not the default."""
    choices = literal_choices(kind)
    if choices:
        return next((choice for choice in choices if choice != field.default), choices[0])
    kind = next(part for part in get_args(kind) if part is not NoneType) if NoneType in get_args(kind) else kind
    if get_origin(kind) in (tuple, list):
        parts = get_args(kind) if get_origin(kind) is tuple else get_args(kind) * 2
        return get_origin(kind)(sample(field, part, opt, folder) for part in parts)
    if kind is bool:
        return not field.default
    if kind in (int, float):
        start = field.default if isinstance(field.default, int | float) else opt.min if opt.min is not None else 1
        if kind is int:
            return int(start) + (1 if opt.max is None or start < opt.max else -1)
        return start + 0.001 if opt.max is None or start < opt.max else start - 0.001
    if opt.pattern is not None:
        return next(text for text in ("0.5", "3steps", "7min", "2GB") if re.fullmatch(opt.pattern, text))
    return folder / f"{field.name} of: [mine]" if kind is Path else "some text: 1"


def samples(command: str, folder: Path) -> dict[str, Any]:
    return {field.name: sample(field, kind, opt, folder) for field, kind, opt in options(command) if opt.stored}


@every_command
def test_an_effective_recipe_repeats_the_command(command: str, tmp_path: Path, started: list[dict[str, Any]]) -> None:
    values = samples(command, tmp_path)
    groups = [
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in COMMANDS[command]
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(effective_recipe(command, groups)))

    assert run([command, "--recipe", str(recipe)]) == 0
    assert list(started[0].values()) == groups
    assert effective_recipe(command, started[0].values()) == yaml.safe_load(recipe.read_text())


@every_command
def test_a_recipe_of_defaults_is_the_bare_command(command: str, tmp_path: Path, started: list[dict[str, Any]]) -> None:
    needed = {f.name: sample(f, kind, opt, tmp_path) for f, kind, opt in options(command) if f.default is MISSING}
    groups = [
        group(**{f.name: needed[f.name] for f in fields(group) if f.name in needed}) for group in COMMANDS[command]
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(effective_recipe(command, groups)))
    assert run([command, "--recipe", str(recipe)]) == 0
    assert list(started[0].values()) == groups


@pytest.fixture
def finetune(tmp_path: Path, started: list[dict[str, Any]]) -> Any:
    """Runs ``tlkit finetune photos --recipe FILE`` with a recipe's text; returns the exit code and the values."""

    def call(text: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(text)
        code = run(["finetune", "photos", "--recipe", str(recipe), *arguments])
        return code, {
            key: value for group in started[-1].values() for key, value in vars(group).items()
        } if started else {}

    return call


def test_recipe_values_are_defaults_and_flags_win(finetune: Any) -> None:
    code, values = finetune("seed: 3\nval-fraction: 0.1\nbatch_size: 7\n", "--seed", "5")
    assert code == 0
    assert (values["seed"], values["val_fraction"], values["batch_size"]) == (5, 0.1, 7)
    assert values["data"] == Path("photos")


def test_flags_win_wherever_they_stand(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 3\ndata: elsewhere\n")
    assert run(["finetune", "--seed", "5", "photos", "--recipe", str(recipe)]) == 0
    assert (started[0]["compute"].seed, started[0]["data"].data) == (5, Path("photos"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("val_fraction: 1e-1", "val_fraction", 0.1),  # text to YAML 1.1
        ("crop: 1", "crop", 1.0),
        ("mean: [0, 0.5, 5e-1]", "mean", (0.0, 0.5, 0.5)),
        ("device:", "device", "auto"),
        ("", "seed", 0),
    ],
)
def test_what_yaml_makes_of_a_value_is_taken_as_meant(finetune: Any, text: str, name: str, value: Any) -> None:
    code, values = finetune(text)
    assert code == 0
    assert values[name] == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sede: 1", "unknown key 'sede'; did you mean 'seed'"),
        ("val-fractoin: 1", "unknown key 'val-fractoin'; did you mean 'val_fraction'"),
        ("xyzzy: 1", "unknown key 'xyzzy'; known keys: "),
        ("1: 2", "unknown key '1'"),
        ("json: true", "unknown key 'json'"),  # how a run is shown is no part of what it does
        ("seed: one", "key 'seed' has a value of the wrong type: 'one'; give a whole number"),
        ("seed: true", "key 'seed' has a value of the wrong type: True"),
        ("seed: 1.5", "key 'seed' has a value of the wrong type: 1.5"),
        ("seed: -1", "key 'seed': -1 is too small; give at least 0"),
        ("val_fraction: much", "key 'val_fraction' has a value of the wrong type: 'much'; give a number"),
        ("val_fraction: 1.5", "key 'val_fraction': 1.5 is too large; give at most 0.9"),
        ("val_fraction: .nan", "key 'val_fraction': nan is too small"),
        ("device: cdua", "key 'device': unknown value 'cdua'; did you mean 'cuda'"),
        ("device: [cpu]", "key 'device' has a value of the wrong type: ['cpu']; give text"),
        ("data: 5", "key 'data' has a value of the wrong type: 5; give a path"),
        ("model: 18", "key 'model' has a value of the wrong type: 18; give text"),
        ("mean: 0.5", "key 'mean' has a value of the wrong type: 0.5; give a list of 3, each a number"),
        ("mean: [0.5, 0.5]", "key 'mean' has a value of the wrong type"),
        ("mean: [a, b, c]", "key 'mean' has a value of the wrong type"),
        ("mean: [0.5, 0.5, 2]", "key 'mean': 2 is too large"),
        ("command: predict", "this recipe is for 'predict', not 'finetune'; run 'tlkit predict'"),
        ("- seed", "a recipe is a mapping of options to values"),
        ("seed: [1", "not a YAML file"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(
    finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    code, values = finetune(text)
    stderr = capsys.readouterr().err
    assert (code, values) == (1, {})
    assert told in stderr
    assert stderr.startswith(f"tlkit: error: {tmp_path / 'mine.yaml'}: ")
    assert stderr.count("\n") == 1


def test_a_list_is_asked_for_where_an_option_takes_several(
    tmp_path: Path, started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("paths: photo.jpg")
    assert run(["predict", "run", "--recipe", str(recipe)]) == 1
    assert "key 'paths' has a value of the wrong type: 'photo.jpg'; give a list, each a path" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.yaml", ".", "bytes.yaml"])
def test_a_recipe_that_cannot_be_read_is_named(
    tmp_path: Path, started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert run(["finetune", "photos", "--recipe", str(tmp_path / name)]) == 1
    stderr = capsys.readouterr().err
    assert str(tmp_path / name) in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr: 0.01", "0.01"),
        ("lr: 1e-3", "1e-3"),
        ("lr: 0.00001", "1e-05"),
        ("lr: 1", "1"),
        ("lr: auto", "auto"),
        ("lr:", None),
    ],
)
def test_a_rate_is_a_number_or_auto(finetune: Any, text: str, value: str | None) -> None:
    code, values = finetune(text)
    assert code == 0
    assert values["lr"] == value


def test_a_rate_on_the_command_line_wins(finetune: Any) -> None:
    code, values = finetune("lr: 0.01\nstrategy: full\n", "--lr", "0.5")
    assert code == 0 and (values["lr"], values["strategy"]) == ("0.5", "full")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: fast", "key 'lr': 'fast' is not understood"),
        ("lr: -0.1", "key 'lr': '-0.1' is not understood"),
        ("lr: .nan", "key 'lr': 'nan' is not understood"),
        ("lr: true", "key 'lr' has a value of the wrong type: True"),
        ("lr: [0.1]", "key 'lr' has a value of the wrong type: [0.1]"),
        ("time_limit: 90", "key 'time_limit': '90' is not understood; give a number with its unit, such as 90s"),
        ("form: run", "unknown key 'form'"),
        ("checkpoint_every: 5min", "unknown key 'checkpoint_every'"),
    ],
)
def test_a_bad_rate_or_run_is_refused(finetune: Any, capsys: pytest.CaptureFixture[str], text: str, told: str) -> None:
    code, values = finetune(text)
    err = capsys.readouterr().err
    assert code == 1 and values == {}
    assert told in " ".join(err.split())


WITH_FROM = [
    name for name, groups in COMMANDS.items() if any("from_" in vars(group)["__annotations__"] for group in groups)
]


def test_some_command_starts_from_a_run() -> None:
    assert WITH_FROM


@pytest.mark.parametrize("command", WITH_FROM)
def test_the_run_to_start_from(command: str, tmp_path: Path, started: list[dict[str, Any]]) -> None:
    """``from`` in a recipe, ``--from`` on the command line, which wins."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("from: runs/earlier\n")
    assert run([command, "photos", "--recipe", str(recipe)]) == 0
    assert run([command, "photos", "--recipe", str(recipe), "--from", "runs/other"]) == 0
    assert run([command, "photos"]) == 0
    found = [next(group.from_ for group in groups.values() if hasattr(group, "from_")) for groups in started]
    assert found == [Path("runs/earlier"), Path("runs/other"), None]


@pytest.mark.parametrize("command", WITH_FROM)
@pytest.mark.parametrize(
    ("text", "told"),
    [("from: 3", "key 'from' has a value of the wrong type: 3; give a path"), ("form: x", "did you mean 'from'")],
)
def test_a_bad_run_to_start_from(
    command: str,
    text: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    started: list[dict[str, Any]],
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert run([command, "photos", "--recipe", str(recipe)]) == 1
    assert told in " ".join(capsys.readouterr().err.split())
    assert started == []
