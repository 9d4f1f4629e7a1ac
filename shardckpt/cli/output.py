"""What the command prints: tables, one JSON document, progress. Rich is imported for terminals only."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

__all__ = ["Column", "Progress", "print_fields", "print_json", "print_table", "printable"]

_SHOW_AFTER = 0.7
"""Seconds after which a progress bar appears."""

_MOST_STYLED = 2000
"""Rows above which a table is plain even on a terminal: measuring each cell takes rich seconds."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, whether it holds numbers, and its style on a terminal."""

    title: str
    number: bool = False
    style: str = ""
    wrap: bool = False


def print_json(document: Any) -> None:
    """Print one JSON document; numbers that JSON lacks become text."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and what they stand for, aligned."""
    width = max((len(name) for name, _ in fields), default=0)
    if not sys.stdout.isatty():
        for name, text in fields:
            print(f"{name:<{width}}  {printable(text)}")
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in fields:
        table.add_row(name, _text(text))
    _console().print(table)


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """Print rows under titles; with rich on a terminal, else aligned by spaces, one line for each row.

    A column that is empty in every row is left out. `styles` has one for each row.
    """
    used = [i for i, _ in enumerate(columns) if any(row[i] for row in rows)]
    columns = [columns[i] for i in used]
    cells = [[printable(row[i]) for i in used] for row in rows]
    if not sys.stdout.isatty() or len(rows) > _MOST_STYLED:
        _print_plain(columns, cells)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.number else "left",
            style=column.style,
            no_wrap=not column.wrap,
            overflow="fold",
        )
    for number, row in enumerate(cells):
        table.add_row(*map(_text, row), style=styles[number] if styles else "")
    _console().print(table)


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class Progress:
    """A progress bar of bytes on stderr, if that is a terminal and it takes longer than a moment."""

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
        """Tell how far it is."""
        with self._lock:
            self._state = (done, total)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, total=total or None)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        with self._lock:
            if self._timer.finished.is_set():
                return
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
            done, total = self._state
            self._task = self._bar.add_task(self._doing, completed=done, total=total or None)
            self._bar.start()


def _print_plain(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip([c.title for c in columns], *cells, strict=True)]
    for row in ([c.title for c in columns], *cells):
        line = (
            text.rjust(width) if column.number else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(line).rstrip())


def _console() -> Any:
    from rich.console import Console

    return Console(width=max(40, shutil.get_terminal_size().columns), highlight=False)


def _text(text: str) -> Any:
    """Text that rich does not search for markup."""
    from rich.text import Text

    return Text(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
