"""The parameter and FLOP report: from what ``tlkit count-params --json`` prints to tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from tlkit.reports.tables import Table, as_markdown, short

Model = dict[str, Any]
"""An entry of ``models``."""

COLUMNS = (
    *("model", "run", "stem", "norm", "image_size", "in_chans", "num_classes", "params", "trainable_params", "buffers"),
    *("macs", "flops", "activations", "receptive_field", "stride", "weight_bytes"),
)
"""Of a model in a CSV file."""
SPEED_COLUMNS = (
    *("latency_seconds", "latency_low", "latency_high", "images_per_second", "images_per_second_low"),
    *("images_per_second_high", "batch_size", "device", "precision", "threads"),
)
LAYER_COLUMNS = (
    *("model", "stage", "name", "type", "params", "trainable_params", "buffers", "macs", "flops", "activations"),
    *("output_shape", "receptive_field", "stride"),
)


def tables(models: Sequence[Model]) -> list[Table]:
    """What is shown of the models: one table of all; of one alone, or where layers are listed, their parts as well."""
    shown = [_models(models)]
    if any("speed" in model for model in models):
        shown.append(_speeds(models))
    for model in models:
        if len(models) == 1 or "layers" in model:
            shown.append(_stages(model))
        if "layers" in model:
            shown.append(_layers(model))
        if "phases" in model:
            shown.append(_phases(model))
    if any("published" in model for model in models):
        shown.append(_published(models))
    return shown


def as_text(form: str, summary: dict[str, Any]) -> str:
    """The report as a file: ``json`` whole, ``csv`` with counts as plain numbers, ``markdown`` or ``table`` to read."""
    match form:
        case "json":
            return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        case "csv":
            return csv_text(summary["models"])
    return markdown(summary["models"])


def csv_text(models: Sequence[Model]) -> str:
    """One line a model, with counts as plain numbers; where layers are listed, one line a layer."""
    file = io.StringIO()
    if any("layers" in model for model in models):
        writer = csv.DictWriter(file, LAYER_COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for model in models:
            for layer in model["layers"]:
                shape = _shape(layer["output_shape"]) if layer["output_shape"] is not None else None
                writer.writerow({**layer, "model": _title(model), "output_shape": shape})
        return file.getvalue()
    speed = SPEED_COLUMNS if any("speed" in model for model in models) else ()
    writer = csv.DictWriter(file, (*COLUMNS, *speed), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**model, **_flat(model.get("speed"))} for model in models)
    return file.getvalue()


def markdown(models: Sequence[Model]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in tables(models):
        title = f"**{table.title}**\n\n" if table.title else ""
        notes = "".join(f"\n{note}\n" for note in table.notes)
        parts.append(title + as_markdown(table) + notes)
    return "\n".join(parts)


def _models(models: Sequence[Model]) -> Table:
    columns = ["model", "parameters", "MACs", "FLOPs", "field", "px"]
    rows = [
        [
            _title(model),
            _count(model["params"]),
            short(model["macs"]),
            short(model["flops"]),
            _count(model["receptive_field"]),
            str(model["image_size"]),
        ]
        for model in models
    ]
    notes = ["field: receptive field of the last feature map, in pixels"]
    if len(models) == 1:
        notes += _details(models[0])
    return Table("", columns, rows, notes)


def _speeds(models: Sequence[Model]) -> Table:
    columns = ["model", "one image, ms", "quartiles", "images/s", "quartiles"]
    rows = [
        [_title(model), *_spread(model["speed"]["latency"], 1000), *_spread(model["speed"]["images_per_second"])]
        for model in models
    ]
    made = models[0]["speed"]
    where = f"{made['device']} in {made['precision']}, {made['threads']} threads"
    return Table(f"speed on {where}; images/s in batches of {made['batch_size']}", columns, rows)


def _spread(spread: dict[str, float], factor: float = 1) -> list[str]:
    low, median, high = (f"{factor * spread[key]:.4g}" for key in ("low", "median", "high"))
    return [median, f"{low} to {high}"]


def _details(model: Model) -> list[str]:
    kinds = ", ".join(f"{kind} {short(count)}" for kind, count in model["macs_by_kind"].items() if count)
    apart = ", ".join(f"{kind} {short(count)}" for kind, count in model["elements_by_kind"].items() if count)
    trained = model["trainable_params"]
    lines = [
        f"MACs of: {kinds or 'nothing'}; numbers out of them: {short(model['activations'])}",
        f"counted apart, numbers out of: {apart or 'nothing'}",
        f"weights {short(model['weight_bytes'])}B with {_count(model['buffers'])} numbers in buffers",
    ]
    if trained != model["params"]:
        lines.append(f"trained: {_count(trained)} parameters ({trained / model['params']:.1%})")
    if model["receptive_field"] is None:
        lines.append(f"no receptive field: {model['receptive_field_limit']}")
    if model["uncounted"]:
        lines.append(f"not counted: {', '.join(f'{name} ({n} times)' for name, n in model['uncounted'].items())}")
    return lines


def _stages(model: Model) -> Table:
    frozen = model["trainable_params"] != model["params"]
    columns = ["stage", "parameters", *(["trained"] if frozen else []), "MACs", "output", "field", "stride"]
    rows = [
        [
            stage["name"],
            _count(stage["params"]),
            *([_count(stage["trainable_params"])] if frozen else []),
            short(stage["macs"]),
            *_output(stage),
        ]
        for stage in model["stages"]
    ]
    return Table(f"stages of {_title(model)}", columns, rows)


def _output(part: dict[str, Any]) -> list[str]:
    return [_shape(part["output_shape"]), _count(part["receptive_field"]), _count(part["stride"])]


def _layers(model: Model) -> Table:
    columns = ["layer", "type", "parameters", "MACs", "output", "field"]
    rows = [
        [layer["name"], layer["type"], _count(layer["params"]), short(layer["macs"]), *_output(layer)[:2]]
        for layer in model["layers"]
    ]
    return Table(f"layers of {_title(model)}", columns, rows)


def _phases(model: Model) -> Table:
    whole = model["params"]
    rows = [
        [
            str(number),
            ", ".join(phase["stages"]),
            _count(phase["trainable_params"]),
            f"{phase['trainable_params'] / whole:.1%}" if whole else "-",
        ]
        for number, phase in enumerate(model["phases"], start=1)
    ]
    columns = ["phase", "stages that train", "parameters", "of all"]
    title = f"phases of {model['strategy']}{', at most' if model['strategy'] == 'auto' else ''}: {_title(model)}"
    return Table(title, columns, rows)


def _published(models: Sequence[Model]) -> Table:
    columns = ["model", "weights", "top-1 %", "top-5 %", "protocol; source"]
    rows = []
    for model in models:
        for entry in model.get("published", []):
            figures = [_percent(entry["top1"]), _percent(entry["top5"])]
            rows.append([model["model"], entry["weights"], *figures, f"{entry['protocol']}; {entry['source']}"])
    missing = [model["model"] for model in models if not model.get("published")]
    notes = [f"nothing is listed for {', '.join(missing)}"] if missing else []
    return Table("published ImageNet accuracy; only figures of one protocol can be compared", columns, rows, notes)


def _title(model: Model) -> str:
    return f"{model['run']} ({model['title']})" if model.get("run") else str(model["title"])


def _flat(speed: dict[str, Any] | None) -> dict[str, Any]:
    if speed is None:
        return {}
    latency, rate = speed["latency"], speed["images_per_second"]
    return {
        **{key: value for key, value in speed.items() if not isinstance(value, dict)},
        **{"latency_seconds": latency["median"], "latency_low": latency["low"], "latency_high": latency["high"]},
        "images_per_second": rate["median"],
        "images_per_second_low": rate["low"],
        "images_per_second_high": rate["high"],
    }


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.6g}"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,}"


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))
