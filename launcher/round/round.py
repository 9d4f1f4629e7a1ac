"""What happens in a round, from the gathering of its nodes to the last report. Pure: no clock, no I/O.

Every node of a team plays the same round. What all must know is said into the team's log, which every
node hears in the same order: so all of them come to the same end.
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

    GATHERING = auto()  # the nodes are not all ready
    RUNNING = auto()
    DRAINING = auto()  # workers have been asked to save at their next step boundary, and to end
    DIAGNOSING = auto()  # workers hang, and before they are stopped it is looked at where
    STOPPING = auto()  # everything that is left has been sent SIGTERM
    KILLING = auto()  # ... SIGKILL
    OVER = auto()  # nothing is left on this node
    SETTLED = auto()  # ... nor on any other


@dataclass(frozen=True)
class RoundEndRequest:
    """Why a round shall end at a step boundary."""

    reason: str
    """leave: a node was told to end; join: nodes wait to be taken in; scale, restart: a user asks for it."""
    node: int
    can_drain: bool  # else the workers are stopped where they are
    slots: int | None = None  # to scale that node to
    without: tuple[int, ...] = ()  # the slots that get no worker then

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
    """One start of all workers of a team, as the events so far tell it to this node."""

    team: Team | None = None
    phase: Phase = Phase.GATHERING
    readies: Mapping[int, Ready] = field(default_factory=dict)
    exits: tuple[WorkerExited, ...] = ()  # of this node, in order of death
    exits_before_stop: int | None = None  # how many had ended when the rest was first told to
    exits_before_kill: int | None = None  # ... when the rest was killed
    end_requests: tuple[RoundEndRequest, ...] = ()
    trouble: SpawnFailed | ZygoteLost | DeadlinePassed | None = None
    cut_off: MemberFailed | None = None  # this node is in no team any more
    stop_signal: int | None = None  # someone wants the whole job to end, now
    hang: tuple[str, ...] = ()  # what was found out about it on this node
    is_hung: bool = False
    lost: Mapping[int, str] = field(default_factory=dict)  # nodes, and why
    waiting: int = 0  # nodes that want to be taken in
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
        """The round of a node that leaves and is in no team that could be told."""
        request = RoundEndRequest("leave", 0 if self.team is None else self.team.rank, can_drain=False)
        after = replace(self, end_requests=(*self.end_requests, request))
        return after if self.is_started else after._at_least(Phase.SETTLED)

    @property
    def plan(self) -> RankAssignment:
        """Of a round that has started."""
        assert self.team is not None
        return RankAssignment.of(self.team.rank, self.readies)

    @property
    def is_started(self) -> bool:
        """Whether workers were, or are being, started on this node."""
        return Phase.RUNNING.value <= self.phase.value < Phase.OVER.value

    @property
    def has_finished(self) -> bool:
        """Whether every worker of this node returned 0, and none of them because it was told to end."""
        return self._have_all_ended_with(0)

    @property
    def has_drained(self) -> bool:
        """Whether every worker of this node returned 0 so, or saved and left."""
        return self._have_all_ended_with(0, ExitCode.PREEMPTED)

    @property
    def was_drained(self) -> bool:
        """Whether nodes have reported, and every worker of theirs had saved and left, or finished."""
        reports = self.reports.values()
        return bool(reports) and all(report.has_drained for report in reports)

    def _have_all_ended_with(self, *codes: int) -> bool:
        """A handler of the worker's own may answer SIGTERM with 0: that is no end of its training."""
        ended = [exit_ for exit_ in self.exits if exit_.code or exit_ in self.unasked_exits]
        return len(ended) == len(self.plan.slots) and all(exit_.code in codes for exit_ in ended)

    @property
    def unasked_exits(self) -> tuple[WorkerExited, ...]:
        """Of this node, before it told any worker to end."""
        return self.exits[: self.exits_before_stop]

    @property
    def failed_exits(self) -> list[WorkerExited]:
        """Of this node, in order of death."""
        return [exit_ for exit_ in self.exits if exit_.code not in (0, ExitCode.PREEMPTED)]

    @property
    def is_stuck(self) -> bool:
        """Whether processes are left on this node that even SIGKILL does not end."""
        return isinstance(self.trouble, DeadlinePassed)

    def is_ours(self, exit_: WorkerExited) -> bool:
        """Whether a worker of this node ended because it was sent a signal to that end."""
        before = {-signal.SIGTERM: self.exits_before_stop, -signal.SIGKILL: self.exits_before_kill}
        first = before.get(exit_.code)
        return first is not None and exit_ in self.exits[first:]

    @property
    def has_failed_here(self) -> bool:
        """Whether something went wrong on this node before anything was stopped."""
        return self.trouble is not None or any(not self.is_ours(exit_) for exit_ in self.failed_exits)

    @property
    def is_asked_to_end(self) -> bool:
        """Whether it ends, or will, because somebody wants it to."""
        return self.stop_signal is not None or bool(self.end_requests)

    @property
    def is_explained(self) -> bool:
        """Whether something other than a worker's failure is known, of which workers may have failed."""
        told = any(report.trouble or report.hang for report in self.reports.values())
        return told or bool(self.lost)

    @property
    def has_failed(self) -> bool:
        """Whether a settled round ended because something went wrong, wherever that was."""
        if self.stop_signal is not None:
            return False
        reports = self.reports.values()
        is_bad = any(report.trouble is not None or report.deaths for report in reports)
        is_asked = bool(self.end_requests) and all(death.is_ours for death in self.deaths)
        return bool(self.lost) or self.is_hung or (is_bad and not is_asked)

    @property
    def trouble_in_words(self) -> str | None:
        """What went wrong on this node that is not a worker's own failure."""
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
        """This node's slots for the next round; `culprit` is the worker that failed first, wherever."""
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
        """Where the workers that are asked to end have to save: those who go on here find it in memory."""
        return "memory" if self.end_requests and not self.leavers else "durable"

    @property
    def step(self) -> int | None:
        """The highest that a worker of any node has reported, once its node has."""
        steps = [report.step for report in self.reports.values() if report.step is not None]
        return max(steps, default=None)

    @property
    def silent(self) -> frozenset[int]:
        """The nodes of a team that have not said what all wait for: that they are ready, and later a report."""
        if self.team is None:
            return frozenset()
        said = self.readies if self.phase is Phase.GATHERING else self.reports
        return frozenset(range(self.team.size)) - frozenset(said) - frozenset(self.lost)

    @property
    def is_late(self) -> bool:
        """Whether the silent nodes should have spoken soon after this one has: no worker of theirs may go on."""
        if self.team is None:
            return False
        if self.phase is Phase.GATHERING:
            return self.team.rank in self.readies
        has_failed = any(not report.has_drained for report in self.reports.values())
        is_ending = has_failed or self.is_hung or bool(self.lost) or self.stop_signal is not None
        return self.phase is Phase.OVER and is_ending

    @property
    def leavers(self) -> frozenset[int]:
        """The nodes that end with this round, because they were told to."""
        return frozenset(request.node for request in self.end_requests if request.reason == "leave")

    @property
    def stuck(self) -> frozenset[int]:
        """The nodes on which processes are left that nothing can end."""
        return frozenset(node for node, report in self.reports.items() if report.is_stuck)

    @property
    def is_leaving(self) -> bool:
        """Whether this node is one of them."""
        return (0 if self.team is None else self.team.rank) in self.leavers

    @property
    def deaths(self) -> list[Death]:
        """Of all nodes, in order as far as their clocks agree."""
        deaths = [death for report in self.reports.values() for death in report.deaths]
        return sorted(deaths, key=lambda death: death.at)

    @property
    def seconds(self) -> float:
        """From the start of the round to its first failure, on the node that had it first."""
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
            return after._at_least(Phase.DRAINING)  # it has heard of it before this node has
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
        """On the way to its end. A node that is there already waits for what the others report."""
        return self._at_least(Phase.SETTLED if self.phase is Phase.GATHERING else Phase.STOPPING)

    def _at_least(self, phase: Phase) -> Round:
        if phase.value <= self.phase.value:
            return self
        if phase is Phase.OVER and self.cut_off is not None:
            phase = Phase.SETTLED  # there is nobody to tell
        after = replace(self, phase=phase)
        if phase.value >= Phase.STOPPING.value and self.exits_before_stop is None:
            after = replace(after, exits_before_stop=len(self.exits))
        if phase.value >= Phase.KILLING.value and self.exits_before_kill is None:
            after = replace(after, exits_before_kill=len(self.exits))
        return after

    def _settled(self) -> Round:
        """Settled, if nothing is left here and every node that is left has said what became of it."""
        return self if self.silent or self.phase is not Phase.OVER else self._at_least(Phase.SETTLED)
