"""Histories of a round, recorded or invented: events, and what a round and the decision after it are then."""

from __future__ import annotations

from launcher.diagnosis.reports import Death, NodeReport
from launcher.errors import ExitCode
from launcher.events import (
    Event,
    Joined,
    MessageReceived,
    WorkerExited,
    WorkersGone,
)
from launcher.rendezvous.team import Ready
from launcher.round.restart import Decision, Finish, History, Limits, decide
from launcher.round.round import Phase, Round, RoundEndRequest

PREEMPTED = Finish(ExitCode.PREEMPTED, is_final=False)
"""What is decided where the workers have saved and left."""


def ready(node: int, workers: int = 2, number: int = 1) -> MessageReceived:
    """A node has its workers' slots, and has had `number` rounds before this one."""
    return MessageReceived(node, Ready(tuple(range(workers)), f"host{node}", 1000 + node, number).to_json())


def end_request(
    reason: str, node: int = 0, *, can_drain: bool = True, slots: int | None = None
) -> MessageReceived:
    """A node asks all to end the round."""
    return MessageReceived(node, RoundEndRequest(reason, node, can_drain, slots).to_json())


def lost(node: int) -> MessageReceived:
    """Node 0 has declared another one lost."""
    return MessageReceived(0, {"kind": "lost", "node": node, "why": "no sign of life"})


def exited(rank: int, code: int = 0) -> WorkerExited:
    return WorkerExited(rank, 1000 + rank, code, 1.0)


def death(rank: int, code: int = 1, at: float = 1.0) -> Death:
    return Death(rank, "host0", 1000 + rank, code, at)


def report(node: int = 0, **fields: object) -> MessageReceived:
    """A node reports its part of the round."""
    told = NodeReport(node, f"host{node}", 1, 1.0, **fields)  # type: ignore[arg-type]
    return MessageReceived(node, {"kind": "report", "report": told.to_json()})


def begin(nodes: int = 1, rank: int = 0) -> list[Event]:
    """A team of so many nodes comes together, as its node `rank` receives it."""
    hellos = [{"host": f"host{node}"} for node in range(nodes)]
    return [Joined(rank, hellos), *(ready(node) for node in range(nodes))]


def play(*events: Event, nodes: int = 1, rank: int = 0) -> Round:
    """The round of such a team after `events`."""
    round_ = Round()
    for event in [*begin(nodes, rank), *events]:
        round_ = round_.after(event)
    return round_


def end(
    *events: Event,
    nodes: int = 1,
    history: History | None = None,
    limits: Limits | None = None,
    mark: str = "x",
) -> Decision:
    """What is decided after a round with these events. The first death reported is to blame."""
    round_ = play(*events, nodes=nodes)
    assert round_.phase is Phase.SETTLED
    culprit = next((one for one in round_.deaths if not one.is_ours), None)
    return decide(round_, culprit, mark if culprit else None, history or History(), limits or Limits())


def drained(*events: Event, nodes: int = 2) -> list[Event]:
    """`events`, and then all workers save and leave."""
    told = [report(node, has_drained=True) for node in range(nodes)]
    return [*events, exited(0, 75), exited(1, 75), WorkersGone(), *told]
