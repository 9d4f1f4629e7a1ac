"""Shows a traceback that many ranks write once."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["Repeats"]

_MARK = rb"^\[rank\d+\]: "  # torch writes it before each line of an uncaught exception
_MOST = 100  # tracebacks that are remembered
_NAMED = 8  # ranks whose error is shown although the traceback is another rank's


class Repeats:
    """Passes on the lines that ranks write; of a traceback that another rank has written before, only the error.

    Two tracebacks are the same although numbers in the error differ, such as ports. After some ranks a last line
    says that the errors of others are in their logs only. The lines of a traceback are held back until it is
    complete.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[bytes, ...], list[int]] = {}  # the ranks that have written each traceback
        self._held: dict[int, list[bytes]] = {}

    def sift(self, rank: int, lines: Sequence[bytes]) -> list[bytes]:
        """The lines to show after `rank` has written `lines`."""
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
        if len(ranks) > _NAMED + 2:
            return []
        text = b"the same traceback as rank %d's: %s" % (ranks[0], error)
        return [
            text if len(ranks) < _NAMED + 2 else text + b" (those of other ranks are in their logs only)"
        ]
