"""Networks in files that other programs run: an ONNX file or an exported program in the place of a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlkit import config
from tlkit.errors import TlkitError, first_line
from tlkit.networks.build import Loaded, build, overridden
from tlkit.networks.names import is_onnx
from tlkit.preprocessing import Preprocessing

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
INSTALL = "pip install 'tlkit[onnx]'"


class Exported(nn.Module):
    """A network that something else runs, and that normalises its images itself.

    It is given normalised images like any other network, and undoes that: what is done to an image is then told in one
    way for all networks, and other means than the stored ones (``--mean``) still mean something.

    Args:
        run: Maps images (B, C, S, S) in [0, 1] to logits (B, K), on the CPU.
        preprocessing: What is done to an image, normalisation included.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, run: Callable[[Tensor], Tensor], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.run = run
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, S, S)."""
        return self.run((images * self.std + self.mean).cpu().contiguous()).to(images.device)


def build_or_read(model: str, weights: str, preprocess: config.Preprocess) -> Loaded:
    """A network to look at images with: that of an ONNX file, or what `build` builds.

    Raises:
        TlkitError: As `build` and `read_onnx`.
    """
    if not is_onnx(model):
        return build(model, weights, preprocess)
    if weights != "default":
        raise TlkitError("an ONNX file brings its own weights", where="--weights", remedy="leave it out")
    return read_onnx(Path(model), preprocess)


def read_onnx(path: Path, preprocess: config.Preprocess | None = None) -> Loaded:
    """The network of an ONNX file that ``tlkit export`` wrote.

    Args:
        path: The file.
        preprocess: What to use instead of the preprocessing that goes with it.

    Raises:
        TlkitError: There is no such file, onnxruntime is not installed or cannot read it, or it tells nothing of its
            preprocessing.
    """
    if not path.is_file():
        raise TlkitError("there is no such file", where=path, remedy="check the path")
    session = _session(path)
    told = session.get_modelmeta().custom_metadata_map
    try:
        kept = Preprocessing.from_dict(json.loads(told["preprocessing"]))
        classes = tuple(map(str, json.loads(told["classes"])))
        model = told["model"]
        ends = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
        if ends != ([IMAGES], [LOGITS, PROBABILITIES]):
            raise ValueError
    except (KeyError, TypeError, ValueError, TlkitError) as error:
        what = "does not say how its images are prepared: 'tlkit export' did not write it"
        raise TlkitError(what, where=path, remedy="give a file that 'tlkit export' wrote, or a run") from error
    preprocess = preprocess or config.Preprocess()
    if preprocess.image_size not in (None, kept.size):
        what = f"it takes images of {kept.size} px alone"
        raise TlkitError(what, where="--image-size", remedy="leave it out, or export the run with another --image-size")

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])

    network = Exported(run, kept).eval()
    return Loaded(network, model, overridden(kept, preprocess), classes or None, f"file {path}")


def read_torch_export(path: Path, preprocessing: Preprocessing) -> Exported:
    """The network of a torch.export program that ``tlkit export`` wrote."""
    with path.open("rb") as file:  # of a path it would want a certain ending
        program: Any = torch.export.load(file).module()
    return Exported(lambda images: program(images)[0], preprocessing).eval()


def metadata(loaded: Loaded, version: str, precision: str, licence: str | None) -> Mapping[str, str]:
    """What a file tells of its network, and `read_onnx` reads: texts by name, lists and objects as JSON."""
    return {
        "model": loaded.name,
        "classes": json.dumps(list(loaded.classes or ()), ensure_ascii=False),
        "preprocessing": json.dumps(loaded.preprocessing.to_dict()),
        "precision": precision,
        "licence_of_weights": licence or "unknown",
        "tlkit": version,
    }


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TlkitError("ONNX files need onnxruntime", where=path, remedy=INSTALL) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that wait in a busy loop take the cores from those that decode images
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class of its own for each way in which a file can be broken
        raise TlkitError(f"cannot be run ({first_line(error)})", where=path, remedy="export it again") from error
