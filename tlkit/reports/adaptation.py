"""The page of an adaptation: how right the network is on the target, and whether the domains came together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from tlkit import __version__
from tlkit.reports import curves
from tlkit.reports.curves import BOTTOM, INFINITE, LEFT, PLOT_HEIGHT, RIGHT, TOP, WIDTH, Chart, Dot, Line, Tick, Value
from tlkit.reports.sections import worst_classes
from tlkit.reports.template import encodable, template
from tlkit.reports.words import ABSENT, duration, listed, percent, plain, plural, points, undefined
from tlkit.run_folder import write_text

LEVEL = 0.05  # of a p-value, below which a difference is called clear
SOURCE_ONLY = "source-only"
RESULTS_SHOWN, SKIPPED_SHOWN, CLASSES_NAMED = 100, 100, 20
HUES_SHOWN = 10  # classes whose colours can still be told apart
POINTS_SHOWN = 2000  # of one cloud
CLOUD_HEIGHT, MARGIN = 300.0, 8.0
SELECTIONS = {
    "infomax": "certain and varied predictions on the target (infomax)",
    "entropy": "certain predictions on the target (entropy)",
    "snd": "soft neighbourhood density of the target (snd)",
    "source-val": "the loss on the source’s val (source-val)",
    "last": "none, the last epoch",
}
OF_TARGET = {
    "target": "Target",
    "target_last": "Last epoch",
    "target_oracle": "Oracle",
    "target_source_only": "Source-only",
}


@dataclass(frozen=True)
class Cloud:
    """Features of both domains, projected to two dimensions.

    Args:
        points: (N, 2).
        is_source: Mask (N).
        labels: Class name of each point (N), empty where it is unknown.
    """

    points: np.ndarray
    is_source: np.ndarray
    labels: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """The domains in the features of one training.

    Args:
        method: Its name.
        seed: Of the training.
        how: How the features were projected: ``PCA`` or ``t-SNE``.
        before: In the features of the network trained on the source alone.
        after: In those of the adapted one.
    """

    method: str
    seed: int
    how: str
    before: Cloud
    after: Cloud


@dataclass(frozen=True)
class AdaptationPage:
    """What an adaptation's page tells.

    Args:
        title: Command and domains, for instance ``adapt amazon to webcam``.
        summary: The object that ``adapt --json`` prints; what it lacks, the page leaves out.
        history: One row for each epoch of each training.
        pictures: The domains before and after, by training.
        per_class: One ``{class, images, precision, recall, f1}`` for each class of the target, and ``auroc`` where it
            is known; what is undefined is None.
        recipe: The effective recipe, as YAML text.
    """

    title: str
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    per_class: Sequence[Mapping[str, Any]]
    recipe: str


class Headline(NamedTuple):
    """What the page says first.

    Args:
        share: A share of images; empty where there is none to tell.
        words: What it is a share of, or the whole of what there is to say.
        spread: How sure that is.
        under: Sentences below.
        note: What to beware of.
    """

    share: str
    words: str
    spread: str
    under: Sequence[str]
    note: str = ""


class Group(NamedTuple):
    """Points of one domain and one class.

    Args:
        name: Domain and class, in words.
        source: Whether they are of the source.
        path: Their marks, as commands of one SVG path.
        hue: Of the class in degrees; None where colours tell the domains apart.
        known: Whether their class is known.
    """

    name: str
    source: bool
    path: str
    hue: int | None
    known: bool


@dataclass(frozen=True)
class Scatter:
    """A cloud as drawn.

    Args:
        height: Height of the viewBox.
        groups: Its points, the source's first.
        counts: How many points the source and the target have.
        hues: Class and hue, where classes are few enough to have colours of their own.
    """

    height: float
    groups: Sequence[Group]
    counts: tuple[int, int]
    hues: Mapping[str, int]


def write_adaptation(path: Path, page: AdaptationPage) -> None:
    """Write the page as UTF-8."""
    write_text(path, render_adaptation(page))


def render_adaptation(page: AdaptationPage) -> str:
    """The page as HTML; what UTF-8 cannot hold (an undecodable byte of a file name) is spelt out as an escape."""
    summary: Mapping[str, Any] = _defined(page.summary)
    results = summary.get("results") or []
    told = _followed(results)
    per_class = worst_classes(_defined(page.per_class))
    skipped = summary.get("skipped_files") or []
    # The first one stands open: what source-only does to its own features is nothing.
    pictures = sorted(page.pictures, key=lambda picture: picture.method == SOURCE_ONLY)
    html = template("adaptation.html").render(
        page=page,
        summary=summary,
        version=summary.get("version") or __version__,
        domains={which: domain(summary, which) for which in ("source", "target")},
        headline=headline(summary),
        tiles=_metrics(results[0], "target") if len(results) == 1 else {},
        rows=table(summary),
        columns={key: name for key, name in OF_TARGET.items() if any(_metrics(one, key) for one in results)},
        results=results[:RESULTS_SHOWN],
        results_left_out=max(len(results) - RESULTS_SHOWN, 0),
        measured_on="target" if _labelled(results) else "source_val",
        gaps=[one for one in results if one.get("mmd2") or one.get("a_distance")][:RESULTS_SHOWN],
        gap_means=gap_means(results),
        gap_words=_gap_words(results),
        pictures=[(picture, scatter(picture.before), scatter(picture.after)) for picture in pictures],
        charts=charts(page.history, told, str(summary.get("select") or "")),
        followed=told,
        per_class=per_class,
        classes_left_out=len(page.per_class) - len(per_class),
        ranked=any(not undefined(row.get("auroc")) for row in per_class),
        only_one=only_one(summary),
        facts=_facts(summary),
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_left_out=max(len(skipped) - SKIPPED_SHOWN, 0),
        metrics_of=_metrics,
        number=number,
        chance=chance,
        spread=spread,
    )
    return encodable(html)


# Words


def domain(summary: Mapping[str, Any], which: str) -> str:
    """What a domain is called: the name of its folder."""
    data = _mapping(summary.get(which)).get("data")
    return plain(PurePath(str(data)).name or data) if data else which


def number(value: float | None, decimals: int = 2) -> str:
    """A figure with so many decimals; what rounds to nothing has no sign."""
    return ABSENT if value is None or undefined(value) else f"{round(value, decimals) + 0.0:.{decimals}f}"


def chance(p: float | None) -> str:
    """A p-value; below what is worth telling apart it is ``< 0.001``."""
    if p is None or undefined(p):
        return ABSENT
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def spread(entry: Mapping[str, Any] | None) -> str:
    """A mean of shares and its standard deviation: ``93.2 % ± 1.0``."""
    mean, sd = _mapping(entry).get("mean"), _mapping(entry).get("sd")
    return f"{percent(mean)} ± {100 * sd:.1f}" if _known([mean]) and sd is not None else percent(mean)


def headline(summary: Mapping[str, Any]) -> Headline:
    """What came of it, in plain words."""
    results = summary.get("results") or []
    if not results:
        return Headline("", "There is no training to tell of", "", ())
    if not _labelled(results):
        images = _mapping(summary.get("target")).get("images")
        those = f"{images:,} image{'' if images == 1 else 's'} of {domain(summary, 'target')}" if images else ""
        what = f"{those} {'was' if images == 1 else 'were'}" if those else f"{domain(summary, 'target')} was"
        why = "the target has no labels, so nothing can be said of accuracy"
        return Headline("", f"{what} adapted to; {why}", "", [*_seeds(results), *_gap_words(results)])
    rows = table(summary)
    adapted = [row for row in rows if row["method"] != SOURCE_ONLY] or rows
    if len(adapted) > 1:
        return _several(summary, adapted)
    if len(rows) == 1 and len(results) == 1:
        return _single(summary, results[0])
    return _one_method(summary, adapted[0])


def _single(summary: Mapping[str, Any], result: Mapping[str, Any]) -> Headline:
    """Of one training, with its interval and its test."""
    metrics, alone = _metrics(result, "target"), _metrics(result, "target_source_only")
    ends, method = metrics.get("top1_ci95"), plain(result.get("method"))
    under = []
    if result.get("method") == SOURCE_ONLY:
        under.append("Source-only: the network never saw the target. That is what adaptation must beat.")
    elif alone.get("top1") is not None:
        under.append(f"Source-only, the same network without adaptation: {percent(alone['top1'])}.")
        under += _paired(result.get("paired"))
    said = f"(95 % interval {points(ends[0])} to {points(ends[1])})" if ends else ""
    return Headline(percent(metrics["top1"]), f"of {_images(summary)} right with {method}", said, under)


def _one_method(summary: Mapping[str, Any], row: Mapping[str, Any]) -> Headline:
    """Of one method: its mean over seeds, and what the baseline reached."""
    target, seeds = _mapping(row.get("target")), row.get("seeds") or 1
    give_or_take = f", ± {100 * target['sd']:.1f} points" if _known([target.get("sd")]) else ""
    said = f"(mean of {seeds:,} seeds{give_or_take})" if seeds > 1 else ""
    under, alone = [], row.get("target_source_only")
    if alone and row["method"] != SOURCE_ONLY:
        under.append(f"Source-only, the same network without adaptation: {spread(alone)}.")
    if seeds == 1:
        under += _paired(row.get("paired"))
    return Headline(
        percent(target.get("mean")), f"of {_images(summary)} right with {plain(row['method'])}", said, under
    )


def _several(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Headline:
    """Of several methods: their range alone, for the one that is best here is so by the target's labels."""
    means = _known(_mapping(row.get("target")).get("mean") for row in rows) or [math.nan]
    seeds = max(row.get("seeds") or 1 for row in rows)
    low, high = min(means), max(means)
    share = percent(low) if low == high else f"{points(low)} to {percent(high)}"
    under = []
    alone = _known(_mapping(row.get("target_source_only")).get("mean") for row in rows)
    if alone:
        under.append(f"Source-only, the same network without adaptation: {percent(statistics.fmean(alone))}.")
    note = (
        "Which method is best cannot be known without labels of the target: whoever picks one by the target column"
        " below has used them, and the figure of that method is then too good."
    )
    counted = f"{plural(len(rows), 'method')}, {plural(seeds, 'seed')}:"
    return Headline(share, f"of {_images(summary)} right", counted, under, note)


def _images(summary: Mapping[str, Any]) -> str:
    metrics = next(filter(None, (_metrics(one, "target") for one in summary["results"])), {})
    images, name = metrics.get("images"), domain(summary, "target")
    return f"the {name} images" if images is None else f"{images:,} {name} image{'' if images == 1 else 's'}"


def _paired(test: Mapping[str, Any] | None) -> list[str]:
    """The exact test against the network trained on the source alone, in a sentence."""
    if not test or test.get("only_adapted") is None or test.get("only_source_only") is None:
        return []
    won, lost, p = test["only_adapted"], test["only_source_only"], test.get("p")
    counts = f"{won:,} image{' is' if won == 1 else 's are'} right only with adaptation, {lost:,} only without"
    if p is None or undefined(p):
        return [f"{counts}."]
    said = f"p {chance(p)}" if p < 0.001 else f"p = {chance(p)}"
    clear = "clearly better" if won > lost else "it did harm: clearly worse"
    return [f"{counts}: {clear if p < LEVEL else 'that may be chance'} ({said}, McNemar’s exact test)."]


def _seeds(results: Sequence[Mapping[str, Any]]) -> list[str]:
    methods = list(dict.fromkeys(plain(one.get("method")) for one in results))
    seeds = len({one.get("seed") for one in results})
    return [f"{plural(len(methods), 'method')}, {plural(seeds, 'seed')}: {listed(methods, 12)}."]


def _gap_words(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of the gap, in sentences: of one training in full, of several as a range."""
    adapted = [one for one in results if one.get("method") != SOURCE_ONLY] or results
    said = []
    names = {
        "mmd2": ("The squared MMD of the two domains’ features", 4),
        "a_distance": ("The A-distance (0: cannot be told apart, 2: told apart perfectly)", 2),
    }
    for key, (name, decimals) in names.items():
        before, after = (_known(_mapping(one.get(key)).get(when) for one in adapted) for when in ("before", "after"))
        if before and after:
            said.append(f"{name} went from {_range(before, decimals)} to {_range(after, decimals)}.")
    p = _mapping(adapted[0].get("mmd2")).get("p_after") if len(adapted) == 1 else None
    if p is not None and not undefined(p):
        finds = "no longer finds" if p >= LEVEL else "still finds"
        said.append(f"A permutation test {finds} a difference afterwards (p {'' if p < 0.001 else '= '}{chance(p)}).")
    return said


def _range(values: Sequence[float], decimals: int) -> str:
    ends = [number(value, decimals) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"between {ends[0]} and {ends[1]}"


def only_one(summary: Mapping[str, Any]) -> list[str]:
    """Classes that only one of the domains has, in sentences."""
    means = {
        "source": "The network may still take a target image for {them}, always wrongly.",
        "target": "The network has no name for {them}, so no figure here counts {their} images.",
    }
    said = []
    for which, meaning in means.items():
        names = [plain(name) for name in summary.get(f"only_in_{which}") or ()]
        if names:
            one = len(names) == 1
            count = f"{len(names):,} class{' is' if one else 'es are'} only in the {which}"
            words = meaning.format(them="it" if one else "them", their="its" if one else "their")
            said.append(f"{count}: {listed(names, CLASSES_NAMED)}. {words}")
    target = _mapping(summary.get("target"))
    reported, images = target.get("reported"), target.get("images")
    if reported and images and reported < images and said:
        said.append(f"{reported:,} of {images:,} target images are reported on; all are adapted to.")
    return said


# Figures


def _defined(found: Any) -> Any:
    """What was found, with None for what is not a number: bars and comparisons could do nothing with it."""
    if isinstance(found, Mapping):
        return {key: _defined(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_defined(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _metrics(result: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Metrics of a training under this key; empty where there is no accuracy among them."""
    found = _mapping(_mapping(result.get("metrics")).get(key))
    return {} if undefined(found.get("top1")) else found


def _labelled(results: Sequence[Mapping[str, Any]]) -> bool:
    return any(_metrics(one, "target") for one in results)


def table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of each method over its seeds, and the paired test of those with one seed."""
    results = summary.get("results") or []
    given = {row.get("method"): row for row in summary.get("table") or ()}
    rows = []
    for method in dict.fromkeys([*given, *(one.get("method") for one in results)]):
        of_method = [one for one in results if one.get("method") == method]
        row: dict[str, Any] = {"method": method, "seeds": len(of_method), "paired": None}
        row |= {key: _mean(_metrics(one, key).get("top1") for one in of_method) for key in (*OF_TARGET, "source_val")}
        row["seconds"] = _mean(one.get("seconds") for one in of_method)
        row |= {key: value for key, value in given.get(method, {}).items() if value is not None}
        if len(of_method) == 1:
            row["paired"] = of_method[0].get("paired")
        rows.append(row)
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not undefined(value)]


def gap_means(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Distances of the domains by method, as means over seeds; empty where every method has a single seed."""
    methods = list(dict.fromkeys(one.get("method") for one in results))
    if len(methods) == len(results):
        return []
    rows = []
    for method in methods:
        row: dict[str, Any] = {"method": method}
        for key in ("mmd2", "a_distance"):
            found = [_mapping(one.get(key)) for one in results if one.get("method") == method]
            means = {when: _mean(each.get(when) for each in found) for when in ("before", "after")}
            row[key] = {when: _mapping(mean).get("mean") for when, mean in means.items()}
        rows.append(row)
    return rows


def _mean(values: Iterable[float | None]) -> dict[str, float | None] | None:
    known = _known(values)
    if not known:
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was done, as (name, value)."""
    results = summary.get("results") or [{}]
    select, target = summary.get("select"), _mapping(summary.get("target"))
    source = _mapping(summary.get("source"))
    known = "" if target.get("labelled") is None else "labels to report on" if target["labelled"] else "no labels"
    told = [f"{target['images']:,} images"] if target.get("images") is not None else []
    facts = [
        ("Model", summary.get("model")),
        ("Weights", summary.get("weights")),
        ("Strategy", summary.get("strategy")),
        ("Epoch chosen by", SELECTIONS.get(str(select), select)),
        ("Epochs", summary.get("epochs") or results[0].get("epochs")),
        (
            "Seeds",
            listed([plain(seed) for seed in dict.fromkeys(one.get("seed") for one in results) if seed is not None], 12),
        ),
        ("Classes", len(summary.get("classes") or ()) or None),
        ("Source", source.get("data")),
        ("Source images", source.get("images")),
        ("Target", target.get("data")),
        ("Target images", ", ".join(filter(None, [*told, known]))),
        ("Device", summary.get("device")),
        ("Precision", summary.get("precision")),
        ("Time", duration(summary["seconds"]) if summary.get("seconds") is not None else None),
        ("Run", summary.get("run")),
    ]
    return [(name, plain(value)) for name, value in facts if value not in (None, "", {})]


# Pictures


def scatter(cloud: Cloud) -> Scatter | None:
    """Circles for the source, triangles for the target, one unit as long across as up; None without a point."""
    places = np.asarray(cloud.points, np.float64).reshape(-1, 2)
    labels = [plain(name) if name else "" for name in cloud.labels] or [""] * len(places)
    kept = np.flatnonzero(np.isfinite(places).all(1) & (np.abs(places) < INFINITE).all(1))
    if not len(kept):
        return None
    if len(kept) > POINTS_SHOWN:
        kept = kept[np.linspace(0, len(kept) - 1, POINTS_SHOWN).astype(int)]
    drawn = _placed(places[kept])
    source = np.asarray(cloud.is_source, bool)[kept]
    names = [labels[row] for row in kept]
    classes = sorted(set(filter(None, names)))
    hues = {name: round(360 * i / len(classes)) for i, name in enumerate(classes)}
    if not 2 <= len(classes) <= HUES_SHOWN:
        hues = {}
    groups: dict[tuple[bool, str], list[str]] = {}
    for (x, y), is_source, name in zip(drawn.tolist(), source.tolist(), names, strict=True):
        mark = f"M{x:g} {y - 2.2:.1f}a2.2 2.2 0 1 1-.1 0z" if is_source else f"M{x:g} {y - 2.8:.1f}l2.6 4.5h-5.2z"
        groups.setdefault((is_source, name), []).append(mark)
    made = [
        Group(
            f"{'source' if of else 'target'}: {name or 'class unknown'}", of, "".join(marks), hues.get(name), bool(name)
        )
        for (of, name), marks in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]
    return Scatter(CLOUD_HEIGHT, made, (int(source.sum()), int((~source).sum())), hues)


def _placed(places: np.ndarray) -> np.ndarray:
    """Where points (N, 2) stand in the viewBox, to a tenth of a unit."""
    low, high = places.min(0), places.max(0)
    room = np.array([WIDTH - 2 * MARGIN, CLOUD_HEIGHT - 2 * MARGIN])
    extent = np.maximum(high - low, 1e-12 * max(1.0, float(np.abs(places).max())))
    scale = float((room / extent).min())
    offset = (places - (low + high) / 2) * scale * np.array([1, -1])  # y is counted downwards
    drawn: np.ndarray = offset + np.array([WIDTH / 2, CLOUD_HEIGHT / 2])
    return drawn.round(1)


# Curves


def _followed(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The training whose curves are drawn: the first that adapts."""
    adapted = (one for one in results if one.get("method") != SOURCE_ONLY)
    return next(adapted, results[0] if results else {})


def charts(history: Sequence[Mapping[str, Any]], result: Mapping[str, Any], select: str) -> list[Chart]:
    """Losses, top-1 and the selection's score of one training by epoch; upright rules mark the selected epoch."""
    rows: dict[int, Mapping[str, Any]] = {}
    for count, row in enumerate(history, start=1):
        same = all(row.get(key, result.get(key)) == result.get(key) for key in ("method", "seed"))
        if same:
            rows[row.get("epoch") or count] = row  # of an epoch that was run again after a stop, the last row counts
    if not rows:
        return []
    losses = {name: _values(rows, "losses", name) for name in ("task", "transfer")}
    if not any(losses.values()):
        losses = {"loss": _values(rows, "losses", "loss")}
    right = {"source val": _values(rows, "source_val", "top1"), "target": _values(rows, "target", "top1")}
    # The score of the last epoch is the number of the epoch: a straight line that tells nothing.
    score = {} if select == "last" else {select or "score": _values(rows, "", "score")}
    epochs, selected = max(rows), result.get("selected_epoch")
    drawn = [
        _chart("loss", {f"{name} loss" if name != "loss" else name: line for name, line in losses.items()}, epochs),
        _chart("top1", right, epochs, selected),
        _chart("score", score, epochs, selected),
    ]
    return [chart for chart in drawn if chart is not None]


def _values(rows: Mapping[int, Mapping[str, Any]], part: str, key: str) -> tuple[Value, ...]:
    """The finite numbers among the rows' figures."""
    found = ((epoch, (_mapping(row.get(part)) if part else row).get(key)) for epoch, row in sorted(rows.items()))
    return tuple(
        Value(epoch, float(value))
        for epoch, value in found
        if isinstance(value, int | float) and math.isfinite(value) and abs(value) < INFINITE
    )


def _chart(key: str, series: Mapping[str, tuple[Value, ...]], epochs: int, selected: int | None = None) -> Chart | None:
    """One line for each series that has values; None where none has."""
    known = {name: values for name, values in series.items() if values}
    if not known:
        return None
    figures = [value.value for values in known.values() for value in values]
    ticks = curves.linear_ticks(min(figures), max(figures))
    right, bottom = WIDTH - RIGHT, TOP + PLOT_HEIGHT

    def x(epoch: float) -> float:
        return curves.place(epoch - 0.5, 0, epochs, LEFT, right)

    def y(value: float) -> float:
        return curves.place(value, ticks[0], ticks[-1], bottom, TOP)

    lines = []
    for name, values in known.items():
        spots = [(x(epoch), y(value)) for epoch, value in values]
        marked = len(values) <= curves.DOTS_SHOWN
        dots = [Dot(*spot, *value) for spot, value in zip(spots, values, strict=True) if marked]
        lines.append(Line((name,), values, curves.path(spots), tuple(dots), list(series).index(name)))
    texts = curves.tick_texts([100 * tick for tick in ticks] if key == "top1" else ticks)
    shown = selected if selected is not None and 1 <= selected <= epochs else None
    rules = [] if shown is None else [x(shown)]
    words = "" if shown is None else f"epoch {shown:,} selected"
    half = len(words) * curves.CHARACTER / 2
    return Chart(
        key=key,
        height=bottom + BOTTOM,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        epoch_ticks=[Tick(x(epoch), str(epoch)) for epoch in curves.epoch_ticks(epochs)],
        ticks=[Tick(y(tick), f"{text} %" if key == "top1" else text) for tick, text in zip(ticks, texts, strict=True)],
        rules=rules,
        phases=[Tick(min(max(place, LEFT + half), WIDTH - half), words) for place in rules],
        lines=lines,
    )
