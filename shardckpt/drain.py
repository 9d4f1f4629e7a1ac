"""Drain requests: the launcher asks a job to save and leave, and all ranks do so after the same step.

A request reaches the nodes of a job at different times, so the ranks have to agree. They do it in-band: at a
*check*, which is the same call of `step` on every rank, each rank starts an all-reduce of what it has read, and
waits for the result of the one that it started at the check before. At least a whole step of training lies
between the two, so a rank hardly ever waits. The all-reduce also carries how long a step takes, from which all
ranks compute the same number of steps until the next check.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import msgspec

from shardckpt.environment import drain_path
from shardckpt.ranks.calls import Call, check, words
from shardckpt.ranks.world import Ranks

__all__ = [
    "CHECK_INTERVAL",
    "DrainFile",
    "DrainWatch",
    "Drained",
    "Reason",
    "Request",
    "Scope",
    "steps_until_next",
]

_log = logging.getLogger("shardckpt")

_EXIT_CODE = 75
CHECK_INTERVAL = 0.1
"""Seconds of training between two checks."""
_MOST = 100  # steps between two checks, however short they are: the next may be long
_LONGEST = 4096  # bytes of a request

Reason = Literal["restart", "preemption"]
_REASONS: tuple[Reason, ...] = get_args(Reason)


class Scope(IntEnum):
    """Where the state has to be safe before the ranks leave. Of two requests, the higher one counts."""

    NONE = 0  # there is no request
    MEMORY = 1  # in the memory of the nodes' savers: the job goes on here at once
    DURABLE = 2  # in every tier


class Drained(SystemExit):
    """Raised by `Checkpointer.step` when the launcher asks the job to leave. The process exits with code 75.

    All ranks raise it after the same step, once that step is saved. A script need not handle it. As a SystemExit
    it passes through `except Exception`, runs every `finally`, and leaves `with Checkpointer(...)` in order. A
    script may catch it to clean up, and then has to raise it again: the launcher ends a process that stays. From
    then on, `wait` and `close` of the Checkpointer return at once.

    Attributes:
        step: optimizer steps done.
        reason: "preemption": the job ends, to be started again; "restart": it goes on at once, maybe on other
            ranks.
        is_saved: True if `step` is saved. If not, the log says why, and the job resumes from the checkpoint
            before.

    >>> import shardckpt
    >>> try:
    ...     raise shardckpt.Drained(120, "preemption", is_saved=True)  # as `step` does
    ... except shardckpt.Drained as end:
    ...     print(f"step {end.step}: {end.reason}, exit code {end.code}")
    step 120: preemption, exit code 75
    """

    def __init__(self, step: int, reason: Reason, *, is_saved: bool) -> None:
        super().__init__(_EXIT_CODE)
        self.step = step
        self.reason = reason
        self.is_saved = is_saved


class _Line(msgspec.Struct, frozen=True):
    """A request, as it stands in the file."""

    reason: Reason
    tiers: Literal["durable", "memory"]


@dataclass(frozen=True)
class Request:
    """A request that all ranks save and leave.

    Attributes:
        scope: where the state has to be safe before they leave.
        reason: see `Drained`.
    """

    scope: Scope
    reason: Reason


class DrainFile:
    """The file in which the launcher asks this node's workers for a drain.

    A file that cannot be read is logged and contains no request: the ranks of other nodes may still read one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._refused = b""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            _log.warning("this node's drain requests are not answered: LAUNCH_DRAIN_FILE: %s", error)

    @property
    def is_open(self) -> bool:
        """True if the file could be opened, so that a request in it is found."""
        return self._descriptor is not None

    def read(self) -> Request | None:
        """Return the request in the file; None if there is none. An invalid line is logged once, and ignored."""
        line = self._content()
        if not line.endswith(b"\n") or line == self._refused:
            return None  # none, or not whole yet, or known
        try:
            asked = msgspec.json.decode(line, type=_Line)
        except msgspec.MsgspecError as error:
            self._refused = line
            _log.error(
                'no drain: %s holds %r; expected one line: {"reason": "preemption", "tiers": "durable"}: %s',
                self.path,
                line[:200].decode(errors="replace"),
                error,
            )
            return None
        return Request(Scope[asked.tiers.upper()], asked.reason)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _content(self) -> bytes:
        if self._descriptor is None:
            return b""
        try:
            return os.pread(self._descriptor, _LONGEST, 0)
        except OSError as error:
            _log.debug("%s cannot be read: %s", self.path, error)
            return b""


def steps_until_next(before: int, micros_per_step: int, interval: float = CHECK_INTERVAL) -> int:
    """Return the number of steps from this check to the next.

    That is as many as take `interval`, but at most twice as many as before, and 100: where steps suddenly take
    longer than they did, the next check must not be hours away.

    Args:
        before: steps from the last check to this one.
        micros_per_step: microseconds that a step has taken since then.
        interval: seconds of training between two checks.
    """
    return max(1, min(int(interval * 1e6) // max(micros_per_step, 1), 2 * before, _MOST))


class DrainWatch:
    """Reads drain requests on all ranks, and returns the same one to all of them after the same step.

    A process has only one, since a request is answered once.
    """

    def __init__(self, file: DrainFile, ranks: Ranks, *, interval: float = CHECK_INTERVAL) -> None:
        """Every rank makes one, and calls its methods together with the others.

        Args:
            file: this node's file. It is closed by `close`.
            ranks: the world.
            interval: seconds of training between two checks; 0: a check at every step.
        """
        self.file = file
        self._interval = interval
        _watched.add(file.path)
        self._ranks = ranks
        self._outcome: Callable[[], list[int]] | None = None  # of the check before
        self._steps = 1  # from the last check to the next
        self._left = 1  # of these steps
        self._checked = time.monotonic()

    @classmethod
    def of_worker(cls, ranks: Ranks) -> DrainWatch | None:
        """Watch LAUNCH_DRAIN_FILE. Returns None without a launcher, or if this process watches it already."""
        path = drain_path()
        return cls(DrainFile(path), ranks) if path and path not in _watched else None

    def poll(self) -> Request | None:
        """Return the request, on all ranks in the same call; None if there is none. Call it after every step."""
        if self._ranks.size == 1:
            return self.file.read()
        self._left -= 1
        return self._check() if self._left == 0 else None

    def close(self) -> None:
        """Stop watching. An all-reduce under way ends by itself, and its result is dropped."""
        self._outcome = None
        _watched.discard(self.file.path)
        self.file.close()

    def _check(self) -> Request | None:
        now = time.monotonic()
        elapsed, self._checked = now - self._checked, now
        slowest = int(self._interval * 1e6)  # microseconds per step, of any rank
        if self._outcome is not None:
            scope, reason, slowest, *_ = check(self._ranks, Call.NEXT_STEP, 0, self._outcome())
            if scope:
                return Request(Scope(scope), _REASONS[reason])
        seen = self.file.read() or _NOTHING
        micros = int(elapsed / self._steps * 1e6)
        told = words(self._ranks, Call.NEXT_STEP, 0, [seen.scope, _REASONS.index(seen.reason), micros])
        self._outcome = self._ranks.start_maximum(told)
        self._steps = self._left = steps_until_next(self._steps, slowest, self._interval)
        return None


_NOTHING = Request(Scope.NONE, "restart")
_watched: set[str] = set()
"""The files that this process watches."""
