"""The trainers that are connected to the saver: lets them in, reads their messages, sends answers."""

from __future__ import annotations

import logging
import os
import select
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.run.tiers import Tier
from shardckpt.saver.channel import Channel, encode, peer
from shardckpt.saver.checks import RequestError
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.outbox import Outbox
from shardckpt.saver.protocol import Answer, Begin
from shardckpt.saver.snapshots import HeldSnapshot, PackPlan, Trainer

__all__ = ["Client", "Connections", "client_of", "sender"]

_log = logging.getLogger("shardckpt.saver")

_LAST_READS = 64  # of what a dead trainer has sent, more than the kernel keeps of that
_ACCEPT_AGAIN = 1.0  # seconds until connections are accepted again, once there were too many


@dataclass(eq=False)
class Client(Trainer):
    """A connected trainer."""

    channel: Channel = field(kw_only=True)
    outbox: Outbox = field(kw_only=True)
    pidfd: int = field(kw_only=True)
    tiers: dict[str, Tier] = field(default_factory=dict)
    """By name. The last one is the run itself."""
    commit_timeout: float = 0.0
    outage_timeout: float = 0.0
    plan: PackPlan | None = None
    has_greeted: bool = False
    requests: deque[int] = field(default_factory=deque)
    """Sizes of the buffers that it waits for."""
    is_told: bool = False
    """True if it knows that there is no buffer for this plan yet."""
    asked_back: set[int] = field(default_factory=set)
    """Buffers that it was asked to give back."""
    begun: Begin | None = None
    """The part that it is writing."""
    attempt: str = ""
    """The attempt of its saves, by the name with which it began."""
    has_left: bool = False
    """True once it has said goodbye."""

    @property
    def plan_number(self) -> int:
        """The number of its current plan; 0 before the first."""
        return self.plan.number if self.plan else 0


class Connections:
    """The connected trainers.

    Args:
        loop: calls this when there is something to read.
        listener: a listening unix socket. Connections of other users are closed at once.
        on_message: called with each message. What it raises ends the trainer's connection, and nothing else.
        on_end: called once a trainer is gone and all that it had sent was handled.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        on_message: Callable[[Client, Any], None],
        on_end: Callable[[Client], None],
    ) -> None:
        self.clients: set[Client] = set()
        self._loop = loop
        self._listener = listener
        self._on_message = on_message
        self._on_end = on_end
        self._accept_at = 0.0  # when connections are accepted again; 0: they are now

    def of_run(self, run: str) -> list[Client]:
        """The connected trainers of a run."""
        return [client for client in list(self.clients) if client.run == run]

    def open(self) -> None:
        """Begin to accept connections."""
        self._listener.setblocking(False)
        self._loop.watch(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def send(self, client: Client, answer: Answer, descriptors: Sequence[int] = ()) -> None:
        """Send an answer, and copies of descriptors. Never waits: a trainer that does not read is cut off."""
        if client not in self.clients:
            return
        try:
            client.outbox.send(encode(answer, len(descriptors)), descriptors)
        except OSError as error:  # it is dead, which the loop is about to find, or does not read
            if isinstance(error, BlockingIOError):
                _log.warning("a trainer is disconnected: %s", error)
            client.outbox.close()
            client.channel.shut()
        self._watch(client)

    # -- accepting

    @property
    def patience(self) -> float | None:
        """Seconds until `accept_again` has something to do; None: nothing is to be done."""
        return _ACCEPT_AGAIN if self._accept_at else None

    def accept_again(self) -> None:
        """Accept connections again if there were too many a while ago."""
        if self._accept_at and time.monotonic() >= self._accept_at:
            self._accept_at = 0.0
            self._loop.watch(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError as error:  # too many: those that wait are accepted when others have gone
            _log.warning("a trainer cannot connect yet: %s", error)
            self._loop.watch(self._listener, 0, self._accept)
            self._accept_at = time.monotonic() + _ACCEPT_AGAIN
            return
        pid, uid = peer(connection)
        if uid != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # dead already, or in another process namespace: the connection's end must do
            pidfd = -1
        channel = Channel(connection, takes_descriptors=False)
        client = Client(channel=channel, outbox=Outbox(connection), pidfd=pidfd)
        self.clients.add(client)
        self._watch(client)
        if pidfd >= 0:
            # Its forked children may keep the connection open after its death.
            self._loop.watch(pidfd, selectors.EVENT_READ, lambda: self._read_last(client))

    # -- reading

    def _watch(self, client: Client) -> None:
        """Have `_read` called when a trainer has sent something, or takes more."""
        events = selectors.EVENT_READ | (0 if client.outbox.is_empty else selectors.EVENT_WRITE)
        self._loop.watch(client.channel, events, lambda: self._read(client))

    def _read(self, client: Client) -> None:
        """Handle what has arrived from a trainer."""
        if client not in self.clients:
            return
        is_open = True
        try:
            self._flush(client)
            is_open = client.channel.read_some()
            while (received := client.channel.next_message()) is not None:
                self._on_message(client, received[0])
        except BlockingIOError:
            is_open = not _is_dead(client)
        except Exception as error:  # whatever it sent, it must not end this process, which others rely on
            expected = isinstance(error, EOFError | LookupError | OSError | RequestError)
            _log.warning("a trainer is disconnected: %s", error, exc_info=not expected)
            is_open = False
        if not is_open:
            self._disconnect(client)

    def _read_last(self, client: Client) -> None:
        """Handle what a dead trainer still sent, even if another process has its connection open."""
        for _ in range(_LAST_READS):
            self._read(client)
        if client in self.clients:
            self._disconnect(client)

    def _flush(self, client: Client) -> None:
        """Send what a trainer has not taken yet. If it is gone, what it sent before counts all the same."""
        if not client.outbox.is_empty:
            try:
                client.outbox.flush()
            except OSError:
                client.outbox.close()
            self._watch(client)

    def _disconnect(self, client: Client) -> None:
        self.clients.discard(client)
        self._loop.watch(client.channel, 0, lambda: None)
        client.outbox.close()
        client.channel.close()
        if client.pidfd >= 0:
            self._loop.watch(client.pidfd, 0, lambda: None)
            os.close(client.pidfd)
        self._on_end(client)


def sender(trainer: Trainer) -> Client:
    """The connection of a trainer."""
    assert isinstance(trainer, Client)
    return trainer


def client_of(held: HeldSnapshot) -> Client:
    """A trainer that has staged a part of a save. All of them name the same tiers for it."""
    return sender(next(iter(held.parts.values())).trainer)


def _is_dead(client: Client) -> bool:
    """True if a trainer has ended, as far as this process can see."""
    if client.pidfd < 0:
        return False
    poll = select.poll()  # `select.select` takes no descriptors from 1024 on
    poll.register(client.pidfd, select.POLLIN)
    return bool(poll.poll(0))
