"""Teams of nodes on the loopback interface: real member processes, and the test as the agent of each node."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.events import Event, Joined, MemberFailed, MemberNews, MessageReceived
from launcher.rendezvous.client import MemberHandle, RendezvousSettings, TeamClient
from launcher.system.processes import Subreaper
from tests.kit.job import PATIENCE, wait_for_death

SLOW = 3 * PATIENCE  # seconds; members import torch, and others use this machine too


class SparedPids(Subreaper):
    """Records the spared processes. A real subreaper would adopt what other tests leave behind."""

    def __init__(self) -> None:
        self.files = None
        self._spared = set()

    def spares(self, pid: int) -> bool:
        return pid in self._spared


class Node:
    """One node's agent, reduced to its team client."""

    def __init__(self, team: Team, member: TeamClient, **hello: Any) -> None:
        self.team = team
        self.member = member
        self.hello = hello
        self.events: list[Event] = []
        self.rank = -1

    @property
    def pid(self) -> int:
        assert isinstance(self.member, MemberHandle)
        assert self.member.pid is not None
        return self.member.pid

    def join(self) -> None:
        self.events.clear()
        self.member.join(self.hello)

    def broadcast(self, **message: Any) -> None:
        self.member.broadcast(message)

    def kill_agent(self) -> None:
        """Close the member's connection, as the death of its agent does."""
        self.team.nodes.remove(self)
        self.member.close()

    def leave(self, outcome: int | None = None) -> None:
        self.member.leave(outcome)
        self.kill_agent()

    def receive(self) -> None:
        for event in self.member.receive():
            self.events.append(event)
            if isinstance(event, Joined):
                self.rank = event.rank

    def size(self) -> int:
        """How many nodes its team has; 0: it is in none."""
        return next((len(event.hellos) for event in self.events if isinstance(event, Joined)), 0)

    def received(self, kind: str) -> list[Mapping[str, Any]]:
        return [
            event.message
            for event in self.events
            if isinstance(event, MessageReceived) and event.message["kind"] == kind
        ]

    def news(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, MemberNews)]

    def failure(self) -> MemberFailed | None:
        return next((event for event in self.events if isinstance(event, MemberFailed)), None)

    def wait_for_failure(self) -> MemberFailed:
        """Its failure, once it has failed."""
        self.team.wait(lambda: self.failure() is not None)
        failure = self.failure()
        assert failure is not None
        return failure


class Team:
    """Nodes that meet at one endpoint."""

    def __init__(self, path: Path, least: int, most: int, **conf: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = ("127.0.0.1", free.getsockname()[1])
        self.path = path
        self.least, self.most = least, most
        self.conf = conf
        self.backend = "c10d"
        self.secret: str | None = None
        self.nodes: list[Node] = []
        self.pids: set[int] = set()
        self.reaper = SparedPids()

    def add(self, node_rank: int | None = None, **hello: Any) -> Node:
        """Add a node, whose member begins to import torch. The first node serves the store."""
        is_first = not self.pids
        settings = RendezvousSettings(
            backend=self.backend,
            endpoint=self.endpoint,
            run_id="job",
            min_nodes=self.least,
            max_nodes=self.most,
            node_rank=node_rank,
            conf={"is_host": str(int(is_first)), **self.conf},
            secret=self.secret,
            secret_source="the test",
        )
        number = len(self.pids)
        member = MemberHandle(settings, self.path / f"member-{number}.log", self.reaper)
        node = Node(self, member, **{"job": "train.py", "number": number, **hello})
        self.nodes.append(node)
        self.pids.add(node.pid)
        assert self.reaper.spares(node.pid)
        return node

    def wait(self, until: Callable[[], bool], seconds: float = SLOW) -> float:
        """Let all agents receive until `until()` is true; return the seconds that took. Fails after `seconds`."""
        began = time.monotonic()
        while not until():
            assert time.monotonic() < began + seconds, [(node.rank, node.events) for node in self.nodes]
            poll = select.poll()
            for node in self.nodes:
                for fd in node.member.descriptors:
                    poll.register(fd, select.POLLIN)
            poll.poll(100)
            for node in self.nodes:
                node.receive()
                if isinstance(node.member, MemberHandle) and node.member.pid is not None:
                    self.pids.add(node.member.pid)
        return time.monotonic() - began

    def form(self) -> None:
        """Have all nodes join until they are in one team, as agents do when other nodes wait."""

        def is_whole() -> bool:
            for node in self.nodes:
                if node.received("waiting") or node.received("lost"):
                    node.join()
            return all(node.size() == len(self.nodes) for node in self.nodes)

        for node in self.nodes:
            node.join()
        self.wait(is_whole)

    def close(self) -> None:
        for node in self.nodes:
            node.member.leave(outcome=0)
        for node in self.nodes:
            node.member.close()
        for pid in self.pids:
            wait_for_death(pid)
