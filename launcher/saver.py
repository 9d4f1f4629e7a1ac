"""The agent's handle on its saver: where workers reach it, when it is started, what it tells.

The saver holds snapshots of the job's state and makes them durable; it outlives workers, and the agent if
need be. docs/worker-contract.md says what is promised to it and what it promises.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import InternalError
from launcher.events import (
    Event,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaverWanted,
    SaveStaged,
    SaveSuperseded,
)
from launcher.processes import Subreaper

__all__ = ["Saver"]

# -P: not what happens to lie in the current directory, but what lies beside this package.
_COMMAND = (sys.executable, "-P", "-m", "shardckpt.saver")
_HOME = str(Path(__file__).parents[1])
_SILENT_ENDS = 3  # in a row, after which no more savers are started
_SCHEDULERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Saver:
    """An address for workers to connect to, and the saver process once one of them has.

    A job whose workers never connect costs a socket and nothing else. The address stays the same
    whatever becomes of the process: the first to connect after its death has another one started.
    """

    def __init__(self, log: Path, reaper: Subreaper, command: Sequence[str] = _COMMAND) -> None:
        self.log = log
        self.address = f"launch-saver-{os.urandom(8).hex()}"
        """Name of the abstract unix socket, without its leading NUL."""
        self._reaper = reaper
        self._command = command
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        self._process: _Process | None = None
        self._silent_ends = 0

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to tell."""
        if self._process is not None:
            return self._process.descriptors
        return () if self._listener is None else (self._listener.fileno(),)

    @property
    def pid(self) -> int | None:
        """The process that runs; None if none does."""
        return None if self._process is None else self._process.pid

    @property
    def is_closed(self) -> bool:
        """Whether no saver will be started any more; who connects is refused."""
        return self._listener is None

    def start(self) -> None:
        """Start the process; it takes the connections that are waiting.

        Raises `InternalError` if it cannot be started. Nobody can connect any more then.
        """
        assert self._listener is not None
        try:
            self._process = _Process(self._command, self._listener, self.log)
        except OSError as error:
            self._refuse()
            raise InternalError(
                f"the saver cannot be started: {error.strerror}: {error.filename}"
            ) from None
        self._reaper.spare(self._process.pid)

    def receive(self) -> list[Event]:
        """What has happened since the last call; does not wait.

        `SaverWanted` asks for `start`. After `SaverEnded` nothing is left of the process.
        """
        if self._process is None:
            return [SaverWanted()]
        process = self._process
        code = process.poll()  # before its last words are read, so that none can be missed
        events = process.read()
        if code is not None:
            self._reaper.forget(process.pid)
            process.close()
            self._process = None
            self._silent_ends = 0 if process.has_spoken else self._silent_ends + 1
            if self._silent_ends == _SILENT_ENDS:
                self._refuse()  # or one would be started for the same connection for ever
            events.append(SaverEnded(code))
        return events

    def drain(self) -> None:
        """Ask the process to persist what it holds, and to end. No worker may be left."""
        if self._process is not None:
            self._process.drain()

    def close(self) -> None:
        """Let go. A process that still runs persists what it holds, and ends by itself."""
        self._refuse()
        if self._process is not None:
            self._process.close()

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class _Process:
    """A running saver, and the stream on which it tells what it does."""

    def __init__(self, command: Sequence[str], listener: socket.socket, log: Path) -> None:
        ours, theirs = socket.socketpair()
        inherited = (listener.fileno(), theirs.fileno())
        path = (os.environ.get("PYTHONPATH"), _HOME)
        with theirs, open(log, "ab") as output:
            # Schedulers send signals to every process of a job; they wait until it ignores them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULERS)
            try:
                self._popen = subprocess.Popen(
                    [*command, "--listen", str(inherited[0]), "--control", str(inherited[1])],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
                    pass_fds=inherited,
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._popen.pid
        self.has_spoken = False
        self._pidfd = os.pidfd_open(self.pid)
        self._control = ours
        self._unread = b""
        self._has_hung_up = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self._pidfd,) if self._has_hung_up else (self._control.fileno(), self._pidfd)

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it, once it is dead."""
        return self._popen.poll()

    def read(self) -> list[Event]:
        """All that it has told since the last call."""
        while received := self._receive():
            self._unread += received
        *lines, self._unread = self._unread.split(b"\n")
        events = [event for line in lines if (event := _decode(line))]
        self.has_spoken = self.has_spoken or bool(events)
        return events

    def _receive(self) -> bytes:
        try:
            received = self._control.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            received = b""
        self._has_hung_up = not received
        return received

    def drain(self) -> None:
        try:
            self._control.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # `receive` tells that it is dead

    def close(self) -> None:
        self._control.close()
        os.close(self._pidfd)


_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "staged": lambda m: SaveStaged(m["step"]),
    "persisting": lambda m: SavePersisting(m["step"], m["tier"], m["done"], m["total"]),
    "persisted": lambda m: SavePersisted(m["step"], m["tier"], m["url"], m["seconds"]),
    "superseded": lambda m: SaveSuperseded(m["step"], m["tier"]),
    "failed": lambda m: SaveFailed(m["step"], m["tier"], m["url"], m["error"]),
}


def _decode(line: bytes) -> Event | None:
    """The event that `line` tells; None for what the agent does not need to know ("drained").

    Nor does a job end because its saver is of another version, installed since, and tells more.
    """
    try:
        message = json.loads(line)
        return _EVENTS[message["event"]](message)
    except (ValueError, KeyError, TypeError):
        return None
