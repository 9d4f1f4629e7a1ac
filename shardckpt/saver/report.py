"""What becomes of saves, told to the trainers that wait for them and to the launcher."""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable

from shardckpt.run.tiers import MEMORY, Tier
from shardckpt.saver.connections import Client, Connections, sender
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.outbox import Outbox
from shardckpt.saver.protocol import Note, Outcome
from shardckpt.saver.snapshots import HeldSnapshot
from shardckpt.saver.tasks import Task

__all__ = ["ControlConnection", "Report"]

_log = logging.getLogger("shardckpt.saver")

_PROGRESS_EVERY = 0.2  # seconds between two lines of progress


class ControlConnection:
    """The connection to the launcher that started this process; it may be dead, or stopped.

    Args:
        loop: calls this when there is something to read.
        control: the connection; None: no launcher has started this process, and nothing is sent.
        on_end: called when the launcher ends the connection, once.
    """

    def __init__(self, loop: EventLoop, control: socket.socket | None, on_end: Callable[[], None]) -> None:
        self._loop = loop
        self._control = control
        self._outbox = None if control is None else Outbox(control)
        self._on_end = on_end
        self._has_ended = False

    def open(self) -> None:
        """Begin to read."""
        if self._control is not None:
            self._control.setblocking(False)
            self._watch()

    @property
    def has_launcher(self) -> bool:
        """True if a launcher has started this process."""
        return self._control is not None

    @property
    def takes_more(self) -> bool:
        """True if there is a launcher, and it has read everything."""
        return self._outbox is not None and self._outbox.is_empty

    def send(self, **line: object) -> None:
        """Send a line of JSON. Never waits."""
        if self._outbox is not None:
            with contextlib.suppress(OSError):
                self._outbox.send(json.dumps(line).encode() + b"\n")
            self._watch()

    def _watch(self) -> None:
        assert self._control is not None
        assert self._outbox is not None
        events = 0 if self._has_ended else selectors.EVENT_READ
        events |= 0 if self._outbox.is_empty else selectors.EVENT_WRITE
        self._loop.watch(self._control, events, self._serve)

    def _serve(self) -> None:
        assert self._control is not None
        assert self._outbox is not None
        try:
            self._outbox.flush()
            if not self._has_ended and not self._control.recv(1 << 12):
                self._end()
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.close()
            self._end()
        self._watch()

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._on_end()


class Report:
    """Sends outcomes and warnings to trainers, and events to the launcher."""

    def __init__(self, connections: Connections, control: ControlConnection) -> None:
        self._connections = connections
        self._control = control
        self._progress_at = 0.0

    # -- to trainers

    def warn(self, clients: Iterable[Client], text: str) -> None:
        """Log a warning, and show it to the users of these trainers, who do not read the saver's log."""
        _log.warning("%s", text)
        for client in clients:
            self._connections.send(client, Note(text))

    def outcome(self, held: HeldSnapshot, tier: str, error: str = "", path: str = "") -> None:
        """Tell the trainers that staged a save what became of it in a tier."""
        for part in held.parts.values():
            self._connections.send(sender(part.trainer), Outcome(held.info.id, tier, error, path))

    def lost(self, held: HeldSnapshot, reason: str) -> None:
        """Tell the trainers that have staged their part that the save will not be whole."""
        for tier in (MEMORY, *next(iter(held.parts.values())).stage.tiers):
            self.outcome(held, tier, reason)

    # -- to trainers and the launcher

    def staged(self, held: HeldSnapshot) -> None:
        """A save is in memory: every rank of this node has staged its part."""
        self._control.send(event="staged", step=held.info.step)
        self.outcome(held, MEMORY)

    def persisted(self, held: HeldSnapshot, tier: Tier, url: str, path: str, seconds: float) -> None:
        """A save is durable in a tier."""
        step = held.info.step
        self._control.send(event="persisted", step=step, tier=tier.name, url=url, seconds=seconds)
        self.outcome(held, tier.name, path=path)

    def superseded(self, held: HeldSnapshot, tier: Tier, url: str, path: str, reason: str) -> None:
        """A save was given up in a tier, because the run goes on without it."""
        self._control.send(event="superseded", step=held.info.step, tier=tier.name, url=url)
        self.outcome(held, tier.name, reason, path)

    def failed(self, held: HeldSnapshot, tier: Tier, url: str, path: str, error: str) -> None:
        """A save did not become durable in a tier."""
        step, again = held.info.step, tier.name in held.failed
        self._control.send(event="failed", step=step, tier=tier.name, url=url, error=error, again=again)
        self.outcome(held, tier.name, error, path)

    # -- to the launcher

    def progress(self, tasks: Iterable[Task]) -> None:
        """Tell the launcher how far the work is, from time to time."""
        now = time.monotonic()
        if not self._control.takes_more or now < self._progress_at + _PROGRESS_EVERY:
            return
        for task in tasks:
            done, total = task.progress.done, task.progress.total
            self._control.send(event="persisting", step=task.step, tier=task.queue, done=done, total=total)
            self._progress_at = now

    def patience(self, *, is_busy: bool) -> float | None:
        """Seconds until `progress` has something to tell; None: never."""
        return _PROGRESS_EVERY if is_busy and self._control.has_launcher else None

    def flushed(self) -> None:
        """All is durable, as far as it can be, and this process ends."""
        self._control.send(event="drained")
