"""The saver's event loop: one thread serves; what takes long is done by others, which come back to it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["EventLoop", "HasDescriptor"]


class HasDescriptor(Protocol):
    """A socket, or what wraps one."""

    def fileno(self) -> int: ...


class EventLoop:
    """Calls functions when descriptors are ready, and what other threads hand over. Not for use by other threads,
    except for `call`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._returned: deque[Callable[[], None]] = deque()
        self._pending = 0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._wake)

    @property
    def is_busy(self) -> bool:
        """True while work of other threads has not come back: the process must not end before."""
        return self._pending > 0 or bool(self._returned)

    def watch(self, connection: HasDescriptor | int, events: int, serve: Callable[[], None]) -> None:
        """Have `serve` called when one of the `events` occurs on a connection; 0 ends that."""
        known = self._selector.get_map().get(connection)
        if known is None and events:
            self._selector.register(connection, events, serve)
        elif known is not None and not events:
            self._selector.unregister(connection)
        elif known is not None and known.events != events:
            self._selector.modify(connection, events, serve)

    def call(self, function: Callable[[], None]) -> None:
        """Have `function` called by the serving thread. Safe from any thread."""
        self._returned.append(function)
        with contextlib.suppress(OSError):  # the socket is full, or the loop is closed
            self._wake_write.send(b"\0")

    def start(self, work: Callable[[], None]) -> None:
        """Have `work`, which does not raise, done by a thread of its own. The loop is busy until then."""
        done = self.promise(lambda: None)

        def run() -> None:
            work()
            done()

        threading.Thread(target=run, daemon=True).start()

    def promise(self, function: Callable[[], None]) -> Callable[[], None]:
        """Be busy until what this returns has been called, once, by any thread, and `function` by this one."""
        self._pending += 1

        def finish() -> None:
            self._pending -= 1
            function()

        return lambda: self.call(finish)

    def turn(self, patience: float | None) -> None:
        """Wait for something to happen, `patience` seconds at most (None: any time), and see to it."""
        for key, _ in self._selector.select(patience):
            key.data()
        while self._returned:
            self._returned.popleft()()

    def close(self) -> None:
        """Close the loop's own descriptors."""
        for descriptor in (self._selector, self._wake_read, self._wake_write):
            descriptor.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(1 << 12)
