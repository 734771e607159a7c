"""What tests of data share: the corpus of image files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

CORPUS = Path(__file__).with_name("corpus.py")


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """The module ``corpus.py`` beside this file."""
    spec = importlib.util.spec_from_file_location("corpus", CORPUS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
