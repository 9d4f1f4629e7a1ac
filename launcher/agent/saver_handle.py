"""The agent's handle on its saver: where workers reach it, when it is started, what it tells.

The saver holds snapshots of the job's state and makes them durable; it outlives workers, and the agent if
need be. docs/worker-contract.md says what is promised to it and what it promises.
"""

from __future__ import annotations

import json
import os
import socket
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
from launcher.system.child_process import ChildProcess, module_command
from launcher.system.process_state import read_process_state
from launcher.system.processes import Subreaper

__all__ = ["SaverHandle"]

_COMMAND = module_command("shardckpt.saver")
_FROZEN = 5  # looks at it, about a second apart, after which it does not only pause
_SILENT_ENDS = 3  # in a row, after which no more savers are started


class SaverHandle:
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
        self._process: ChildProcess | None = None
        self._has_spoken = False  # the process that runs
        self._silent_ends = 0
        self._halted = 0  # looks in a row at which it could not go on

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

    def look(self, *, at_last: bool = False) -> str | None:
        """Why the process cannot go on, if it could not at the looks before; `at_last`: whatever those told."""
        if self._process is None:
            self._halted = 0
            return None
        found = read_process_state(self._process.pid)
        halt = found.halt(found)
        self._halted = 0 if halt is None else self._halted + 1
        return halt if at_last or self._halted >= _FROZEN else None

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
            listener = self._listener.fileno()
            command = [*self._command, "--listen", str(listener), "--control"]
            self._process = ChildProcess(command, self.log, inherits=[listener])
        except OSError as error:
            self._refuse()
            raise InternalError(
                f"the saver cannot be started: {error.strerror}: {error.filename}"
            ) from None
        self._has_spoken = False
        self._reaper.spare(self._process.pid)

    def receive(self) -> list[Event]:
        """What has happened since the last call; does not wait.

        `SaverWanted` asks for `start`. After `SaverEnded` nothing is left of the process.
        """
        if self._process is None:
            return [SaverWanted()]
        process = self._process
        code = process.poll()  # before its last words are read, so that none can be missed
        events = [event for line in process.read() if (event := _decode(line))]
        self._has_spoken = self._has_spoken or bool(events)
        if code is not None:
            self._reaper.forget(process.pid)
            process.close()
            self._process = None
            self._silent_ends = 0 if self._has_spoken else self._silent_ends + 1
            if self._silent_ends == _SILENT_ENDS:
                self._refuse()  # or one would be started for the same connection for ever
            events.append(SaverEnded(code))
        return events

    def flush(self) -> None:
        """Ask the process to persist what it holds, and to end. No worker may be left."""
        if self._process is not None:
            self._process.end_input()

    def close(self) -> None:
        """Let go. A process that still runs persists what it holds, and ends by itself."""
        self._refuse()
        if self._process is not None:
            self._process.close()

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "staged": lambda m: SaveStaged(m["step"]),
    "persisting": lambda m: SavePersisting(m["step"], m["tier"], m["done"], m["total"]),
    "persisted": lambda m: SavePersisted(m["step"], m["tier"], m["url"], m["seconds"]),
    "superseded": lambda m: SaveSuperseded(m["step"], m["tier"]),
    "failed": lambda m: SaveFailed(m["step"], m["tier"], m["url"], m["error"], m.get("again", False)),
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
