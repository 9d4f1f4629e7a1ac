"""Run a function over a list of work in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from shardckpt.storage.work import Interruption

__all__ = ["THREADS", "in_parallel"]

THREADS = 4
"""Threads of a rank that wait for a storage."""

T = TypeVar("T")


def in_parallel(function: Callable[[Any], T], work: Sequence[Any], threads: int = THREADS) -> list[T]:
    """Call `function` with each item of `work`, in up to `threads` threads; return the results in order.

    After the first error no further item is begun, and waits in storages end at once; the error is raised when
    all threads have ended.
    """
    if len(work) < 2 or threads == 1:
        return [function(item) for item in work]
    interruption = Interruption()

    def run(item: Any) -> T:
        with interruption.joined():
            return function(item)

    with ThreadPoolExecutor(threads, thread_name_prefix="shardckpt") as pool:
        try:
            futures = [pool.submit(run, item) for item in work]
            wait(futures, return_when=FIRST_EXCEPTION)
            ended = [future for future in futures if future.done()]
            return [future.result() for future in ended]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            interruption.set()
            raise
