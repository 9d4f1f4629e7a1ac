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
failure          the verdict's
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
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["JOURNAL", "Journal", "encodable", "read_journal"]

JOURNAL = "events.jsonl"
"""The file's name in a run directory, or in a node's part of it."""


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
        line = json.dumps(encodable({"time": round(time.time(), 6), "event": event, **fields}))
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


def _ends_a_line(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"


def encodable(value: Any) -> Any:
    """`value` as JSON can have it: numbers that JSON lacks become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encodable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [encodable(item) for item in value]
    return value


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
