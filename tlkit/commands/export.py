"""Write a network for other programs, and prove that they get what tlkit gets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlkit import __version__, config, run_folder
from tlkit.commands.console import Console
from tlkit.commands.export_check import TOLERANCE, calibration_batches, differences, images_to_check
from tlkit.errors import TlkitError
from tlkit.networks.build import Loaded, build, save_network, weight_bytes
from tlkit.networks.exported import metadata, read_onnx, read_torch_export
from tlkit.networks.exporting import quantise_int8, require_exporter, write_onnx, write_torch_export
from tlkit.networks.licences import Origin, origin
from tlkit.reports.model_card import model_card

ENDINGS = {".onnx": "onnx", ".pt2": "torch-export"}
CARD = "README.md"


def export(
    network: config.Trained,
    exporting: config.Exporting,
    preprocess: config.Preprocess,
    output: config.Output,
    console: Console,
) -> dict[str, Any]:
    """Write a network for other programs; see ``tlkit export --help``."""
    form = _form(exporting, output.out)
    out = output.out or _usual_name(network.model, form)
    run_folder.refuse_existing(out)
    if form == "onnx":
        require_exporter()
    torch.manual_seed(0)
    loaded = build(network.model, network.weights, preprocess)
    for remark in loaded.remarks:
        console.warn(remark)
    images = images_to_check(network.model, exporting, loaded, console)
    came = origin(loaded)
    told: dict[str, Any] = {
        "model": loaded.name,
        "weights": loaded.weights,
        "licence_of_weights": came.licence,
        "format": form,
        "quantise": exporting.quantise,
        "classes": list(loaded.classes or ()),
        "preprocessing": loaded.preprocessing.to_dict(),
    }
    if output.plan:
        console.line(f"{loaded.title}, weights: {loaded.weights}, {_kind(exporting, form)}: {out}")
        console.line(f"compared on {len(images.views)} {images.of}")
        return told | {"plan": {"out": str(out), "images": len(images.views), "of": images.of}}
    if loaded.classes is None:
        console.warn("nobody knows what this network's outputs mean: predict and evaluate will not take it")
    run_folder.require_space(out, weight_bytes(loaded.network))
    with (run_folder.folder_atomically if form == "hub" else run_folder.atomically)(out) as part:
        console.say(f"writing {out}: takes some seconds")
        found = _write(part, form, network.model, exporting, loaded, came)
        check, metrics = differences(loaded, found, images, console)
        if exporting.quantise == "none":
            _refuse_different(check, out)
    told |= {"out": str(out), "bytes": _size(out), "check": check | {"tolerance": TOLERANCE}, "metrics": metrics}
    _show(told, loaded, _kind(exporting, form), came, console)
    return told


def _form(exporting: config.Exporting, out: Path | None) -> str:
    """The format that is asked for, in words or by the ending of ``--out``.

    Raises:
        TlkitError: The two say different things, or neither says anything.
    """
    ending = out.suffix.lower() if out is not None else ""
    form = exporting.format or (ENDINGS.get(ending) if out is not None else "onnx")
    if form is None:
        remedy = f"end it in {' or '.join(ENDINGS)}, or give --format hub for a folder"
        raise TlkitError("its ending names no format", where=out, remedy=remedy)
    wanted = next((ending for ending, other in ENDINGS.items() if other == form), None)
    if out is not None and (ending != wanted if wanted else ending in ENDINGS):
        remedy = f"end it in {wanted}" if wanted else "give a folder"
        raise TlkitError(f"not what --format {form} writes", where=out, remedy=remedy)
    if form != "onnx" and exporting.quantise != "none":
        remedy = "leave it out, or give --format onnx"
        raise TlkitError(f"{form} has no fewer bits", where="--quantise", remedy=remedy)
    if exporting.calibrate_on is not None and exporting.quantise != "int8":
        raise TlkitError("only int8 needs it", where="--calibrate-on", remedy="add --quantise int8, or leave it out")
    return form


def _usual_name(model: str, form: str) -> Path:
    """Where an export goes by default: into the working folder, called as the run is."""
    name = Path(model).absolute().name if run_folder.is_run(model) else model.replace("/", "-").replace(":", "-")
    ending = next((ending for ending, other in ENDINGS.items() if other == form), "-hub")
    return Path(f"{name}{ending}")


def _write(part: Path, form: str, model: str, exporting: config.Exporting, loaded: Loaded, came: Origin) -> nn.Module:
    """Write the file or the folder; returns the network as it is read back from there."""
    if form == "hub":
        save_network(part, loaded)
        summary = Path(model) / run_folder.SUMMARY
        card = model_card(loaded, came, run_folder.read_json(summary) if summary.is_file() else {})
        run_folder.write_text(part / CARD, card)
        return build(str(part), "default").network
    told = metadata(loaded, __version__, {"none": "fp32"}.get(exporting.quantise, exporting.quantise), came.licence)
    if form == "torch-export":
        write_torch_export(part, loaded, told)
        return read_torch_export(part, loaded.preprocessing)
    if exporting.quantise == "int8":
        batches = calibration_batches(model, exporting.calibrate_on, loaded)
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "fp32.onnx"
            write_onnx(plain, loaded, told)
            quantise_int8(plain, part, batches)
    else:
        write_onnx(part, loaded, told, half=exporting.quantise == "fp16")
    return read_onnx(part).network


def _refuse_different(check: dict[str, Any], out: Path) -> None:
    """Raise where a file in float32 does not give what the network gives.

    Raises:
        TlkitError: Says how far it is off.
    """
    if check["same_labels"] == check["images"] and check["max_difference"] <= TOLERANCE:
        return
    same = f"{check['same_labels']} of {check['images']} labels are the network's"
    far = f"probabilities differ by up to {check['max_difference']:.2g} ({TOLERANCE:g} is allowed)"
    raise TlkitError(f"not written: {same}, {far}", where=out, remedy="try another --format")


def _kind(exporting: config.Exporting, form: str) -> str:
    names = {"onnx": "ONNX", "torch-export": "torch.export", "hub": "hub folder"}
    return names[form] if exporting.quantise == "none" else f"{names[form]} {exporting.quantise}"


def _size(out: Path) -> int:
    return sum(path.stat().st_size for path in out.iterdir()) if out.is_dir() else out.stat().st_size


def _show(told: dict[str, Any], loaded: Loaded, kind: str, came: Origin, console: Console) -> None:
    check, form = told["check"], told["format"]
    if told["metrics"]:
        columns = [f"{check['images']} {check['of']}", "top-1", "95 % interval", "loss", "ECE"]
        rows = []
        for name, key in ((f"{loaded.title}, torch", "network"), (kind, "export")):
            figures = told["metrics"][key]
            interval = "{:.3f} to {:.3f}".format(*figures["top1_ci95"])
            rows.append([name, figures["top1"], interval, figures["loss"], figures["ece"]])
        console.table("", columns, rows)
    console.line(
        f"same label on {check['same_labels']} of {check['images']} {check['of']}; probabilities differ by up to"
        f" {check['max_difference']:.2g}"
    )
    console.line(f"{'folder' if form == 'hub' else 'file'}    {told['out']} ({told['bytes'] / 1e6:.1f} MB)")
    console.line(f"licence {came.licence or 'not known'} (weights: {came.weights})")
    if form == "onnx" and loaded.classes:
        console.line(f"next    tlkit predict {told['out']} PHOTOS")
    if form == "hub":
        console.line(f"next    look at {CARD}, then: hf upload NAME/{Path(told['out']).absolute().name} {told['out']}")
