"""Of parts of a batch in several processes comes what comes of the whole in one, to the digits of a double."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("numerics.py")


@pytest.fixture(scope="module")
def numerics() -> ModuleType:
    spec = importlib.util.spec_from_file_location("numerics", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(together: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numerics")
    for done in together(SCRIPT, folder):
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> list[dict[str, np.ndarray]]:
    """What each of two processes has."""
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(numerics: ModuleType) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = numerics.everything()
    return made


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_batch_norm_of_uneven_parts_is_that_of_the_whole(found: Any, alone: Any, kind: str) -> None:
    for name in ("outputs", "inputs"):
        joined = np.concatenate([found[rank][f"{kind} {name}"] for rank in range(2)])
        np.testing.assert_allclose(joined, alone[f"{kind} {name}"], rtol=1e-9, atol=1e-9)
    for rank in range(2):
        for name in ("weight", "bias", "mean", "var"):
            np.testing.assert_allclose(found[rank][f"{kind} {name}"], alone[f"{kind} {name}"], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["mmd", "jmmd", "coral", "mcc", "dann", "cdan"])
def test_a_step_of_adaptation_is_that_of_the_whole_batch(found: Any, alone: Any, name: str) -> None:
    keys = [key for key in alone if key.startswith(f"{name} ")]
    assert len(keys) >= 9
    for key in keys:
        for rank in range(2):
            np.testing.assert_allclose(found[rank][key], alone[key], rtol=1e-7, atol=1e-10, err_msg=key)


def test_what_processes_tell_each_other(out: Path, numerics: ModuleType) -> None:
    told = [ast.literal_eval((out / f"{rank}.txt").read_text()) for rank in range(2)]
    both = {"gathered": [0, 1], "highest": 3, "first": 10}
    both |= {f"fails in the {which}": "list index out of range" for which in ("first", "second")}
    assert told == [both | {"each": 20, "share": [0, 1]}, both | {"each": 21, "share": [2, 3, 4]}]
    single = {"gathered": [0], "highest": 3, "first": 10, "each": 20, "share": [0, 1, 2, 3, 4]}
    single |= {"fails in the first": "list index out of range", "fails in the second": None}
    assert numerics.talk() == single
