"""What `adapt` writes and tells."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlkit import __version__, run_folder
from tlkit.adaptation import gap
from tlkit.commands.console import Console
from tlkit.evaluation.comparison import mcnemar
from tlkit.evaluation.metrics import measured, per_class
from tlkit.evaluation.metrics import metrics as metrics_of
from tlkit.networks.build import save_network
from tlkit.reports.adaptation import AdaptationPage, Cloud, Picture, write_adaptation

if TYPE_CHECKING:
    from tlkit.commands.adapting import Result, Trainings

GAPS, WHEN = (("mmd2", ".4f"), ("a_distance", ".2f")), ("before", "after")


def figures(
    probabilities: Mapping[str, np.ndarray], alone: np.ndarray | None, source: np.ndarray, target: np.ndarray
) -> dict[str, Any]:
    """Metrics of a training, and its paired test against the network trained on the source alone.

    Args:
        probabilities: As in `tlkit.commands.adapting.Result`.
        alone: What the source-only network makes of the target's images (N, K); None where this is that network.
        source: Classes of the source's images set apart (M).
        target: Classes of the target's images (N), -1 for what is not reported on.
    """
    known = target >= 0
    metrics = {"source_val": measured(probabilities["source_val"], source)}
    if not known.any():
        return {"metrics": metrics}
    labels = target[known]
    reference = (probabilities["selected"] if alone is None else alone)[known]
    metrics["target"] = measured(probabilities["selected"][known], labels)
    metrics |= {f"target_{key}": metrics_of(probabilities[key][known], labels) for key in ("last", "oracle")}
    metrics["target_source_only"] = metrics_of(reference, labels)
    if alone is None:
        return {"metrics": metrics}
    guesses = probabilities["selected"][known].argmax(1)
    test = mcnemar(guesses == labels, reference.argmax(1) == labels)
    paired = {"only_adapted": test["only_first"], "only_source_only": test["only_second"], "p": test["p"]}
    return {"metrics": metrics, "paired": paired}


def table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation, None of a single seed) of each method over its seeds."""
    rows = []
    for name in dict.fromkeys(result["method"] for result in results):
        of_method = [result for result in results if result["method"] == name]
        values = {key: [one["metrics"][key]["top1"] for one in of_method] for key in of_method[0]["metrics"]}
        values |= {
            "mmd2_after": [one["mmd2"]["after"] for one in of_method],
            "a_distance_after": [one["a_distance"]["after"] for one in of_method],
            "seconds": [one["seconds"] for one in of_method],
        }
        spreads = {key: {"mean": float(np.mean(found)), "sd": _sd(found)} for key, found in values.items()}
        rows.append({"method": name, "seeds": len(of_method)} | spreads)
    return rows


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def write_adapted(
    trainings: Trainings, results: Iterable[Result], run: Path, console: Console, started: float
) -> dict[str, Any]:
    """Write each training's network as it is finished, and then what a finished run leaves; tell it."""
    pair, asked, loaded = trainings.pair, trainings.asked, trainings.loaded
    several = len(trainings.methods) * len(trainings.seeds) > 1
    told, history, pictures = [], [], []
    of_class: list[dict[str, Any]] = []
    for result in results:
        folder = run / f"{result.method}-{result.seed}" if several else run
        folder.mkdir(exist_ok=True)
        save_network(folder, replace(loaded, network=result.network, classes=pair.source.classes))
        _write_predictions(folder, trainings, result)
        told.append(result.told | ({"run": str(folder)} if several else {}))
        history += result.history
        if result.seed == trainings.seeds[0]:
            pictures.append(_picture(trainings, result))
        if not several:
            of_class = _per_class(trainings, result)
    images = pair.images()
    summary: dict[str, Any] = {
        "run": str(run),
        "model": loaded.name,
        "weights": loaded.weights,
        "strategy": asked.strategy,
        "select": asked.adaptation.select,
        "classes": list(pair.source.classes),
        "only_in_source": list(pair.only_in_source),
        "only_in_target": list(pair.only_in_target),
        "source": {"data": str(asked.domains.source), "images": images["source"]},
        "target": {
            "data": str(asked.domains.target),
            "images": images["target"],
            "labelled": pair.labelled,
            "reported": images["reported"],
        },
        **({} if several else {key: value for key, value in told[0].items() if key not in ("seconds", "run")}),
        "results": told,
        "table": table(told),
        "skipped_files": trainings.left_out,
        "preprocessing": loaded.preprocessing.to_dict(),
        "device": str(trainings.how.accelerator.device),
        "precision": trainings.how.accelerator.mixed_precision,
    }
    whole = {"command": "adapt", "version": __version__, "seconds": round(time.monotonic() - started, 3)} | summary
    names = [Path(str(place)).absolute().name for place in (asked.domains.source, asked.domains.target)]
    recipe = (run / run_folder.RECIPE).read_text(encoding="utf-8")
    page = AdaptationPage(f"adapt {names[0]} to {names[1]}", whole, history, pictures, of_class, recipe)
    write_adaptation(run / run_folder.REPORT, page)
    if trainings.left_out:
        rows = ((file["path"], file["reason"]) for file in trainings.left_out)
        run_folder.write_rows(run / run_folder.SKIPPED, ("path", "reason"), rows)
    run_folder.write_json(run / run_folder.SUMMARY, whole)  # last: it says that the run is finished
    _tell(console, summary, loaded.title, run)
    return summary


def _write_predictions(folder: Path, trainings: Trainings, result: Result) -> None:
    """``predictions.csv`` of the target's images; the label is empty where nothing is known of it."""
    target, classes, made = trainings.pair.target, trainings.pair.source.classes, result.probabilities["selected"]
    rows = [
        (path, target.classes[label], classes[guess], f"{row[guess]:.6f}", "target")
        for path, label, guess, row in zip(target.paths, target.labels, made.argmax(1), made, strict=True)
    ]
    columns = ("path", "label", "predicted", "probability", "split")
    run_folder.write_rows(folder / run_folder.PREDICTIONS, columns, rows)


def _per_class(trainings: Trainings, result: Result) -> list[dict[str, Any]]:
    """Precision, recall and the like of the classes that both domains have, on the target."""
    pair, known = trainings.pair, trainings.pair.labels >= 0
    if not known.any():
        return []
    rows = per_class(result.probabilities["selected"][known], pair.labels[known], pair.source.classes)
    return [row for row in rows if row["class"] in pair.shared]


def _picture(trainings: Trainings, result: Result) -> Picture:
    """Both domains before and after, fewer images of them where there are many pictures."""
    how, seed = trainings.asked.adaptation.projection, trainings.asked.compute.seed
    most = gap.DRAWN if len(trainings.methods) == 1 else gap.DRAWN // 2
    pair = trainings.pair
    of_source = [pair.source.classes[label] for label in pair.source.labels[trainings.shown[0]]]
    of_target = [pair.target.classes[label] for label in pair.target.labels[trainings.shown[1]]]
    rows = [gap.sampled(len(names), seed, most) for names in (of_source, of_target)]
    labels = [names[row] for names, some in zip((of_source, of_target), rows, strict=True) for row in some.tolist()]
    is_source = np.arange(len(labels)) < len(rows[0])
    clouds = []
    for features in (result.before, result.after):
        both = np.concatenate([part[some] for part, some in zip(features, rows, strict=True)])
        clouds.append(Cloud(gap.project(both, how, seed), is_source, labels))
    return Picture(result.method, result.seed, "PCA" if how == "pca" else "t-SNE", *clouds)


def _tell(console: Console, summary: Mapping[str, Any], title: str, run: Path) -> None:
    table = summary["table"]
    seeds, firsts = table[0]["seeds"], _firsts(summary)
    named = {"target": "target", "target_last": "last", "target_oracle": "oracle", "target_source_only": "source-only"}
    keys = {key: name for key, name in (named | {"source_val": "source val"}).items() if key in table[0]}
    rows = [[row["method"], *(_mean(row[key]) for key in keys)] for row in table]
    columns = ["method", *keys.values()]
    if "target" in keys and seeds == 1:
        columns.append("p")
        for row, result in zip(rows, firsts, strict=True):
            row.append(_p(result["paired"]["p"]) if "paired" in result else "")
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    console.table(f"{title}, {summary['strategy']}: top-1{spread}", columns, rows)
    if "target" in keys:
        by = f"epoch chosen by {summary['select']}, without its labels"
        console.line(f"target: {by}; oracle: by its labels, which is no result")
    rows = [
        [one["method"], *(f"{one[name][when]:{digits}}" for name, digits in GAPS for when in WHEN)] for one in firsts
    ]
    columns = [
        "gap" if seeds == 1 else f"gap (seed {firsts[0]['seed']})",
        "MMD2 before",
        "after",
        "A-distance before",
        "after",
    ]
    console.table("", columns, rows)
    console.line(f"run     {run}")
    console.line(f"report  {run / run_folder.REPORT}")
    console.line(f"next    tlkit predict {summary['results'][0].get('run', run)} PHOTOS")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _firsts(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first seed's result of each method."""
    firsts: dict[str, Mapping[str, Any]] = {}
    for result in summary["results"]:
        firsts.setdefault(result["method"], result)
    return list(firsts.values())


def _mean(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.3f}" + (f"±{spread['sd']:.3f}".replace("±0.", "±.") if spread["sd"] is not None else "")
