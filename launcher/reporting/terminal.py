"""Output to a terminal or what stands in its place: lines, colours, and a block that stays below them."""

from __future__ import annotations

import os
import re
import select
import stat
import unicodedata
from collections.abc import Sequence

__all__ = ["LiveBlock", "Sink", "fit"]

_COLUMNS, _ROWS = 80, 24  # of a terminal of unknown size
_STYLE = re.compile(r"(\x1b\[[0-9;:]*m)")
# Of the escape sequences of workers only styles reach a terminal: others move the cursor, clear the screen or
# set modes that would outlive the job.
_SEQUENCE = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-OQ-WYZ`-~\\]|$)?"
)
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]")


class Sink:
    """A file descriptor for whole lines. Once its reader is gone, lines are dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.is_gone = False
        self.is_terminal = os.isatty(fd)
        self.can_redraw = self.is_terminal and os.environ.get("TERM") != "dumb"
        self.is_coloured = self.can_redraw and not os.environ.get("NO_COLOR")

    def write(self, data: bytes) -> None:
        while data and not self.is_gone:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                self.is_gone = True

    def write_lines(self, prefix: bytes, lines: Sequence[bytes]) -> None:
        """Write workers' lines; to a terminal without anything but text and styles."""
        if self.is_terminal:
            lines = [_printable(line) for line in lines]
        if self.is_coloured:
            lines = [line + b"\x1b[0m" if b"\x1b" in line else line for line in lines]
        self.write(b"".join(prefix + line + b"\n" for line in lines))

    def paint(self, text: str, style: int) -> str:
        """`text` in an ANSI style, if this is a terminal with colours."""
        return f"\x1b[{style}m{text}\x1b[0m" if self.is_coloured and style else text

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows, now."""
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            return _COLUMNS, _ROWS
        return columns or _COLUMNS, rows or _ROWS

    @property
    def is_foreground(self) -> bool:
        """True unless a shell has put this process in the background of its terminal."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # not its controlling terminal
            return True

    @property
    def is_piped(self) -> bool:
        """True for a pipe or socket, whose reader may write to the terminal, such as `| tee`."""
        try:
            mode = os.fstat(self._fd).st_mode
        except OSError:
            return False
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _printable(line: bytes) -> bytes:
    line = _SEQUENCE.sub(_styles_only, line)
    return _CONTROL.sub(b"?", line).decode(errors="replace").encode()


def _styles_only(sequence: re.Match[bytes]) -> bytes:
    text = sequence.group()
    return text if _STYLE.fullmatch(text.decode(errors="replace")) else b""


def fit(text: str, columns: int) -> tuple[str, int]:
    """As much of `text` as fits into `columns`, with all its styles, and the number of columns that it takes."""
    parts: list[str] = []
    used = 0
    for number, part in enumerate(_STYLE.split(text)):
        if number % 2:
            parts.append(part)
            continue
        for character in part:
            shown = character if character.isprintable() else "?"
            wide = _columns(shown)
            if used + wide > columns:
                columns = used  # nothing narrower after it either
                break
            parts.append(shown)
            used += wide
    return "".join(parts), used


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class LiveBlock:
    """Lines at the bottom of a terminal that are redrawn in place. All other output goes above them.

    The cursor stays on the line below, in the first column, and no mode of the terminal is changed: so a shell
    that gets the terminal back finds it as after any other output.
    """

    def __init__(self, sink: Sink, beside: Sink) -> None:
        self.lines: Sequence[str] = ()
        self.can_draw = sink.can_redraw and not beside.is_piped
        self._sink = sink
        self._drawn: tuple[str, ...] = ()
        self._widths: list[int] = []  # of the lines that are on the screen

    @property
    def is_drawn(self) -> bool:
        return bool(self._widths)

    def erase(self) -> None:
        """Remove the lines from the screen, until `refresh`."""
        self._sink.write(self._erasure())
        self._widths = []

    def refresh(self) -> None:
        """Draw the lines again if they have changed."""
        lines = tuple(self.lines)
        if not self.can_draw:
            return
        if not self._sink.is_foreground:
            self.forget()
        elif lines != self._drawn or bool(lines) != self.is_drawn:
            columns, rows = self._sink.size
            fitted = [fit(line, columns - 1) for line in lines[: max(0, rows - 2)]]
            text = "".join(f"{line}\n" for line, _ in fitted)
            self._sink.write(self._erasure() + text.encode(errors="replace"))
            self._widths = [width for _, width in fitted]
            self._drawn = lines

    def forget(self) -> None:
        """Leave what is on the screen there: another process has written below it."""
        self._widths = []

    def _erasure(self) -> bytes:
        """The sequence that clears the lines. A terminal that became narrower has wrapped them again."""
        columns, _ = self._sink.size
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        return f"\r\x1b[{rows}A\x1b[J".encode() if rows else b""
