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
_FAREWELL = 2.0  # seconds


@dataclass(frozen=True)
class RendezvousSettings:
    """Where and how the nodes of a job meet.

    `backend` is "c10d", "static", "etcd-v2", "etcd" or another one that torch's registry knows. `endpoint` is
    host and port. `node_rank` is this node's number with "static", where all `max_nodes` nodes must come.
    `local_addr` is the address at which other nodes reach this one; None: found by the way to the endpoint.
    `conf` is what torchrun takes as --rdzv-conf; unless given, `join_timeout` is 600 s, `last_call_timeout` 2
    s, `read_timeout` (for somebody to answer at the endpoint; never longer than `join_timeout`) 60 s,
    `keep_alive_interval` 1 s and `keep_alive_max_attempt` 30; `is_host` says whether to serve the store of
    "c10d" and "static", which is otherwise done by the first process on the endpoint's machine. `has_met`:
    this node has been in a generation of the job before. `secret` is what all nodes of the job share, by
    which they know each other, and `secret_source` where it comes from, in words; None: anybody can take
    part.

    A node beyond `max_nodes` waits, without a limit, until another one is lost or the job has ended.
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
        """Who is at the endpoint, in words."""
        is_node = self.backend in ("c10d", "static")
        return "the node that serves the store" if is_node else "the rendezvous"


class TeamClient(Protocol):
    """A node's place in its team. A source of the monitor's: `descriptors` and `receive`."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to tell; none: never again."""

    def receive(self) -> list[Event]:
        """What has happened since the last call; does not wait.

        `Joined`, `MessageReceived` and `MemberFailed`; `MemberNews` while it joins.
        """

    def join(self, hello: Mapping[str, Any]) -> None:
        """Leave the generation that this node is in, and take part in the next one.

        `Joined` comes when that has formed, or `MemberFailed`; nothing that was said before is heard
        after this call. May be called again at any time, also after `MemberFailed`.

        `hello` is what this node tells the others of itself. "host", "addr" and "version" are added unless
        it has them, and "member", which is not the agent's. A node whose "version" or "job" (what tells this
        job from others) differs from the others' is refused: `MemberFailed` of kind "usage".
        """

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Have every node of the generation hear `message`, a JSON object; lost if there is none."""

    def leave(self, outcome: int | None = None) -> None:
        """Leave for good and in peace: nobody is told that this node is lost. Then `close`.

        `outcome` is the exit code with which the whole job has ended, if it has: nodes that wait, and those
        that come now, are told so.
        """

    def close(self) -> None:
        """Let go. Without `leave` before, the other nodes hear that this one is lost."""


class SingleNodeClient:
    """A team of one node: no process and no torch; what it says it hears at once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to tell."""
        return () if self._is_closed else (self._wake,)

    def receive(self) -> list[Event]:
        """What was said since the last call; does not wait."""
        events, self._events = self._events, []
        if events:
            os.eventfd_read(self._wake)
        return events

    def join(self, hello: Mapping[str, Any]) -> None:
        """Begin a generation, with this node as number 0."""
        self._events = []
        self._tell(Joined(0, [_through_json(hello)]))

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Hear `message` at the next `receive`."""
        self._tell(MessageReceived(0, _through_json(message)))

    def leave(self, outcome: int | None = None) -> None:
        """Nothing: there is nobody to be told."""

    def close(self) -> None:
        """Let go of the descriptor; there are no more events."""
        self._is_closed = True
        self._events = []
        os.close(self._wake)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        os.eventfd_write(self._wake, 1)


class MemberHandle:
    """A team of several nodes, which a process of its own speaks to.

    The process starts at once and imports torch meanwhile. It outlives this one as long as other nodes
    depend on it (because it serves the store of the rendezvous), and writes to `log` what torch has to say.
    Raises `InternalError` if it cannot be started, here and in `join`.
    """

    def __init__(self, settings: RendezvousSettings, log: Path, reaper: Subreaper) -> None:
        self._settings = settings
        self._log = log
        self._reaper = reaper
        self._has_left = False
        self._joins = 0  # what is told of an earlier one is out of date
        self._process: ChildProcess | None = self._start()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has something to tell."""
        return () if self._process is None else self._process.descriptors

    @property
    def pid(self) -> int | None:
        """The process that speaks for this node; None if none does."""
        return None if self._process is None else self._process.pid

    def receive(self) -> list[Event]:
        """What has happened since the last call; does not wait.

        `MemberFailed` is the last event until `join` is called again.
        """
        if self._process is None:
            return []
        code = self._process.poll()  # before its last words are read, so that none can be missed
        told = map(_decode, self._process.read())
        events = [event for number, event in told if number == self._joins]
        if any(isinstance(event, Joined) for event in events):
            self._settings = replace(self._settings, has_met=True)
        failed = next((i for i, event in enumerate(events) if isinstance(event, MemberFailed)), None)
        if failed is not None:
            events = events[: failed + 1]
            self._disconnect()
        elif code is not None:
            events.append(MemberFailed("lost", f"{_ending(code)}: see {self._log}"))
            self._disconnect()
        return events

    def join(self, hello: Mapping[str, Any]) -> None:
        """Leave the generation that this node is in, and take part in the next one."""
        self._joins += 1
        if self._process is None:
            self._process = self._start()
        _order(self._process, order="join", number=self._joins, hello=hello)

    def broadcast(self, message: Mapping[str, Any]) -> None:
        """Have every node of the generation hear `message`; lost if this node is in none."""
        if self._process is not None:
            _order(self._process, order="say", number=self._joins, message=message)

    def leave(self, outcome: int | None = None) -> None:
        """Leave for good and in peace: nobody is told that this node is lost."""
        self._has_left = True
        if self._process is not None:
            _order(self._process, order="leave", outcome=outcome)

    def close(self) -> None:
        """Let go of the process, which ends by itself, soon. There are no more events.

        After `leave`, waits for that end, for two seconds at most: only one that serves the store takes longer.
        """
        if self._process is not None:
            if self._has_left:
                self._process.wait(_FAREWELL)
            self._disconnect()

    def _start(self) -> ChildProcess:
        try:
            process = ChildProcess(_COMMAND, self._log)
        except OSError as error:
            raise InternalError(
                f"the process for the rendezvous cannot be started: {error.strerror}: {error.filename}"
            ) from None
        self._reaper.spare(process.pid)
        _order(process, order="settings", **asdict(self._settings))
        return process

    def _disconnect(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            self._reaper.forget(self._process.pid)
        self._process.close()
        self._process = None


def _order(member: ChildProcess, **order: Any) -> None:
    member.send(json.dumps(order).encode())


_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "joined": lambda m: Joined(m["rank"], m["hellos"]),
    "heard": lambda m: MessageReceived(m["node"], m["message"]),
    "failed": lambda m: MemberFailed(m["kind"], m["reason"], m["outcome"]),
    "news": lambda m: MemberNews(m["text"], m.get("is_bad", False), m.get("phase")),
}


def _decode(line: bytes) -> tuple[int, Event]:
    message = json.loads(line)
    return message["number"], _EVENTS[message["event"]](message)


def _ending(code: int) -> str:
    how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    return f"this node's process for the rendezvous {how}"


def _through_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as another node would get it."""
    return json.loads(json.dumps(value))  # type: ignore[no-any-return]
