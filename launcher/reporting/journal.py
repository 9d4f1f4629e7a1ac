"""The journal of a run: RUN_DIR/events.jsonl, one JSON object a line, appended and never rewritten.

Every line has `time` (seconds since the epoch) and `event`; what else it has depends on the event. docs/events.md
tells what each field means.

event            fields
job_started      command, nproc, nodes, pid, host
round_started    round, world, nodes, restarts, slots
progress         round, step, rate, loss
staged           step
persisted        step, tier; url, seconds unless workers have saved by themselves
save_failed      step, tier, url, error
failure          the verdict's, its kind, steps_lost
saver_halted     pid, reason
left_behind      processes
hang             round, summary, directory
drain_requested  reason, by
drained          step
node_joined      node, hosts
node_lost        node, host, why
recovered        round, stopped, forked, joined, restored, first_step
control          verb, number
job_ended        exit_code, reason
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.job import Config
from launcher.diagnosis.verdict import Verdict
from launcher.events import (
    Event,
    Joined,
    RequestReceived,
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SaveStaged,
    StacksTaken,
)
from launcher.formatting import json_values
from launcher.reporting.status import Status
from launcher.round.round import Round
from launcher.system.left_behind import LeftBehind

__all__ = ["JOURNAL", "JobJournal", "Journal", "read_journal"]

JOURNAL = "events.jsonl"
"""The file's name in a run directory, or in a node's part of it."""

_PROGRESS_SECONDS = 5.0  # between two lines of progress


class Journal:
    """Appends to a journal. Several processes may write to one file, on one host, at the same time.

    A job does not end because its journal cannot be written: `complain` is called with a line for the
    user, once.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self.path = path
        self._complain = complain
        self._has_complained = False
        self._fd: int | None = None
        self._is_torn = False  # the file may end in the middle of a line

    def record(self, event: str, /, **fields: object) -> None:
        """Append one line: that `event` happens now, unless `fields` has a `time`."""
        line = json.dumps(json_values({"time": round(time.time(), 6), "event": event, **fields}))
        try:
            self._append(f"{line}\n".encode())
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                self._complain(f"{self.path} cannot be written: {error.strerror}; the job goes on")

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, line: bytes) -> None:
        """Write `line` in one piece, so that no other writer's can come to lie in it."""
        if self._fd is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o666)
            self._is_torn = not _ends_a_line(self._fd)
        if self._is_torn:
            line = b"\n" + line
        self._is_torn = True
        self._is_torn = os.write(self._fd, line) < len(line)


class JobJournal(Journal):
    """What one agent records of its job: a method for each event, or for each kind of them."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        super().__init__(path, complain)
        self._progress_at = 0.0  # seconds since the epoch: when it was recorded last,
        self._step: int | None = None  # and which step

    def job_started(self, config: Config) -> None:
        self.record(
            "job_started",
            command=[config.command.target, *config.command.args],
            nproc=[config.min_nproc, config.nproc],
            nodes=list(config.nnodes),
            pid=os.getpid(),
            host=os.uname().nodename,
        )

    def job_ended(self, exit_code: int, reason: str) -> None:
        self.record("job_ended", exit_code=exit_code, reason=reason)

    def joined(self, event: Joined) -> None:
        hosts = ", ".join(str(hello["host"]) for hello in event.hellos)
        self.record("node_joined", node=event.rank, hosts=hosts)

    def message_received(self, node: int, message: Mapping[str, Any], hosts: Sequence[str]) -> None:
        """What a node of the team has broadcast, if it changes who takes part."""
        match message["kind"]:
            case "lost":
                lost = int(message["node"])
                self.record("node_lost", node=lost, host=hosts[lost], why=str(message["why"]))
            case "wish":
                self.record("drain_requested", reason=message["reason"], by=hosts[node])

    def round_started(self, round_: Round, restarts: int) -> None:
        plan = round_.plan
        self.record(
            "round_started",
            round=plan.number,
            world=plan.world,
            nodes=plan.nodes,
            restarts=restarts,
            slots=plan.slots,
        )

    def progress(self, status: Status, *, at_last: bool = False) -> None:
        """How far the job is: at most every 5 s, or `at_last`, if it has got any further."""
        is_due = at_last or status.time - self._progress_at >= _PROGRESS_SECONDS
        if not is_due or status.step is None or status.step == self._step:
            return
        self._progress_at, self._step = status.time, status.step
        self.record("progress", round=status.round, step=status.step, rate=status.rate, loss=status.loss)

    def recovered(self, number: int, timeline: Mapping[str, float]) -> None:
        """In round `number`; `timeline` has seconds since the failure, by what was done then."""
        self.record("recovered", round=number, **timeline)

    def stacks_taken(self, number: int, taken: StacksTaken) -> None:
        self.record("hang", round=number, summary=taken.summary, directory=taken.directory)

    def left_behind(self, processes: Sequence[LeftBehind]) -> None:
        self.record("left_behind", processes=[str(one) for one in processes])

    def drained(self, step: int | None) -> None:
        self.record("drained", step=step)

    def round_failed(self, verdict: Verdict) -> None:
        self.record("failure", **verdict.to_json())

    def on_save(self, event: Event) -> None:
        """What the saver, or workers without it, have done with a checkpoint; other events are not recorded."""
        match event:
            case SaveStaged(step=step):
                self.record("staged", step=step)
            case SavePersisted(step=step, tier=tier, url=url, seconds=seconds):
                self.record("persisted", step=step, tier=tier, url=url, seconds=seconds)
            case SavedByWorkers(step=step, tier=tier):
                self.record("persisted", step=step, tier=tier)
            case SaveFailed(step=step, tier=tier, url=url, error=error, again=False):
                self.record("save_failed", step=step, tier=tier, url=url, error=error)

    def saver_halted(self, pid: int | None, reason: str) -> None:
        self.record("saver_halted", pid=pid, reason=reason)

    def request_received(self, request: RequestReceived) -> None:
        self.record("control", verb=request.verb, number=request.number)


def _ends_a_line(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The events in a journal, the oldest first; none if there is no such file.

    Lines that are cut off, as by a full disk or a power failure, are passed over.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                event = _decode(line)
                if event is not None:
                    yield event
    except FileNotFoundError:
        return


def _decode(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(event, dict) and "event" in event and "time" in event
    return event if is_whole else None
