"""Which nodes have stopped sending heartbeats: decided from the values read, without a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["GONE", "PERIOD", "HeartbeatWatch", "WaitingNodes"]

PERIOD = 0.5
"""Seconds between two heartbeats of a node, and between two looks at those of others."""

GONE = "gone"
"""The last heartbeat of a node that leaves by itself."""

_TIMEOUT = 4.0  # seconds without a heartbeat, after which a node is lost
_LONGEST_LOOK = 2 * PERIOD


class HeartbeatWatch:
    """Measures for how long the heartbeat of each node has not increased.

    Heartbeats are whole numbers, or `GONE`. A number below the last one, or a missing one (None), does not count.

    Between two looks at most two periods count: if this process or the store was suspended, the others must
    first get a chance to send a heartbeat.
    """

    def __init__(self) -> None:
        self._heartbeats: dict[int, str] = {}
        self._silent: dict[int, float] = {}
        self._looked: float | None = None

    def silent_nodes(self, heartbeats: Mapping[int, str | None], now: float) -> dict[int, float]:
        """Compare with the last look; return the nodes that are silent for too long, with seconds of silence.

        Args:
            heartbeats: by node.
            now: this node's monotonic clock, seconds.
        """
        passed = 0.0 if self._looked is None else min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        for node, heartbeat in heartbeats.items():
            if heartbeat is not None and _is_newer(heartbeat, self._heartbeats.get(node)):
                self._heartbeats[node] = heartbeat
                self._silent[node] = 0.0
            else:
                self._silent[node] = self._silent.get(node, 0.0) + passed
        return {node: self._silent[node] for node in heartbeats if self._silent[node] >= _TIMEOUT}


def _is_newer(heartbeat: str, last: str | None) -> bool:
    return heartbeat == GONE or last is None or (last != GONE and int(heartbeat) > int(last))


class WaitingNodes:
    """Counts the waiting nodes whose heartbeat has changed since this object was made, and recently.

    A node that announces itself and is then suspended does not count.

    Args:
        timeout: seconds for which a heartbeat may stay the same.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._heartbeats: dict[str, str] = {}
        self._changed: dict[str, float] = {}

    def count_alive(self, heartbeats: Mapping[str, str], now: float) -> int:
        """How many of the nodes in `heartbeats` are alive; `now` is this node's monotonic clock, seconds."""
        for name, heartbeat in heartbeats.items():
            if self._heartbeats.setdefault(name, heartbeat) != heartbeat:
                self._changed[name] = now
        self._heartbeats.update(heartbeats)
        return sum(
            name in self._changed and now - self._changed[name] <= self._timeout for name in heartbeats
        )
