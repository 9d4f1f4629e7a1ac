"""A small terminal: what is to be seen on a screen after the bytes that were written to it."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["Screen"]

_BEGUN = re.compile(r"\x1b(\[[\d;]*)?$")
_TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[([\d;]*)m|([\r\n])|([^\x00-\x1f\x7f])", re.DOTALL)


class Screen:
    """Understands printable text, CR, LF, colours, cursor up and erase below; refuses everything else."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]  # scrolled out ones included
        self.row, self.column = 0, 0
        self._begun = ""  # a sequence whose rest has not come yet

    def feed(self, text: str) -> None:
        text = self._begun + text
        begun = _BEGUN.search(text)
        self._begun = begun[0] if begun else ""
        text = text.removesuffix(self._begun)
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            assert token, f"not understood: {text[position : position + 20]!r}"
            position = token.end()
            self._dispatch(token)

    def _dispatch(self, token: re.Match[str]) -> None:
        if token[4] == "\r":
            self.column = 0
        elif token[4] == "\n":
            self._down()
        elif token[5]:
            self._print(token[5])
        elif token[2] == "A":
            top = max(0, len(self.lines) - self.rows)
            self.row = max(top, self.row - int(token[1] or 1))
        elif token[2] == "J":
            del self.lines[self.row + 1 :]
            del self.lines[self.row][self.column :]
        else:
            assert token[2] in (None, "m"), token[0]

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _print(self, character: str) -> None:
        if unicodedata.combining(character):
            return
        wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + wide > self.columns:
            self.column = 0
            self._down()
        line = self.lines[self.row]
        line += [" "] * (self.column - len(line))
        line[self.column : self.column + wide] = [character] + [""] * (wide - 1)
        self.column += wide

    def resize(self, columns: int) -> None:
        """Wrap lines that are too long now, as most terminals do."""
        lines = []
        for number, line in enumerate(self.lines):
            parts = [line[i : i + columns] for i in range(0, len(line), columns)] or [[]]
            lines += parts
            if number == self.row:
                row = len(lines) - 1
        self.columns, self.lines, self.row = columns, lines, row

    @property
    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]
