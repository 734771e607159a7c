"""Every subcommand's signature, one lazy import each: ``tlkit --help`` must not wait for torch."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer import TyperException

from tlkit import __version__, config, processes
from tlkit.cli.options import groups_of, options_from_configs
from tlkit.errors import TlkitError

app = typer.Typer(
    name="tlkit",
    help="Transfer learning on image folders: from photos to a tested classifier, by shell commands.",
    add_completion=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"tlkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Transfer learning on image folders: from photos to a tested classifier, by shell commands."""


@app.command()
@options_from_configs
def finetune(
    data: config.Data,
    network: config.Network,
    transfer: config.Transfer,
    training: config.Training,
    unfreezing: config.Unfreezing,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.Caching,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
) -> None:
    """Transfer a pretrained network to a labelled folder.

    Writes a run folder: the trained network with its preprocessing and class names, predictions, metrics and a report.
    """
    _start("finetune", locals())


@app.command()
@options_from_configs
def unfreeze(
    data: config.Data,
    start: config.StartingRun,
    network: config.Network,
    unfreezing: config.Unfreezing,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.Caching,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
) -> None:
    """Transfer a network stage by stage: the new head, then the last stage with it, then the one before, and so on.

    The same as finetune --strategy gradual, and may start from an earlier run (--from).
    """
    _start("unfreeze", locals())


@app.command()
@options_from_configs
def pretrain(
    data: config.Data,
    network: config.NewNetwork,
    training: config.Training,
    augmentation: config.Augmentation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
) -> None:
    """Train a network from random weights. Other commands start from its run: --model RUN, or --from RUN."""
    _start("pretrain", locals())


@app.command()
@options_from_configs
def adapt(
    domains: config.Domains,
    adaptation: config.Adaptation,
    network: config.Network,
    optimisation: config.Optimisation,
    variation: config.Variation,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    caching: config.CacheBudget,
    tracking: config.Tracking,
    output: config.Output,
    resume: config.Resume,
) -> None:
    """Adapt a network from labelled images of one domain (--source) to unlabelled ones of another (--target).

    The target's labels, where it has class folders, serve to report alone: no epoch is chosen by them.
    """
    _start("adapt", locals())


@app.command()
@options_from_configs
def evaluate(
    network: config.TrainedOrExported,
    data: config.EvalData,
    views: config.Views,
    merging: config.Merging,
    calibration: config.Calibration,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
) -> None:
    """Measure a run or a pretrained model on labelled images.

    A pretrained ImageNet model can be measured where the class folders are WordNet ids or ImageNet class names.
    """
    _start("evaluate", locals())


@app.command()
@options_from_configs
def check_data(
    checking: config.Checking,
    network: config.Network,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
) -> None:
    """Find what is wrong in a folder of images: broken files, copies, leaks between splits, odd images, suspect labels.

    With --out FILE.html also as a page of thumbnails. Nothing is ever changed or removed.
    """
    _start("check-data", locals())


@app.command()
@options_from_configs
def compare(
    compared: config.Compared,
    views: config.Views,
    merging: config.Merging,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
) -> None:
    """Measure runs and pretrained models on the same images, side by side, with a paired test against the best."""
    _start("compare", locals())


@app.command()
@options_from_configs
def predict(
    network: config.TrainedOrExported,
    images: config.NewImages,
    views: config.Views,
    merging: config.Merging,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
) -> None:
    """Label new images with a run or a pretrained model."""
    _start("predict", locals())


@app.command()
@options_from_configs
def export(
    network: config.Trained,
    exporting: config.Exporting,
    preprocess: config.Preprocess,
    output: config.Output,
) -> None:
    """Write a run or a pretrained model for other programs: ONNX, torch.export, or a folder for the Hugging Face hub.

    What was written is read back and compared with the network; predict and evaluate take the ONNX file as they take a
    run.
    """
    _start("export", locals())


@app.command()
@options_from_configs
def extract_features(
    features: config.Features,
    network: config.Network,
    views: config.Views,
    preprocess: config.Preprocess,
    compute: config.Compute,
    passing: config.Passing,
    output: config.Output,
    resume: config.ResumeFile,
) -> None:
    """Write what a frozen network makes of images to a Parquet, npz or safetensors file (--out FILE).

    Each image with its path, label and split. The same command, or --resume FILE, goes on with what was stopped.

    Several processes make a folder of a Parquet file, one part each.
    """
    _start("extract-features", locals())


@app.command()
@options_from_configs
def shard(
    sharding: config.Sharding,
    output: config.Output,
) -> None:
    """Write a folder of images into shards: a few large tar files, as webdataset reads them, with an index beside them.

    Every command takes them as DATA, from a disk or a server: the folder, or 'https://host/name-{000000..000099}.tar'.
    """
    _start("shard", locals())


@app.command()
@options_from_configs
def update_bn(
    network: config.Trained,
    images: config.Unlabelled,
    preprocess: config.Preprocess,
    compute: config.Compute,
    output: config.Output,
) -> None:
    """Estimate batch norm's statistics anew from images without labels, of another camera or laboratory, say.

    Writes a run folder with the same network but for these statistics.
    """
    _start("update-bn", locals())


@app.command()
@options_from_configs
def count_params(
    networks: config.Counted, listing: config.Listing, compute: config.Compute, output: config.Output
) -> None:
    """Count parameters, MACs, FLOPs and receptive fields of models and runs, by stage and layer, without weights.

    tlkit count-params resnet50 'densenet*' RUN
    """
    _start("count-params", locals())


@app.command()
@options_from_configs
def cache(action: config.CacheAction, output: config.Output) -> None:
    """Show what runs keep of frozen layers' outputs, to be used again; clear it."""
    _start("cache", locals())


@app.command()
@options_from_configs
def models(models: config.Listed, output: config.Output) -> None:
    """List model names with their parameters, and where their public weights come from."""
    _start("models", locals())


@app.command("run")
@options_from_configs
def run_(pipeline: config.Pipeline, output: config.Output) -> None:
    """Run a pipeline: commands as steps of a file, which take what they need from steps before (${pretrain.run}).

    Its folder (--out, by default runs/NAME) holds a run for each, and may be there already: what is done is skipped.

    What was cut is resumed; what depends on an option or a file that has changed (its size or time) is done anew.
    """
    _start("run", locals())


@app.command()
@options_from_configs
def recipes(recipes: config.Recipes, output: config.Output) -> None:
    """List, show or copy (--out FILE) the recipes that come with tlkit: options with what to expect of them."""
    _start("recipes", locals())


@app.command()
@options_from_configs
def demo(compute: config.Compute, output: config.Output) -> None:
    """The main job on images and weights that come with the install: no network, about half a minute."""
    _start("demo", locals())


@app.command()
@options_from_configs
def doctor(output: config.Output) -> None:
    """Check the installation: versions, devices, missing extras, each with its remedy."""
    _start("doctor", locals())


def _commands_of_steps() -> dict[str, tuple[Any, ...]]:
    """The option groups of each command that a pipeline's step can be: of every other one."""
    functions = {
        info.name or info.callback.__name__: info.callback for info in app.registered_commands if info.callback
    }
    return {name.replace("_", "-"): groups_of(function) for name, function in functions.items() if name != "run"}


SEVERAL = ("pretrain", "finetune", "unfreeze", "adapt", "evaluate", "predict", "extract-features")
"""Commands that several processes can carry out together."""


def _start(name: str, groups: dict[str, Any]) -> None:
    """Import ``tlkit.commands.<name>`` and call its function of that name with the config groups and a console."""
    from tlkit.cli.console import Console

    started = time.monotonic()
    output: config.Output = groups["output"]
    console = Console(json=output.json, quiet=output.quiet, mute=not processes.is_first())
    if processes.count() > 1 and name not in SEVERAL:
        what = f"{processes.count()} processes were started for a command of one"
        raise TlkitError(what, where=f"tlkit {name}", remedy="start it without torchrun")
    try:
        function = name.replace("-", "_")
        command = getattr(_import_command(function), function)
        if processes.count() > 1:
            _import("tlkit.compute").accelerator(groups["compute"])
        more = {"commands": _commands_of_steps()} if name == "run" else {}
        summary: dict[str, Any] = command(**groups, **more, console=console)
    except KeyboardInterrupt:
        raise _Interrupted from None  # Typer would end without a word, and without the one JSON object
    finally:
        console.close()
    code = summary.pop("exit_code", 0)
    seconds = round(time.monotonic() - started, 3)
    console.result({"command": name, "version": __version__, "seconds": seconds} | summary)
    raise typer.Exit(code)


def _import_command(name: str) -> Any:
    # Threads that have finished their part of a layer wait for the others in a busy loop, for milliseconds by default.
    # Where the cores are shared, with decoding processes or with somebody else, that takes from those that still work.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return _import(f"tlkit.commands.{name}")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        # torch and torchvision of different builds fail while they are imported, in many ways (RuntimeError, OSError,
        # AttributeError ...) and with messages that help nobody: what tells is the package whose import broke off
        frames = traceback.walk_tb(error.__traceback__)
        bodies = [frame.f_globals["__name__"] for frame, _ in frames if frame.f_code.co_name == "<module>"]
        missing = error.name if isinstance(error, ImportError) else None
        package = (missing or bodies[-1]).partition(".")[0]
        if package == "tlkit":
            raise
        remedy = "run 'tlkit doctor'"
        if package in ("torch", "torchvision"):
            remedy += ", or 'pip install --force-reinstall torch torchvision': the two must be of one build"
        what = f"{package} cannot be imported ({type(error).__name__}: {error})"
        raise TlkitError(what, where="installation", remedy=remedy) from error


class _Interrupted(BaseException):
    """Ctrl-C arrived in a command, which has unwound."""


class _Terminated(BaseException):
    """SIGTERM arrived: unwinds like Ctrl-C, so that what was reached is kept."""


def _terminate(*_: object) -> None:
    if hasattr(signal, "SIGCHLD"):  # the group's decoding processes die of the same signal: torch would raise for each
        # a handler that does nothing, not SIG_DFL: Python prints an error where a pending signal finds none
        signal.signal(signal.SIGCHLD, lambda *_: None)
    # a batch system may tell each process, and a pipeline its steps: told twice, nobody should break off the saving
    signal.signal(signal.SIGTERM, lambda *_: None)
    raise _Terminated


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 a mistake, 2 usage, 130 and 143 stopped.

    A mistake is one line on stderr; with ``--json`` stdout holds exactly one object even then.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid in any encoding
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(arguments) or ["--help"], prog_name="tlkit", standalone_mode=False)
        processes.leave()
    except TlkitError as error:
        return _fail(error, arguments, error.exit_code)
    except TyperException as error:
        return _fail(_usage_error(error), arguments, error.exit_code)
    except (KeyboardInterrupt, _Interrupted):
        return _fail(TlkitError("interrupted"), arguments, 130)
    except _Terminated:
        return _fail(TlkitError("terminated"), arguments, 143)
    except BrokenPipeError:  # `tlkit ... | head`: the reader has gone, there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            processes.leave()
            raise
        remedy = "free some space, or give --out on another disk"
        return _fail(TlkitError("no space left on the disk", where=error.filename or "", remedy=remedy), arguments, 1)
    except Exception as error:
        if processes.is_lost(error):
            return _fail(processes.PeerLost(), arguments, 1)
        processes.leave()
        raise
    return result if isinstance(result, int) else 0


def _usage_error(error: TyperException) -> TlkitError:
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    path = context.command_path if context is not None else "tlkit"
    remedy = f"see '{path} --help'"
    if option and error.message.startswith("No such option"):
        close = getattr(error, "possibilities", None) or []
        remedy = f"did you mean {' or '.join(repr(name) for name in close)}?" if close else remedy
        return TlkitError(f"no such option {option}", where=path, remedy=remedy)
    if "unexpected extra argument" in error.message and ".tar" in error.message:  # which the shell has made of one word
        remedy = "put quotes around names of shards: 'name-{000000..000099}.tar'"
    return TlkitError(error.format_message().rstrip("."), where=path, remedy=remedy)


def _fail(error: TlkitError, arguments: Sequence[str], code: int) -> int:
    told = processes.last_words(error)
    if told is None:
        return code
    error = told
    for detail in error.details:
        print(f"tlkit: {' '.join(detail.split())}", file=sys.stderr)
    print(f"tlkit: error: {error}", file=sys.stderr)
    if "--json" in arguments and processes.is_first():
        command = next((word for word in arguments if not word.startswith("-")), None)
        parts = {"what": error.what, "where": error.where, "remedy": error.remedy, "details": error.details}
        whole = {"command": command, "version": __version__} | error.told | {"error": parts, "exit_code": code}
        print(json.dumps(whole))
    return code
