"""A round, from the gathering of its nodes to the last report, as a value that events change. Pure.

Every node of a team has its own copy. What all must know is broadcast through the team's message log, which every
node receives in the same order: so all copies come to the same end.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from launcher.diagnosis.reports import Death, NodeReport
from launcher.errors import ExitCode
from launcher.events import (
    DeadlinePassed,
    Event,
    Joined,
    MemberFailed,
    MessageReceived,
    SpawnFailed,
    StacksTaken,
    StopRequested,
    WorkerExited,
    WorkersGone,
    ZygoteLost,
)
from launcher.formatting import describe_exit
from launcher.rendezvous.team import RankAssignment, Ready, Team
from launcher.round.slots import Slots

__all__ = ["Phase", "Round", "RoundEndRequest"]


class Phase(Enum):
    """How far a round is on this node. It only ever moves down this list."""

    GATHERING = auto()  # not all nodes are ready
    RUNNING = auto()
    DRAINING = auto()  # workers are asked to save at their next step boundary, and to end
    DIAGNOSING = auto()  # workers hang, and their stacks are taken before they are stopped
    STOPPING = auto()  # all processes that are left have been sent SIGTERM
    KILLING = auto()  # ... SIGKILL
    OVER = auto()  # no process is left on this node
    SETTLED = auto()  # ... nor on any other


@dataclass(frozen=True)
class RoundEndRequest:
    """A node's request to end the round at a step boundary."""

    reason: str
    """leave: the node was told to end; join: nodes wait to be taken in; scale, restart: a user asks for it."""
    node: int
    can_drain: bool  # False: the workers cannot save, and are stopped where they are
    slots: int | None = None  # to scale: the number of workers on that node afterwards
    without: tuple[int, ...] = ()  # to scale: slots that get no worker

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "wish",
            "reason": self.reason,
            "node": self.node,
            "can_drain": self.can_drain,
            "slots": self.slots,
            "without": self.without,
        }

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> RoundEndRequest:
        without = tuple(message["without"])
        return cls(message["reason"], message["node"], message["can_drain"], message["slots"], without)


@dataclass(frozen=True)
class Round:
    """One start of all workers of a team, as this node knows it from the events so far."""

    team: Team | None = None
    phase: Phase = Phase.GATHERING
    readies: Mapping[int, Ready] = field(default_factory=dict)
    exits: tuple[WorkerExited, ...] = ()  # of this node, in order of death
    exits_before_stop: int | None = (
        None  # how many workers had ended before the rest was first sent SIGTERM
    )
    exits_before_kill: int | None = None  # ... before the rest was sent SIGKILL
    end_requests: tuple[RoundEndRequest, ...] = ()
    trouble: SpawnFailed | ZygoteLost | DeadlinePassed | None = None
    cut_off: MemberFailed | None = None  # this node is no longer in a team
    stop_signal: int | None = None  # the whole job ends, now
    hang: tuple[str, ...] = ()  # what the stacks of this node's workers say
    is_hung: bool = False
    lost: Mapping[int, str] = field(default_factory=dict)  # why each lost node is taken for lost
    waiting: int = 0  # number of nodes that wait to be taken in
    reports: Mapping[int, NodeReport] = field(default_factory=dict)

    def after(self, event: Event) -> Round:
        """The round after `event`."""
        match event:
            case Joined(rank=rank, hellos=hellos):
                return replace(self, team=Team(rank, tuple(hello["host"] for hello in hellos)))
            case MessageReceived(node=node, message=message) if self.team is not None:
                return self._after_message(node, message)
            case WorkerExited():
                return self._after_exit(event)
            case StopRequested():
                return self._after_stop(event.signum)
            case SpawnFailed():
                return replace(self, trouble=event)._at_least(Phase.STOPPING)
            case StacksTaken() if self.phase is Phase.DIAGNOSING:
                return replace(self, hang=event.summary)._at_least(Phase.STOPPING)
            case DeadlinePassed():
                return self._after_deadline(event)
            case ZygoteLost() if self.phase is not Phase.GATHERING:
                trouble = self.trouble if event.is_ours else event
                return replace(self, trouble=trouble)._at_least(Phase.OVER)
            case MemberFailed():
                after = replace(self, cut_off=event)
                return after._at_least(Phase.STOPPING if self.is_started else Phase.SETTLED)
            case WorkersGone():
                return self._at_least(Phase.OVER)
            case _:
                return self

    def withdrawn(self) -> Round:
        """The round of a node that leaves and is in no team whose nodes need to know."""
        request = RoundEndRequest("leave", 0 if self.team is None else self.team.rank, can_drain=False)
        after = replace(self, end_requests=(*self.end_requests, request))
        return after if self.is_started else after._at_least(Phase.SETTLED)

    @property
    def plan(self) -> RankAssignment:
        """Which ranks run where, in a round that has started."""
        assert self.team is not None
        return RankAssignment.of(self.team.rank, self.readies)

    @property
    def is_started(self) -> bool:
        """True from the start of this node's workers until no process of theirs is left."""
        return Phase.RUNNING.value <= self.phase.value < Phase.OVER.value

    @property
    def has_finished(self) -> bool:
        """True if every worker of this node returned 0, none of them in answer to a signal of launch's."""
        return self._have_all_ended_with(0)

    @property
    def has_drained(self) -> bool:
        """True if every worker of this node has finished in that sense, or has saved and left."""
        return self._have_all_ended_with(0, ExitCode.PREEMPTED)

    @property
    def was_drained(self) -> bool:
        """True if nodes have reported, and all their workers had saved and left, or finished."""
        reports = self.reports.values()
        return bool(reports) and all(report.has_drained for report in reports)

    def _have_all_ended_with(self, *codes: int) -> bool:
        """A worker that answers SIGTERM with 0, by a handler of its own, has not finished its training."""
        ended = [exit_ for exit_ in self.exits if exit_.code or exit_ in self.unasked_exits]
        return len(ended) == len(self.plan.slots) and all(exit_.code in codes for exit_ in ended)

    @property
    def unasked_exits(self) -> tuple[WorkerExited, ...]:
        """The exits on this node before it signalled any worker."""
        return self.exits[: self.exits_before_stop]

    @property
    def failed_exits(self) -> list[WorkerExited]:
        """The exits of this node's workers that failed, in order of death."""
        return [exit_ for exit_ in self.exits if exit_.code not in (0, ExitCode.PREEMPTED)]

    @property
    def is_stuck(self) -> bool:
        """True if processes are left on this node that even SIGKILL does not end."""
        return isinstance(self.trouble, DeadlinePassed)

    def is_ours(self, exit_: WorkerExited) -> bool:
        """True if a worker of this node ended by the signal that launch had sent it."""
        before = {-signal.SIGTERM: self.exits_before_stop, -signal.SIGKILL: self.exits_before_kill}
        first = before.get(exit_.code)
        return first is not None and exit_ in self.exits[first:]

    @property
    def has_failed_here(self) -> bool:
        """True if something went wrong on this node that no signal of launch's explains."""
        return self.trouble is not None or any(not self.is_ours(exit_) for exit_ in self.failed_exits)

    @property
    def is_asked_to_end(self) -> bool:
        """True if the round ends, or will end, because a user, a scheduler or a node asked for it."""
        return self.stop_signal is not None or bool(self.end_requests)

    @property
    def is_explained(self) -> bool:
        """True if a node was lost, or reported a hang or trouble, which may have caused the workers' failures."""
        is_reported = any(report.trouble or report.hang for report in self.reports.values())
        return is_reported or bool(self.lost)

    @property
    def has_failed(self) -> bool:
        """True if a settled round ended because something went wrong, on any node."""
        if self.stop_signal is not None:
            return False
        reports = self.reports.values()
        is_bad = any(report.trouble is not None or report.deaths for report in reports)
        is_asked = bool(self.end_requests) and all(death.is_ours for death in self.deaths)
        return bool(self.lost) or self.is_hung or (is_bad and not is_asked)

    @property
    def trouble_in_words(self) -> str | None:
        """What went wrong on this node besides the workers' failures; None if nothing did."""
        match self.trouble:
            case SpawnFailed(rank=rank, reason=reason):
                return f"rank {rank} could not be started: {reason}"
            case ZygoteLost(code=code):
                return f"the zygote was lost, and all workers with it: {describe_exit(code)}"
            case DeadlinePassed():
                return "processes are left that do not die of SIGKILL (stuck in a driver or file system)"
            case _:
                return None

    def slots_after(self, slots: Slots, culprit: Death | None) -> Slots:
        """This node's slots for the next round; `culprit` is the worker of any node that failed first."""
        if self.team is None:
            return slots
        for request in reversed(self.end_requests):
            if request.reason == "scale" and request.node == self.team.rank and request.slots is not None:
                return slots.scaled(request.slots, request.without)
        if culprit is not None and culprit.rank in self.plan.ranks and culprit.step is None:
            return slots.after_failed_start(self.plan.slots[culprit.rank - self.plan.first_rank])
        return slots if self.step is None else slots.after_progress()

    @property
    def drain_tiers(self) -> str:
        """Where workers must save before they leave: "memory" is enough if all nodes go on, else "durable"."""
        return "memory" if self.end_requests and not self.leavers else "durable"

    @property
    def step(self) -> int | None:
        """The highest step in the nodes' reports; None if there is none."""
        steps = [report.step for report in self.reports.values() if report.step is not None]
        return max(steps, default=None)

    @property
    def silent(self) -> frozenset[int]:
        """The nodes whose message all others wait for: that they are ready, or at the end their report."""
        if self.team is None:
            return frozenset()
        received = self.readies if self.phase is Phase.GATHERING else self.reports
        return frozenset(range(self.team.size)) - frozenset(received) - frozenset(self.lost)

    @property
    def is_late(self) -> bool:
        """True if the silent nodes' messages are overdue soon: none of their workers may go on any more."""
        if self.team is None:
            return False
        if self.phase is Phase.GATHERING:
            return self.team.rank in self.readies
        has_failed = any(not report.has_drained for report in self.reports.values())
        is_ending = has_failed or self.is_hung or bool(self.lost) or self.stop_signal is not None
        return self.phase is Phase.OVER and is_ending

    @property
    def leavers(self) -> frozenset[int]:
        """The nodes that end with this round because they were told to."""
        return frozenset(request.node for request in self.end_requests if request.reason == "leave")

    @property
    def stuck(self) -> frozenset[int]:
        """The nodes on which processes are left that nothing can end."""
        return frozenset(node for node, report in self.reports.items() if report.is_stuck)

    @property
    def is_leaving(self) -> bool:
        """True if this node leaves."""
        return (0 if self.team is None else self.team.rank) in self.leavers

    @property
    def deaths(self) -> list[Death]:
        """The deaths on all nodes, in order as far as their clocks agree."""
        deaths = [death for report in self.reports.values() for death in report.deaths]
        return sorted(deaths, key=lambda death: death.at)

    @property
    def seconds(self) -> float:
        """Seconds from the start of the round to its first failure, on the node where that was."""
        return min(self.reports.values(), key=lambda report: report.at).seconds

    def _after_message(self, node: int, message: Mapping[str, Any]) -> Round:
        match message["kind"]:
            case "ready":
                after = replace(self, readies={**self.readies, node: Ready.from_json(message)})
                return after._once_all_are_ready()
            case "ended":
                return self._at_least(Phase.STOPPING)
            case "wish":
                return self._after_end_request(RoundEndRequest.from_json(message))
            case "hang" if self.phase.value < Phase.DIAGNOSING.value:
                return replace(self, is_hung=True)._at_least(Phase.DIAGNOSING)
            case "stop":
                return replace(self, stop_signal=message["signum"])._ending()
            case "waiting":
                return replace(self, waiting=message["count"])
            case "lost":
                after = replace(self, lost={**self.lost, message["node"]: message["why"]})
                return after._ending()._settled()
            case "report":
                report = NodeReport.from_json(message["report"])
                after = replace(self, reports={**self.reports, node: report})
                return (after if report.has_drained else after._at_least(Phase.STOPPING))._settled()
            case _:
                return self  # of a later version

    def _once_all_are_ready(self) -> Round:
        assert self.team is not None
        return self if len(self.readies) < self.team.size else self._at_least(Phase.RUNNING)

    def _after_end_request(self, request: RoundEndRequest) -> Round:
        after = replace(self, end_requests=(*self.end_requests, request))
        if self.is_started:
            return after._at_least(Phase.DRAINING if request.can_drain else Phase.STOPPING)
        return after._at_least(Phase.SETTLED) if self.phase is Phase.GATHERING else after

    def _after_exit(self, event: WorkerExited) -> Round:
        after = replace(self, exits=(*self.exits, event))
        if event.code not in (0, ExitCode.PREEMPTED) or len(after.exits) == len(self.plan.slots):
            return after._at_least(Phase.STOPPING)
        if event.code == ExitCode.PREEMPTED:
            return after._at_least(Phase.DRAINING)  # it has received the request before this node has
        return after

    def _after_stop(self, signum: int) -> Round:
        insists = self.stop_signal is not None or self.is_leaving
        after = replace(self, stop_signal=signum)
        if not self.is_started:
            waits = self.phase is Phase.OVER and not insists
            return after if waits else after._at_least(Phase.SETTLED)
        return after._at_least(Phase.KILLING if insists else Phase.STOPPING)

    def _after_deadline(self, event: DeadlinePassed) -> Round:
        match self.phase:
            case Phase.DRAINING | Phase.DIAGNOSING:
                return self._at_least(Phase.STOPPING)
            case Phase.STOPPING:
                return self._at_least(Phase.KILLING)
            case Phase.KILLING:
                return replace(self, trouble=event)._at_least(Phase.OVER)
            case _:
                return self

    def _ending(self) -> Round:
        """The round on its way to the end; before its start, at it."""
        return self._at_least(Phase.SETTLED if self.phase is Phase.GATHERING else Phase.STOPPING)

    def _at_least(self, phase: Phase) -> Round:
        if phase.value <= self.phase.value:
            return self
        if phase is Phase.OVER and self.cut_off is not None:
            phase = Phase.SETTLED  # no other node waits for a report
        after = replace(self, phase=phase)
        if phase.value >= Phase.STOPPING.value and self.exits_before_stop is None:
            after = replace(after, exits_before_stop=len(self.exits))
        if phase.value >= Phase.KILLING.value and self.exits_before_kill is None:
            after = replace(after, exits_before_kill=len(self.exits))
        return after

    def _settled(self) -> Round:
        """The round, settled if no process is left here and every node that is not lost has reported."""
        return self if self.silent or self.phase is not Phase.OVER else self._at_least(Phase.SETTLED)
