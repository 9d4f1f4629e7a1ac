"""What this node tells all nodes about a round, once no worker process is left here."""

from __future__ import annotations

import time

from launcher.agent.workers import Workers
from launcher.diagnosis.death import read_death
from launcher.diagnosis.reports import Death, NodeReport
from launcher.events import WorkerExited
from launcher.round.round import Round
from launcher.system.oom import OomWatch

__all__ = ["make_node_report"]


def make_node_report(round_: Round, workers: Workers, oom: OomWatch) -> NodeReport:
    """Gather the deaths, exits, trouble and steps of `round_` on this node.

    Reads the workers' log, error and progress files, and the kernel's log for OOM kills. Times in the
    report are seconds since the epoch.
    """
    assert round_.team is not None
    now, epoch = time.monotonic(), time.time()
    host = round_.team.hosts[round_.team.rank]

    def time_of(exit_: WorkerExited) -> float:
        return epoch - (now - exit_.at)

    def death_of(exit_: WorkerExited) -> Death:
        return read_death(
            workers.files[exit_.rank],
            exit_,
            host,
            time_of(exit_),
            oom,
            round_.is_ours(exit_) or _has_handled_stop(exit_, round_, workers),
            workers.stderr_sizes.get(exit_.rank),
        )

    failed = round_.failed_exits
    return NodeReport(
        node=round_.team.rank,
        host=host,
        round=round_.plan.number,
        at=time_of(failed[0]) if failed else epoch,
        seconds=(failed[0].at if failed else now) - workers.began,
        has_finished=round_.has_finished,
        has_drained=round_.has_drained,
        deaths=tuple(map(death_of, failed)),
        ended=tuple(
            (exit_.rank, exit_.code, time_of(exit_))
            for exit_ in round_.unasked_exits
            if exit_ not in failed
        ),
        trouble=round_.trouble_in_words,
        is_stuck=round_.is_stuck,
        step=workers.step,
        hang=(*workers.hung_at, *round_.hang) if round_.hang else (),
    )


def _has_handled_stop(exit_: WorkerExited, round_: Round, workers: Workers) -> bool:
    """True if a worker ended in its own SIGTERM handler after it was told to stop."""
    before = round_.exits_before_stop
    return before is not None and exit_ in round_.exits[before:] and exit_.rank in workers.stderr_sizes
