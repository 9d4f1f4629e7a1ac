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
import pwd
import select
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError, NotRunningError, RunDirError, UnreachableError, UsageError
from launcher.events import Asked, Event

__all__ = ["RECORD", "VERBS", "Control", "ask", "is_running"]

VERBS = ("status", "stacks", "restart", "scale", "stop", "kill")
RECORD = "control.json"

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
    """Where a running job is asked. A `monitor.Source` that yields `Asked`; never blocks.

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
            _write_record(record, address)
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
        if _peer(connection) not in (os.geteuid(), 0):
            self._refuse(client, f"this job is of user {_user_name(os.geteuid())}: ask as that user")

    def _attend(self, client: _Client, ready: int) -> Asked | None:
        if ready & select.EPOLLOUT:
            self._send(client)
        elif ready & select.EPOLLIN and not client.has_asked:
            return self._read(client)
        else:
            self._drop(client)
        return None

    def _read(self, client: _Client) -> Asked | None:
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
            if isinstance(asked, Asked):
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


def _decode(line: bytes, client: int) -> Asked | str:
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
    return Asked(verb, number, client, tuple(sorted(set(without))))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _write_record(path: Path, address: str) -> None:
    """Write it such that no reader ever sees a part of it."""
    pid = os.getpid()
    content = {"pid": pid, "started": _start_of(pid), "address": address, "host": socket.gethostname()}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
    fresh.replace(path)


def _peer(connection: socket.socket) -> int:
    """The user at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def is_running(run_dir: Path) -> bool:
    """Whether a job of this host runs in `run_dir`, as far as can be told without asking it."""
    try:
        record = _find_record(run_dir)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0)
            connection.connect(f"\0{record['address']}")
    except BlockingIOError:  # so many ask it already
        return True
    except (OSError, LaunchError):
        return False
    return True


def ask(
    run_dir: Path,
    verb: str,
    number: int | None = None,
    *,
    without: Collection[int] = (),
    timeout: float = 3.0,
) -> Iterator[dict[str, Any]]:
    """Ask the job that runs in `run_dir`, and yield its answers as they come.

    `number` of workers, and the slots `without` any, are for "scale". `timeout` is in seconds, for each of
    the answers. Raises `UsageError` if there is no such run, or if the job refuses; `NotRunningError` if no job
    runs there; `UnreachableError` if it runs on another host or as another user, or does not answer.
    """
    record = _find_record(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(f"\0{record['address']}")
        except OSError:
            raise _unreachable(run_dir, record) from None
        if os.geteuid() != 0 and _peer(connection) not in (os.geteuid(), 0):
            owner = _user_name(_peer(connection))
            raise UnreachableError(f"the job in {run_dir} is of user {owner}: ask as that user")
        try:
            _send_request(connection, {"verb": verb, "number": number, "without": sorted(without)})
            yield from _answers(connection)
        except TimeoutError:
            raise UnreachableError(
                f"launch (pid {record['pid']}) in {run_dir} has not answered in {timeout:g} s: it may be stopped "
                f"(kill -CONT {record['pid']})"
            ) from None
        except (ConnectionError, EOFError):
            raise NotRunningError(f"the job in {run_dir} ended before it had answered") from None


def _send_request(connection: socket.socket, request: Mapping[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(request).encode() + b"\n")
    except BrokenPipeError:
        pass  # refused before it was heard: the reason can be read


def _answers(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with connection.makefile("rb") as lines:
        for line in lines:
            message = json.loads(line)
            if "error" in message["answer"]:
                raise UsageError(message["answer"]["error"])
            yield message["answer"]
            if not message["more"]:
                return
    raise EOFError


def _find_record(run_dir: Path) -> dict[str, Any]:
    """Where the agent of this host is asked, of a job that may have agents on several."""
    try:
        paths = [run_dir / RECORD, *sorted(run_dir.glob(f"nodes/*/{RECORD}"))] if run_dir.is_dir() else []
    except PermissionError:
        raise UnreachableError(f"{run_dir} is closed to user {_user_name(os.geteuid())}") from None
    if not paths:
        raise UsageError(f"no run in {run_dir}: expected a run directory, as launch makes it")
    records = [record for path in paths if (record := _read_record(path))]
    here = [record for record in records if record["host"] == socket.gethostname()]
    if here:
        return next(filter(_is_alive, here), here[0])
    if records:
        hosts = ", ".join(sorted({record["host"] for record in records}))
        raise UnreachableError(
            f"the job in {run_dir} runs on {hosts}, and this is {socket.gethostname()}: ask there"
        )
    raise NotRunningError(f"nothing runs in {run_dir}")


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            "pid": int(record["pid"]),
            "started": int(record["started"]),
            "address": str(record["address"]),
            "host": str(record["host"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(record: Mapping[str, Any]) -> bool:
    started = _start_of(record["pid"])
    return bool(started) and started == record["started"]


def _start_of(pid: int) -> int:
    """What tells a process from others that had its number before; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _unreachable(run_dir: Path, record: Mapping[str, Any]) -> UnreachableError:
    """Why nobody listens at the address in `record`."""
    if _is_alive(record):
        return UnreachableError(
            f"launch (pid {record['pid']}) in {run_dir} cannot be reached from here: ask from within its "
            f"container or network namespace"
        )
    return NotRunningError(f"nothing runs in {run_dir}: its launch (pid {record['pid']}) was killed")
