"""What a person or a script sees: progress and remarks on stderr, the result on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0


class Console:
    """Prints for one command.

    Lower layers never import this: they take `progress` and `say` as plain callables. What is printed is wrapped in
    `Text`, never read as markup: names of files may look like it.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, mute: bool = False) -> None:
        """``mute`` is for all but the first of several processes that do the same: nothing is printed at all."""
        self.json, self.quiet, self.mute = json or mute, quiet or mute, mute
        self._out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._err = RichConsole(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def say(self, line: str) -> None:
        """One remark for the person who waits; not part of the result."""
        if not self.quiet:
            self._err.print(Text(line))

    def warn(self, line: str) -> None:
        """A remark that changes how the result is to be read: shown even when quiet."""
        if self.mute:
            return
        self._err.print(Text.assemble(("note:", "yellow"), " ", line))

    def progress(self, label: str, done: int, total: int) -> None:
        """Tell how far a piece of work is, in images; ``done == total`` ends it."""
        if self.quiet:
            return
        if self._err.is_terminal:
            self._advance_bar(label, done, total)
        else:
            self._print_line(label, done, total)

    def _advance_bar(self, label: str, done: int, total: int) -> None:
        if self._bars is None:
            name, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
            columns = (name, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self._bars = Progress(*columns, console=self._err)
            self._bars.start()
        if label not in self._tasks:
            self._started[label] = time.monotonic()
            self._tasks[label] = self._bars.add_task(label, total=total, rate="")
        self._bars.update(self._tasks[label], completed=done, rate=f"{self._rate(label, done):.0f}/s")
        if done >= total:
            self._bars.update(self._tasks.pop(label), rate=f"{self._rate(label, done):.0f}/s")
            if not self._tasks:
                self.close()

    def _print_line(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        started = self._started.setdefault(label, now)
        if done < total and now - self._printed.get(label, started) < SECONDS_BETWEEN_LINES:
            return
        self._printed[label] = now
        rate = self._rate(label, done)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate else ""
        self._err.print(Text(f"{label}: {done}/{total}, {rate:.0f}/s{left}"))
        if done >= total:
            del self._started[label], self._printed[label]

    def _rate(self, label: str, done: int) -> float:
        return done / max(time.monotonic() - self._started[label], 1e-6)

    def close(self) -> None:
        """End the live display, so that what follows starts on a line of its own."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of the result; numbers stand on the right."""
        if self.json:
            return
        if title:
            self._out.print(Text(title, "bold"))  # not the table's own title, which is folded to the table's width
        table = Table(show_edge=False, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._out.print(table)

    def line(self, text: str = "") -> None:
        """A line of the human result."""
        if not self.json:
            self._out.print(Text(text))

    def text(self, text: str) -> None:
        """The result in a form for other programs, which nothing is added to and no line of which is folded."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def result(self, summary: dict[str, Any]) -> None:
        """The one JSON object of ``--json``."""
        if self.json and not self.mute:
            sys.stdout.write(json.dumps(summary, ensure_ascii=False, allow_nan=False) + "\n")
            sys.stdout.flush()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(_NUMBER.fullmatch(value)))


_NUMBER = re.compile(r"-|[0-9][0-9,.]*( [kMGT]?|%)?")  # a dash where there is none


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
