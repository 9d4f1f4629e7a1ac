"""What happens in a round, and what happens after it. Pure: no clock, no I/O, no environment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from launcher.errors import ExitCode, shell_code
from launcher.events import (
    DeadlinePassed,
    Event,
    RoundDrained,
    SpawnFailed,
    StopRequested,
    WorkerExited,
    ZygoteLost,
)

__all__ = ["Decision", "Finish", "GiveUp", "History", "Phase", "Restart", "Round", "decide"]


class Phase(Enum):
    """How far a round is. It only ever moves down this list."""

    RUNNING = auto()
    STOPPING = auto()  # everything that is left has been sent SIGTERM
    KILLING = auto()  # ... SIGKILL
    OVER = auto()


@dataclass(frozen=True)
class Round:
    """One start of all workers, as the events so far tell it."""

    number: int
    ranks: int
    started: float
    phase: Phase = Phase.RUNNING
    exits: tuple[WorkerExited, ...] = ()  # in order of death
    trouble: SpawnFailed | ZygoteLost | DeadlinePassed | None = None  # not a worker's own failure
    stop_signal: int | None = None  # someone wants the job to end

    def after(self, event: Event) -> Round:
        """The round after `event`."""
        match event:
            case WorkerExited():
                after = replace(self, exits=(*self.exits, event))
                if event.code != 0 or len(after.exits) == self.ranks:
                    return after._at_least(Phase.STOPPING)
                return after
            case SpawnFailed():
                return replace(self, trouble=event)._at_least(Phase.STOPPING)
            case StopRequested():
                insists = self.stop_signal is not None
                after = replace(self, stop_signal=event.signum)
                return after._at_least(Phase.KILLING if insists else Phase.STOPPING)
            case DeadlinePassed():
                if self.phase is Phase.STOPPING:
                    return self._at_least(Phase.KILLING)
                return replace(self, trouble=event)._at_least(Phase.OVER)
            case ZygoteLost():
                return replace(self, trouble=event)._at_least(Phase.OVER)
            case RoundDrained():
                return self._at_least(Phase.OVER)
            case _:
                return self

    def _at_least(self, phase: Phase) -> Round:
        return self if phase.value <= self.phase.value else replace(self, phase=phase)

    @property
    def succeeded(self) -> bool:
        return len(self.exits) == self.ranks and all(exit_.code == 0 for exit_ in self.exits)


@dataclass(frozen=True, slots=True)
class History:
    """What a job has been through before its present round."""

    max_restarts: int
    restarts: int = 0

    def after_restart(self) -> History:
        return replace(self, restarts=self.restarts + 1)


@dataclass(frozen=True, slots=True)
class Restart:
    """Begin a new round: restart `number` of at most `of`."""

    number: int
    of: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The job ends because its workers have finished, or because it was told to stop."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job ends because its restarts are used up."""

    exit_code: int
    restarts: int


Decision = Restart | Finish | GiveUp


def decide(round_: Round, culprit: int | None, history: History) -> Decision:
    """What to do after a round that is over.

    `culprit` is the code of the worker that failed first, None if no worker is to blame.
    """
    if round_.stop_signal is not None:
        return Finish(128 + round_.stop_signal)
    if round_.succeeded:
        return Finish(ExitCode.OK)
    is_stuck = isinstance(round_.trouble, DeadlinePassed)
    if history.restarts < history.max_restarts and not is_stuck:
        return Restart(history.restarts + 1, history.max_restarts)
    code = ExitCode.INTERNAL if culprit is None or is_stuck else shell_code(culprit)
    return GiveUp(code, history.restarts)
