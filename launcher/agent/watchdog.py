"""What is overdue in a round: steps of the workers, answers of other nodes, nodes that wait to join."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.agent.workers import Workers
from launcher.round.round import Phase, Round, RoundEndRequest

__all__ = ["DIAGNOSIS_SECONDS", "KILL_SECONDS", "Watchdog"]

KILL_SECONDS = 10.0
"""Seconds that processes have to disappear after SIGKILL; uninterruptible sleep delays that."""
DIAGNOSIS_SECONDS = 30.0
"""Seconds that dumping the stacks of a hang may take."""
_NODE_SLACK = 5.0  # seconds that other nodes get beyond what this one needs
_STALL_REPORT = 600.0  # seconds without progress before stacks are dumped, if --hang-timeout is not given
_SILENCE = 30.0  # seconds before the user is told that no worker reports steps, with --hang-timeout
_JOIN_WAIT = 30.0  # seconds after which workers that report nothing are taken to be unable to drain


@dataclass(frozen=True)
class Watchdog:
    """The overdue things of one round, and what the last look found. Each look gives a new value."""

    hang_timeout: float | None
    """Seconds without progress that are a hang; 0: never; None: stacks are dumped, and nothing is killed."""
    grace: float
    """Seconds that stopped workers get to end."""
    node_silence: float = 0.0
    """Seconds for which the round has waited for nodes that should have answered."""
    has_dumped_stall: bool = False
    has_missed_progress: bool = False
    """True once the job was found to report no progress although --hang-timeout was given."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """What the last look has for all nodes: a hang, a lost node, a request to end the round."""
    wants_stacks: bool = False
    """The last look found workers whose stacks should be dumped."""
    misses_progress: bool = False
    """The last look was the first to find that no worker reports progress."""

    def for_next_round(self) -> Watchdog:
        """The watchdog of a new round. What was said once per job is not repeated."""
        return Watchdog(self.hang_timeout, self.grace, has_missed_progress=self.has_missed_progress)

    def after(self, workers: Workers, round_: Round, seconds: float) -> Watchdog:
        """Look again, `seconds` after the last look."""
        looked = replace(self, messages=(), wants_stacks=False, misses_progress=False)
        if round_.phase in (Phase.RUNNING, Phase.DRAINING):
            looked = looked._after_progress(workers, round_)
        if round_.phase is Phase.RUNNING:
            looked = looked._after_newcomers(workers, round_)
        return looked._after_silence(round_, seconds)

    def _after_progress(self, workers: Workers, round_: Round) -> Watchdog:
        if self.hang_timeout is None:
            is_stalled = workers.still >= _STALL_REPORT
            is_new = is_stalled and not self.has_dumped_stall
            return replace(self, has_dumped_stall=is_stalled, wants_stacks=is_new)
        if not self.hang_timeout:
            return self
        after = self
        is_silent = not workers.is_watched and workers.age > max(self.hang_timeout, _SILENCE)
        if is_silent and not self.has_missed_progress:
            after = replace(self, has_missed_progress=True, misses_progress=True, wants_stacks=True)
        # A node that leaves is limited by --grace instead.
        if not round_.leavers and workers.hang(self.hang_timeout):
            return after._telling({"kind": "hang"})
        return after

    def _after_newcomers(self, workers: Workers, round_: Round) -> Watchdog:
        """End the round for nodes that wait, once the workers can drain or are taken never to."""
        assert round_.team is not None
        if not round_.waiting or round_.end_requests or round_.team.rank != 0:
            return self
        if workers.can_drain or workers.age > _JOIN_WAIT:
            request = RoundEndRequest("join", round_.team.rank, workers.can_drain)
            return self._telling(request.to_json())
        return self

    def _after_silence(self, round_: Round, seconds: float) -> Watchdog:
        """Declare a node lost if its agent has sent nothing for the timeout although its member still answers."""
        silence = self.node_silence + seconds if round_.is_late else 0.0
        after = replace(self, node_silence=silence)
        timeout = self.grace + KILL_SECONDS + _NODE_SLACK
        if round_.is_hung:
            timeout += DIAGNOSIS_SECONDS
        if silence < timeout:
            return after
        why = f"its launch has said nothing for {silence:.0f} s, and may be stopped"
        lost = ({"kind": "lost", "node": node, "why": why} for node in sorted(round_.silent))
        return after._telling(*lost)

    def _telling(self, *messages: Mapping[str, Any]) -> Watchdog:
        return replace(self, messages=(*self.messages, *messages))
