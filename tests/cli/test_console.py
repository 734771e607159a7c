"""What is printed where: tables, remarks, progress, and the one JSON object."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console as RichConsole

from tlkit.cli import console as console_module
from tlkit.cli.console import Console

AWKWARD = ["[red]x[/red]", "[/]", "[bold", ":smile:", "a\\[b]", "ends in \\", "\\", "größe 日本", "[link=x]y[/link]"]


class Clock:
    """A clock that only moves when told."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


@pytest.mark.parametrize("name", AWKWARD)
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say(name)
    console.warn(name)
    console.progress(name, 3, 3)
    console.line(name)
    console.table(name, [name, "other"], [[name, 1]])
    printed = capsys.readouterr()
    said, noted, progress = printed.err.splitlines()
    assert (said, noted) == (name, f"note: {name}")
    assert progress.startswith(f"{name}: 3/3, ")
    line, title, header, _, row = (text.rstrip() for text in printed.out.splitlines())
    assert (line, title) == (name, name)
    assert header.startswith(f"{name} ") and row.startswith(f"{name} ")


def test_a_name_in_the_bar_is_printed_as_it_is() -> None:
    console, screen = Console(), io.StringIO()
    console._err = RichConsole(file=screen, force_terminal=True, width=100, color_system=None)
    console.progress("[red] :smile:", 1, 2)
    console.progress("[red] :smile:", 2, 2)
    assert "[red] :smile:" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    assert console._bars is None, "the live display has ended"


def test_two_bars_at_once_end_with_the_last() -> None:
    console, screen = Console(), io.StringIO()
    console._err = RichConsole(file=screen, force_terminal=True, width=100, color_system=None)
    console.progress("read", 1, 1000)
    console.progress("write", 5, 5)
    assert console._bars is not None
    console.close()
    console.close()
    assert console._bars is None


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_screen_and_lose_nothing(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    paths = ["/".join(f"folder{i}" for i in range(20)), "short.jpg"]
    Console().table("Files", ["path", "top1", "note"], [[path, 0.5, "some words on it " * 6] for path in paths])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= columns
    first_column = "".join(line.split("│")[0].strip() for line in lines if "│" in line)
    assert first_column == "".join(paths)
    assert "…" not in "".join(lines)


def test_numbers_stand_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("", ["class", "images", "top1"], [["cat", 5, 0.25], ["dog", 1000, 1.0]])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [["cat", "5", "0.250"], ["dog", "1000", "1.000"]]
    assert rows[0][1].index("5") == rows[1][1].rindex("0")


def test_a_title_longer_than_its_table_stays_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("Images per class and split", ["a"], [["b"]])
    assert capsys.readouterr().out.splitlines()[0] == "Images per class and split"


def test_what_is_not_there_is_a_dash_and_an_empty_table_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("Rows", ["a", "b"], [[None, 1]])
    assert "- " in capsys.readouterr().out
    Console().table("Rows", ["a", "b"], [])
    assert "Rows" in capsys.readouterr().out


def test_progress_is_plain_lines_every_few_seconds_where_there_is_no_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console()
    for done in range(101):
        clock.now = done * 0.125
        console.progress("read", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "read: 40/100, 8/s, 8 s left",
        "read: 80/100, 8/s, 2 s left",
        "read: 100/100, 8/s",
    ]


def test_a_second_piece_of_work_of_the_same_name_starts_at_its_own_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console()
    for start in (0.0, 100.0):
        clock.now = start
        console.progress("read", 0, 10)
        clock.now = start + 1
        console.progress("read", 10, 10)
    assert capsys.readouterr().err.splitlines() == ["read: 10/10, 10/s"] * 2


def test_quiet_keeps_the_result_and_what_changes_how_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("working")
    console.progress("read", 1, 1)
    console.warn("3 files were skipped")
    console.line("result")
    printed = capsys.readouterr()
    assert printed.err == "note: 3 files were skipped\n"
    assert printed.out == "result\n"


def test_json_is_one_object_and_nothing_else_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    console.say("working")
    console.table("t", ["a"], [[1]])
    console.line("human")
    console.result({"name": "größe [red]\nline", "top1": 0.5})
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert json.loads(printed.out) == {"name": "größe [red]\nline", "top1": 0.5}
    assert printed.err == "working\n"


def test_no_json_is_printed_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result({"a": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_other_languages_cannot_read_is_never_written(
    value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Console(json=True).result({"loss": value})
    assert capsys.readouterr().out == ""


def test_the_commands_protocol_is_what_the_console_offers() -> None:
    import inspect

    from tlkit.commands.console import Console as Offered

    methods: dict[str, Any] = {name: what for name, what in vars(Offered).items() if inspect.isfunction(what)}
    spoken = {name: what for name, what in methods.items() if not name.startswith("_")}
    assert set(spoken) == {"say", "warn", "progress", "table", "text", "line"}
    for name, method in spoken.items():
        assert inspect.signature(method) == inspect.signature(getattr(Console, name))
