"""Carries out several command lines one after another in a process of a job, and notes what only it knows.

    worker.py COMMANDS.json OUT

COMMANDS: a list of lists of words. OUT/RANK.json: for each command its exit code, what it printed, the rows that each
step of training saw, and the weights after each phase, before anything is made the same.
"""

import contextlib
import faulthandler
import io
import json
import sys
from pathlib import Path

import tlkit.data.batches
from tlkit import processes
from tlkit.cli.app import run
from tlkit.networks.weights import fingerprint
from tlkit.training.trainer import Trainer

faulthandler.dump_traceback_later(480, exit=True)  # where one waits for the other, if it does
commands, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
noted = []


def batches(self):
    for batch in drawn(self):
        noted[-1]["rows"].append(batch)
        yield batch


def equalise(self):
    noted[-1]["weights"].append(fingerprint(self.network))
    made_equal(self)


drawn, tlkit.data.batches.BatchSampler.__iter__ = tlkit.data.batches.BatchSampler.__iter__, batches
made_equal, Trainer._equalise = Trainer._equalise, equalise
processes.leave = lambda: None  # the processes stay together for the next command
for command in commands:
    noted.append({"rows": [], "weights": []})
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        code = run(command)
    noted[-1] |= {"code": code, "out": printed.getvalue(), "err": told.getvalue()}
(out / f"{processes.rank()}.json").write_text(json.dumps(noted))
