"""The config dataclasses: every field documented, defaults valid, values out of bounds refused by the option's name."""

from __future__ import annotations

import math
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest

from tlkit import config
from tlkit.config import (
    Checked,
    Opt,
    check_value,
    effective_recipe,
    group_from_recipe,
    key,
    literal_choices,
    option_name,
    seconds,
)
from tlkit.errors import TlkitError

GROUPS = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Checked)]
GROUPS.remove(Checked)
FIELDS = [(group, field) for group in GROUPS for field in fields(group)]


def hint_of(group: Any, name: str) -> Any:
    return get_type_hints(group, include_extras=True)[name]


def field_id(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else value.name


@pytest.mark.parametrize(("group", "field"), FIELDS, ids=field_id)
def test_every_field_has_help_and_a_valid_default(group: Any, field: Any) -> None:
    hint = hint_of(group, field.name)
    opt = get_args(hint)[1]
    assert isinstance(opt, Opt)
    assert opt.help.strip().endswith("."), "one sentence"
    assert group.__doc__.strip(), "the title of its panel in the help page"
    if field.default is not MISSING:
        check_value(field.name, hint, field.default)


@pytest.mark.parametrize(("group", "field"), FIELDS, ids=field_id)
def test_values_outside_choices_and_bounds_are_refused_by_name(group: Any, field: Any) -> None:
    hint = hint_of(group, field.name)
    kind, opt = get_args(hint)[:2]
    wrong: list[Any] = ["no-such-choice"] if literal_choices(kind) else []
    wrong += [] if opt.min is None else [opt.min - 1, math.nan]
    wrong += [] if opt.max is None else [opt.max + 1]
    for value in wrong:
        with pytest.raises(TlkitError) as caught:
            check_value(field.name, hint, value)
        assert caught.value.where == (field.name.upper() if opt.positional else option_name(field.name))
        assert caught.value.remedy


def test_whoever_makes_a_group_is_checked() -> None:
    with pytest.raises(TlkitError, match=r"--val-fraction: 2 is too large; give at most 0\.9"):
        config.Data(val_fraction=2)
    with pytest.raises(TlkitError, match="--device: unknown value 'cdua'; did you mean 'cuda'"):
        config.Compute(device="cdua")  # type: ignore[arg-type]
    with pytest.raises(TlkitError, match=r"--mean: 1\.5 is too large"):
        config.Preprocess(mean=(0.5, 0.5, 1.5))


def test_groups_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        config.Compute().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "choices"),
    [(Literal["a", "b"], ("a", "b")), (Literal["a"] | None, ("a",)), (str, ()), (int | None, ()), (list[str], ())],
)
def test_literal_choices(kind: Any, choices: tuple[str, ...]) -> None:
    assert literal_choices(kind) == choices


@dataclass(frozen=True)
class Sample(Checked):
    """A group that has one of each kind."""

    folder: Annotated[Path | None, Opt("A folder.")] = None
    several: Annotated[tuple[float, float], Opt("Two numbers.")] = (0.5, 1.0)
    many: Annotated[list[Path] | None, Opt("Files.")] = None
    out: Annotated[Path | None, Opt("Not part of a recipe.", stored=False)] = None


def test_the_effective_recipe_is_plain_and_means_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = Sample(folder=Path("photos"), many=[Path("a.jpg"), Path("/b.jpg")], out=Path("run"))
    assert effective_recipe("finetune", [sample]) == {
        "command": "finetune",
        "folder": str(tmp_path / "photos"),
        "several": [0.5, 1.0],
        "many": [str(tmp_path / "a.jpg"), "/b.jpg"],
    }
    assert effective_recipe("finetune", [Sample()]) == {"command": "finetune", "several": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("name", "recipe_key", "option"),
    [("val_fraction", "val_fraction", "--val-fraction"), ("from_", "from", "--from"), ("lr", "lr", "--lr")],
)
def test_names_of_fields(name: str, recipe_key: str, option: str) -> None:
    assert (key(name), option_name(name)) == (recipe_key, option)


def test_a_word_of_pythons_is_plain_in_recipes(tmp_path: Path) -> None:
    group = config.StartingRun(from_=tmp_path / "run")
    recipe = effective_recipe("finetune", [group])
    assert recipe == {"command": "finetune", "from": str(tmp_path / "run")}
    assert group_from_recipe(config.StartingRun, recipe) == group
    assert group_from_recipe(config.StartingRun, {}) == config.StartingRun()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("90 s", 90), ("10min", 600), ("1.5h", 5400), (".5h", 1800), ("0s", 0), ("1e2s", 100), ("2h", 7200)],
)
def test_durations(text: str, expected: float) -> None:
    assert seconds(text) == expected
    assert config.Training(time_limit=text).time_limit == text
    assert config.Resume(checkpoint_every=text).checkpoint_every == text


@pytest.mark.parametrize(
    ("text", "expected"), [("500MB", 500 * 10**6), ("10GB", 10**10), ("0.5 TB", 5 * 10**11), ("0MB", 0)]
)
def test_sizes(text: str, expected: int) -> None:
    assert config.size(text) == expected
    assert config.Caching(cache_budget=text).cache_budget == text


PATTERNS = {
    "time_limit": (
        config.Training,
        ["", "90", "s", "-5s", "5 minutes", "5m", "1.s", "1:30h", "90s ", "10steps", "infs"],
    ),
    "lr": (config.Training, ["", "Auto", "fast", "-0.1", "1e", "nan", "inf", "0,1", "auto1", "1e-3\n"]),
    "older_than": (config.CacheAction, ["", "90", "d", "-5d", "5 days", "30d "]),
    "max_size": (config.Sharding, ["", "10", "MB", "-1GB", "256mb", "1e MB"]),
    "cache_budget": (config.Caching, ["", "10", "GB", "-1GB", "10gb", "10G", "1e GB", "500 MB "]),
    "checkpoint_every": (config.Resume, ["", "200", "0steps", "-1steps", "1.5steps", "steps", "5m", "5 min 3s"]),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (_, texts) in PATTERNS.items() for text in texts])
def test_texts_of_another_form_are_refused(name: str, text: str) -> None:
    group: Any = PATTERNS[name][0]
    with pytest.raises(TlkitError) as caught:
        group(**{name: text})
    assert caught.value.where == option_name(name)
    assert caught.value.what == f"'{text}' is not understood"
    example = get_args(hint_of(group, name))[1].example
    assert example and caught.value.remedy == f"give {example}"


@pytest.mark.parametrize("text", ["auto", "1", "0.01", ".5", "1e-3", "3E-4", "1e+1", "1e-05"])
def test_rates(text: str) -> None:
    assert config.Training(lr=text).lr == text
    assert text == "auto" or float(text) > 0


@pytest.mark.parametrize("text", ["1step", "200steps", "200 steps", "10step"])
def test_numbers_of_steps(text: str) -> None:
    assert config.Resume(checkpoint_every=text).checkpoint_every == text


def test_every_pattern_is_tested() -> None:
    with_pattern = {field.name for group, field in FIELDS if get_args(hint_of(group, field.name))[1].pattern}
    assert with_pattern == set(PATTERNS)
