"""Every option's name, type, default, bounds and help, stated once; no torch in here.

A field is at once a command-line option (``val_fraction`` is ``--val-fraction``), a recipe key and a Python argument.
A command takes one or more of these groups; ``cli/options.py`` turns them into options.
"""

from __future__ import annotations

import re
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
        pattern: Regular expression that a text must match as a whole.
        example: What matches it, in words.
        positional: An argument without a leading ``--name``.
        stored: Part of the effective recipe that a run writes.
    """

    help: str
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    pattern: str | None = None
    example: str = ""
    positional: bool = False
    stored: bool = True


_HINTS: dict[Any, dict[str, Any]] = {}


def hints_of(group: Any) -> dict[str, Any]:
    """The annotated types of an option group's fields, by name: read once, for most commands have most groups."""
    if group not in _HINTS:
        _HINTS[group] = get_type_hints(group, include_extras=True)
    return _HINTS[group]


class Checked:
    """Refuses values outside a field's choices and bounds, whoever makes the object."""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
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
    if opt.pattern is not None and value is not None and not re.fullmatch(opt.pattern, value):
        raise TlkitError(f"'{value}' is not understood", where=flag, remedy=f"give {opt.example}")
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
    """``"val_fraction"`` to ``"--val-fraction"``, ``"from_"`` (a word of Python's) to ``"--from"``."""
    return "--" + key(name).replace("_", "-")


def key(name: str) -> str:
    """A field's name as recipes have it: ``"from_"`` is ``"from"``."""
    return name.rstrip("_")


_NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = rf"({_NUMBER}) ?({'|'.join(_SECONDS)})"


_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = rf"({_NUMBER}) ?({'|'.join(_SIZES)})"


def size(text: str) -> int:
    """``"500MB"`` or ``"10GB"`` in bytes."""
    match = re.fullmatch(_SIZE, text)
    assert match, text  # options are checked before
    return int(float(match[1]) * _SIZES[match[2]])


def spelled(path: Path) -> str:
    """A path as it was typed: a URL, of whose slashes `Path` keeps one, has all of them."""
    url = re.match(r"([a-z][a-z0-9+.-]+):/+", path.as_posix())
    if url is None:
        return str(path)
    return f"{url[1]}://{'/' if url[1] == 'file' else ''}{path.as_posix()[url.end() :]}"


def seconds(duration: str) -> float:
    """``"90s"``, ``"10min"``, ``"1.5h"`` or ``"30d"`` in seconds."""
    match = re.fullmatch(_DURATION, duration)
    assert match, duration  # options are checked before
    return float(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class Data(Checked):
    """Labelled images to learn from."""

    data: Annotated[
        Path | None,
        Opt(
            "Folder with train/ val/ test/, folder of class folders, CSV/Parquet manifest, or shards: a folder of them,"
            " or 'https://host/name-{000..099}.tar'.",
            positional=True,
        ),
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
    folds: Annotated[
        int | None,
        Opt(
            "Cross-validation: train on all but one part of the images and measure on that, in turn; then on all.",
            min=2,
        ),
    ] = None


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

    paths: Annotated[
        list[Path],
        Opt(
            "Image files, folders (searched through), quoted patterns ('photos/**/*.jpg'), shards, or - for a list of"
            " files and folders on stdin, one a line.",
            metavar="PATH",
            positional=True,
        ),
    ]
    top_k: Annotated[int, Opt("How many labels to list for each image.", min=1)] = 3
    unsure_below: Annotated[
        float | None,
        Opt("Label 'unsure' where the highest probability is below this; by default never.", min=0, max=1),
    ] = None
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "skip"


@dataclass(frozen=True)
class Features(Checked):
    """Images, and what is wanted of them."""

    data: Annotated[
        Path | None, Opt("Labelled images, as for finetune, or a folder of images without labels.", positional=True)
    ] = None
    stage: Annotated[
        str, Opt("pooled: what the classifier sees; or the map that a stage puts out.", metavar="pooled|STAGE")
    ] = "pooled"
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "fail"


Norm = Literal["batch", "layer", "instance", "group", "none"]


@dataclass(frozen=True)
class Unlabelled(Checked):
    """Images without labels."""

    paths: Annotated[list[Path], Opt("Image files or folders (searched through), or shards.", positional=True)]
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
    norm: Annotated[Norm | None, Opt("Normalisation that FILE or random weights have instead of the model's own.")] = (
        None
    )


@dataclass(frozen=True)
class Trained(Checked):
    """The network to use."""

    model: Annotated[str, Opt("Folder of a run, or a timm model name.", metavar="RUN|MODEL", positional=True)]
    weights: Annotated[str, Opt("Weights for a MODEL; default means its public ones.", metavar="default|FILE|RUN")] = (
        "default"
    )


@dataclass(frozen=True)
class TrainedOrExported(Checked):
    """The network to use."""

    model: Annotated[
        str,
        Opt("Folder of a run, ONNX file of tlkit export, or timm model name.", metavar="RUN|MODEL", positional=True),
    ]
    weights: Annotated[str, Opt("Weights for a MODEL; default means its public ones.", metavar="default|FILE|RUN")] = (
        "default"
    )


@dataclass(frozen=True)
class Exporting(Checked):
    """What to export, and what to check it on."""

    format: Annotated[
        Literal["onnx", "torch-export", "hub"] | None,
        Opt(
            "onnx: a file for onnxruntime; torch-export: a program for torch without tlkit and timm; hub: a folder with"
            " a model card for the Hugging Face hub. By default what the ending of --out says (.onnx, .pt2), else onnx."
        ),
    ] = None
    quantise: Annotated[
        Literal["none", "fp16", "int8"],
        Opt(
            "ONNX in fewer bits, its accuracy stated beside that of the network. fp16: half the size, not quicker on a"
            " CPU; int8: a third, quicker, and less accurate."
        ),
    ] = "none"
    calibrate_on: Annotated[
        Path | None,
        Opt("int8: images that show its ranges; by default training images of the run.", metavar="FOLDER"),
    ] = None
    check: Annotated[
        Path | None,
        Opt(
            "Images that the export is compared with the network on, labelled or not; by default the run's own test,"
            " else val images, and noise where they are not there.",
            metavar="DATA",
        ),
    ] = None
    check_images: Annotated[int, Opt("How many of them at most, drawn at random.", min=1)] = 200


@dataclass(frozen=True)
class Sharding(Checked):
    """Images to write into shards."""

    data: Annotated[Path | None, Opt("Images, with labels as for finetune or without.", positional=True)] = None
    folder: Annotated[Path | None, Opt("Folder to write.", metavar="OUT", positional=True, stored=False)] = None
    max_size: Annotated[
        str,
        Opt("Size of a shard at most: 100MB, 1GB ...", metavar="SIZE", pattern=_SIZE, example="a number with MB or GB"),
    ] = "256MB"
    max_images: Annotated[int, Opt("Images in a shard at most.", min=1)] = 10_000
    on_error: Annotated[Literal["fail", "skip"], Opt("Files that cannot be read: stop, or leave them out.")] = "fail"
    seed: Annotated[int, Opt("Of the order of the images, which are mixed.", min=0)] = 0


@dataclass(frozen=True)
class Views(Checked):
    """Test-time augmentation."""

    tta: Annotated[
        str,
        Opt(
            "Views of each image that are merged: center, flip, five-crop, ten-crop, multi-scale, or several joined by"
            " + (multi-scale+ten-crop).",
            metavar="VIEWS",
        ),
    ] = "center"


@dataclass(frozen=True)
class Merging(Checked):
    """How the probabilities of an image's views become one."""

    merge: Annotated[
        Literal["mean", "geometric", "max"], Opt("Mean, geometric mean, or maximum over views, made to add up to 1.")
    ] = "mean"


@dataclass(frozen=True)
class Calibration(Checked):
    """Temperature scaling."""

    calibrate: Annotated[
        bool,
        Opt("Fit a temperature on images that are then not reported on, and write the calibrated network as a run."),
    ] = False


@dataclass(frozen=True)
class Checking(Checked):
    """Images to look for mistakes in."""

    data: Annotated[
        Path, Opt("Labelled images, as for finetune, or a folder of images without labels.", positional=True)
    ]
    deep: Annotated[
        bool,
        Opt(
            "Look with a frozen network too: copies that are cropped, turned or mirrored, and labels that may be wrong."
        ),
    ] = False
    strict: Annotated[bool, Opt("Exit with 1 where anything is found.")] = False
    ignore: Annotated[
        str | None, Opt("Kinds that are not findings, with commas between: blurred,odd-aspect ...", metavar="KINDS")
    ] = None
    write_manifest: Annotated[
        Path | None,
        Opt(
            "Write a CSV or Parquet manifest of what is left without unreadable files, copies and leaks.",
            metavar="FILE",
            stored=False,
        ),
    ] = None


@dataclass(frozen=True)
class Compared(Checked):
    """Networks to compare, and the images to compare them on."""

    models: Annotated[list[str], Opt("Folders of runs, or timm model names.", metavar="RUN|MODEL", positional=True)]
    data: Annotated[
        Path | None, Opt("Labelled images, as for finetune; by default the data that the runs were trained on.")
    ] = None
    split: Annotated[
        Literal["auto", "train", "val", "test", "all"], Opt("Which images; auto takes test, else val, else all.")
    ] = "auto"
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "fail"
    format: Annotated[
        Literal["table", "json", "markdown", "html"] | None,
        Opt("How to print or write it; by default what the ending of --out says, else a table."),
    ] = None


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
class NewNetwork(Checked):
    """The network to train from random weights."""

    model: Annotated[str, Opt("Any timm model name.", metavar="NAME")] = "resnet18"
    stem: Annotated[
        Literal["auto", "standard", "small"],
        Opt("small: no down-sampling before the first stage; auto takes it for inputs up to 64 px where there is one."),
    ] = "auto"
    norm: Annotated[
        Norm | None,
        Opt("Normalisation in place of the model's batch norm; in AlexNet and plain VGG after each convolution."),
    ] = None


@dataclass(frozen=True)
class Counted(Checked):
    """Networks to count."""

    models: Annotated[
        list[str],
        Opt("timm model names, with wildcards ('resnet*') if you like, or folders of runs.", positional=True),
    ]
    image_size: Annotated[
        int | None, Opt("Side of the square input, in pixels; by default the model's own.", min=1, max=4096)
    ] = None
    num_classes: Annotated[int | None, Opt("Classes; by default the model's own.", min=1)] = None
    in_chans: Annotated[int | None, Opt("Channels of the images; by default the model's own.", min=1)] = None
    stem: Annotated[
        Literal["standard", "small"], Opt("small: no down-sampling before the first stage, for images of about 32 px.")
    ] = "standard"
    norm: Annotated[
        Norm | None,
        Opt("Normalisation in place of the model's batch norm; in AlexNet and plain VGG after each convolution."),
    ] = None
    strategy: Annotated[
        Literal["auto", "probe", "full", "differential", "lp-ft", "gradual"] | None,
        Opt("Show which stages and how many parameters each phase of this strategy trains."),
    ] = None


@dataclass(frozen=True)
class Listing(Checked):
    """What the report shows."""

    layers: Annotated[bool, Opt("List every layer.")] = False
    measure: Annotated[bool, Opt("Measure latency and images per second on this machine.")] = False
    published: Annotated[bool, Opt("Add published ImageNet accuracies, with weights, protocol and source.")] = False
    sort: Annotated[
        Literal["name", "params", "macs", "activations", "receptive-field", "latency"] | None,
        Opt("Order of the models, the largest last; by default as given."),
    ] = None
    format: Annotated[
        Literal["table", "json", "csv", "markdown"] | None,
        Opt("How to print or write it; by default what the ending of --out says, else a table."),
    ] = None


@dataclass(frozen=True)
class Recipes(Checked):
    """Recipes to show or copy."""

    names: Annotated[
        list[str] | None, Opt("Names as the list has them; by default all are listed.", positional=True)
    ] = None


@dataclass(frozen=True)
class Pipeline(Checked):
    """Steps to run."""

    pipeline: Annotated[
        Path, Opt("YAML file of steps, each a command with its options.", metavar="PIPELINE.yaml", positional=True)
    ]
    keep_going: Annotated[bool, Opt("Where a step fails, still run those that do not depend on it.")] = False


@dataclass(frozen=True)
class Listed(Checked):
    """Models to list."""

    patterns: Annotated[
        list[str] | None, Opt("Names or wildcards ('resnet*'); by default all models.", positional=True)
    ] = None
    source: Annotated[
        Literal["package", "hub", "none"] | None, Opt("Only models whose public weights come from there.")
    ] = None


@dataclass(frozen=True)
class Transfer(Checked):
    """How the network is transferred."""

    strategy: Annotated[
        Literal["auto", "probe", "full", "differential", "lp-ft", "gradual"],
        Opt(
            "probe: a linear head on the frozen backbone; full: everything at one rate; differential: pretrained stages"
            " at a tenth of the head's rate; lp-ft: probe, then full; gradual: stage by stage from the head; auto:"
            " probe, then stages from the top down as long as that pays."
        ),
    ] = "auto"
    train_views: Annotated[
        Literal["center", "flip"], Opt("Images that a linear head is fitted on: as they are, or also mirrored.")
    ] = "center"


@dataclass(frozen=True)
class Unfreezing(Checked):
    """Gradual unfreezing."""

    stages: Annotated[int | None, Opt("How many phases, that of the head included; by default all.", min=1)] = None
    epochs_per_stage: Annotated[int, Opt("Epochs of each phase after the head's.", min=1)] = 3
    order: Annotated[
        Literal["top-down", "bottom-up"], Opt("Which stages join the head first: the last ones, or the first ones.")
    ] = "top-down"


@dataclass(frozen=True)
class StartingRun(Checked):
    """The run to start from."""

    from_: Annotated[
        Path | None, Opt("Start from this run's network (pretrained or fine-tuned) instead of --model.", metavar="RUN")
    ] = None


@dataclass(frozen=True)
class Optimisation(Checked):
    """How the network learns."""

    epochs: Annotated[int | None, Opt("Passes over the training images; auto depends on the strategy.", min=1)] = None
    optimizer: Annotated[str, Opt("sgd (with momentum), adamw, or any of timm's by name.", metavar="NAME")] = "adamw"
    lr: Annotated[
        str | None,
        Opt(
            "Highest learning rate (of the head); auto searches for one. By default what suits optimizer and strategy.",
            metavar="NUMBER|auto",
            pattern=f"auto|{_NUMBER}",
            example="a number such as 0.001, or auto",
        ),
    ] = None
    layer_decay: Annotated[
        float, Opt("Each pretrained stage learns at this part of the rate of the one above it.", min=0.01, max=1)
    ] = 1.0
    schedule: Annotated[
        Literal["constant", "step", "cosine", "one-cycle", "plateau"], Opt("How the rates change over a phase.")
    ] = "cosine"
    warmup: Annotated[float, Opt("Share of a phase's steps over which the rates rise linearly.", min=0, max=1)] = 0.1
    min_lr: Annotated[float, Opt("cosine: the last rate as a share of the highest.", min=0, max=1)] = 0.0
    step_every: Annotated[
        float, Opt("step: epochs between two decays; plateau: epochs without a lower loss before one.", min=0.01)
    ] = 10.0
    gamma: Annotated[float, Opt("step, plateau: what a decay multiplies the rates by.", min=1e-6, max=1)] = 0.1
    momentum: Annotated[float, Opt("Momentum of sgd and of timm's optimisers that have one.", min=0, max=0.9999)] = 0.9
    weight_decay: Annotated[float, Opt("Weight decay; never of norms and biases.", min=0)] = 0.01
    bn: Annotated[
        Literal["train", "stats-frozen", "frozen"] | None,
        Opt(
            "Batch norm of stages that train: as usual, with its running statistics fixed, or all of it fixed. By"
            " default stats-frozen for pretrained weights (small batches would spoil them), train for random ones and"
            " in adapt."
        ),
    ] = None
    clip: Annotated[float | None, Opt("Longest gradient; longer ones are scaled down.", min=1e-9)] = None


@dataclass(frozen=True)
class Training(Optimisation):
    """How the network learns."""

    time_limit: Annotated[
        str | None,
        Opt(
            "Training ends at the first step after this time: 90s, 10min, 2h ...",
            metavar="TEXT",
            pattern=_DURATION,
            example="a number with its unit, such as 90s, 10min or 2h",
        ),
    ] = None
    patience: Annotated[
        int | None,
        Opt(
            "Epochs without a lower loss on the choosing part after which a phase ends, its best epoch kept; 0: never,"
            " all training images are trained on. By default 3 for gradual unfreezing, else 0.",
            min=0,
        ),
    ] = None
    anchor: Annotated[float, Opt("L2-SP: pulls pretrained weights back to where they started.", min=0)] = 0.0
    accumulate: Annotated[int, Opt("Parts that each batch is computed in, to save memory.", min=1)] = 1
    ema: Annotated[
        float, Opt("Decay of an average of the weights over steps, which is then used; 0 for none.", min=0, max=0.99999)
    ] = 0.0


@dataclass(frozen=True)
class Variation(Checked):
    """How training images are varied and weighed."""

    augment: Annotated[
        Literal["none", "light", "standard", "strong"] | None,
        Opt(
            "light: random crop, flip; standard: random resized crop, flip, colour; strong: TrivialAugment and erasing"
            " as well. By default light, for pretrain standard."
        ),
    ] = None
    label_smoothing: Annotated[float, Opt("Share of each label that is spread over all classes.", min=0, max=0.99)] = (
        0.0
    )
    class_weights: Annotated[
        Literal["none", "balanced"], Opt("balanced: each class counts the same, however few its images.")
    ] = "none"
    balanced_sampling: Annotated[bool, Opt("Draw images so that each class is seen equally often.")] = False


@dataclass(frozen=True)
class Augmentation(Variation):
    """How training images are varied and weighed."""

    mixup: Annotated[float, Opt("Alpha of mixup; 0 for none.", min=0)] = 0.0
    cutmix: Annotated[float, Opt("Alpha of cutmix; 0 for none.", min=0)] = 0.0


METHODS = tuple(
    sorted(
        (path.stem.replace("_", "-") for path in (Path(__file__).parent / "adaptation" / "methods").glob("[a-z]*.py")),
        key=lambda name: (name != "source-only", name),
    )
)
"""Adaptation methods: each file of that folder is one."""


@dataclass(frozen=True)
class Domains(Checked):
    """Source and target."""

    source: Annotated[Path | None, Opt("Labelled images to learn from, as for finetune.", metavar="DATA")] = None
    target: Annotated[
        Path | None,
        Opt(
            "Images to adapt to: any folder of images. Labels, if it has class folders, serve to report alone.",
            metavar="DATA",
        ),
    ] = None
    val_fraction: Annotated[
        float, Opt("Share of each class of the source set apart as val where it has no splits.", min=0.01, max=0.9)
    ] = 0.2
    group_regex: Annotated[
        str | None,
        Opt("Source images whose path gives the same match (first group) never stand on both sides of the split."),
    ] = None
    on_error: Annotated[Literal["fail", "skip"], Opt("Unreadable images: stop and name each, or leave out.")] = "fail"


@dataclass(frozen=True)
class Adaptation(Checked):
    """How the network is adapted."""

    method: Annotated[
        str, Opt(f"One of {', '.join(METHODS)}; several with commas between; or all.", metavar="NAME,...|all")
    ] = "mcc"
    seeds: Annotated[int, Opt("Train with so many seeds, from --seed on, and report mean and spread.", min=1)] = 1
    select: Annotated[
        Literal["infomax", "entropy", "snd", "source-val", "last"],
        Opt(
            "What chooses the epoch, never with the target's labels: certain and varied predictions on the target;"
            " certain ones; soft neighbourhood density; the loss on the source's val; none, the last."
        ),
    ] = "infomax"
    strategy: Annotated[
        Literal["auto", "probe", "full", "differential"],
        Opt(
            "probe: a bottleneck and a head on the frozen backbone's features, which are computed once; full:"
            " everything at one rate; differential: pretrained stages at a tenth of the head's; auto: full from random"
            " weights, else probe."
        ),
    ] = "auto"
    stages: Annotated[
        int | None,
        Opt("How many stages train, counted from the head down; the others are frozen. By default all.", min=1),
    ] = None
    bottleneck: Annotated[
        int | None,
        Opt(
            "Width of a layer put in front of the head; 0: none. By default 256, but 0 where everything is trained from"
            " random weights.",
            min=0,
        ),
    ] = None
    weight: Annotated[
        float | None, Opt("What the method's loss is multiplied by; by default what suits the method.", min=0)
    ] = None
    projection: Annotated[
        Literal["pca", "tsne"], Opt("How the report's picture of both domains is drawn; tsne takes longer.")
    ] = "pca"


@dataclass(frozen=True)
class Compute(Checked):
    """Where and how to compute."""

    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Opt("Where to compute.")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Opt("Arithmetic of the network; auto is bf16 where the chip has it.")
    ] = "auto"
    batch_size: Annotated[int | None, Opt("Images in one step, over all processes.", min=1)] = None
    workers: Annotated[
        int | None, Opt("Processes that decode images, 0 for none; by default what suits the machine.", min=0)
    ] = None
    seed: Annotated[int, Opt("Seed of everything random.", min=0)] = 0


@dataclass(frozen=True)
class Passing(Checked):
    """How images are passed through a network that does not learn."""

    compile: Annotated[
        Literal["auto", "always", "never"],
        Opt("Compile the frozen network (15 to 40 s); auto: where the number of images pays for it."),
    ] = "auto"


@dataclass(frozen=True)
class CacheBudget(Checked):
    """What is kept of frozen stages, so that they run once and not in every run."""

    cache_budget: Annotated[
        str,
        Opt(
            "Disk that all runs together may use for it: 500MB, 10GB ...",
            metavar="TEXT",
            pattern=_SIZE,
            example="a number with its unit, such as 500MB or 10GB",
        ),
    ] = "10GB"


@dataclass(frozen=True)
class Caching(CacheBudget):
    """What is kept of frozen stages, so that they run once and not in every epoch."""

    cached_views: Annotated[
        int,
        Opt(
            "Varied views of each training image that the outputs of frozen stages are kept for; epochs take turns with"
            " them. More are more varied and take longer to make. 0: frozen stages run in every epoch.",
            min=0,
        ),
    ] = 4


@dataclass(frozen=True)
class Tracking(Checked):
    """Following the training in another program."""

    track: Annotated[
        str | None,
        Opt(
            "Draw curves in tensorboard, wandb, mlflow or another of Accelerate's trackers, several with commas"
            " between; by default in none. Files go to RUN/tracking; with --folds, each fold's to"
            " RUN/folds/1/tracking and so on.",
            metavar="NAME,...",
        ),
    ] = None


@dataclass(frozen=True)
class Output(Checked):
    """What is printed and written."""

    out: Annotated[Path | None, Opt("Folder or file to write; never overwritten.", stored=False)] = None
    json: Annotated[bool, Opt("Print one JSON object on stdout, everything else on stderr.", stored=False)] = False
    plan: Annotated[bool, Opt("Print what would be done, and stop.", stored=False)] = False
    quiet: Annotated[bool, Opt("No progress on stderr.", stored=False)] = False


@dataclass(frozen=True)
class Resume(Checked):
    """Going on with a run that was stopped."""

    resume: Annotated[
        Path | None, Opt("Go on with this interrupted run, by its own recipe.", metavar="RUN", stored=False)
    ] = None
    checkpoint_every: Annotated[
        str,
        Opt(
            "How often the state that --resume goes on from is saved: 200steps, 90s, 5min ...",
            metavar="TEXT",
            pattern=rf"[1-9][0-9]* ?steps?|{_DURATION}",
            example="a number with its unit, such as 200steps, 90s or 5min",
            stored=False,
        ),
    ] = "5min"
    keep_state: Annotated[bool, Opt("Keep that state when the run is finished.", stored=False)] = False


@dataclass(frozen=True)
class ResumeFile(Checked):
    """Going on with a file that was begun."""

    resume: Annotated[
        Path | None,
        Opt("Go on with this file where it was stopped, with its own options.", metavar="FILE", stored=False),
    ] = None


@dataclass(frozen=True)
class CacheAction(Checked):
    """What becomes of the cache."""

    clear: Annotated[bool, Opt("Remove what no process is using.")] = False
    older_than: Annotated[
        str | None,
        Opt(
            "With --clear: only what was not used for so long.",
            metavar="TEXT",
            pattern=_DURATION,
            example="a number with its unit, such as 30d, 12h or 90s",
        ),
    ] = None


def effective_recipe(command: str, groups: Iterable[Checked]) -> dict[str, Any]:
    """The option values that repeat a run, as plain YAML values keyed by option name."""
    recipe: dict[str, Any] = {"command": command}
    for group in groups:
        hints = hints_of(type(group))
        for field in fields(group):  # type: ignore[arg-type]
            value = getattr(group, field.name)
            if get_args(hints[field.name])[1].stored and value is not None:
                recipe[key(field.name)] = plain(value)
    return recipe


def plain(value: Any) -> Any:
    """An option's value as a recipe has it."""
    if isinstance(value, Path):
        typed = spelled(value)
        return typed if "://" in typed else str(value.resolve())  # a recipe means the same from any working folder
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def group_from_recipe(group: type[Any], recipe: dict[str, Any]) -> Any:
    """The option group as a run's effective recipe has it; what the recipe lacks takes its default."""
    values = {}
    for name, hint in hints_of(group).items():
        if key(name) in recipe:
            kind, value = get_args(hint)[0], recipe[key(name)]
            is_path = Path in (kind, *get_args(kind))
            values[name] = Path(value) if is_path else tuple(value) if isinstance(value, list) else value
    return group(**values)
