"""Calls that run in another thread, and that the waiting thread can give up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shardckpt.errors import OutOfReachError, StorageError
from shardckpt.storage.limits import at_most, remaining

if TYPE_CHECKING:
    import asyncio

__all__ = ["Interruption", "Work", "cleanup", "in_loop", "in_thread", "stop"]

T = TypeVar("T")

# Seconds after an interrupt; together they let a command end within two.
_STOP = 0.3
_CLEANUP = 1.2


class Interruption:
    """Ends the storage calls that a group of threads waits for, and all later ones.

    Each thread works inside `joined()`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: set[Work[Any]] = set()
        self._is_set = False

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Have `set` end the waits of this thread in the block."""
        _thread.interruption = self
        try:
            yield
        finally:
            del _thread.interruption

    def set(self) -> None:
        """End all waits, the present and the later ones: they raise StorageError."""
        with self._lock:
            self._is_set = True
            works = list(self._works)
        for work in works:
            work.cancel()

    def _add(self, work: Work[Any]) -> None:
        with self._lock:
            self._works.add(work)
            is_set = self._is_set
        if is_set:
            work.cancel()

    def _remove(self, work: Work[Any]) -> None:
        with self._lock:
            self._works.discard(work)


_thread = threading.local()


class Work(Generic[T]):
    """A call under way.

    Args:
        future: completes with the call's result or error, also after `cancel`.
        cancel: requests its end, from any thread.
    """

    def __init__(self, future: Future[T], cancel: Callable[[], object]) -> None:
        self.future = future
        self.cancel = cancel

    def result(self, seconds: float | None = None, *, stop_it: bool = True) -> T:
        """Wait for the call, and return or raise its outcome.

        Args:
            seconds: to wait at most; `at_most` may grant less. None waits without a limit of its own.
            stop_it: whether an interrupt of this thread (KeyboardInterrupt) cancels the call.

        Raises StorageError if an `Interruption` ends the wait, OutOfReachError if the call takes too long.
        """
        interruption = getattr(_thread, "interruption", None)
        granted = remaining()
        if interruption is not None:
            interruption._add(self)
        try:
            limits = [limit for limit in (seconds, granted) if limit is not None]
            return self.future.result(min(limits) if limits else None)
        except CancelledError:
            raise StorageError("the call was interrupted") from None
        except TimeoutError:
            if self.future.done():  # by now, or with this very error
                return self.future.result()
            self.cancel()
            raise OutOfReachError("the storage does not answer in time") from None
        except BaseException:
            if stop_it:
                stop([self])
            raise
        finally:
            if interruption is not None:
                interruption._remove(self)


def stop(works: Sequence[Work[Any]]) -> None:
    """Cancel these calls, and wait a moment for them to end."""
    for work in works:
        work.cancel()
    wait([work.future for work in works], _STOP)


def in_loop(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Work[T]:
    """Run a coroutine in the event loop of another thread. `cancel` takes effect once the coroutine has ended."""
    future: Future[T] = Future()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        task = loop.create_task(coroutine)
        tasks.append(task)
        task.add_done_callback(lambda task: _settle(future, task))

    loop.call_soon_threadsafe(start)
    return Work(future, lambda: loop.call_soon_threadsafe(lambda: tasks[0].cancel()))


def in_thread(function: Callable[[], T]) -> Work[T]:
    """Run a function in a thread of its own. It cannot be stopped: a cancelled one runs on, unobserved."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            _try_set(partial(future.set_exception, error))
        else:
            _try_set(partial(future.set_result, result))

    threading.Thread(target=run, name="shardckpt-storage", daemon=True).start()
    return Work(future, future.cancel)


@contextlib.contextmanager
def cleanup(error: BaseException, left: str) -> Iterator[None]:
    """Clean up after an error; if the block fails, `left` is added to the error as a note.

    Args:
        error: the error that is being handled. After an interrupt (no Exception) all blocks for it together have
            1.2 s; after another error a block has the time that the storage needs.
        left: what is left behind if the block fails.
    """
    try:
        if isinstance(error, Exception):
            yield
        else:
            until = error.__dict__.setdefault("_tidied_until", time.monotonic() + _CLEANUP)
            with at_most(until - time.monotonic()):
                yield
    except FileNotFoundError:
        pass
    except BaseException as failure:
        error.add_note(left)
        if not isinstance(failure, Exception) and isinstance(error, Exception):
            failure.add_note(left)
            raise


def _settle(future: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        future.cancel()
        future.set_running_or_notify_cancel()
    elif (error := task.exception()) is not None:
        _try_set(partial(future.set_exception, error))
    else:
        _try_set(partial(future.set_result, task.result()))


def _try_set(setter: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):  # it was cancelled
        setter()
