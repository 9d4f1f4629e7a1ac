"""Live control of a running job: `launch status`, `stacks`, `restart`, `scale`, `stop`.

The agent listens on an abstract unix socket, whose name is in RUN_DIR/control.json, and answers its own
user and root. A client sends one line, `{"verb": "scale", "number": 6, "without": [3]}`, and gets one line or
several: `{"answer": {...}, "more": false}`; the last has `more` false. An answer with the key "error" is a
refusal. "without" may be missing.

verb     number           what the client wants
status                    how the job is
stacks                    where every worker is, without disturbing it
restart                   a new round, begun at a step boundary where the workers can do that; asked
                          again before they are there, at once: the answer has the key "at_once"
scale    workers          that many workers on this node from now on, and none in the slots "without"
stop                      save, then end: as SIGTERM
kill                      end at once: as a second SIGTERM
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.agent.control_record import user_name, write_record
from launcher.errors import RunDirError
from launcher.events import Event, RequestReceived

__all__ = ["VERBS", "Control", "peer"]

VERBS = ("status", "stacks", "restart", "scale", "stop", "kill")

_CLIENTS = 32  # at a time; then the one that came first has to go
_REQUEST_BYTES = 4096
_UNSENT_BYTES = 64 << 20  # of one client that does not read
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(slots=True, eq=False)
class _Client:
    number: int  # not its descriptor, which another connection gets once this one is closed
    connection: socket.socket
    received: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    has_asked: bool = False
    is_answered: bool = False


class Control:
    """Where a running job is asked. A `monitor.Source` that yields `RequestReceived`; never blocks.

    Raises `RunDirError` if the record, which tells clients where that is, cannot be written.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._clients: dict[int, _Client] = {}  # by file descriptor, the oldest first
        self._numbers = itertools.count()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        address = f"launch-control-{os.urandom(8).hex()}"
        self._listener.bind(f"\0{address}")
        self._listener.listen()
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        try:
            write_record(record, address)
        except OSError as error:
            self._close_sockets()
            raise RunDirError(f"{record} cannot be written: {error.strerror}") from None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to do."""
        return (self._epoll.fileno(),)

    def receive(self) -> list[Event]:
        """What has been asked since the last call; also sends on what a client was too slow to read."""
        events: list[Event] = []
        for fd, ready in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._clients:
                asked = self._attend(self._clients[fd], ready)
                events += [asked] if asked else []
        return events

    def answer(self, client: int, value: Mapping[str, Any], *, more: bool = False) -> None:
        """Answer what `client` has asked; `more` answers follow. If it has gone, nothing happens."""
        for waiting in self._clients.values():
            if waiting.number == client and not waiting.is_answered:
                self._answer(waiting, value, more)
                return

    def close(self) -> None:
        """Take no more questions. Who still waits for an answer learns that the job has ended."""
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
        except OSError:  # it has gone already, or there are no descriptors left
            return
        connection.setblocking(False)
        if len(self._clients) == _CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(next(self._numbers), connection)
        self._clients[connection.fileno()] = client
        self._epoll.register(connection, select.EPOLLIN)
        if peer(connection) not in (os.geteuid(), 0):
            self._refuse(client, f"this job is of user {user_name(os.geteuid())}: ask as that user")

    def _attend(self, client: _Client, ready: int) -> RequestReceived | None:
        if ready & select.EPOLLOUT:
            self._send(client)
        elif ready & select.EPOLLIN and not client.has_asked:
            return self._read(client)
        else:
            self._drop(client)
        return None

    def _read(self, client: _Client) -> RequestReceived | None:
        try:
            received = client.connection.recv(_REQUEST_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            received = b""
        client.received += received
        line, end, _ = client.received.partition(b"\n")
        if not received:
            self._drop(client)
        elif end or len(client.received) > _REQUEST_BYTES:
            client.has_asked = True
            self._epoll.modify(client.connection, 0)  # only its end is of interest now
            asked = _decode(line, client.number)
            if isinstance(asked, RequestReceived):
                return asked
            self._refuse(client, asked)
        return None

    def _refuse(self, client: _Client, reason: str) -> None:
        client.has_asked = True
        self._answer(client, {"error": reason}, more=False)

    def _answer(self, client: _Client, value: Mapping[str, Any], more: bool) -> None:
        client.is_answered = not more
        client.unsent += json.dumps({"answer": value, "more": more}).encode() + b"\n"
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
        if is_done or len(client.unsent) > _UNSENT_BYTES:
            self._drop(client)
        else:
            self._epoll.modify(client.connection, select.EPOLLOUT if client.unsent else 0)

    def _drop(self, client: _Client) -> None:
        self._epoll.unregister(client.connection)
        del self._clients[client.connection.fileno()]
        try:
            client.connection.recv(1 << 16)  # what was not read would make the end a reset
        except OSError:
            pass
        client.connection.close()


def _decode(line: bytes, client: int) -> RequestReceived | str:
    """What a client asks for, or why that makes no sense."""
    try:
        request = json.loads(line)
        verb, number, without = request["verb"], request.get("number"), request.get("without", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'expected one line like {"verb": "status"}'
    if verb not in VERBS:
        return (
            f"unknown verb {verb!r}: expected one of {', '.join(VERBS)}; is this launch of another version?"
        )
    if not (_is_whole(number) and number) if verb == "scale" else number is not None:
        return f"{verb}: expected {'a' if verb == 'scale' else 'no'} number of workers, found {number!r}"
    if not isinstance(without, list) or not all(map(_is_whole, without)) or (without and verb != "scale"):
        return f"{verb}: expected {'a list of' if verb == 'scale' else 'no'} slots, found {without!r}"
    return RequestReceived(verb, number, client, tuple(sorted(set(without))))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def peer(connection: socket.socket) -> int:
    """The user at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])
