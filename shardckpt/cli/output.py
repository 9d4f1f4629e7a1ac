"""Output: tables, JSON documents, progress. Rich is imported for terminals only."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self

from shardckpt.formatting import size

__all__ = [
    "Column",
    "Progress",
    "print_fields",
    "print_json",
    "print_result",
    "print_table",
    "printable",
]

_SHOW_AFTER = 0.7
"""Seconds after which a progress bar appears."""

_MOST_STYLED = 2000
"""Rows above which a table is plain even on a terminal: rich takes about a second for as many lines."""

_GAP = "  "
_INDENT = "    "
_NARROW = 24
"""Characters below which no column is wrapped."""
_PIECE = re.compile(r"(?:[^\s/.]|\.(?=\d))*(?:[\s/]|\.(?!\d))*")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        number: whether it is aligned to the right.
        style: of its cells on a terminal, as rich writes styles.
        wrap: whether its cells may take several lines where the terminal is too narrow.
        optional: whether it is left out if it is empty in every row.
        below: for the last column: where the terminal is too narrow, its cells stand below their rows.
    """

    title: str
    number: bool = False
    style: str = ""
    wrap: bool = False
    optional: bool = False
    below: bool = False


def print_json(document: Any) -> None:
    """Print one JSON document; NaN and infinities, which JSON lacks, become text."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def print_result(document: Any, text: str, *, as_json: bool) -> None:
    """Print the result of a command: the JSON document, or the line for people."""
    if as_json:
        print_json(document)
    else:
        print(printable(text))


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values, aligned. Lines are not wrapped: a URL can be copied whole."""
    width = max((len(name) for name, _ in fields), default=0)
    rows = [(f"{name:<{width}}", printable(text)) for name, text in fields]
    if not sys.stdout.isatty():
        for name, text in rows:
            print(f"{name}  {text}")
        return
    from rich.text import Text

    console = _console()
    for name, text in rows:
        console.print(Text.assemble((name, "dim"), "  ", text), soft_wrap=True)


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """Print rows under titles, aligned.

    A terminal gets styles, and rows that fit its width as far as the columns permit; a pipe gets one line a row,
    however long.

    Args:
        columns: one for each cell of a row.
        rows: the cells.
        styles: one for each row, as rich writes styles; for terminals.
    """
    used = [i for i, column in enumerate(columns) if not column.optional or any(row[i] for row in rows)]
    columns = [columns[i] for i in used]
    cells = [[printable(row[i]) for i in used] for row in rows]
    if not sys.stdout.isatty() or len(rows) > _MOST_STYLED:
        for line in _lines(columns, [[column.title for column in columns], *cells]):
            print(line)
        return
    _print_styled(columns, cells, styles or [""] * len(cells))


def printable(text: str) -> str:
    """The text with control characters escaped, so that a terminal does not interpret them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class Progress:
    """A progress bar of bytes on stderr, if that is a terminal and the command takes longer than a moment."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._bar: Any = None
        self._task: Any = None
        self._lock = threading.Lock()
        self._state = (0, 0)
        self._timer = threading.Timer(_SHOW_AFTER, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Update the bar: bytes done, and bytes in all (0 if unknown)."""
        with self._lock:
            self._state = (done, total)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, total=total or None)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar
        from rich.text import Text

        class Speed(ProgressColumn):
            """Bytes per second in the same units as everywhere; rich's own column has powers of 1000."""

            def render(self, task: Task) -> Text:
                return Text("" if task.speed is None else f"{size(int(task.speed))}/s")

        with self._lock:
            if self._timer.finished.is_set():
                return
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                Speed(),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            done, total = self._state
            self._task = self._bar.add_task(self._doing, completed=done, total=total or None)
            self._bar.start()


def _lines(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as one line, with the cells of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(columns, row, widths) for row in rows]


def _line(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        text.rjust(width) if column.number else text.ljust(width)
        for text, width, column in zip(row, widths, columns, strict=True)
    )
    return _GAP.join(cells).rstrip()


def _print_styled(columns: Sequence[Column], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
    """Print a table that fits the terminal as far as its columns permit."""
    from rich.text import Text

    console = _console()
    titles = [column.title for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    last = columns[-1]
    is_below = last.below and _total(widths) > console.width
    if is_below:
        columns, titles, widths = columns[:-1], titles[:-1], widths[:-1]
    _shrink(columns, widths, console.width)
    console.print(Text(_line(columns, titles, widths), "bold"), soft_wrap=True)
    for row, style in zip(rows, styles, strict=True):
        cells = [_wrapped(text, width) for text, width in zip(row, widths, strict=False)]
        for parts in zip_longest(*cells, fillvalue=""):
            text = Text(_line(columns, parts, widths), style)
            if last.style and not is_below:
                text.stylize(last.style, len(text) - len(parts[-1]))
            console.print(text, soft_wrap=True)
        for line in _wrapped(row[-1], console.width - len(_INDENT)) if is_below and row[-1] else ():
            console.print(Text(_INDENT + line, last.style), soft_wrap=True)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _shrink(columns: Sequence[Column], widths: list[int], available: int) -> None:
    """Take width from the columns that may wrap, the widest first, until the table fits or they are narrow."""
    while (excess := _total(widths) - available) > 0:
        candidates = [i for i, column in enumerate(columns) if column.wrap and widths[i] > _NARROW]
        if not candidates:
            return
        widest = max(candidates, key=lambda i: widths[i])
        widths[widest] = max(_NARROW, widths[widest] - excess)


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken after spaces, slashes and dots of names where it can be."""
    if len(text) <= width:
        return [text]
    lines = [""]
    for piece in _PIECE.findall(text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        rest = piece
        while len(rest.rstrip()) > width:
            lines[-1:] = [rest[:width], ""]
            rest = rest[width:]
        lines[-1] += rest
    return [line.rstrip() for line in lines]


def _console() -> Any:
    from rich.console import Console

    return Console(width=max(40, shutil.get_terminal_size().columns), highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
