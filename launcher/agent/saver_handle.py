"""The agent's handle on the node's saver: its address, its process, its events and its backlog.

The saver holds snapshots of the job's state and makes them durable; it outlives the workers, and the agent if
need be. docs/worker-contract.md has the contract between it, the workers and the agent.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from launcher.round.saver_flush import Backlog, Flush
from launcher.system.child_process import ChildProcess, module_command
from launcher.system.process_state import read_process_state
from launcher.system.processes import Subreaper

__all__ = ["SaverHandle"]

_COMMAND = module_command("shardckpt.saver")
_FROZEN_LOOKS = 5  # about a second apart, after which a process counts as halted, and not as busy
_MAX_SILENT_ENDS = 3  # processes in a row that end without an event, after which no more are started


class SaverHandle:
    """An address for workers to connect to, and the saver process once one of them has.

    A job whose workers never connect costs a socket and nothing else. The address outlives the process: the
    first worker to connect after its death has another one started.
    """

    def __init__(self, log: Path, reaper: Subreaper, command: Sequence[str] = _COMMAND) -> None:
        self.log = log
        self.address = f"launch-saver-{os.urandom(8).hex()}"
        """Name of the abstract unix socket, without its leading NUL."""
        self.backlog: Backlog | None = None
        """What the process has not made durable yet, as the events passed to `take` say; None: none runs."""
        self._reaper = reaper
        self._command = command
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        self._process: ChildProcess | None = None
        self._has_spoken = False  # the present process
        self._silent_ends = 0
        self._halted_looks = 0  # in a row

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events."""
        if self._process is not None:
            return self._process.descriptors
        return () if self._listener is None else (self._listener.fileno(),)

    @property
    def pid(self) -> int | None:
        """The process's ID; None if none runs."""
        return None if self._process is None else self._process.pid

    @property
    def is_closed(self) -> bool:
        """True if no saver is started any more; workers that connect are refused."""
        return self._listener is None

    def start(self) -> None:
        """Start the process. It accepts the connections that wait.

        Raises:
            InternalError: It cannot be started. `is_closed` is true from then on.
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
        self.backlog = Backlog()
        self._reaper.spare(self._process.pid)

    def receive(self) -> list[Event]:
        """The events since the last call; does not wait.

        `SaverWanted` asks for `start`. After `SaverEnded` nothing is left of the process.
        """
        if self._process is None:
            return [SaverWanted()]
        process = self._process
        code = process.poll()  # before the output is read, so that no last event is missed
        events = [event for line in process.read() if (event := _decode(line))]
        self._has_spoken = self._has_spoken or bool(events)
        if code is not None:
            self._reaper.forget(process.pid)
            process.close()
            self._process = None
            self._silent_ends = 0 if self._has_spoken else self._silent_ends + 1
            if self._silent_ends == _MAX_SILENT_ENDS:
                self._refuse()  # else the connection that waits would have one started for ever
            events.append(SaverEnded(code))
        return events

    def take(self, event: Event) -> None:
        """Bring the backlog up to date with any event of the job."""
        if self.backlog is not None:
            self.backlog = self.backlog.after(event)

    def take_loss(self) -> Backlog:
        """The backlog of the process that has ended, which is lost."""
        lost, self.backlog = self.backlog or Backlog(), None
        return lost

    def find_halt(self, *, now: bool = False) -> str | None:
        """Why the process cannot go on (stopped, frozen, in uninterruptible sleep); None if it can.

        Call it about once a second.

        Args:
            now: Do not wait until it was seen so for several calls, which tells a halt from a pause.
        """
        if self._process is None:
            self._halted_looks = 0
            return None
        condition = read_process_state(self._process.pid)
        halt = condition.halt(condition)
        self._halted_looks = 0 if halt is None else self._halted_looks + 1
        return halt if now or self._halted_looks >= _FROZEN_LOOKS else None

    def begin_flush(self, timeout: float, *, waited: float, leave_in: float | None) -> Flush:
        """Have the process persist what it holds, and end. No worker may be left.

        Returns the wait for it, as it begins; this function does not wait.

        Args:
            timeout: Seconds that it gets (--drain-timeout).
            waited: Seconds that the workers have waited for it already. They count only if it is halted.
            leave_in: Seconds until this node must have left the job; None: it has all the time.
        """
        assert self.backlog is not None
        is_halted = self.find_halt(now=True) is not None
        spent = min(waited, timeout) if is_halted else 0.0
        flush = Flush(self.backlog, timeout - spent, waited=spent)
        if leave_in is not None and leave_in < flush.timeout:
            flush = replace(flush, timeout=leave_in, limit="--grace")
        if self._process is not None:
            self._process.end_input()
        return flush

    def close(self) -> None:
        """Let go of the process. If it still runs, it persists what it holds and ends by itself."""
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
    """The event in a line of output; None if the agent needs none for it ("drained").

    Unknown lines are skipped, so that a job survives a saver of a version that was installed meanwhile.
    """
    try:
        message = json.loads(line)
        return _EVENTS[message["event"]](message)
    except (ValueError, KeyError, TypeError):
        return None
