"""Count parameters, multiply-accumulates and receptive fields, without weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tlkit import compute, config, run_folder
from tlkit.commands.console import Console
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded
from tlkit.networks.complexity import Complexity, Part, complexity
from tlkit.networks.freezing import freeze
from tlkit.networks.names import names_like
from tlkit.networks.published import published
from tlkit.networks.skeleton import channels_of, skeleton, untrained
from tlkit.networks.speed import speed
from tlkit.networks.stages import stages
from tlkit.reports import complexity as report
from tlkit.training.strategies import Situation, longest, strategy

COUNTED = (
    "MACs are multiply-accumulates of convolutions, linear layers and products of matrices (attention) for one image;"
    " FLOPs are two for each; activations are the numbers that come out of these. Normalisation, activation functions,"
    " pooling and additions are in none of them."
)
FORMATS = {".json": "json", ".csv": "csv", ".md": "markdown", ".txt": "table"}


def count_params(
    networks: config.Counted,
    listing: config.Listing,
    compute: config.Compute,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Count networks; see ``tlkit count-params --help``."""
    run_folder.refuse_existing(output.out)
    _refuse_idle(listing, compute)
    form = listing.format or (FORMATS.get(output.out.suffix.lower(), "table") if output.out else "table")
    console.json = console.json or (form == "json" and output.out is None)
    names, by_pattern = _expand(networks.models)
    if output.plan:
        console.table("Would be counted", ["model"], [[name] for name in names])
        return {"plan": names}
    models: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for number, name in enumerate(names):
        if len(names) > 1:
            console.progress("models", number, len(names))
        try:
            models.append(_count(name, networks, listing, compute))
        except TlkitError as error:
            if name not in by_pattern:
                raise error if error.where else TlkitError(error.what, where=name, remedy=error.remedy) from error
            left_out.append({"model": name, "reason": error.what})
    if len(names) > 1:
        console.progress("models", len(names), len(names))
    for entry in left_out:
        console.warn(f"{entry['model']} is left out: {entry['reason']}")
    if not models:
        raise TlkitError("none of these models can be counted", where=" ".join(networks.models), remedy="name others")
    if listing.sort:
        models.sort(key=lambda model: _sort_key(model, listing.sort or "name"))
    summary = {"models": models, "not_counted": left_out, "counted": COUNTED}
    _show(form, summary, output.out, console)
    return summary


def _refuse_idle(listing: config.Listing, compute: config.Compute) -> None:
    default = config.Compute()
    given = [name for name in ("device", "precision", "batch_size") if getattr(compute, name) != getattr(default, name)]
    if given and not listing.measure:
        option = config.option_name(given[0])
        raise TlkitError("nothing is computed without --measure", where=option, remedy=f"add it, or leave out {option}")
    if listing.sort == "latency" and not listing.measure:
        raise TlkitError("nothing is measured without --measure", where="--sort latency", remedy="add --measure")


def _expand(models: Sequence[str]) -> tuple[list[str], set[str]]:
    """Names of models and folders of runs, each once; and which of them come from wildcards alone.

    Raises:
        TlkitError: A pattern fits no model.
    """
    names: dict[str, None] = {}
    by_pattern: set[str] = set()
    for given in models:
        if run_folder.is_run(given) or not any(sign in given for sign in "*?["):
            by_pattern.discard(given)
            names[given] = None
            continue
        found = names_like(given)
        by_pattern |= {name for name in found if name not in names}
        names |= dict.fromkeys(found)
    return list(names), by_pattern


def _count(given: str, networks: config.Counted, listing: config.Listing, computing: config.Compute) -> dict[str, Any]:
    loaded = _as_asked(skeleton, given, networks)
    is_run = run_folder.is_run(given)
    if is_run:
        _freeze_as_trained(loaded, Path(given))
    counted = _complexity(loaded)
    found: dict[str, Any] = {
        "model": loaded.name if is_run else given,
        **({"run": given} if is_run else {}),
        "title": loaded.title,
        "stem": loaded.stem,
        "norm": loaded.norm,
        **_costs(counted.whole),
        "image_size": loaded.preprocessing.size,
        "in_chans": channels_of(loaded.network),
        "num_classes": loaded.network.num_classes,
        "weight_bytes": counted.weight_bytes,
        "macs_by_kind": counted.macs_by_kind,
        "elements_by_kind": counted.elements_by_kind,
        "uncounted": counted.uncounted,
        "stages": [{"name": part.name} | _costs(part) for part in counted.stages],
    }
    if listing.layers:
        found["layers"] = [
            {"name": part.name, "stage": part.stage, "type": part.kind} | _costs(part) for part in counted.layers
        ]
    if networks.strategy:
        found |= {"strategy": networks.strategy, "phases": _phases(counted, networks.strategy)}
    if listing.measure:
        found["speed"] = _speed(given, loaded, networks, computing)
    if listing.published:
        found["published"] = [] if is_run else _published(given)
    return found


def _as_asked(make: Callable[..., Loaded], given: str, networks: config.Counted) -> Loaded:
    return make(
        given,
        networks.image_size,
        num_classes=networks.num_classes,
        in_chans=networks.in_chans,
        stem=networks.stem,
        norm=networks.norm,
    )


def _costs(part: Part) -> dict[str, Any]:
    return {
        "params": part.params,
        "trainable_params": part.trainable_params,
        "buffers": part.buffers,
        "macs": part.macs,
        "flops": 2 * part.macs,
        "activations": part.activations,
        "output_shape": part.output_shape,
        "receptive_field": part.receptive_field,
        "receptive_field_limit": part.receptive_field_limit,
        "stride": part.stride,
    }


def _freeze_as_trained(loaded: Loaded, run: Path) -> None:
    """Freeze the stages that no phase of the run trained; a run that does not say so trained all of them."""
    if not (run / run_folder.SUMMARY).is_file():
        return
    phases = run_folder.read_json(run / run_folder.SUMMARY).get("phases") or []
    trained = {name for phase in phases if phase.get("kept", True) for name in phase["stages"]}
    if trained:
        freeze(loaded.network, [stage.name for stage in stages(loaded.network) if stage.name not in trained])


def _complexity(loaded: Loaded) -> Complexity:
    size = loaded.preprocessing.size
    try:
        return complexity(loaded.network, torch.empty(1, channels_of(loaded.network), size, size, device="meta"))
    except TlkitError as error:
        usual = loaded.network.pretrained_cfg["input_size"][-1]  # type: ignore[index]
        raise TlkitError(
            error.what, where=loaded.title, remedy=f"give another --image-size; usual is {usual}"
        ) from error


def _phases(counted: Complexity, name: str) -> list[dict[str, Any]]:
    """Stages and parameters that each phase trains; of ``auto`` those that it goes through if every one pays."""
    sizes = {part.name: part.params for part in counted.stages}
    situation = Situation(
        stages=tuple(sizes),
        costs=(0.0,) * len(sizes),
        trained_on=1,
        chosen_on=1,
        choosing_is_apart=False,
        seen=1,
        lr=1.0,
    )
    phases = longest(strategy(name, situation, config.Training(), config.Unfreezing()))
    return [
        {"stages": list(phase.stages), "trainable_params": sum(sizes[stage] for stage in phase.stages)}
        for phase in phases
    ]


def _speed(given: str, loaded: Loaded, networks: config.Counted, computing: config.Compute) -> dict[str, Any]:
    accelerator = compute.accelerator(computing)
    torch.manual_seed(computing.seed)
    network = _as_asked(untrained, given, networks).network
    size = loaded.preprocessing.size
    return asdict(speed(network, (channels_of(network), size, size), accelerator, computing.batch_size))


def _published(name: str) -> list[dict[str, Any]]:
    base, _, tag = name.partition(".")
    return [asdict(entry) for entry in published(base) if not tag or entry.weights == tag]


def _sort_key(model: dict[str, Any], key: str) -> Any:
    match key:
        case "name":
            return model["title"]
        case "receptive-field":
            return model["receptive_field"] or math.inf
        case "latency":
            return model["speed"]["latency"]["median"]
    return model[key]


def _show(form: str, summary: dict[str, Any], out: Path | None, console: Console) -> None:
    models = summary["models"]
    if out is None and form == "table":
        for table in report.tables(models):
            console.table(table.title, table.columns, table.rows)
            for note in table.notes:
                console.line(note)
            console.line()
        console.line(COUNTED)
        return
    text = report.as_text(form, summary)
    if out is None:
        console.text(text)
        return
    run_folder.write_text(out, text)
    console.line(f"{len(models)} model{'s' * (len(models) != 1)} written to {out}")
