"""What `launch status` prints: the state of a running job, or how one has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.cli.ask import ask
from launcher.errors import NotRunningError, UnreachableError
from launcher.reporting.journal import JOURNAL, read_journal
from launcher.reporting.past_job import PastJob
from launcher.reporting.status import Status
from launcher.reporting.terminal import LiveBlock, Sink

__all__ = ["print_status", "watch_status"]

_WATCH_SECONDS = 1.0


def print_status(run: Path, *, as_json: bool) -> None:
    """Print the status once. Raises `NotRunningError` if no job was ever there."""
    print(_render(_read_status(run), run, as_json=as_json))


def watch_status(run: Path, *, as_json: bool) -> None:
    """Print the status every second, in place on a terminal, and at last how the job has ended."""
    block = LiveBlock(Sink(1), beside=Sink(1))
    for status in _follow(run):
        if as_json or not block.can_draw:
            print(_render(status, run, as_json=as_json), flush=True)
        else:
            block.lines = _lines(status, run)
            block.refresh()


def _follow(run: Path) -> Iterator[Status | PastJob]:
    while isinstance(status := _read_status(run), Status):
        yield status
        time.sleep(_WATCH_SECONDS)
    yield status


def _read_status(run: Path) -> Status | PastJob:
    """The status that the agent answers; if none runs, the end of the last job in the journals."""
    try:
        answer = list(ask(run, "status"))[-1]
    except NotRunningError:
        past = _read_past_job(run)
        if past is None:
            raise
        return past
    try:
        return Status.from_json(answer["status"])
    except (KeyError, TypeError, ValueError):
        raise UnreachableError(f"the job in {run} was started by another version of launch") from None


def _read_past_job(run: Path) -> PastJob | None:
    """As the agent recorded it that was there last, on one or several nodes."""
    journals = [run / JOURNAL, *run.glob(f"nodes/*/{JOURNAL}")]
    past_jobs = [past for journal in journals if (past := PastJob.of(read_journal(journal)))]
    return max(past_jobs, key=lambda past: (past.started, past.ended), default=None)


def _render(status: Status | PastJob, run: Path, *, as_json: bool) -> str:
    if as_json:
        running: Mapping[str, Any] = {"running": isinstance(status, Status)}
        return json.dumps({**running, **status.to_json()})
    return "\n".join(_lines(status, run))


def _lines(status: Status | PastJob, run: Path) -> list[str]:
    paint = Sink(1).paint
    if isinstance(status, Status):
        return status.render(paint)
    return status.render(run.name, time.time(), paint)
