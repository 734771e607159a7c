"""What is wrong in a pipeline file is told before anything is run, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlkit.errors import TlkitError
from tlkit.pipelines.command import FILES, PLAIN, RUNS, Command

Read = Callable[[str], tuple[Any, ...]]

MISTAKES = {
    "nothing in it": ("", "no steps"),
    "a list of steps": ("steps: [pretrain]", "no steps"),
    "no YAML": ("steps: [", "not a YAML file"),
    "unknown key": ("step: {}\nsteps: {doctor: {}}", "unknown key 'step'; did you mean 'steps'?"),
    "unknown command": ("steps: {pretrian: {data: photos}}", "did you mean 'pretrain'? or give 'command:'"),
    "unknown command given": ("steps: {a: {command: pretrian}}", "called 'pretrian'; did you mean 'pretrain'?"),
    "a pipeline as a step": ("steps: {run: {pipeline: night.yaml}}", "no command of a step is called 'run'"),
    "unknown option": ("steps: {pretrain: {data: photos, epoch: 3}}", "unknown key 'epoch'; did you mean 'epochs'?"),
    "mistyped key of steps": ("steps: {pretrain: {data: photos, matirx: {}}}", "did you mean 'matrix'?"),
    "bad value": ("steps: {pretrain: {data: photos, epochs: 0}}", "step 'pretrain': key 'epochs': 0 is too small"),
    "bad type": ("steps: {pretrain: {data: photos, epochs: few}}", "key 'epochs' has a value of the wrong type"),
    "bad choice": ("steps: {pretrain: {data: photos, schedule: cosin}}", "did you mean 'cosine'?"),
    "given by the pipeline": ("steps: {pretrain: {data: photos, out: a}}", "key 'out' is given by the pipeline"),
    "no data": ("steps: {pretrain: {epochs: 1}}", "'data' is missing, which pretrain needs; give 'data:'"),
    "no model": ("steps: {evaluate: }", "'model' is missing, which evaluate needs"),
    "missing folder": ("steps: {pretrain: {data: photo}}", "key 'data': there is no photo; check the path"),
    "a step twice": ("steps:\n  doctor:\n  doctor:\n", "line 3: 'doctor' is given twice"),
    "an option twice": ("steps:\n  pretrain:\n    data: photos\n    data: other\n", "line 4: 'data' is given twice"),
    "name with a dot": ("steps: {a.b: {command: doctor}}", "a step cannot be called so"),
    "name of the environment": ("steps: {env: {command: doctor}}", "a step cannot be called so"),
    "a step as text": ("steps: {pretrain: photos}", "a step is a mapping"),
    "no number of processes": ("steps: {pretrain: {data: photos, processes: two}}", "processes: 'two' is no number"),
    "recipe not there": ("steps: {pretrain: {recipe: no.yaml}}", "no.yaml: the recipe cannot be read"),
    "forward": (
        "steps: {evaluate: {model: '${pretrain.run}'}, pretrain: {data: photos}}",
        "night.yaml, step 'evaluate': ${pretrain.run} refers to a step that comes later;"
        " put 'pretrain' before 'evaluate'",
    ),
    "to itself": ("steps: {evaluate: {model: '${evaluate.run}'}}", "refers to the step itself"),
    "unknown reference": (
        "steps: {pretrain: {data: photos}, evaluate: {model: '${pretran.run}'}}",
        "${pretran.run} refers to an unknown step; did you mean 'pretrain'?",
    ),
    "not whole": ("steps: {evaluate: {model: '${pretrain'}}", "a reference that is not whole; write ${STEP.FIELD}"),
    "no field": ("steps: {evaluate: {model: '${pretrain}'}}", "a reference that is not whole"),
    "no run": (
        "steps: {extract-features: {data: photos}, evaluate: {model: '${extract-features.run}'}}",
        "extract-features gives no 'run'; did you mean 'out'?",
    ),
    "in a list": ("steps: {predict: {model: resnet18, paths: ['${a.out}']}}", "refers to an unknown step"),
    "in a matrix": ("steps: {evaluate: {matrix: {model: ['${a.run}']}}}", "refers to an unknown step"),
    "environment": ("steps: {pretrain: {data: '${env.TLKIT_NOT_THERE}'}}", "no such environment variable"),
    "a matrix of one value": ("steps: {pretrain: {data: photos, matrix: {seed: 3}}}", "'seed' has no list of values"),
    "an axis without values": ("steps: {pretrain: {data: photos, matrix: {seed: []}}}", "'seed' has no list of values"),
    "a matrix as text": ("steps: {pretrain: {data: photos, matrix: seed}}", "a matrix is a mapping"),
    "unknown axis": ("steps: {pretrain: {data: photos, matrix: {seeds: [0]}}}", "did you mean 'seed'?"),
    "bad value in a matrix": ("steps: {pretrain: {data: photos, matrix: {epochs: [1, 0]}}}", "0 is too small"),
    "value twice": ("steps: {pretrain: {data: photos, matrix: {lr: [0.1, '0.1']}}}", "'lr' has the value 0.1 twice"),
    "varied and given": (
        "steps: {pretrain: {data: photos, seed: 1, matrix: {seed: [0, 1]}}}",
        "key 'seed' is given beside the matrix that varies it",
    ),
    "axis of no step": (
        "matrix: {sed: [1]}\nsteps: {pretrain: {data: photos}}",
        "'sed' is an option of no step; did you mean 'seed'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(read: Read, mistake: str) -> None:
    text, told = MISTAKES[mistake]
    with pytest.raises(TlkitError) as caught:
        read(text)
    assert told in str(caught.value)
    assert str(caught.value).startswith(("night.yaml", "no.yaml"))
    assert caught.value.remedy


def test_no_such_file(commands: dict[str, Command], read: Read) -> None:
    from tlkit.pipelines.reading import read_pipeline

    with pytest.raises(TlkitError, match=r"no\.yaml: the pipeline cannot be read"):
        read_pipeline(Path("no.yaml"), commands, Path)


def test_steps_are_commands_with_their_options(read: Read) -> None:
    first, second = read(
        "steps:\n  base model: {command: pretrain, data: photos, lr: 0.1}\n"
        "  unfreeze: {data: photos, from: '${base model.run}', epochs-per-stage: 2, processes: 2}\n"
    )
    assert (first.name, first.command.name, first.values) == ("base model", "pretrain", {"data": "photos", "lr": "0.1"})
    assert second.values == {"data": "photos", "from_": "${base model.run}", "epochs_per_stage": 2}
    assert second.processes == 2


def test_a_recipe_gives_what_the_step_does_not(read: Read) -> None:
    Path("mine.yaml").write_text("command: pretrain\nepochs: 7\nlr: 0.5\ngroup_regex: '${literally}'\n")
    (step,) = read("steps: {pretrain: {recipe: mine.yaml, data: photos, lr: 0.1}}")
    assert step.values == {"epochs": 7, "lr": "0.1", "data": "photos", "group_regex": "$${literally}"}


def test_variables_of_the_environment(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITS", "photos")
    (step,) = read("steps: {pretrain: {data: '${env.DIGITS}'}}")
    assert step.values["data"] == "photos"


@pytest.mark.parametrize("given", ["matrix: {}", "matrix:"])
def test_an_empty_matrix_is_none(read: Read, given: str) -> None:
    (step,) = read(f"{given}\nsteps:\n  pretrain:\n    data: photos\n    {given}\n")
    assert step.axes == ()


def test_every_command_has_a_place_for_its_result(commands: dict[str, Command]) -> None:
    assert sorted(commands) == sorted([*RUNS, *FILES, *PLAIN]), "say in pipelines/command.py what --out of it is"
    assert {name for name, command in commands.items() if command.resumes} == {
        *("adapt", "finetune", "pretrain", "unfreeze")
    }
