"""Who gives no sign of life any more: a decision over what is read, without a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["GONE", "PERIOD", "Arrivals", "Watch"]

PERIOD = 0.5
"""Seconds between two signs of life, and between two looks at them."""

GONE = "gone"
"""The last sign of a node that leaves in peace."""

_SILENCE = 4.0  # seconds without a sign after which a node is lost
_LONGEST_LOOK = 2 * PERIOD


class Watch:
    """Knows for how long each sign has not grown, by this node's monotonic clock.

    Signs are whole numbers, or `GONE`; one that is smaller than the last, or none at all (None), is no sign
    of life.

    Time in which nobody looked does not count beyond one period or so: if this process or the store stood
    still, the others must first get the chance to give a sign again.
    """

    def __init__(self) -> None:
        self._signs: dict[int, str] = {}
        self._silent: dict[int, float] = {}
        self._looked: float | None = None

    def look(self, signs: Mapping[int, str | None], now: float) -> dict[int, float]:
        """The nodes that are silent for too long, and for how many seconds."""
        passed = 0.0 if self._looked is None else min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        for node, sign in signs.items():
            if sign is not None and _is_newer(sign, self._signs.get(node)):
                self._signs[node] = sign
                self._silent[node] = 0.0
            else:
                self._silent[node] = self._silent.get(node, 0.0) + passed
        return {node: self._silent[node] for node in signs if self._silent[node] >= _SILENCE}


def _is_newer(sign: str, last: str | None) -> bool:
    return sign == GONE or last is None or (last != GONE and int(sign) > int(last))


class Arrivals:
    """Knows who waits and lives: whose sign has changed since this watch began, and of late.

    One that announced itself and then stands still is not waited for. `patience` is how many seconds a sign
    may stay the same.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._signs: dict[str, str] = {}
        self._changed: dict[str, float] = {}

    def look(self, signs: Mapping[str, str], now: float) -> int:
        """How many of those that `signs` has wait and live, by this node's monotonic clock."""
        for name, sign in signs.items():
            if self._signs.setdefault(name, sign) != sign:
                self._changed[name] = now
        self._signs.update(signs)
        return sum(name in self._changed and now - self._changed[name] <= self._patience for name in signs)
