"""One stream of all the events that the agent waits for."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from launcher.events import DeadlinePassed, Event, StopRequested, Tick

__all__ = ["Monitor", "Source"]

_LONGEST_POLL = 86400.0  # seconds; the kernel counts milliseconds in 31 bits
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_HARMLESS = (signal.SIGUSR2,)


class Source(Protocol):
    """Where events come from: a process, a socket, a thread."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events; none: it never will again."""

    def receive(self) -> list[Event]:
        """The events since the last call; does not wait."""


class Monitor:
    """Waits for events of its sources, signals, one deadline at a time and ticks, without polling.

    Enter it as a context: inside, the signals that stop a job are events, and SIGUSR2 is ignored. Signals that
    were ignored before (SIGHUP under nohup) stay ignored.
    """

    def __init__(self) -> None:
        self._sources: tuple[Source, ...] = ()
        self._deadline: float | None = None
        self._period: float | None = None
        self._next_tick = 0.0
        self._pending: deque[Event] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former: dict[int, object] = {}

    def __enter__(self) -> Monitor:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for signum in _STOP + _HARMLESS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._former[signum] = signal.signal(signum, lambda *_: None)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def watch(self, *sources: Source) -> None:
        """Take the events of these sources from now on, and of no others."""
        self._sources = sources

    def set_deadline(self, seconds: float | None) -> None:
        """Yield `DeadlinePassed` in `seconds` from now; None: never. Replaces the deadline before."""
        self._pending = deque(event for event in self._pending if not isinstance(event, DeadlinePassed))
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def set_ticks(self, seconds: float | None) -> None:
        """Yield `Tick` every so many seconds from now on; None: never."""
        self._period = seconds
        self._next_tick = time.monotonic() + (seconds or 0.0)

    def push(self, *events: Event) -> None:
        """Yield `events` next."""
        self._pending += events

    def events(self) -> Iterator[Event]:
        """Yield events as they come, without an end. Each is yielded once, also across calls."""
        while True:
            while self._pending:
                yield self._pending.popleft()
            self._wait()

    def _wait(self) -> None:
        poll = select.poll()
        for fd in (self._wake_read, *(fd for source in self._sources for fd in source.descriptors)):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._timeout())}
        if self._wake_read in ready:
            signums = os.read(self._wake_read, 1 << 10)
            self._pending += [StopRequested(s) for s in signums if signal.Signals(s) in _STOP]
        for source in self._sources:
            if ready.intersection(source.descriptors):
                self._pending += source.receive()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._pending.append(DeadlinePassed())
        if self._period is not None and time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + self._period
            self._pending.append(Tick())

    def _timeout(self) -> float | None:
        """Milliseconds until the deadline or the next tick; None: neither is set."""
        due = [] if self._deadline is None else [self._deadline]
        due += [] if self._period is None else [self._next_tick]
        return min(max(0.0, min(due) - time.monotonic()), _LONGEST_POLL) * 1000 if due else None
