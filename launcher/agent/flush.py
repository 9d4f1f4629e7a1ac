"""Wait for the saver after the last worker's end: the last thing that `launch` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from launcher.agent.departure import Departure
from launcher.agent.monitor import Monitor
from launcher.agent.saver_handle import SaverHandle
from launcher.events import DeadlinePassed, RequestReceived, Tick
from launcher.reporting.reporter import Reporter
from launcher.round.restart import Finish, GiveUp

__all__ = ["flush_saver", "report_halt"]


def flush_saver(
    saver: SaverHandle,
    monitor: Monitor,
    reporter: Reporter,
    decision: Finish | GiveUp,
    departure: Departure,
    *,
    timeout: float,
    waited: float,
    answer: Callable[[RequestReceived], None],
) -> tuple[int, str]:
    """Wait until the saver has made durable what it holds, for `timeout` seconds at most.

    Returns the exit code of `launch` after `decision`, and the reason for it.

    Args:
        waited: Seconds that the workers have waited for their saves before they ended.
        answer: Answers the requests that come meanwhile.
    """
    if saver.backlog is None:
        return decision.exit_code, decision.reason
    leave_in = departure.seconds_left(time.monotonic()) if departure.is_leaving else None
    flush = saver.begin_flush(timeout, waited=waited, leave_in=leave_in)
    monitor.set_deadline(flush.timeout)
    for event in monitor.events():
        if isinstance(event, Tick):
            report_halt(saver, reporter)
        if isinstance(event, DeadlinePassed):
            flush = replace(flush, halt=saver.find_halt(now=True))
        flush = flush.after(event)
        reporter.on_event(event)
        if isinstance(event, RequestReceived):
            answer(event)
        if flush.ending is not None:
            break
        reporter.flushing(flush)
    told = reporter.flushed(flush, saver.pid)
    exit_code = flush.exit_code(decision.exit_code)
    return exit_code, told if exit_code != decision.exit_code else decision.reason


def report_halt(saver: SaverHandle, reporter: Reporter) -> None:
    """Report a saver that cannot go on: workers train without it, and nothing becomes durable."""
    reporter.saver_halted(saver.find_halt(), saver.pid)
