"""Cells of matrices, and what the names of their folders depend on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlkit.pipelines.cells import Cell, cells_of
from tlkit.pipelines.inputs import fingerprint

Read = Callable[[str], tuple[Any, ...]]
TWO = "steps:\n  pretrain: {data: photos, epochs: 3}\n  evaluate: {model: '${pretrain.run}'}\n"


@pytest.fixture
def cells(read: Read) -> Callable[[str], list[Cell]]:
    return lambda text: cells_of(read(text), Path("runs"))


Cells = Callable[[str], list[Cell]]


def test_a_step_follows_the_matrix_of_what_it_refers_to(cells: Cells) -> None:
    found = cells(
        "steps:\n  pretrain: {data: photos, matrix: {lr: [0.1, 0.2], seed: [0, 1]}}\n"
        "  evaluate: {model: '${pretrain.run}', matrix: {tta: [center, flip]}}\n"
    )
    assert [cell.label for cell in found] == [
        *(f"pretrain lr={lr} seed={seed}" for lr in (0.1, 0.2) for seed in (0, 1)),
        *(
            f"evaluate lr={lr} seed={seed} tta={tta}"
            for tta in ("center", "flip")
            for lr in (0.1, 0.2)
            for seed in (0, 1)
        ),
    ]
    for cell in found[4:]:
        (needed,) = cell.needs["pretrain", False]
        assert cell.setting == needed.setting | {"tta": cell.values["tta"]}
        assert "lr" not in cell.values and "seed" not in cell.values
    assert len({cell.folder for cell in found}) == 12


def test_the_pipelines_matrix_is_of_all_steps_that_have_the_option(cells: Cells) -> None:
    found = cells(
        "matrix: {seed: [0, 1], epochs: [1, 2]}\n"
        "steps:\n  pretrain: {data: photos}\n  finetune: {data: photos, model: '${pretrain.run}', epochs: 5}\n"
        "  doctor:\n"
    )
    assert [cell.label for cell in found if cell.step.name == "pretrain"] == [
        f"pretrain seed={seed} epochs={epochs}" for seed in (0, 1) for epochs in (1, 2)
    ]
    finetuned = [cell for cell in found if cell.step.name == "finetune"]
    assert len(finetuned) == 4, "a seed is the same in both steps"
    for cell in finetuned:
        assert cell.values["seed"] == cell.needs["pretrain", False][0].values["seed"]
        assert cell.values["epochs"] == 5
    assert [cell.label for cell in found if cell.step.name == "doctor"] == ["doctor"]


def test_two_steps_that_vary_the_same_option_are_told_apart(cells: Cells) -> None:
    found = cells(
        "steps:\n  a: {command: pretrain, data: photos, matrix: {lr: [1, 2]}}\n"
        "  b: {command: finetune, data: photos, model: '${a.run}', matrix: {lr: [3]}}\n"
    )
    assert [cell.label for cell in found[2:]] == ["b a.lr=1 b.lr=3", "b a.lr=2 b.lr=3"]


def test_values_that_refer_to_different_steps(cells: Cells) -> None:
    found = cells(
        "steps:\n  a: {command: pretrain, data: photos}\n  b: {command: pretrain, data: photos, seed: 1}\n"
        "  c: {command: evaluate, matrix: {model: ['${a.run}', '${b.run}']}}\n"
        "  d: {command: compare, models: ['${c.run}', resnet18]}\n  e: {command: compare, models: ['${c.*.run}']}\n"
    )
    assert [cell.label for cell in found[2:]] == [
        "c model=a.run",
        "c model=b.run",
        "d model=a.run",
        "d model=b.run",
        "e",
    ]
    assert [cell.step.name for cell in found[2].needs["a", False]] == ["a"]
    assert found[-1].needs == {("c", True): (found[2], found[3])}


def test_what_changes_the_digest_and_what_does_not(cells: Cells) -> None:
    def digests(text: str) -> list[str]:
        return [cell.digest for cell in cells(text)]

    pretrain, evaluate = digests(TWO)
    assert digests("# other words\n" + TWO) == [pretrain, evaluate]
    assert digests(TWO.replace("epochs: 3", "epochs: 3, workers: 1")) == [pretrain, evaluate]
    assert digests(TWO.replace("epochs: 3", "epochs: 3, checkpoint_every: 1min")) == [pretrain, evaluate]
    assert digests(TWO.replace("photos", "photos/")) == [pretrain, evaluate]
    other = digests(TWO.replace("epochs: 3", "epochs: 4"))
    assert other[0] != pretrain and other[1] != evaluate
    other = digests(TWO.replace("run}'", "run}', tta: flip"))
    assert other[0] == pretrain and other[1] != evaluate
    Path("photos", "b.png").write_text("b")
    more = digests(TWO)
    assert more[0] != pretrain and more[1] != evaluate
    os.utime("photos/b.png", (1, 1))
    assert digests(TWO)[0] != more[0]


def test_the_pipelines_own_folder_is_no_input(read: Read) -> None:
    steps = read("steps: {check-data: {data: .}}")
    before = cells_of(steps, Path("runs"))[0].digest
    Path("runs").mkdir()
    Path("runs", "new").write_text("new")
    assert cells_of(steps, Path("runs"))[0].digest == before
    assert cells_of(steps, Path("elsewhere"))[0].digest != before


@pytest.mark.parametrize("value", ["ä ö", "a/../b", "..", "$${x.y}", "'", "x" * 300, "\U0001f41d" * 90, "a\nb"])
def test_folders_of_hostile_values_are_plain_names(read: Read, value: str) -> None:
    import yaml

    text = yaml.safe_dump(
        {"steps": {"süße katze": {"command": "pretrain", "data": "photos", "matrix": {"optimizer": [value]}}}}
    )
    (cell,) = cells_of(read(text), Path("runs"))
    assert Path(cell.folder).name == cell.folder and not cell.folder.startswith((".", "-"))
    assert len(cell.folder.encode()) < 200
    Path("runs", cell.folder).mkdir(parents=True)


def test_shards_are_told_by_what_is_there(tmp_path: Path) -> None:
    """Of those at a URL nothing is known here."""
    for number in range(2):
        (tmp_path / f"a-{number}.tar").write_bytes(b"x")
    pattern, without = f"{tmp_path}/a-{{0..1}}.tar", tmp_path / "none"
    before = fingerprint(pattern, without)
    assert before and before == fingerprint(f"{tmp_path}/a-{{0,1}}.tar", without)
    (tmp_path / "a-1.tar").write_bytes(b"xy")
    assert fingerprint(pattern, without) != before
    assert fingerprint(f"{tmp_path}/b-{{0..1}}.tar", without) == ""
    assert fingerprint("https://host/a-{0..1}.tar", without) == ""
