"""Waiting for what rank 0 does, on all ranks, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from shardckpt.progress import alive, doing
from shardckpt.ranks.world import Ranks, agree

__all__ = ["wait_together"]

_SLICE = (
    5.0  # seconds that the other ranks wait for rank 0 without a word, far less than process groups allow
)

T = TypeVar("T")


def wait_together(ranks: Ranks, work: Callable[[], T], what: str) -> T:
    """What `work` returns or raises on rank 0, where it may take long, on every rank. Collective.

    Its result is data. The launcher is told that all ranks get on.
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
