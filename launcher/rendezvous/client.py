"""The agent's side of its team: join a generation, broadcast messages, receive events.

The agents of a job form a team. Each rendezvous has a *generation* as its result: a set of nodes, and one log of
small JSON messages that every node receives in the same order, its own messages included. A worker's failure is
a message; only a node that is lost, leaves or joins makes a new generation.

`SingleNodeClient` is a team of one. `MemberHandle` starts a process of its own (`launcher.rendezvous.member`),
which imports torch for its rendezvous and store; the agent does not.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import InternalError
from launcher.events import Event, Joined, MemberFailed, MemberNews, MessageReceived
from launcher.system.child_process import ChildProcess, module_command
from launcher.system.processes import Subreaper

__all__ = ["MemberHandle", "RendezvousSettings", "SingleNodeClient", "TeamClient"]

_COMMAND = module_command("launcher.rendezvous.member")
_LEAVE_TIMEOUT = 2.0  # seconds that `close` waits for the process after `leave`


@dataclass(frozen=True)
class RendezvousSettings:
    """Where and how the nodes of a job meet.

    Beyond `max_nodes`, a node waits without a limit until another one is lost or the job has ended.

    Args:
        backend: "c10d", "static", "etcd-v2", "etcd" or another one that torch's registry knows.
        endpoint: host and port at which the nodes meet.
        run_id: the job's name there.
        min_nodes: the fewest nodes of a generation.
        max_nodes: the most nodes of a generation.
        node_rank: this node's number with "static", where all `max_nodes` nodes must come.
        local_addr: the address at which other nodes reach this one; None: that of the route to the endpoint.
        conf: torchrun's --rdzv-conf. Defaults: `join_timeout` 600 s; `last_call_timeout` 2 s; `read_timeout`,
            the time for a server to answer at the endpoint, 60 s and never more than `join_timeout`;
            `keep_alive_interval` 1 s; `keep_alive_max_attempt` 30; `is_host`, whether to serve the store of
            "c10d" and "static": true for the first process on the endpoint's machine.
        has_met: true if this node has been in a generation of the job before.
        secret: what all nodes of the job share to authenticate each other's messages; None: anyone can join.
        secret_source: where the secret comes from, in words, for messages.
    """

    backend: str
    endpoint: tuple[str, int]
    run_id: str
    min_nodes: int
    max_nodes: int
    node_rank: int | None = None
    local_addr: str | None = None
    conf: Mapping[str, str] = field(default_factory=dict)
    has_met: bool = False
    secret: str | None = field(default=None, repr=False)
    secret_source: str = ""

    @property
    def secret_key(self) -> bytes | None:
        return None if self.secret is None else self.secret.encode()

    @property
    def server(self) -> str:
        """What serves the endpoint, in words."""
        is_node = self.backend in ("c10d", "static")
        return "the node that serves the store" if is_node else "the rendezvous"


class TeamClient(Protocol):
    """An agent's connection to its team. A source of the monitor's: `descriptors` and `receive`."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events; none: no more events ever."""

    def receive(self) -> list[Event]:
        """The events since the last call; does not wait.

        `Joined`, `MessageReceived` and `MemberFailed`; `MemberNews` while the node joins.
        """

    def join(self, hello: Mapping[str, Any]) -> None:
        """Leave the current generation and take part in the next one.

        `Joined` follows when that has formed, or `MemberFailed`. Messages of earlier generations are not
        received after this call. It may be called again at any time, also after `MemberFailed`.

        Args:
            hello: what this node sends the others about itself. "host", "addr" and "version" are added unless
                present; "member" is reserved. A node whose "version" or "job" (which identifies the job)
                differs from the others' is refused: `MemberFailed` of kind "usage".
        """

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Send a JSON object to every node of the generation, this one included; lost if there is none."""

    def leave(self, outcome: int | None = None) -> None:
        """Leave for good, without the others reporting this node as lost. `close` follows.

        Args:
            outcome: the exit code with which the whole job has ended, if it has. Nodes that wait now, or come
                later, receive it.
        """

    def close(self) -> None:
        """Release the connection. Without `leave` before, the other nodes learn that this one is lost."""


class SingleNodeClient:
    """A team of one node: needs no process and no torch, and receives its own messages at once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events."""
        return () if self._is_closed else (self._wake,)

    def receive(self) -> list[Event]:
        """The messages since the last call; does not wait."""
        events, self._events = self._events, []
        if events:
            os.eventfd_read(self._wake)
        return events

    def join(self, hello: Mapping[str, Any]) -> None:
        """Begin a generation, with this node as number 0."""
        self._events = []
        self._add(Joined(0, [_through_json(hello)]))

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Have the next `receive` return `message`."""
        self._add(MessageReceived(0, _through_json(message)))

    def leave(self, outcome: int | None = None) -> None:
        """Nothing: there are no other nodes."""

    def close(self) -> None:
        """Close the descriptor; there are no more events."""
        self._is_closed = True
        self._events = []
        os.close(self._wake)

    def _add(self, event: Event) -> None:
        self._events.append(event)
        os.eventfd_write(self._wake, 1)


class MemberHandle:
    """A team of several nodes, reached through this node's member process.

    The process starts at once and imports torch meanwhile. It outlives this one while other nodes depend on it,
    because it may serve the store of the rendezvous. `InternalError` is raised if it cannot be started, here
    and in `join`.

    Args:
        settings: how the nodes meet.
        log: the file to which the output of the process, torch's warnings included, is appended.
        reaper: told to leave the process alone.
    """

    def __init__(self, settings: RendezvousSettings, log: Path, reaper: Subreaper) -> None:
        self._settings = settings
        self._log = log
        self._reaper = reaper
        self._has_left = False
        self._joins = 0  # events of an earlier join are out of date
        self._process: ChildProcess | None = self._start()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events."""
        return () if self._process is None else self._process.descriptors

    @property
    def pid(self) -> int | None:
        """The member process of this node; None if there is none."""
        return None if self._process is None else self._process.pid

    def receive(self) -> list[Event]:
        """The events since the last call; does not wait.

        `MemberFailed` is the last event until `join` is called again.
        """
        if self._process is None:
            return []
        code = self._process.poll()  # before its last lines are read, so that none can be missed
        decoded = map(_decode, self._process.read())
        events = [event for number, event in decoded if number == self._joins]
        if any(isinstance(event, Joined) for event in events):
            self._settings = replace(self._settings, has_met=True)
        failed = next((i for i, event in enumerate(events) if isinstance(event, MemberFailed)), None)
        if failed is not None:
            events = events[: failed + 1]
            self._disconnect()
        elif code is not None:
            events.append(MemberFailed("lost", f"{_describe_end(code)}: see {self._log}"))
            self._disconnect()
        return events

    def join(self, hello: Mapping[str, Any]) -> None:
        """Leave the current generation and take part in the next one."""
        self._joins += 1
        if self._process is None:
            self._process = self._start()
        _send_order(self._process, order="join", number=self._joins, hello=hello)

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Send `message` to every node of the generation; lost if this node is in none."""
        if self._process is not None:
            _send_order(self._process, order="say", number=self._joins, message=message)

    def leave(self, outcome: int | None = None) -> None:
        """Leave for good, without the others reporting this node as lost."""
        self._has_left = True
        if self._process is not None:
            _send_order(self._process, order="leave", outcome=outcome)

    def close(self) -> None:
        """Close the connection to the process, which then ends by itself. There are no more events.

        After `leave`, wait for that end for at most two seconds: only a process that serves the store takes
        longer.
        """
        if self._process is not None:
            if self._has_left:
                self._process.wait(_LEAVE_TIMEOUT)
            self._disconnect()

    def _start(self) -> ChildProcess:
        try:
            process = ChildProcess(_COMMAND, self._log)
        except OSError as error:
            raise InternalError(
                f"the process for the rendezvous cannot be started: {error.strerror}: {error.filename}"
            ) from None
        self._reaper.spare(process.pid)
        _send_order(process, order="settings", **asdict(self._settings))
        return process

    def _disconnect(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            self._reaper.forget(self._process.pid)
        self._process.close()
        self._process = None


def _send_order(member: ChildProcess, **order: Any) -> None:
    member.send(json.dumps(order).encode())


_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "joined": lambda m: Joined(m["rank"], m["hellos"]),
    "heard": lambda m: MessageReceived(m["node"], m["message"]),
    "failed": lambda m: MemberFailed(m["kind"], m["reason"], m["outcome"]),
    "news": lambda m: MemberNews(m["text"], m.get("is_bad", False), m.get("phase")),
}


def _decode(line: bytes) -> tuple[int, Event]:
    """The join that a line from the member belongs to, and its event."""
    message = json.loads(line)
    return message["number"], _EVENTS[message["event"]](message)


def _describe_end(code: int) -> str:
    how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    return f"this node's process for the rendezvous {how}"


def _through_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as another node would receive it."""
    return json.loads(json.dumps(value))  # type: ignore[no-any-return]
