"""Tables and text, in pipes and on terminals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardckpt.cli.output import Column, print_table, printable
from shardckpt.format import records
from tests.shardckpt.cli.helpers import on_terminal


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b]0;x\x07\u202e\n") == "a\\x1b]0;x\\x07\\u202e\\n"
    assert printable("ü [bold]") == "ü [bold]"


def test_only_optional_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """If no row has anything in them: others stay, so that a column has one place in every listing."""
    columns = (Column("A", number=True), Column("B"), Column("C", optional=True), Column("D"))
    print_table(columns, [("1", "", "", "x"), ("20", "", "", "")])
    assert capsys.readouterr().out == " A  B  D\n 1     x\n20\n"


def test_a_pipe_gets_whole_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table((Column("A", wrap=True), Column("B", below=True)), [("a" * 300, "b " * 300)])
    assert f"{'a' * 300}  {('b ' * 300).rstrip()}" in capsys.readouterr().out


def test_a_terminal_gets_colours_and_no_markup(made: Path) -> None:
    """The newest checkpoint is highlighted."""
    out = on_terminal("ls", str(made))
    assert "\x1b[" in out
    assert re.search(r"\* +2 +150 ", plain(out))


def test_a_long_note_stands_below_its_row(run: Path) -> None:
    """Across the terminal, broken between words; the row itself stays one line."""
    words = " ".join(f"word{n}" for n in range(40))
    failed = run / "attempt-0002/step-00000200/failed.json"
    failed.write_bytes(records.encode({"id": "x", "error": words}))
    lines = plain(on_terminal("ls", str(run), columns=80)).splitlines()
    (row,) = [number for number, line in enumerate(lines) if " failed" in line]
    assert lines[row].rstrip().endswith("failed")
    assert all(line.startswith("    ") for line in lines[row + 1 :])
    assert " ".join(line.strip() for line in lines[row + 1 :]) == words
    assert len(lines[row + 1 :]) == 4
    assert max(map(len, lines)) <= 80
    assert "NOTE" not in lines[0]


def test_names_are_broken_at_their_dots_and_slashes(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    """And at nothing else, where the terminal is too narrow; numbers and shapes stay whole."""
    del capsys
    lines = plain(on_terminal("info", str(run), "--select", "model/0*", columns=50)).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("TENSOR"))) :]
    assert max(map(len, table)) <= 50
    assert any(line.startswith("model/0.weight") or line.startswith("model/") for line in table)


def plain(text: str) -> str:
    """What a terminal shows, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")
