"""How long each worker has made no progress. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Stillness"]

_LONGEST_GAP = 5.0
"""Seconds between two looks that count at most: while this process could not look, nor could workers work."""


@dataclass(frozen=True)
class Stillness:
    """What was seen of the workers of one round, and since when it has been the same."""

    steps: Mapping[int, int] = field(default_factory=dict)  # by rank; only of those that report steps
    seconds: Mapping[int, float] = field(default_factory=dict)  # by rank, since its last step

    def after(self, steps: Mapping[int, int | None], elapsed: float) -> Stillness:
        """After a look at all ranks, `elapsed` seconds after the last one."""
        known = {rank: step for rank, step in steps.items() if step is not None}
        passed = min(elapsed, _LONGEST_GAP)
        seconds = {
            rank: self.seconds[rank] + passed if self.steps.get(rank) == step else 0.0
            for rank, step in known.items()
        }
        return Stillness(known, seconds)

    @property
    def longest(self) -> float:
        """Seconds that the stillest rank has been still; 0 if none reports steps."""
        return max(self.seconds.values(), default=0.0)
