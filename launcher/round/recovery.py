"""How long each part of a recovery took, from a failure to the next step of all ranks. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.progress import Progress

__all__ = ["Recovery"]


@dataclass(frozen=True)
class Recovery:
    """The times of one restart on this node, in seconds since the epoch."""

    detected: float  # the first failure was seen
    stopped: float | None = None  # no process of the failed round was left
    forked: float | None = None  # all workers of this node existed

    def timeline(self, ranks: Collection[int], progress: Mapping[int, Progress]) -> dict[str, float] | None:
        """Seconds from the failure to each part, for the last of `ranks`; None until all have made a step.

        Parts that not all workers report are left out.
        """
        known = [progress.get(rank) for rank in ranks]
        if any(one is None or one.first_step is None for one in known):
            return None
        times = {"stopped": self.stopped, "forked": self.forked}
        for part in ("joined", "restored", "first_step"):
            parts = [getattr(one, part) for one in known]
            times[part] = None if None in parts else max(parts)
        return {part: round(time - self.detected, 3) for part, time in times.items() if time is not None}
