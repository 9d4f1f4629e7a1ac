"""The saver's background work: a thread for each tier, so that a slow one does not hold up the others."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Progress", "Task", "TierQueues", "lower_priority"]

_log = logging.getLogger("shardckpt.saver")

_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LOWEST_BEST_EFFORT = 2 << 13 | 7


@dataclass(eq=False)
class Progress:
    """How far a task is, in bytes."""

    total: int = 0
    done: int = 0
    moved: float = field(default_factory=time.monotonic)
    """When that was last more than before."""

    def reach(self, nbytes: int) -> None:
        """Note how much is written. Safe from any thread."""
        if nbytes > self.done:
            self.done, self.moved = nbytes, time.monotonic()


@dataclass(eq=False)
class Task:
    """One save to persist in one tier."""

    tier: str
    step: int
    url: str
    work: Callable[[Progress], None]
    done: Callable[[str], None]
    """Called by the working thread once the work is over, with what went wrong."""
    progress: Progress


class TierQueues:
    """Runs tasks of one tier one after another, and those of different tiers at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Task]] = {}

    def submit(self, task: Task) -> None:
        """Have the task done, after those of its tier that were submitted before."""
        with self._lock:
            queue = self._queues.get(task.tier)
            if queue is not None:
                queue.append(task)
                return
            self._queues[task.tier] = deque([task])
        threading.Thread(target=self._work, args=(task.tier,), daemon=True).start()

    def stalled(self, seconds: float) -> set[str]:
        """The tiers whose storage has taken nothing for so long, although something is to be written."""
        with self._lock:
            first = [(tier, queue[0].progress) for tier, queue in self._queues.items() if queue]
        return {tier for tier, progress in first if time.monotonic() - progress.moved > seconds}

    def under_way(self) -> list[Task]:
        """What is being done or waits."""
        with self._lock:
            return [task for queue in self._queues.values() for task in queue]

    def _work(self, tier: str) -> None:
        while True:
            with self._lock:
                queue = self._queues[tier]
                if not queue:
                    del self._queues[tier]
                    return
                task = queue[0]
            error = ""  # not the exception, whose traceback would hold on to the packs
            task.progress.moved = time.monotonic()
            try:
                task.work(task.progress)
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}"
                _log.error("saving %s failed: %s", task.url, failure)
            with self._lock:
                queue.popleft()
            task.done(error)
            del task


def lower_priority() -> None:
    """Have training go first, on the processor and on the disk, where the system knows such priorities."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST_BEST_EFFORT)
