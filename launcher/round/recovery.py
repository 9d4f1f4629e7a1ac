"""How long each part of getting back to work took after a failure. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.progress import Progress

__all__ = ["Recovery"]


@dataclass(frozen=True)
class Recovery:
    """A restart in the making. All times are in seconds since the epoch."""

    detected: float  # the first failure
    stopped: float | None = None  # nothing was left of the round that failed
    forked: float | None = None  # all workers of this node exist

    def timeline(self, ranks: Collection[int], progress: Mapping[int, Progress]) -> dict[str, float] | None:
        """Seconds since the failure at which each part was done by the last of `ranks`; None: not there yet.

        A recovery is complete with every rank's first step. Parts that the workers do not tell of are
        left out.
        """
        told = [progress.get(rank) for rank in ranks]
        if any(one is None or one.first_step is None for one in told):
            return None
        times = {"stopped": self.stopped, "forked": self.forked}
        for part in ("joined", "restored", "first_step"):
            parts = [getattr(one, part) for one in told]
            times[part] = None if None in parts else max(parts)
        return {part: round(time - self.detected, 3) for part, time in times.items() if time is not None}
