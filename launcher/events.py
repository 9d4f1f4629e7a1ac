"""What the monitor tells the agent. Every event is a frozen value; times are monotonic seconds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Event",
    "GraceExpired",
    "RoundDrained",
    "SpawnFailed",
    "StopRequested",
    "WorkerExited",
    "WorkerStarted",
    "ZygoteLost",
    "ZygoteReady",
]


@dataclass(frozen=True, slots=True)
class ZygoteReady:
    """The zygote has imported what it should and forks from now on.

    `error` is the traceback if it could not: workers are then fresh interpreters.
    """

    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker is dead. `code` is its exit code, or minus the signal that killed it.

    Events of this type come in the order in which the workers died.
    """

    rank: int
    pid: int
    code: int
    at: float


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """A worker could not be forked."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class RoundDrained:
    """No process of any worker's tree exists any more."""


@dataclass(frozen=True, slots=True)
class ZygoteLost:
    """The zygote is dead, and its workers with it. `code` is as in `WorkerExited`."""

    code: int
    at: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone wants the job to end: Ctrl-C, SIGTERM, a closed terminal."""

    signum: int


@dataclass(frozen=True, slots=True)
class GraceExpired:
    """The deadline set with `Monitor.set_deadline` has passed."""


Event = (
    ZygoteReady
    | WorkerStarted
    | WorkerExited
    | SpawnFailed
    | RoundDrained
    | ZygoteLost
    | StopRequested
    | GraceExpired
)
