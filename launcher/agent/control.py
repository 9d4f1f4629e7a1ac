"""The agent's end of live control: it takes requests from many clients, and waits for none of them.

`control_protocol` says what is sent.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.agent.control_protocol import (
    ControlRecord,
    decode_request,
    encode_answer,
    peer_user,
    user_name,
)
from launcher.errors import RunDirError
from launcher.events import Event, RequestReceived

__all__ = ["Control"]

_MAX_CLIENTS = 32  # at a time; the oldest is dropped for another one
_MAX_REQUEST = 4096  # bytes
_MAX_UNSENT = 64 << 20  # bytes, of one client that does not read


@dataclass(slots=True, eq=False)
class _Client:
    number: int  # unlike its descriptor, never used again for another connection
    connection: socket.socket
    received: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    has_asked: bool = False
    is_answered: bool = False


class Control:
    """A socket at which a running job is asked. A `monitor.Source` that yields `RequestReceived`; never blocks.

    Args:
        record: The file that tells clients where it is.
        peer: The user ID at the other end of a connection.
        max_unsent: Bytes that may wait for a client that does not read, before it is dropped.

    Raises:
        RunDirError: The record cannot be written.
    """

    def __init__(
        self,
        record: Path,
        *,
        peer: Callable[[socket.socket], int] = peer_user,
        max_unsent: int = _MAX_UNSENT,
    ) -> None:
        self._record = record
        self._peer = peer
        self._max_unsent = max_unsent
        self._clients: dict[int, _Client] = {}  # by file descriptor, the oldest first
        self._numbers = itertools.count()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        address = f"launch-control-{os.urandom(8).hex()}"
        self._listener.bind(f"\0{address}")
        self._listener.listen()
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        try:
            ControlRecord.of_this_process(address).write(record)
        except OSError as error:
            self._close_sockets()
            raise RunDirError(f"{record} cannot be written: {error.strerror}") from None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to do."""
        return (self._epoll.fileno(),)

    def receive(self) -> list[Event]:
        """The requests since the last call; also sends on what slow clients have not read yet."""
        events: list[Event] = []
        for fd, ready in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._clients:
                asked = self._serve(self._clients[fd], ready)
                events += [asked] if asked else []
        return events

    def answer(self, client: int, value: Mapping[str, Any], *, more: bool = False) -> None:
        """Answer a client's request; `more` answers follow. Does nothing if the client has gone."""
        for waiting in self._clients.values():
            if waiting.number == client and not waiting.is_answered:
                self._answer(waiting, value, more)
                return

    def close(self) -> None:
        """Take no more requests. A client that waits for an answer learns that the job has ended."""
        self._close_sockets()
        try:
            self._record.unlink()
        except OSError:
            pass

    def _close_sockets(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._epoll.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client has gone, or no descriptors are left
            return
        connection.setblocking(False)
        if len(self._clients) == _MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(next(self._numbers), connection)
        self._clients[connection.fileno()] = client
        self._epoll.register(connection, select.EPOLLIN)
        if self._peer(connection) not in (os.geteuid(), 0):
            self._refuse(client, f"this job is of user {user_name(os.geteuid())}: ask as that user")

    def _serve(self, client: _Client, ready: int) -> RequestReceived | None:
        if ready & select.EPOLLOUT:
            self._send(client)
        elif ready & select.EPOLLIN and not client.has_asked:
            return self._read(client)
        else:
            self._drop(client)
        return None

    def _read(self, client: _Client) -> RequestReceived | None:
        try:
            received = client.connection.recv(_MAX_REQUEST)
        except BlockingIOError:
            return None
        except OSError:
            received = b""
        client.received += received
        line, end, _ = client.received.partition(b"\n")
        if not received:
            self._drop(client)
        elif end or len(client.received) > _MAX_REQUEST:
            client.has_asked = True
            self._epoll.modify(client.connection, 0)  # only its end is of interest now
            try:
                return decode_request(line, client.number)
            except ValueError as reason:
                self._refuse(client, str(reason))
        return None

    def _refuse(self, client: _Client, reason: str) -> None:
        client.has_asked = True
        self._answer(client, {"error": reason}, more=False)

    def _answer(self, client: _Client, value: Mapping[str, Any], more: bool) -> None:
        client.is_answered = not more
        client.unsent += encode_answer(value, more=more)
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            del client.unsent[: client.connection.send(client.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        is_done = client.is_answered and not client.unsent
        if is_done or len(client.unsent) > self._max_unsent:
            self._drop(client)
        else:
            self._epoll.modify(client.connection, select.EPOLLOUT if client.unsent else 0)

    def _drop(self, client: _Client) -> None:
        self._epoll.unregister(client.connection)
        del self._clients[client.connection.fileno()]
        try:
            client.connection.recv(1 << 16)  # unread bytes would turn the end of the stream into a reset
        except OSError:
            pass
        client.connection.close()
