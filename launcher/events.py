"""What the monitor tells the agent. Every event is a frozen value; times are monotonic seconds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DeadlinePassed",
    "Event",
    "RoundDrained",
    "SaveFailed",
    "SavePersisted",
    "SavePersisting",
    "SaverEnded",
    "SaverWanted",
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
class SaverWanted:
    """A worker has connected to the saver's address, and no saver runs."""


@dataclass(frozen=True, slots=True)
class SavePersisting:
    """`done` of `total` bytes of a checkpoint are in a tier: "local" or "remote"."""

    step: int
    tier: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class SavePersisted:
    """A checkpoint is committed in a tier, at `url`."""

    step: int
    tier: str
    url: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A checkpoint will never be committed in a tier."""

    step: int
    tier: str
    url: str
    error: str


@dataclass(frozen=True, slots=True)
class SaverEnded:
    """The saver is dead. `code` is as in `WorkerExited`; 0: all that it was given is durable."""

    code: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone wants the job to end: Ctrl-C, SIGTERM, a closed terminal."""

    signum: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline set with `Monitor.set_deadline` has passed."""


Event = (
    ZygoteReady
    | WorkerStarted
    | WorkerExited
    | SpawnFailed
    | RoundDrained
    | ZygoteLost
    | SaverWanted
    | SavePersisting
    | SavePersisted
    | SaveFailed
    | SaverEnded
    | StopRequested
    | DeadlinePassed
)
