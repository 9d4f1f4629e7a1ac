"""What comes after a round. Pure, and the same on every node: they decide from what all have received."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.diagnosis.reports import Death
from launcher.diagnosis.same_again import would_fail_again
from launcher.errors import ExitCode, shell_code
from launcher.formatting import count
from launcher.round.round import Round

__all__ = ["Again", "Decision", "Failure", "Finish", "GiveUp", "History", "Limits", "decide"]

_LONGEST_PAUSE = 30.0  # seconds before another try
_JOIN_ATTEMPTS = 5  # in a row that do not bring this node into a team
_MEMBER_CODES = {
    "usage": ExitCode.BAD_USAGE,
    "unavailable": ExitCode.UNAVAILABLE,
    "lost": ExitCode.UNAVAILABLE,
    "closed": ExitCode.UNAVAILABLE,
    "quorum": ExitCode.QUORUM_LOST,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How many failures end a job."""

    max_restarts: int = 3  # without progress
    crash_loop: int = 3  # number of equal failures at one step; 0: no limit
    min_nodes: int = 1  # with which the job goes on


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of one round. Two with equal step and fingerprint are the same failure again."""

    step: int | None  # the highest that was reported
    fingerprint: str | None = None  # None: the failure cannot be compared with others


@dataclass(frozen=True, slots=True)
class History:
    """The failures of a job before its present round. Progress is a step beyond `best_step`."""

    restarts: int = 0  # after failures, since the job's start
    best_step: int | None = None  # the highest that any round has reported
    failures: tuple[Failure, ...] = ()  # since the last progress
    losses: int = 0  # rounds since the last progress that ended because nodes were lost
    failed_joins: int = 0  # of this node, in a row; 0 once it has joined

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        failures = tuple(Failure(**failure) for failure in value["failures"])
        return cls(value["restarts"], value["best_step"], failures, value["losses"])

    @classmethod
    def of_team(cls, histories: Sequence[History]) -> History:
        """The history that a new team goes on with: the longest of its nodes'."""
        return max(histories, key=lambda one: (one.restarts, one.best_step or 0, one.losses))

    def after_step(self, step: int | None) -> History:
        """The history after a round that reached `step`. Progress clears the failures before it."""
        if step is None or (self.best_step is not None and step <= self.best_step):
            return self
        return replace(self, best_step=step, failures=(), losses=0)

    def after_failure(self, failure: Failure) -> History:
        return replace(self, restarts=self.restarts + 1, failures=(*self.failures, failure))


@dataclass(frozen=True, slots=True)
class Again:
    """The job goes on with a new round, `pause` seconds from now."""

    history: History
    reason: str
    pause: float = 0.0
    same_team: bool = True  # False: the nodes form a new team first


@dataclass(frozen=True, slots=True)
class Finish:
    """The job ends because its workers have finished, or because it, or this node, was told to."""

    exit_code: int
    reason: str = field(default="", compare=False)  # empty: the workers have finished
    is_final: bool = True  # the job goes on neither here nor on another node


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job ends because going on makes no sense."""

    exit_code: int
    reason: str
    is_final: bool = True  # as in `Finish`


Decision = Again | Finish | GiveUp

# Not final: the job may go on on other nodes, and the user starts it again on this one.
_PREEMPTED = Finish(ExitCode.PREEMPTED, "told to end: start it again to go on", is_final=False)
_STUCK = GiveUp(
    ExitCode.INTERNAL, "no more rounds where processes are left that nothing can end", is_final=False
)


def decide(
    round_: Round, culprit: Death | None, fingerprint: str | None, history: History, limits: Limits
) -> Decision:
    """What to do after a round that is settled.

    Args:
        culprit: the worker that failed first; None if no worker is to blame.
        fingerprint: equal for the same failure again; None if it cannot be compared.
    """
    if round_.stop_signal is not None:
        reason = f"stopped by {signal.Signals(round_.stop_signal).name}"
        is_known_to_team = round_.team is not None and round_.cut_off is None
        return Finish(128 + round_.stop_signal, reason, is_final=is_known_to_team)
    if round_.cut_off is not None:
        return _after_exclusion(round_, history)
    reports = round_.reports.values()
    if reports and all(report.has_finished for report in reports) and not round_.lost:
        return Finish(ExitCode.OK)
    if round_.leavers or round_.stuck or round_.lost:
        return _without_some_nodes(round_, history.after_step(round_.step), limits)
    is_asked = bool(round_.end_requests) and culprit is None and not round_.is_hung
    if is_asked or all(report.has_drained for report in reports):
        return _after_drain(round_, history.after_step(round_.step))
    failure = Failure(round_.step, "a hang" if round_.is_hung and culprit is None else fingerprint)
    return _after_failure(round_, culprit, failure, history.after_step(round_.step), limits)


def _after_exclusion(round_: Round, history: History) -> Decision:
    assert round_.cut_off is not None
    if round_.is_leaving:
        return _PREEMPTED
    if round_.is_stuck:
        return _STUCK
    failed = 0 if round_.team is not None else history.failed_joins + 1
    if round_.cut_off.kind == "lost" and failed < _JOIN_ATTEMPTS:
        after = replace(history, failed_joins=failed)
        return Again(after, "joining again", _pause(failed + 1), same_team=False)
    if round_.cut_off.kind == "over":
        return Finish(round_.cut_off.outcome or ExitCode.OK, round_.cut_off.reason, is_final=False)
    code = _MEMBER_CODES.get(round_.cut_off.kind, ExitCode.INTERNAL)
    return GiveUp(code, round_.cut_off.reason, is_final=False)


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0 after the first."""
    return 0.0 if failures <= 1 else min(2.0 ** (failures - 3), _LONGEST_PAUSE)


def _without_some_nodes(round_: Round, history: History, limits: Limits) -> Decision:
    """What comes after nodes left, were lost or got stuck: the others go on if they are enough."""
    if round_.team is None:
        return _PREEMPTED
    gone = round_.leavers | round_.stuck | set(round_.lost)
    can_go_on = round_.team.size - len(gone) >= limits.min_nodes
    if round_.team.rank in round_.leavers or (round_.leavers and not can_go_on):
        return _PREEMPTED
    if round_.team.rank in round_.stuck or (round_.stuck and not can_go_on):
        return replace(_STUCK, is_final=not can_go_on)
    if not round_.lost:
        why = "were told to leave" if round_.leavers else "cannot get rid of their processes"
        return Again(history, f"going on without the nodes that {why}", same_team=False)
    after = replace(history, losses=history.losses + 1)
    reason = "the nodes that are left come together anew"
    return Again(after, reason, _pause(after.losses), same_team=False)


def _after_drain(round_: Round, history: History) -> Decision:
    if not round_.end_requests:
        return _PREEMPTED  # the workers have left by themselves
    return Again(history, _REASONS[round_.end_requests[0].reason], same_team=not round_.waiting)


_REASONS = {
    "join": "taking in the nodes that wait",
    "scale": "with as many workers as asked for",
    "restart": "as asked for",
}


def _after_failure(
    round_: Round, culprit: Death | None, failure: Failure, history: History, limits: Limits
) -> Decision:
    after = history.after_failure(failure)
    if culprit is not None and would_fail_again(round_.deaths, round_.plan.world, round_.seconds):
        return GiveUp(
            shell_code(culprit.failure_code), "no other try, since every rank fails so at its start"
        )
    same = sum(failure == other for other in after.failures)
    if failure.fingerprint is not None and 0 < limits.crash_loop <= same:
        where = "before its first step" if failure.step is None else f"at step {failure.step}"
        how = "hung" if round_.is_hung and culprit is None else "failed with the same error"
        often = count(same, "time")
        reason = f"{how} {often} {where} (--crash-loop {limits.crash_loop})"
        return GiveUp(ExitCode.CRASH_LOOP, reason)
    spent = len(after.failures)
    if spent > limits.max_restarts:
        return GiveUp(_code(round_, culprit), _used_up(spent - 1, history.best_step))
    since = "" if history.best_step is None else " without progress"
    reason = f"{spent} of at most {limits.max_restarts} restarts{since}"
    return Again(after, reason, _pause(spent), same_team=not round_.waiting)


def _code(round_: Round, culprit: Death | None) -> int:
    if culprit is None:
        return ExitCode.HUNG if round_.is_hung else ExitCode.INTERNAL
    return shell_code(culprit.failure_code)


def _used_up(restarts: int, best_step: int | None) -> str:
    if not restarts:
        return "no restarts allowed"
    since = "" if best_step is None else f" without getting beyond step {best_step}"
    return f"{count(restarts, 'restart')} used up{since}"
