"""What a Checkpointer keeps to itself and tests look at, in this module only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardckpt.checkpointer import Checkpointer
from shardckpt.saver.client import SaverClient
from shardckpt.saving.saver_backend import SaverBackend
from shardckpt.saving.session import SaveHandle, SaveSession

__all__ = ["around_saves", "client_of", "crash", "last_save", "saver_of", "session_of", "wait_ready"]


def session_of(checkpointer: Checkpointer) -> SaveSession:
    """The session that makes its saves."""
    return checkpointer._session


def saver_of(checkpointer: Checkpointer) -> SaverBackend:
    """The backend by which it reaches the node's saver."""
    assert checkpointer._saver is not None
    return checkpointer._saver


def client_of(checkpointer: Checkpointer) -> SaverClient:
    """Its connection to the node's saver."""
    client = saver_of(checkpointer)._client
    assert client is not None
    return client


def last_save(checkpointer: Checkpointer) -> SaveHandle:
    """The save that it has started last."""
    claim = checkpointer._saves.claim
    assert claim is not None
    assert claim.last is not None
    return claim.last


def crash(checkpointer: Checkpointer) -> None:
    """Close the connection to the saver as the end of the process would: without a goodbye."""
    client_of(checkpointer).disconnect()


def wait_ready(checkpointer: Checkpointer) -> None:
    """Wait until the next buffer is there, so that a save is not skipped for want of it."""
    while not session_of(checkpointer).is_ready:
        pass


def around_saves(
    checkpointer: Checkpointer,
    wrap: Callable[[Callable[[], SaveHandle]], SaveHandle],
    *,
    only_at_exit: bool = False,
) -> None:
    """Have each save, or only those of a drain, started by `wrap`, which is given what starts it."""
    saves = checkpointer._saves
    start, save_before_exit = saves._start, saves.save_before_exit

    def wrapped(*arguments: Any) -> SaveHandle:
        return wrap(lambda: start(*arguments))

    def wrapped_at_exit(*arguments: Any, **options: Any) -> bool:
        saves._start = wrapped  # type: ignore[method-assign]
        return save_before_exit(*arguments, **options)

    if only_at_exit:
        saves.save_before_exit = wrapped_at_exit  # type: ignore[method-assign]
    else:
        saves._start = wrapped  # type: ignore[method-assign]
