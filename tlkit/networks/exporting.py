"""A network as a file that other programs run: ONNX, or a program of torch.export."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlkit.errors import TlkitError, first_line
from tlkit.networks.build import Loaded, weight_bytes
from tlkit.networks.exported import IMAGES, INSTALL, LOGITS, PROBABILITIES
from tlkit.preprocessing import Preprocessing

LARGEST = 2**31 - 2**20  # bytes: of one message of protobuf, which an ONNX file is, and something for the graph
IN_8_BITS = ("Conv", "MatMul", "Gemm", "Add", "Relu", "Clip")
"""Activations are among them: what they cut off would otherwise take up most of an output's 8 bits."""

METADATA = "tlkit.json"
"""The file of a torch.export program that holds what an ONNX file has as metadata."""


class FromPixels(nn.Module):
    """A network with the normalisation before it and the softmax behind it: nobody can forget them.

    Args:
        network: Puts out logits; computes in the precision of its weights.
        preprocessing: Whose mean and standard deviation become part of it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.precision = next(network.parameters()).dtype
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities (B, K) of images (B, C, S, S) in [0, 1], all float32."""
        logits = self.network(((images - self.mean) / self.std).to(self.precision)).float()
        return logits, logits.softmax(-1)


def require_exporter() -> None:
    """Raise where the packages are missing that torch writes ONNX files with, and the one that runs them.

    Raises:
        TlkitError: Names the first.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise TlkitError(f"ONNX files need {package}", where="--format onnx", remedy=INSTALL) from error


def write_onnx(path: Path, loaded: Loaded, told: Mapping[str, str], *, half: bool = False) -> None:
    """Write an ONNX file: ``images`` (batch, C, S, S) in [0, 1] to ``logits`` and ``probabilities`` (batch, K).

    Args:
        path: The file.
        loaded: The network.
        told: The file's metadata.
        half: Weights and arithmetic in 16 bits; what goes in and comes out stays in 32.

    Raises:
        TlkitError: The network is too large for one file, or the exporter cannot express it.
    """
    if weight_bytes(loaded.network) // (2 if half else 1) > LARGEST:
        remedy = "use --format torch-export, or --quantise fp16"
        raise TlkitError("the network is too large for one ONNX file (2 GB)", where=loaded.title, remedy=remedy)
    network = copy.deepcopy(loaded.network).half() if half else loaded.network
    with _in_one_line(loaded, "ONNX"):
        program = torch.onnx.export(
            FromPixels(network, loaded.preprocessing).eval(),
            (_example(loaded.preprocessing),),
            dynamo=True,
            input_names=[IMAGES],
            output_names=[LOGITS, PROBABILITIES],
            dynamic_shapes={IMAGES: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        program.model.metadata_props.update(told)  # type: ignore[union-attr]
        program.save(path, external_data=False)  # type: ignore[union-attr]


def write_torch_export(path: Path, loaded: Loaded, told: Mapping[str, str]) -> None:
    """Write a program of torch.export: images (B, C, S, S) in [0, 1] to logits and probabilities (B, K).

    Raises:
        TlkitError: torch.export cannot express the network.
    """
    with _in_one_line(loaded, "torch.export"):
        program = torch.export.export(
            FromPixels(loaded.network, loaded.preprocessing).eval(),
            (_example(loaded.preprocessing),),
            dynamic_shapes={IMAGES: {0: torch.export.Dim("batch")}},
        )
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={METADATA: json.dumps(told, ensure_ascii=False)})


def quantise_int8(source: Path, path: Path, batches: Sequence[Tensor]) -> None:
    """Write an ONNX file with weights and activations of convolutions and linear layers in 8 bits.

    Static: the ranges of activations are those of the given images. Weights have a scale for each output channel, and 7
    bits: on processors that lack the newer instructions (VNNI), sums of 8-bit products overflow.

    Args:
        source: The file of the network in float32.
        path: The file to write.
        batches: Images (B, C, S, S) in [0, 1].

    Raises:
        TlkitError: The quantiser cannot express the network.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.left, None)
            return None if images is None else {IMAGES: images.numpy()}

    with _quiet():
        try:
            quantize_static(
                source,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(IN_8_BITS),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # of whatever kind: it is somebody else's code on somebody else's network
            what = f"cannot be quantised ({first_line(error)})"
            raise TlkitError(what, where="--quantise int8", remedy="leave it out") from error


def _example(preprocessing: Preprocessing) -> Tensor:
    return torch.rand(2, len(preprocessing.mean), preprocessing.size, preprocessing.size)


@contextmanager
def _in_one_line(loaded: Loaded, form: str) -> Iterator[None]:
    with _quiet():
        try:
            yield
        except Exception as error:  # the exporters' errors are as many as the things that a network's code can do
            cause = error.__cause__ or error  # torch.onnx wraps what it met in a page of advice
            what = f"cannot be expressed in {form} ({first_line(cause)})"  # type: ignore[arg-type]
            raise TlkitError(what, where=loaded.title, remedy="try another --format") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell those who write them."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
