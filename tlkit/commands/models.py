"""List models: names, parameters, where their public weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from tlkit import config, run_folder
from tlkit.commands.console import Console
from tlkit.errors import TlkitError, did_you_mean
from tlkit.networks.names import names_like
from tlkit.networks.skeleton import skeleton
from tlkit.networks.weights import source_of


def models(models: config.Listed, output: config.Output, console: Console) -> dict[str, Any]:
    """List models; see ``tlkit models --help``."""
    run_folder.refuse_existing(output.out)
    sources = {name: source_of(name) for name in _names(models.patterns or ["*"])}
    names = [name for name, source in sources.items() if models.source in (None, source)]
    if not names:
        what = "no such model has public weights" if models.source != "none" else "all such models have public weights"
        raise TlkitError(what, where=f"--source {models.source}", remedy="leave it out, or choose another")
    if output.plan:
        console.line(f"{len(names)} models would be listed")
        return {"plan": {"models": len(names)}}
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        console.progress("models", number, len(names))
        rows.append({"model": name, "params": _params(name), "weights": sources[name], "tags": _tags(name)})
    console.progress("models", len(names), len(names))
    shown = [[row["model"], _written(row["params"]), row["weights"], ", ".join(row["tags"]) or "-"] for row in rows]
    if output.out is not None:
        columns = ["model", "params", "weights", "tags"]
        run_folder.write_rows(output.out, columns, [[*list(row.values())[:3], " ".join(row["tags"])] for row in rows])
        console.line(f"{len(rows)} models written to {output.out}")
    else:
        console.table("", ["model", "parameters", "weights", "tags (the first is the default)"], shown)
    return {"models": rows}


def _names(patterns: Sequence[str]) -> list[str]:
    """Names without tags that fit, each once; a word that is no name is searched for inside names."""
    names: dict[str, None] = {}
    for pattern in patterns:
        wild = any(sign in pattern for sign in "*?[")
        try:
            names |= dict.fromkeys(names_like(pattern if wild or timm.is_model(pattern) else f"*{pattern}*"))
        except TlkitError as error:
            remedy = did_you_mean(pattern, timm.list_models()) or error.remedy
            raise TlkitError(error.what, where=pattern, remedy=remedy) from error
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _tags(name: str) -> list[str]:
    """Of its public weights, those that timm loads by default first."""
    tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{name}.*")]
    default = getattr(get_pretrained_cfg(name), "tag", None)
    return sorted(tags, key=lambda tag: tag != default)


def _params(name: str) -> int | None:
    """None for the few that are no classifiers."""
    try:
        return sum(parameter.numel() for parameter in skeleton(name).network.parameters())
    except TlkitError:
        return None


def _written(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
