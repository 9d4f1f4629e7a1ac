"""The same traceback of many ranks, shown once."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["Repeats"]

_MARK = rb"^\[rank\d+\]: "  # torch writes it before each line of an uncaught exception
_MOST = 100  # tracebacks that are remembered
_TOLD = 8  # ranks of which each is said to have written the same traceback


class Repeats:
    """Passes on the lines that ranks write; of a traceback that another rank has written before only its error.

    Numbers in the error, as ports and ranks are, may differ. If many ranks have written it, not even the errors
    of all are passed on, which is told. The lines of a traceback are held until its last one has come.
    """

    def __init__(self) -> None:
        self._seen: dict[
            tuple[bytes, ...], list[int]
        ] = {}  # tracebacks, and the ranks that have written them
        self._held: dict[int, list[bytes]] = {}

    def sift(self, rank: int, lines: Sequence[bytes]) -> list[bytes]:
        """What is to be shown, now that `rank` has written `lines`."""
        shown: list[bytes] = []
        for line in lines:
            plain = re.sub(_MARK, b"", line)
            if rank in self._held:
                self._held[rank].append(line)
                if plain and not plain[:1].isspace():
                    shown += self._end(rank)
            elif plain.startswith((b"Traceback (most recent call last):", b'  File "')):
                self._held[rank] = [line]
            else:
                shown.append(line)
        return shown

    def release(self, rank: int) -> list[bytes]:
        """The lines of a traceback that `rank` did not finish."""
        return self._held.pop(rank, [])

    def _end(self, rank: int) -> list[bytes]:
        lines = self._held.pop(rank)
        *frames, error = (re.sub(_MARK, b"", line) for line in lines)
        ranks = self._seen.setdefault((*frames, re.sub(rb"\d+", b"0", error)), [])
        if len(self._seen) > _MOST:
            del self._seen[next(iter(self._seen))]
        if rank not in ranks:
            ranks.append(rank)
        if rank == ranks[0]:
            return lines
        if len(ranks) > _TOLD + 2:
            return []
        text = b"the same traceback as rank %d's: %s" % (ranks[0], error)
        return [
            text if len(ranks) < _TOLD + 2 else text + b" (those of other ranks are in their logs only)"
        ]
