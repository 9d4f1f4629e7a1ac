"""The saver's background work: a thread for each tier, so that a slow one does not hold up the others."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Progress", "Task", "TierQueues", "lower_priority"]

_log = logging.getLogger("shardckpt.saver")

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LOWEST_BEST_EFFORT = 2 << 13 | 7


@dataclass(eq=False)
class Progress:
    """How far a task is.

    Attributes:
        total: bytes to write.
        done: bytes that the storage has taken.
        moved: when `done` grew last, by time.monotonic.
    """

    total: int = 0
    done: int = 0
    moved: float = field(default_factory=time.monotonic)

    def reach(self, nbytes: int) -> None:
        """Note how many bytes are written. Safe from any thread."""
        if nbytes > self.done:
            self.done, self.moved = nbytes, time.monotonic()


class Task(Protocol):
    """One save to persist in one tier.

    Attributes:
        queue: the tier's name. Tasks of one queue run one after another.
        step: the save's.
        url: where the checkpoint will be.
        progress: how far the work is.
    """

    url: str
    progress: Progress

    @property
    def queue(self) -> str: ...

    @property
    def step(self) -> int: ...

    def work(self) -> None:
        """Do it. May raise anything."""

    def done(self, error: str) -> None:
        """Called by the working thread once the work is over: with what it raised, empty if nothing."""


class TierQueues:
    """Runs the tasks of one tier one after another, and those of different tiers at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Task]] = {}

    def submit(self, task: Task) -> None:
        """Queue a task behind those of its tier that were submitted before."""
        with self._lock:
            queue = self._queues.get(task.queue)
            if queue is not None:
                queue.append(task)
                return
            self._queues[task.queue] = deque([task])
        threading.Thread(target=self._work, args=(task.queue,), daemon=True).start()

    def stalled(self, seconds: float) -> set[str]:
        """The tiers that have work, and whose storage has taken nothing for so many seconds."""
        with self._lock:
            first = [(tier, queue[0].progress) for tier, queue in self._queues.items() if queue]
        return {tier for tier, progress in first if time.monotonic() - progress.moved > seconds}

    def under_way(self) -> list[Task]:
        """The tasks that run or wait."""
        with self._lock:
            return [task for queue in self._queues.values() for task in queue]

    def _work(self, name: str) -> None:
        while True:
            with self._lock:
                queue = self._queues[name]
                if not queue:
                    del self._queues[name]
                    return
                task = queue[0]
            error = ""  # not the exception, whose traceback would hold on to the packs
            task.progress.moved = time.monotonic()
            try:
                task.work()
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}"
                _log.error("saving %s failed: %s", task.url, failure)
            with self._lock:
                queue.popleft()
            task.done(error)
            del task


def lower_priority() -> None:
    """Give training priority over this process, for CPU and disk, where the system has such priorities."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST_BEST_EFFORT)
