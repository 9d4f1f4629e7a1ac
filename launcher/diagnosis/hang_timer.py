"""Since when each worker has made no progress, and when that is a hang. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from launcher.progress import Progress

__all__ = ["HangTimer", "Stage"]

_LONGEST_GAP = 5.0
"""Seconds between two looks that count at most: while this process could not look, nor could workers work."""
_START_FACTOR, _SHORTEST_START = 3.0, 30.0
"""Before its first step a worker imports, builds and compiles, and says nothing of it: it gets so many times
what a step gets, and so many seconds at least."""


class Stage(IntEnum):
    """How far a worker is, as far as that says how long it may make no progress."""

    UNKNOWN = 0  # nothing says that it will ever tell of any progress
    STARTING = 1  # on the way to its first step: it imports, compiles, or waits for others
    BUSY = 2  # on that way too, in something of which it tells how it gets on
    STEPPING = 3


@dataclass(frozen=True)
class HangTimer:
    """What was seen of the workers of one round, and since when it has been the same."""

    marks: Mapping[int, tuple[object, ...]] = field(default_factory=dict)  # what each told last, by rank
    seconds: Mapping[int, float] = field(default_factory=dict)  # by rank, since it told anything new
    stages: Mapping[int, Stage] = field(default_factory=dict)

    def after(
        self,
        progress: Mapping[int, Progress],
        elapsed: float,
        *,
        silent: Collection[int] = (),
        are_known: bool = False,
    ) -> HangTimer:
        """After a look at all ranks that live, `elapsed` seconds after the last one.

        `silent` are those that have told nothing yet; `are_known`, that in a round before all told of steps.
        """
        marks = {rank: _mark(one) for rank, one in progress.items() if not one.is_over}
        marks |= dict.fromkeys(silent, ())
        # Every rank makes a Checkpointer, so where one of a job's has, the others are on their way to it.
        are_expected = are_known or any(one.world > 1 for one in progress.values())
        stages = {rank: _stage(progress.get(rank), is_expected=are_expected) for rank in marks}
        passed = min(elapsed, _LONGEST_GAP)
        seconds = {
            rank: self.seconds[rank] + passed
            if rank in self.seconds and self.marks[rank] == mark and self.stages[rank] == stages[rank]
            else 0.0
            for rank, mark in marks.items()
        }
        return HangTimer(marks, seconds, stages)

    @property
    def longest(self) -> float:
        """Seconds that the stillest of those has been still that tell of their progress; 0 without any."""
        return max(self._of(Stage.STEPPING), default=self._start)

    @property
    def is_known(self) -> bool:
        """Whether there is anything to look at."""
        return any(self.stages.values())

    def is_hang(self, timeout: float, usual_start: float = 0.0) -> bool:
        """Whether workers hang that are to make a step every `timeout` seconds.

        Of those that make steps, each is looked at by itself. On the way to the first step ranks wait for each
        other, so as long as one of them gets on, none hangs. `usual_start` is how many seconds the first step
        took in rounds before.
        """
        if any(still >= timeout for still in self._of(Stage.STEPPING)):
            return True
        is_busy = Stage.BUSY in self.stages.values()
        start = max(_START_FACTOR * timeout, _START_FACTOR * usual_start, _SHORTEST_START)
        return self._start >= (timeout if is_busy else start)

    @property
    def _start(self) -> float:
        """Seconds for which no worker has got on towards its first step; 0 once one has made it."""
        if self._of(Stage.STEPPING):
            return 0.0
        return min(self._of(Stage.STARTING, Stage.BUSY), default=0.0)

    def _of(self, *stages: Stage) -> list[float]:
        return [still for rank, still in self.seconds.items() if self.stages[rank] in stages]


def _mark(progress: Progress) -> tuple[object, ...]:
    """Differs from the one before if the worker has got on."""
    return (progress.step, progress.alive, progress.joined, progress.restored)


def _stage(progress: Progress | None, *, is_expected: bool) -> Stage:
    if progress is None:
        return Stage.STARTING if is_expected else Stage.UNKNOWN
    if progress.step is not None:
        return Stage.STEPPING
    if progress.doing is not None:
        return Stage.BUSY
    return Stage.STARTING if progress.steps else Stage.UNKNOWN
