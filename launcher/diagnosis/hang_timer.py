"""How long each worker has made no progress, and when that is a hang. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from launcher.progress import Progress

__all__ = ["HangTimer", "Stage"]

_LONGEST_GAP = 5.0
"""Seconds between two readings that count at most: while this process could not run, nor could the workers."""
_START_FACTOR, _SHORTEST_START = 3.0, 30.0
"""Before its first step a worker imports, builds and compiles without reporting anything: it gets so many times
the timeout of a step, and so many seconds at least."""


class Stage(IntEnum):
    """How far a worker is, which decides how long it may make no progress."""

    UNKNOWN = 0  # it may never report any progress
    STARTING = 1  # before its first step: it imports, compiles, or waits for others
    BUSY = 2  # before its first step too, in something that reports its own progress, such as a restore
    STEPPING = 3


@dataclass(frozen=True)
class HangTimer:
    """The progress of one round's workers, and for how long it has been the same. All mappings are by rank."""

    marks: Mapping[int, tuple[object, ...]] = field(default_factory=dict)  # what each reported last
    seconds: Mapping[int, float] = field(default_factory=dict)  # since it reported anything new
    stages: Mapping[int, Stage] = field(default_factory=dict)

    def after(
        self,
        progress: Mapping[int, Progress],
        elapsed: float,
        *,
        silent: Collection[int] = (),
        are_known: bool = False,
    ) -> HangTimer:
        """The timer after the progress of all living ranks was read.

        Args:
            progress: by rank.
            elapsed: seconds since it was read before.
            silent: ranks that have reported nothing yet.
            are_known: True if in an earlier round every rank reported steps.
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
        """Seconds without progress: the most of a worker that makes steps, or of all before their first step."""
        return max(self._of(Stage.STEPPING), default=self._start)

    @property
    def is_known(self) -> bool:
        """True if some worker reports progress, or is expected to."""
        return any(self.stages.values())

    def is_hang(self, timeout: float, usual_start: float = 0.0) -> bool:
        """True if workers hang.

        A worker that makes steps hangs by itself. Before the first step ranks wait for each other, so none hangs
        as long as one of them makes progress.

        Args:
            timeout: seconds that a step may take.
            usual_start: seconds that the first step took in earlier rounds.
        """
        if any(still >= timeout for still in self._of(Stage.STEPPING)):
            return True
        is_busy = Stage.BUSY in self.stages.values()
        start = max(_START_FACTOR * timeout, _START_FACTOR * usual_start, _SHORTEST_START)
        return self._start >= (timeout if is_busy else start)

    @property
    def _start(self) -> float:
        """Seconds for which no worker has made progress towards its first step; 0 once one has made it."""
        if self._of(Stage.STEPPING):
            return 0.0
        return min(self._of(Stage.STARTING, Stage.BUSY), default=0.0)

    def _of(self, *stages: Stage) -> list[float]:
        return [still for rank, still in self.seconds.items() if self.stages[rank] in stages]


def _mark(progress: Progress) -> tuple[object, ...]:
    """A value that changes whenever the worker makes progress."""
    return (progress.step, progress.alive, progress.joined, progress.restored)


def _stage(progress: Progress | None, *, is_expected: bool) -> Stage:
    if progress is None:
        return Stage.STARTING if is_expected else Stage.UNKNOWN
    if progress.step is not None:
        return Stage.STEPPING
    if progress.doing is not None:
        return Stage.BUSY
    return Stage.STARTING if progress.steps else Stage.UNKNOWN
