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
            told, error = _outcome(future) if ranks.rank == 0 and is_over else (b"", None)
            is_running, has_failed = ranks.maximum([not is_over, error is not None])
            if not is_running:
                break
            alive()
    if has_failed:
        agree(ranks, error)
    result: T = msgspec.msgpack.decode(ranks.broadcast(told))
    return result


def _outcome(future: Future[T]) -> tuple[bytes, Exception | None]:
    """The encoded result of work that is over, or its error."""
    try:
        return msgspec.msgpack.encode(future.result()), None
    except Exception as error:
        return b"", error


def _is_over(future: Future[T]) -> bool:
    try:
        future.exception(_SLICE)
    except TimeoutError:
        return False
    return True
