"""Every option's name, type, default, bounds and help, stated once; no torch in here.

A field is at once a command-line option (``val_fraction`` is ``--val-fraction``), a recipe key and a Python argument.
A command takes one or more of these groups; ``cli/options.py`` turns them into options.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tlkit.errors import TlkitError, did_you_mean


@dataclass(frozen=True)
class Opt:
    """How a field shows on the command line.

    Args:
        help: One sentence; the default is added by the help page.
        min: Smallest value allowed.
        max: Largest value allowed.
        metavar: What stands for the value in the help page.
        positional: An argument without a leading ``--name``.
        stored: Part of the effective recipe that a run writes.
    """

    help: str
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    positional: bool = False
    stored: bool = True


class Checked:
    """Refuses values outside a field's choices and bounds, whoever makes the object."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):  # type: ignore[arg-type]
            check_value(field.name, hints[field.name], getattr(self, field.name))


def check_value(name: str, hint: Any, value: Any) -> None:
    """Raise `TlkitError` where ``value`` is not among the choices of ``hint`` or lies outside its bounds."""
    kind, opt = get_args(hint)[0], get_args(hint)[1]
    flag = name.upper() if opt.positional else option_name(name)
    choices = literal_choices(kind)
    if choices and value is not None and value not in choices:
        remedy = did_you_mean(str(value), choices) or f"choose one of {', '.join(choices)}"
        raise TlkitError(f"unknown value '{value}'", where=flag, remedy=remedy)
    for number in value if isinstance(value, tuple | list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            if opt.min is not None and not number >= opt.min:
                raise TlkitError(f"{number} is too small", where=flag, remedy=f"give at least {opt.min}")
            if opt.max is not None and not number <= opt.max:
                raise TlkitError(f"{number} is too large", where=flag, remedy=f"give at most {opt.max}")


def literal_choices(kind: Any) -> tuple[str, ...]:
    """The choices of ``Literal[...]`` or ``Literal[...] | None``; empty for any other type."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return get_args(kind) if get_origin(kind) is Literal else ()


def option_name(name: str) -> str:
    """``"val_fraction"`` to ``"--val-fraction"``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Data(Checked):
    """Labelled images to learn from."""

    data: Annotated[
        Path | None,
        Opt("Folder with train/ val/ test/, folder of class folders, or CSV/Parquet manifest.", positional=True),
    ] = None
    val_fraction: Annotated[
        float, Opt("Share of each class set apart as val where DATA has no splits.", min=0, max=0.9)
    ] = 0.2
    test_fraction: Annotated[
        float, Opt("Share of each class set apart as test where DATA has no splits.", min=0, max=0.9)
    ] = 0.0
    group_regex: Annotated[
        str | None, Opt("Images whose path gives the same match (first group) never stand on both sides of a split.")
    ] = None
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "fail"
    select_on: Annotated[
        Literal["train", "val"], Opt("Choose by cross-validation inside train, or on val (then said so).")
    ] = "train"


@dataclass(frozen=True)
class EvalData(Checked):
    """Labelled images to measure on."""

    data: Annotated[
        Path | None,
        Opt(
            "Labelled images, as for finetune; with a RUN, default is the data that it was trained on.", positional=True
        ),
    ] = None
    split: Annotated[
        Literal["auto", "train", "val", "test", "all"], Opt("Which images; auto takes test, else val, else all.")
    ] = "auto"
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "fail"


@dataclass(frozen=True)
class NewImages(Checked):
    """Images to label."""

    paths: Annotated[list[Path], Opt("Image files or folders (searched through).", positional=True)]
    top_k: Annotated[int, Opt("How many labels to list for each image.", min=1)] = 3
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "skip"


@dataclass(frozen=True)
class Network(Checked):
    """The network to start from."""

    model: Annotated[str, Opt("Any timm model name, or the folder of an earlier run.", metavar="NAME|RUN")] = (
        "tf_efficientnet_lite0"
    )
    weights: Annotated[
        str, Opt("Weights to start from; default means the model's public ones.", metavar="default|random|FILE|RUN")
    ] = "default"


@dataclass(frozen=True)
class Trained(Checked):
    """The network to use."""

    model: Annotated[str, Opt("Folder of a run, or a timm model name.", metavar="RUN|MODEL", positional=True)]
    weights: Annotated[str, Opt("Weights for a MODEL; default means its public ones.", metavar="default|FILE|RUN")] = (
        "default"
    )


@dataclass(frozen=True)
class Views(Checked):
    """Test-time augmentation."""

    tta: Annotated[Literal["center"], Opt("Views of each image whose probabilities are averaged.")] = "center"


@dataclass(frozen=True)
class Preprocess(Checked):
    """Preprocessing, where the one stored with the weights is not wanted."""

    image_size: Annotated[int | None, Opt("Side of the square network input, in pixels.", min=8, max=4096)] = None
    crop: Annotated[
        float | None, Opt("Input size divided by the side that the image is resized to.", min=0.1, max=1)
    ] = None
    crop_mode: Annotated[
        Literal["center", "squash", "border"] | None,
        Opt("Cut the centre out, squash to a square, or pad to a square."),
    ] = None
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None, Opt("How images are resized.")
    ] = None
    mean: Annotated[
        tuple[float, float, float] | None, Opt("Mean of the red, green and blue channel, in [0, 1].", min=0, max=1)
    ] = None
    std: Annotated[
        tuple[float, float, float] | None,
        Opt("Standard deviation of the red, green and blue channel, in [0, 1].", min=1e-6, max=1),
    ] = None


@dataclass(frozen=True)
class Transfer(Checked):
    """How the network is transferred."""

    strategy: Annotated[
        Literal["probe"], Opt("probe: the backbone stays frozen, a linear head is fitted on its features.")
    ] = "probe"
    class_weights: Annotated[
        Literal["none", "balanced"], Opt("balanced: each class counts the same, however few its images.")
    ] = "none"
    train_views: Annotated[
        Literal["center", "flip"], Opt("Training images as they are, or also mirrored: twice the time, little gain.")
    ] = "center"


@dataclass(frozen=True)
class Compute(Checked):
    """Where and how to compute."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Opt("Where to compute.")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Opt("Arithmetic of the network; auto is bf16 where the chip has it.")
    ] = "auto"
    batch_size: Annotated[int | None, Opt("Images in one forward pass; by default what suits the device.", min=1)] = (
        None
    )
    workers: Annotated[
        int | None, Opt("Processes that decode images, 0 for none; by default what suits the machine.", min=0)
    ] = None
    seed: Annotated[int, Opt("Seed of everything random.", min=0)] = 0


@dataclass(frozen=True)
class Output(Checked):
    """What is printed and written."""

    out: Annotated[Path | None, Opt("Folder or file to write; never overwritten.", stored=False)] = None
    json: Annotated[bool, Opt("Print one JSON object on stdout, everything else on stderr.", stored=False)] = False
    plan: Annotated[bool, Opt("Print what would be done, and stop.", stored=False)] = False
    quiet: Annotated[bool, Opt("No progress on stderr.", stored=False)] = False


@dataclass(frozen=True)
class Resume(Checked):
    """Going on with a run."""

    resume: Annotated[
        Path | None, Opt("Go on with this interrupted run, by its own recipe.", metavar="RUN", stored=False)
    ] = None


def effective_recipe(command: str, groups: Iterable[Checked]) -> dict[str, Any]:
    """The option values that repeat a run, as plain YAML values keyed by option name."""
    recipe: dict[str, Any] = {"command": command}
    for group in groups:
        hints = get_type_hints(type(group), include_extras=True)
        for field in fields(group):  # type: ignore[arg-type]
            value = getattr(group, field.name)
            if get_args(hints[field.name])[1].stored and value is not None:
                recipe[field.name] = _plain(value)
    return recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())  # a recipe means the same from any working folder
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def group_from_recipe(group: type[Any], recipe: dict[str, Any]) -> Any:
    """The option group as a run's effective recipe has it; what the recipe lacks takes its default."""
    values = {}
    for name, hint in get_type_hints(group, include_extras=True).items():
        if name in recipe:
            kind, value = get_args(hint)[0], recipe[name]
            is_path = Path in (kind, *get_args(kind))
            values[name] = Path(value) if is_path else tuple(value) if isinstance(value, list) else value
    return group(**values)
