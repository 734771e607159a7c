"""The model card of a network: what it is, what it learnt from, what it was measured on, how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tlkit import __version__
from tlkit.data.folders import SPLITS
from tlkit.networks import imagenet
from tlkit.networks.build import Loaded
from tlkit.networks.licences import Origin

LISTED = 50
"""Classes that the card lists."""

FIGURES = (("top1", "top-1"), ("balanced_accuracy", "balanced accuracy"), ("loss", "loss (nats)"), ("ece", "ECE"))


def model_card(loaded: Loaded, came: Origin, summary: Mapping[str, Any]) -> str:
    """The text of a ``README.md`` for the Hugging Face hub.

    Args:
        loaded: The network.
        came: Where its weights came from at first.
        summary: What the run told; empty where there is no run.
    """
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "transfer-learning", "tlkit"],
    }
    # "other" is what the hub has for a licence that it has no word for, and wants a name with it
    head |= {"license": came.licence} if came.licence else {"license": "other", "license_name": "unknown"}
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {loaded.title}",
        _what(loaded, came, summary),
        *_licence(came),
        *_data(loaded, summary),
        *_metrics(summary),
        "## Preprocessing\n\n" + _preprocessing(loaded),
        "## Use\n\n" + _use(loaded),
    ]
    return "\n\n".join(blocks) + "\n"


def _what(loaded: Loaded, came: Origin, summary: Mapping[str, Any]) -> str:
    classes = f"{len(loaded.classes)} classes" if loaded.classes else "classes that nobody named"
    how = f", by `tlkit {summary['command']}`" if summary.get("command") else ""
    strategy = f" ({summary['strategy']})" if summary.get("strategy") else ""
    start = {"random": "random weights", "unknown": "weights of unknown origin", "hub": "timm's weights on the hub"}
    return (
        f"An image classifier of {classes}: timm's `{loaded.name}`{how}{strategy} with tlkit"
        f" {summary.get('version', __version__)}, from {start.get(came.weights, Path(came.weights).name)}."
    )


def _licence(came: Origin) -> Iterator[str]:
    if came.licence:
        yield f"The weights that it started from have the licence {came.licence}."
    elif came.weights == "random":
        yield "It was trained from random weights: put your own licence into the header in place of `other`."
    else:
        yield (
            "The licence of the weights that it started from is not known: find it out, and put it into the header in"
            " place of `other`, before anybody else gets this."
        )


def _data(loaded: Loaded, summary: Mapping[str, Any]) -> Iterator[str]:
    counts: Mapping[str, Mapping[str, int]] = summary.get("data") or {}
    if not counts or not all(isinstance(of, Mapping) for of in counts.values()):
        if loaded.classes:
            yield "## Classes\n\n" + _some([f"`{name}`" for name in imagenet.describe(loaded.classes)])
        return
    there = {part for of in counts.values() for part in of}
    parts = [part for part in SPLITS if part in there] + sorted(there - set(SPLITS))
    rows = [[name, *(of.get(part, 0) for part in parts)] for name, of in counts.items()]
    total = ["all", *(sum(of.get(part, 0) for of in counts.values()) for part in parts)]
    more = f"\n\nand {len(rows) - LISTED} more classes" if len(rows) > LISTED else ""
    yield "## Data\n\nImages of each class and split:\n\n" + _table(["class", *parts], [*rows[:LISTED], total]) + more


def _metrics(summary: Mapping[str, Any]) -> Iterator[str]:
    found = summary.get("metrics") or {}
    found = {str(summary.get("split", "images")): found} if "top1" in found else found
    measured = {part: figures for part, figures in found.items() if isinstance(figures, Mapping) and "top1" in figures}
    if not measured:
        return
    rows = [
        [part, figures["images"], *(_with_interval(figures, key) for key, _ in FIGURES)]
        for part, figures in measured.items()
    ]
    text = "## Metrics\n\nWith 95 % intervals:\n\n"
    text += _table(["images of", "images", *(name for _, name in FIGURES)], rows)
    if chosen := [part for part, figures in measured.items() if figures.get("used_for_selection")]:
        text += f"\n\nSomething was chosen on {', '.join(chosen)}: expect somewhat less on new images."
    yield text


def _with_interval(figures: Mapping[str, Any], key: str) -> str:
    if key not in figures:
        return "-"
    interval = figures.get(f"{key}_ci95")
    return f"{figures[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _preprocessing(loaded: Loaded) -> str:
    kept = loaded.preprocessing
    resized = {
        "center": f"shorter side to {kept.resized_side} px, centre of {kept.size} px cut out",
        "squash": f"both sides to {kept.resized_side} px, centre of {kept.size} px cut out",
        "border": f"longer side to {kept.resized_side} px, padded to a square",
    }[kept.crop_mode]
    return (
        f"{'Grey' if kept.colour_mode == 'L' else 'RGB'} images, turned as EXIF says; {resized} ({kept.interpolation},"
        f" antialiased); scaled to [0, 1]; mean {_numbers(kept.mean)}, standard deviation {_numbers(kept.std)}."
    )


def _use(loaded: Loaded) -> str:
    ours = loaded.stem != "standard" or loaded.norm != "own"
    imports = "import timm\nimport tlkit.networks  # makes its architecture known to timm" if ours else "import timm"
    return (
        f"```python\n{imports}\n\n"
        'network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:NAME/REPOSITORY\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))\n"
        'names = network.pretrained_cfg["label_names"]\n```\n\n'
        "```console\n$ tlkit predict FOLDER photos/\n$ tlkit predict hf-hub:NAME/REPOSITORY photos/\n```"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
