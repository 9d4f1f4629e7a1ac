"""Wait on all ranks for work of rank 0, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from shardckpt.progress import alive, doing
from shardckpt.ranks.world import Ranks, agree

__all__ = ["wait_together"]

_SLICE = 5.0  # seconds between two collectives of the waiting ranks, far less than the timeout of a process group

T = TypeVar("T")


def wait_together(ranks: Ranks, work: Callable[[], T], what: str) -> T:
    """Return or raise, on every rank, what `work` returns or raises on rank 0. Collective.

    Meanwhile the ranks exchange signs of life, so that neither the process group nor the launcher takes them for
    hung.

    Args:
        ranks: the world.
        work: may take long. Its result can be encoded as msgpack.
        what: what `launch status` shows that the ranks do.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if ranks.rank == 0:
        threading.Thread(target=run, name="shardckpt-look", daemon=True).start()
    with doing(what):
        while True:
            is_over = ranks.rank != 0 or _is_over(future)
            if not any(ranks.maximum([not is_over])):
                break
            alive()
    error: Exception | None = None
    told = b""
    try:
        if ranks.rank == 0:
            told = msgspec.msgpack.encode(future.result())
    except Exception as failure:
        error = failure
    agree(ranks, error)
    result: T = msgspec.msgpack.decode(ranks.broadcast(told))
    return result


def _is_over(future: Future[T]) -> bool:
    try:
        future.exception(_SLICE)
    except TimeoutError:
        return False
    return True
