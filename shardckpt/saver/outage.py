"""Retries while a storage is out of reach."""

from __future__ import annotations

import time
from collections.abc import Callable

from shardckpt.errors import OutOfReachError

__all__ = ["until_it_answers"]

_FIRST_PAUSE = 0.5  # seconds
_LONGEST_PAUSE = 4.0


def until_it_answers(
    work: Callable[[], None],
    seconds: float,
    may_wait: Callable[[OutOfReachError], bool],
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Do `work`, and do it again after ever longer pauses while it raises OutOfReachError.

    Args:
        work: what to do.
        seconds: how long after the first such error another try may begin.
        may_wait: called with each such error in that time; if it returns False, the error is raised.
        sleep, clock: as in the module `time`.

    Raises what `work` raises last.
    """
    end = None
    pause = _FIRST_PAUSE
    while True:
        try:
            work()
        except OutOfReachError as error:
            end = clock() + seconds if end is None else end
            if clock() + pause > end or not may_wait(error):
                raise
        else:
            return
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
