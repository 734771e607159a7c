"""Shards made without tlkit."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _impatient(impatient: None) -> None:
    """All of these tests are."""


def png(colour: int = 128, side: int = 8) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of some files, as another program would write it."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label: object = None, said: dict[str, Any] | None = None, colour: int = 128) -> Files:
    """An image with what stands beside it."""
    files = [(f"{key}.png", png(colour))]
    files += [(f"{key}.cls", str(label).encode())] if label is not None else []
    return files + ([(f"{key}.json", json.dumps(said).encode())] if said is not None else [])


@pytest.fixture
def make_tar() -> Callable[..., Path]:
    """``make_tar(path, files)``."""
    return write_tar
