"""What the monitor tells the agent. Every event is a frozen value; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = [
    "DeadlinePassed",
    "Event",
    "Joined",
    "MemberFailed",
    "MemberNews",
    "MessageReceived",
    "RequestReceived",
    "SaveFailed",
    "SavePersisted",
    "SavePersisting",
    "SaveStaged",
    "SaveSuperseded",
    "SavedByWorkers",
    "SaverEnded",
    "SaverWanted",
    "SpawnFailed",
    "StacksTaken",
    "StopRequested",
    "Tick",
    "WorkerExited",
    "WorkerStarted",
    "WorkersGone",
    "ZygoteLost",
    "ZygoteReady",
    "describe",
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
class WorkersGone:
    """No process of any worker's tree exists any more."""


@dataclass(frozen=True, slots=True)
class ZygoteLost:
    """The zygote is dead, and its workers with it. `code` is as in `WorkerExited`."""

    code: int
    at: float
    is_ours: bool = False  # the agent has killed it, because it was not to start any workers


@dataclass(frozen=True, slots=True)
class SaverWanted:
    """A worker has connected to the saver's address, and no saver runs."""


@dataclass(frozen=True, slots=True)
class SaveStaged:
    """Every rank of this node has its part of a checkpoint in the saver's memory."""

    step: int


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
class SavedByWorkers:
    """Workers have committed a checkpoint in a tier by themselves, without the saver."""

    step: int
    tier: str


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A checkpoint is not committed in a tier. `again`: nor after another try."""

    step: int
    tier: str
    url: str
    error: str
    again: bool = False


@dataclass(frozen=True, slots=True)
class SaveSuperseded:
    """A checkpoint will not be committed in a tier, since the run goes on in a newer attempt. No failure."""

    step: int
    tier: str


@dataclass(frozen=True, slots=True)
class SaverEnded:
    """The saver is dead. `code` is as in `WorkerExited`; 0: all that it was given is durable."""

    code: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone wants the job to end: Ctrl-C, a scheduler's signal, a closed terminal, `launch stop`."""

    signum: int
    is_asked: bool = False  # by `launch stop`, which counts as SIGTERM


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline set with `Monitor.set_deadline` has passed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: look at what nobody tells of by itself, such as how far the workers are."""


@dataclass(frozen=True, slots=True)
class StacksTaken:
    """Where every worker of this node was: `summary`, a line each, and where the whole dumps are."""

    summary: tuple[str, ...]
    directory: str


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A user asks the running job for something: `launch scale RUN 6` has verb "scale" and number 6.

    `client` is the connection that the answer goes to, `without` the slots that get no worker.
    """

    verb: str
    number: int | None
    client: int
    without: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """This node is number `rank` of the `len(hellos)` nodes of a team, which starts with this event.

    `hellos` is what each of them has said of itself, by rank.
    """

    rank: int
    hellos: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """Node `node` of the team has said `message`. All nodes hear the same, in the same order."""

    node: int
    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """This node is in no team any more, or could not join one; `reason` is a line for the user.

    `kind` is "usage" (wrong endpoint, address or backend), "unavailable" (refused, or nobody there in time),
    "closed" (the job with this id had ended before), "over" (it has ended while this node waited, or was lost:
    `outcome` is its exit code), "quorum" (not enough nodes in time) or "lost" (the
    team goes on without this node, or its store is gone: it may join again).
    """

    kind: str
    reason: str
    outcome: int | None = None


@dataclass(frozen=True, slots=True)
class MemberNews:
    """What keeps this node from being in a team as yet, or else concerns it; `text` is a line for the user.

    `is_bad`: something is wrong. `phase` is what this node does meanwhile, in a word or two; None: as before.
    """

    text: str
    is_bad: bool = False
    phase: str | None = None


Event = (
    ZygoteReady
    | WorkerStarted
    | WorkerExited
    | SpawnFailed
    | WorkersGone
    | ZygoteLost
    | SaverWanted
    | SaveStaged
    | SavePersisting
    | SavePersisted
    | SavedByWorkers
    | SaveFailed
    | SaveSuperseded
    | SaverEnded
    | StopRequested
    | DeadlinePassed
    | Tick
    | StacksTaken
    | RequestReceived
    | Joined
    | MessageReceived
    | MemberFailed
    | MemberNews
)


def describe(event: Event) -> str:
    """`event` in a line for people: `worker exited: rank 0, pid 4711, code 1`."""
    name = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(event).__name__)
    told = {field.name: getattr(event, field.name) for field in fields(event)}
    if isinstance(event, MessageReceived):
        told = {"from node": event.node, **event.message}
    known = ", ".join(
        f"{key} {value}"
        for key, value in told.items()
        if value is not None and value is not False and value != ()
    )
    return f"{name.strip()}: {known}" if known else name.strip()
