"""The config dataclasses: every field documented, defaults valid, values out of bounds refused by the option's name."""

from __future__ import annotations

import math
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest

from tlkit import config
from tlkit.config import Checked, Opt, check_value, effective_recipe, literal_choices, option_name
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
