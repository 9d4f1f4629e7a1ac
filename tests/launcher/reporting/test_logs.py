"""Lines out of bytes, and out of files that grow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.reporting.logs import Lines, Tail


def cut(chunks: list[bytes]) -> list[bytes]:
    lines = Lines()
    return [line for chunk in chunks for line in lines.feed(chunk)] + lines.flush()


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"\n", b"\r", b"\xff"])).map(b"".join)))
def test_lines_do_not_depend_on_how_the_bytes_come(chunks: list[bytes]) -> None:
    assert cut(chunks) == cut([b"".join(chunks)])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"\r10%\r20%\r30%\n", [b"30%"]),
        (b"\r10%\r20%", [b"20%"]),
        (b"\r", []),
        (b"", []),
    ],
)
def test_lines(data: bytes, lines: list[bytes]) -> None:
    assert cut([data]) == lines


def test_a_progress_bar_is_known_as_such() -> None:
    lines = Lines()
    lines.feed(b"text")
    assert lines.drawn == b""
    lines.feed(b"\r 10%\r 20%")
    assert lines.drawn == b" 20%"
    lines.feed(b"\n")
    assert lines.drawn == b""


def test_endless_lines_are_cut() -> None:
    """Memory stays bounded, and no byte is lost."""
    data = b"x" * (Lines.LIMIT * 2 + 10)
    lines = cut([data[i : i + 60_000] for i in range(0, len(data), 60_000)])
    assert len(lines) >= 2
    assert b"".join(lines) == data


def test_tail_reads_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb")
    tail = Tail(path)
    assert [line for lines in tail.read() for line in lines] == [b"a"]
    with path.open("ab") as file:
        file.write(b"c\n" + b"d\n" * Tail.CHUNK)
    assert [line for lines in tail.read() for line in lines] == [b"bc"] + [b"d"] * Tail.CHUNK
    tail.close()
