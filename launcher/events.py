"""The events that the monitor passes to the agent, as frozen values. Times are monotonic seconds."""

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
    """The zygote has done its imports, and forks from now on."""

    seconds: float  # that they took
    error: str | None = None  # the traceback if they failed: workers are fresh interpreters then


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker exists."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker is dead. Events of this type come in the order in which the workers died."""

    rank: int
    pid: int
    code: int  # its exit code, or minus the signal that killed it
    at: float


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """A worker could not be forked."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkersGone:
    """The workers of this node and all processes that they have started are gone."""


@dataclass(frozen=True, slots=True)
class ZygoteLost:
    """The zygote is dead, and its workers with it. `code` is as in `WorkerExited`."""

    code: int
    at: float
    is_ours: bool = False  # the agent has killed it before it started any workers


@dataclass(frozen=True, slots=True)
class SaverWanted:
    """A worker has connected to the saver's address, and no saver runs."""


@dataclass(frozen=True, slots=True)
class SaveStaged:
    """The saver's memory has the parts of a checkpoint of all ranks of this node."""

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
    """A checkpoint could not be committed in a tier."""

    step: int
    tier: str
    url: str
    error: str
    again: bool = False  # another try has failed too, after an event of the first


@dataclass(frozen=True, slots=True)
class SaveSuperseded:
    """A checkpoint is not committed in a tier because the run goes on in a newer attempt. This is no failure."""

    step: int
    tier: str


@dataclass(frozen=True, slots=True)
class SaverEnded:
    """The saver is dead. `code` is as in `WorkerExited`; 0: every snapshot that it got is durable."""

    code: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The job is to end: Ctrl-C, a scheduler's signal, a closed terminal, `launch stop`."""

    signum: int
    is_asked: bool = False  # by `launch stop`, which counts as SIGTERM


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline set with `Monitor.set_deadline` has passed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the agent reads what causes no event, such as the workers' progress."""


@dataclass(frozen=True, slots=True)
class StacksTaken:
    """The stacks of this node's workers have been taken."""

    summary: tuple[str, ...]  # a line for each group of ranks
    directory: str  # of the whole dumps


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A user asks the running job for something: `launch scale RUN 6` has verb "scale" and number 6."""

    verb: str
    number: int | None
    client: int  # the connection that the answer goes to
    without: tuple[int, ...] = ()  # slots that get no worker


@dataclass(frozen=True, slots=True)
class Joined:
    """This node is in a team, which starts with this event."""

    rank: int  # of this node
    hellos: Sequence[Mapping[str, Any]]  # by rank, what each node of the team has said of itself


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A node of the team has broadcast a message. All nodes receive all messages, in the same order."""

    node: int
    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """This node is no longer in a team, or could not join one; `reason` is a line for the user.

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
    """News from the node's part in the rendezvous, such as what it waits for."""

    text: str  # a line for the user
    is_bad: bool = False  # something is wrong
    phase: str | None = None  # what the node does meanwhile, in a word or two; None: as before


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
    facts = {field.name: getattr(event, field.name) for field in fields(event)}
    if isinstance(event, MessageReceived):
        facts = {"from node": event.node, **event.message}
    known = ", ".join(
        f"{key} {value}"
        for key, value in facts.items()
        if value is not None and value is not False and value != ()
    )
    return f"{name.strip()}: {known}" if known else name.strip()
