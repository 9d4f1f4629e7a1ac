"""Teams of nodes: real members on the loopback interface, and one test process as the agent of each node."""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.events import Event, Joined, MemberFailed, MemberNews, MessageReceived
from launcher.rendezvous.client import MemberHandle, RendezvousSettings, SingleNodeClient, TeamClient
from launcher.rendezvous.member.endpoint import (
    is_here,
    listening_address,
    local_address,
    resolve,
    show,
    wait_for_name,
)
from launcher.rendezvous.member.heartbeat import GONE, PERIOD, Arrivals, Watch
from launcher.rendezvous.member.refused import Refused
from launcher.system.processes import Subreaper
from tests.kit.job import PATIENCE, wait_for_death

SLOW = 3 * PATIENCE  # seconds; members import torch, and others use this machine too

STORE_IS_GONE = (
    "the node that serves the store is gone, frozen or cut off; start the job again, it goes on from its "
    "checkpoints"
)

PLAIN = {
    "round": 1,
    "complete": False,
    "closed": False,
    "deadline": None,
    "participants": [],
    "wait_list": [],
    "redundancy_list": [],
    "last_heartbeats": [],
}
"""A state of torch's rendezvous as it is kept."""

STORES: list[
    Any
] = []  # not closed before this process ends: threads of generations that are over wait at them


class Spared(Subreaper):
    """Notes who is to be spared. A real one would make this process adopt what other tests leave behind."""

    def __init__(self) -> None:
        self.files = None
        self._spared = set()

    def spares(self, pid: int) -> bool:
        return pid in self._spared


class Node:
    """One node's agent, as far as its team is concerned."""

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

    def say(self, **message: Any) -> None:
        self.member.broadcast(message)

    def kill_agent(self) -> None:
        """What the member sees when its agent is killed."""
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
        """How many nodes are in the team that it is in; 0: in none."""
        return next((len(event.hellos) for event in self.events if isinstance(event, Joined)), 0)

    def heard(self, kind: str) -> list[Mapping[str, Any]]:
        return [
            event.message
            for event in self.events
            if isinstance(event, MessageReceived) and event.message["kind"] == kind
        ]

    def news(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, MemberNews)]

    def failure(self) -> MemberFailed | None:
        return next((event for event in self.events if isinstance(event, MemberFailed)), None)

    def failed(self) -> MemberFailed:
        """Wait for its failure."""
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
        self.reaper = Spared()

    def add(self, node_rank: int | None = None, **hello: Any) -> Node:
        """A node whose member imports torch by now. The first one serves the store."""
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
        """Let all agents receive until it is so; returns the seconds that took. Fails after `seconds`."""
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
        """Have all join until all are in one team, as agents do when they hear that others wait."""

        def is_whole() -> bool:
            for node in self.nodes:
                if node.heard("waiting") or node.heard("lost"):
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


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    """A team of one or two nodes, empty yet."""
    team = Team(tmp_path, 1, 2)
    yield team
    team.close()


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A team of three, which every test leaves as it has found it."""
    team = Team(tmp_path_factory.mktemp("trio"), 3, 3)
    for _ in range(3):
        team.add()
    team.form()
    yield team
    team.close()


# -- alone


def test_alone_is_heard_at_once() -> None:
    """Without a process; what is heard has been through JSON, as between nodes."""
    alone = SingleNodeClient()
    alone.join({"host": "here"})
    alone.broadcast({"kind": "report", "ranks": (1, 2)})
    poll = select.poll()
    poll.register(alone.descriptors[0], select.POLLIN)
    assert poll.poll(0)
    assert alone.receive() == [
        Joined(0, [{"host": "here"}]),
        MessageReceived(0, {"kind": "report", "ranks": [1, 2]}),
    ]
    assert not poll.poll(0)
    assert alone.receive() == []
    alone.broadcast({"kind": "old"})
    alone.join({})
    assert alone.receive() == [Joined(0, [{}])]
    alone.leave()
    alone.close()
    assert alone.descriptors == ()
    assert alone.receive() == []


# -- together


def test_every_node_hears_the_same_in_the_same_order(trio: Team) -> None:
    trio.form()
    for number in range(40):
        for node in trio.nodes:
            node.say(kind="count", rank=node.rank, number=number)
    trio.wait(lambda: all(len(node.heard("count")) == 120 for node in trio.nodes))
    first = [event for event in trio.nodes[0].events if isinstance(event, MessageReceived)]
    for node in trio.nodes:
        assert [event for event in node.events if isinstance(event, MessageReceived)] == first
        own = [event.message["number"] for event in first if event.node == node.rank]
        assert own == list(range(40))
        assert all(event.message["rank"] == event.node for event in first)


def test_everyone_learns_who_is_there(trio: Team) -> None:
    joined = [event for node in trio.nodes for event in node.events if isinstance(event, Joined)]
    assert sorted(event.rank for event in joined) == [0, 1, 2]
    assert all(event.hellos == joined[0].hellos for event in joined)
    for node in trio.nodes:
        hello = joined[0].hellos[node.rank]
        assert hello["number"] == node.hello["number"]
        assert hello["host"] == socket.gethostname()
        assert hello["addr"] == "127.0.0.1"
        assert hello["version"]


def test_nothing_of_an_older_generation_is_heard(trio: Team) -> None:
    """Not even what was on its way when a node joined again; what was said before that reaches the others."""
    for node in trio.nodes[1:]:
        node.say(kind="old")
    listener = trio.nodes[0]
    trio.wait(lambda: len(listener.heard("old")) == 2)
    listener.say(kind="old")
    trio.form()
    for node in trio.nodes:
        node.say(kind="new")
    trio.wait(lambda: all(len(node.heard("new")) == 3 for node in trio.nodes))
    assert not any(node.heard("old") or node.heard("lost") for node in trio.nodes)


def test_signals_are_the_agents_business(trio: Team) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(trio.nodes[0].pid, signum)
    trio.nodes[0].say(kind="alive")
    trio.wait(lambda: all(node.heard("alive") for node in trio.nodes))
    trio.form()


def test_a_killed_agent_is_missed_at_once_and_its_store_goes_on(team: Team) -> None:
    """The killed one served the store. The rest forms a smaller team, and takes in who comes later."""
    host, other = team.add(), team.add()
    team.form()
    served_by = host.pid
    rank = host.rank
    host.kill_agent()
    assert team.wait(lambda: bool(other.heard("lost"))) < 2.0
    assert other.heard("lost") == [{"kind": "lost", "node": rank, "why": "its launch was killed"}]
    team.form()
    other.say(kind="alone")
    team.wait(lambda: bool(other.heard("alone")))
    third = team.add()
    third.join()
    team.wait(lambda: bool(other.heard("waiting")))
    assert other.heard("waiting") == [{"kind": "waiting", "count": 1}]
    assert third.events == []
    other.join()
    team.wait(lambda: other.size() == third.size() == 2)
    os.kill(served_by, 0)  # it is still there
    third.leave()
    other.leave()
    wait_for_death(served_by)


def test_a_silent_node_is_lost_and_may_come_back(team: Team) -> None:
    host, other = team.add(), team.add()
    team.form()
    rank = other.rank
    os.kill(other.pid, signal.SIGSTOP)
    try:
        assert team.wait(lambda: bool(host.heard("lost"))) < 5.5
        lost = host.heard("lost")
        host.join()
        assert team.wait(lambda: host.size() == 1) < 6.0  # it has not to wait for a keep-alive to expire
    finally:
        os.kill(other.pid, signal.SIGCONT)
    assert [(message["node"], message["why"][:21]) for message in lost] == [(rank, "no sign of life for 4")]
    assert other.failed().kind == "lost"
    assert "given this one up: no sign of life" in other.failed().reason
    team.form()


def test_a_node_that_the_others_have_gone_on_without_finds_out(team: Team) -> None:
    """It has stood still together with the store that it serves: by its keep-alive it is dead."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    other = team.add()
    other.join()
    team.wait(lambda: bool(host.heard("waiting")))
    joined = next(event for event in host.events if isinstance(event, Joined))
    remove_node(team, joined.hellos[0]["member"])
    team.wait(lambda: other.size() == 1 and host.failure() is not None)
    assert host.failure() == MemberFailed("lost", "the other nodes have gone on without this one")


def remove_node(team: Team, member: str) -> None:
    """Make a node's keep-alive too old."""
    from launcher.rendezvous.member.gate import Gate, StoreBackend
    from launcher.rendezvous.member.seal import open_seal
    from launcher.rendezvous.member.signing import Signer
    from launcher.rendezvous.member.stores import connect

    settings = RendezvousSettings("c10d", team.endpoint, "job", team.least, team.most)
    STORES.append(store := connect(*team.endpoint, SLOW))
    signer = open_seal(store, settings, Signer(None, "job"), is_host=False, is_first=False)
    Gate(StoreBackend(store, "launch.job/state"), signer).remove_node(member)


def test_a_node_that_stands_still_while_it_waits_is_not_waited_for_twice(team: Team) -> None:
    """It would have the others stop for nothing, again and again. Who lives is told of as ever."""
    team.most = 3
    host, late, third = (team.add() for _ in range(3))
    host.join()
    team.wait(lambda: host.size() == 1)
    late.join()
    team.wait(lambda: bool(host.heard("waiting")))
    os.kill(late.pid, signal.SIGSTOP)
    try:
        host.join()
        team.wait(lambda: host.size() == 1)
        third.join()
        team.wait(lambda: bool(host.heard("waiting")))
        assert host.heard("waiting") == [{"kind": "waiting", "count": 1}]
        host.join()
        team.wait(lambda: host.size() > 0)
        assert (host.size(), third.size() or 2) == (2, 2)  # it was the third that was told of
    finally:
        os.kill(late.pid, signal.SIGCONT)
    team.wait(lambda: bool(host.heard("waiting")))


def test_a_node_outlives_the_store(team: Team) -> None:
    """Whoever has lost it says so soon; all may join again, at a new store."""
    host, other = team.add(), team.add()
    team.form()
    os.kill(host.pid, signal.SIGKILL)
    assert team.wait(lambda: host.failure() is not None and other.failure() is not None) < 7.0
    assert host.failed().kind == other.failed().kind == "lost"
    assert "was killed by SIGKILL" in host.failed().reason
    endpoint = f"{team.endpoint[0]}:{team.endpoint[1]}"
    assert (
        other.failed().reason
        == f"the node that serves the store ({endpoint}) is gone, or cannot be reached"
    )
    assert host.member.descriptors == ()
    team.form()


def host_and_guest(team: Team) -> tuple[Node, Node]:
    """A team of two: who serves the store, and one that soon stops waiting for an answer."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.conf = {"read_timeout": "2"}
    other = team.add()
    team.form()
    return host, other


def test_a_store_that_does_not_answer(team: Team) -> None:
    """As behind a network that is cut: connections do not break, and nothing comes. Nor for who joins again."""
    host, other = host_and_guest(team)
    os.kill(host.pid, signal.SIGSTOP)
    try:
        assert team.wait(lambda: other.failure() is not None) < 7.0
        assert other.failed().kind == "lost"
        assert "has not answered for 5 s" in other.failed().reason
        other.join()
        assert other.failed().kind == "unavailable"
    finally:
        os.kill(host.pid, signal.SIGCONT)
    assert other.failed().reason == (
        f"what listens at {show(team.endpoint)} does not answer as the store of a rendezvous would: "
        f"{STORE_IS_GONE}"
    )


def test_a_store_that_is_gone_for_good(team: Team) -> None:
    host, other = host_and_guest(team)
    os.kill(host.pid, signal.SIGKILL)
    assert other.failed().kind == "lost"
    other.join()
    assert other.failed() == MemberFailed(
        "unavailable",
        f"nobody answers at {show(team.endpoint)} within 2 s (Connection refused): {STORE_IS_GONE}",
    )


def test_who_leaves_in_peace_is_not_lost(team: Team) -> None:
    """And who serves the store stays until the others have gone; who joins now hears that the job has ended."""
    team.most = 3
    host, other, late = team.add(), team.add(), team.add()
    team.form()
    served_by = host.pid
    host.say(kind="bye")
    host.leave(outcome=0)
    team.wait(lambda: bool(other.heard("bye")) and bool(late.heard("bye")))
    late.join()
    assert late.failed() == MemberFailed("over", "the job has finished; this node was not needed", 0)
    newcomer = team.add()
    newcomer.join()
    assert newcomer.failed().kind == "closed"  # it may be meant for another job
    assert "has ended: choose another --rdzv-id" in newcomer.failed().reason
    assert not other.heard("lost")
    other.leave(outcome=0)
    wait_for_death(served_by)


@pytest.mark.parametrize("outcome", [0, 3])
def test_a_spare_that_is_not_needed(team: Team, outcome: int) -> None:
    """It says that it is one, and ends as the job does."""
    team.most = 1
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    spare = team.add()
    spare.join()
    team.wait(lambda: bool(spare.news()))
    assert spare.news()[0].startswith(
        "the job runs on 1 node, the most that --nnodes allows: this node waits"
    )
    host.leave(outcome)
    assert (spare.failed().kind, spare.failed().outcome) == ("over", outcome)
    assert spare.failed().reason.endswith("; this node was not needed")
    assert len(spare.news()) == 1


def test_who_comes_to_a_job_that_runs_waits_for_longer_than_for_too_few_nodes(team: Team) -> None:
    """Beyond join_timeout: it is taken in whenever there is a step boundary, or room."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.conf = {"join_timeout": "1"}
    newcomer = team.add()
    newcomer.join()
    team.wait(lambda: len(host.heard("waiting")) > 1)  # it has come again
    assert newcomer.events == []
    host.join()
    team.wait(lambda: host.size() == newcomer.size() == 2)


def test_versions_must_be_the_same(team: Team) -> None:
    team.least = 2
    nodes = [team.add(host="alpha", version="1.0"), team.add(host="beta", version="1.1")]
    for node in nodes:
        node.join()
    for node in nodes:
        assert node.failed().kind == "usage"
        assert "alpha has shardckpt 1.0" in node.failed().reason or "alpha has 1.0" in node.failed().reason
        assert "1.1" in node.failed().reason
        assert "beta" in node.failed().reason


def test_another_job_with_the_same_id_is_refused(team: Team) -> None:
    """And does not disturb the one that runs."""
    node = team.add()
    team.form()
    stranger = team.add(job="other.py")
    stranger.join()
    assert stranger.failed().kind == "usage"
    assert f"{socket.gethostname()} runs 'train.py', and this node 'other.py'" in stranger.failed().reason
    node.say(kind="alive")
    team.wait(lambda: bool(node.heard("alive")))
    assert [type(event) for event in node.events] == [Joined, MessageReceived]


def test_static_ranks(team: Team) -> None:
    """Nodes have the numbers that they were given, in every generation, also after a restart of one."""
    team.backend, team.least = "static", 2
    first, second = team.add(node_rank=0), team.add(node_rank=1)
    team.form()
    assert (first.rank, second.rank) == (0, 1)
    second.kill_agent()
    team.wait(lambda: bool(first.heard("lost")))
    team.add(node_rank=1)
    team.form()
    assert [node.rank for node in team.nodes] == [0, 1]


def test_too_few_nodes(team: Team) -> None:
    team.least = 2
    team.conf = {"join_timeout": "1"}
    node = team.add()
    node.join()
    assert node.failed() == MemberFailed("quorum", "1 of at least 2 nodes came within 1 s")


def test_settings_that_cannot_be_used(team: Team) -> None:
    team.conf = {"join_timeout": "soon"}
    node = team.add()
    node.join()
    assert node.failed().kind == "usage"
    assert node.failed().reason.startswith("--rdzv-conf cannot be used: ")
    assert "join_timeout" in node.failed().reason


def test_two_jobs_that_come_together(team: Team) -> None:
    """Each of them says what the other one is."""
    team.least = 2
    nodes = [
        team.add(host="alpha", job="train.py on 2 nodes"),
        team.add(host="beta", job="other.py on 2 nodes"),
    ]
    for node in nodes:
        node.join()
    alpha, beta = (node.failed() for node in nodes)
    assert alpha.kind == beta.kind == "usage"
    assert "beta runs 'other.py on 2 nodes', and this node 'train.py on 2 nodes'" in alpha.reason
    assert "alpha runs 'train.py on 2 nodes', and this node 'other.py on 2 nodes'" in beta.reason
    assert "another --rdzv-id" in alpha.reason


def test_a_node_that_comes_before_the_first(team: Team) -> None:
    """Users are told once why nothing happens."""
    team.conf = {"is_host": "0"}
    early = team.add()
    early.join()
    team.wait(lambda: bool(early.news()))
    assert early.news() == [
        f"nobody answers at {show(team.endpoint)} yet (Connection refused); trying for 60 s"
    ]
    time.sleep(1.0)  # of further attempts
    team.conf = {"is_host": "1"}
    team.add().join()
    team.wait(lambda: early.size() > 0)
    assert len(early.news()) == 1


@pytest.mark.parametrize("bound", ["read_timeout", "join_timeout"])
def test_nobody_answers(team: Team, bound: str) -> None:
    team.conf = {"is_host": "0", bound: "1"}
    node = team.add()
    node.join()
    host, port = team.endpoint
    assert node.failed().kind == "unavailable"
    assert node.failed().reason.startswith(
        f"nobody answers at {host}:{port} within 1 s (Connection refused)"
    )
    assert "start the first node, or check --rdzv-endpoint" in node.failed().reason


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "nonsense"])
def test_not_a_store_answers(team: Team, answer: bytes) -> None:
    """The node tries to serve the store itself at first, but the port belongs to another program."""
    team.conf = {"read_timeout": "2"}
    with socket.create_server(team.endpoint) as server, ExitStack() as connections:
        server.settimeout(0)
        node = team.add()
        node.join()

        def serve() -> bool:
            try:
                connection = connections.enter_context(server.accept()[0])
            except BlockingIOError:
                return node.failure() is not None
            connection.sendall(answer)
            return False

        team.wait(serve)
    assert node.failed().kind == "unavailable"
    assert "it is frozen, or another program has that port" in node.failed().reason


def test_a_store_that_cannot_compare_and_set(tmp_path: Path) -> None:
    """As those of etcd. Node 0 of a generation then serves one for it; here the nodes are threads."""
    from torch.distributed import FileStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    from launcher.rendezvous.member.generation import Generation
    from launcher.rendezvous.member.meeting import meet_through
    from launcher.rendezvous.member.signing import Signer

    settings = RendezvousSettings("etcd-v2", ("127.0.0.1", 1), "job", 2, 2)
    path = str(tmp_path / "store")
    heard: dict[int, queue.SimpleQueue[tuple[int, Any]]] = {0: queue.SimpleQueue(), 1: queue.SimpleQueue()}

    def take_part(number: int) -> Generation:
        store = FileStore(path)
        backend = C10dRendezvousBackend(store, "job")
        seat = meet_through(settings, "127.0.0.1", Signer(b"secret", "job"), backend, store).next()
        generation = Generation(seat, lambda *said: heard[seat.rank].put(said), pytest.fail, pytest.fail)
        assert len(generation.greet({"number": number}, SLOW)) == 2
        assert seat.is_host == (seat.rank == 0)
        generation.start()
        return generation

    with ThreadPoolExecutor() as threads:
        generations = list(threads.map(take_part, range(2)))
    for generation in generations:
        generation.say({"rank": generation.rank})
    said = [[heard[rank].get(timeout=SLOW) for _ in range(2)] for rank in range(2)]
    assert said[0] == said[1]
    assert sorted(said[0]) == [(0, {"rank": 0}), (1, {"rank": 1})]
    for generation in generations:
        generation.retire()
    _join_threads()


class Heap:
    """The nodes of one generation in this process, at a store of their own."""

    def __init__(self, size: int) -> None:
        from launcher.rendezvous.member.generation import Generation
        from launcher.rendezvous.member.protocol import Seat
        from launcher.rendezvous.member.signing import Signer
        from launcher.rendezvous.member.stores import SignedStore, serve

        self.store = serve("127.0.0.1", "127.0.0.1", 0)
        signed = SignedStore(self.store, Signer(b"secret", "job"))
        self.heard: list[queue.SimpleQueue[tuple[int, Any]]] = [queue.SimpleQueue() for _ in range(size)]
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()

        def make(rank: int) -> Generation:
            heard = self.heard[rank]
            return Generation(
                Seat(rank, size, signed, rank == 0),
                lambda *said: heard.put(said),
                self.failures.put,
                lambda error: self.failures.put(str(error)),
            )

        self.nodes = [make(rank) for rank in range(size)]

    def hear(self, rank: int, count: int) -> list[tuple[int, Any]]:
        return [self.heard[rank].get(timeout=SLOW) for _ in range(count)]

    def close(self) -> None:
        for node in self.nodes:
            node.retire()
        _join_threads()


def _join_threads() -> None:
    """Threads that wait at a store must not outlive it, nor this process."""
    for thread in threading.enumerate():
        if thread.name == "generation":
            thread.join(SLOW)


def test_a_node_that_does_not_see_the_others_is_missed_by_those_that_see_it() -> None:
    """Else they would wait for it for ever, in a generation that it has not begun."""
    hasty, slow = (heap := Heap(2)).nodes
    with pytest.raises(TimeoutError, match="not all of 2 nodes said hello"):
        hasty.greet({}, 0.05)
    hasty.abandon("it was in a hurry")
    assert len(slow.greet({}, SLOW)) == 2
    slow.start()
    assert heap.hear(1, 1) == [(0, {"kind": "lost", "node": 0, "why": "it was in a hurry"})]
    assert slow.look(0.0) == []
    assert slow.look(100.0) == []
    heap.close()


def test_a_node_is_lost_once_and_heard_no_more() -> None:
    """Whoever notices, and whatever it still says: the same for all, the node itself included."""
    heap = Heap(3)
    for node in heap.nodes:
        node.say({"kind": "first"})
        node.tell_lost(2, f"as {node.rank} sees it")
    for node in heap.nodes[:2]:
        node.start()
        node.flush(SLOW)
    late = heap.nodes[2]
    late.start()
    assert "as 0 sees it" in heap.failures.get(timeout=SLOW)
    for node in heap.nodes[:2]:
        node.say({"kind": "last"})
    lost = {"kind": "lost", "node": 2, "why": "as 0 sees it"}
    expected = [(0, {"kind": "first"}), (0, lost), (1, {"kind": "first"})]
    assert heap.hear(0, 3) == heap.hear(1, 3) == expected
    last = heap.hear(0, 2)
    assert last == heap.hear(1, 2)
    assert {node for node, message in last if message == {"kind": "last"}} == {0, 1}
    assert heap.hear(2, 2) == expected[:2]
    assert heap.heard[2].empty()
    heap.close()


# -- decisions


def test_a_host_that_does_not_exist() -> None:
    """Its name may be known later, so that is not bad usage."""
    with pytest.raises(Refused, match=r"nosuch\.invalid, cannot be resolved \(.*\w") as refused:
        resolve(("nosuch.invalid", 29400))
    assert refused.value.kind == "unavailable"
    with pytest.raises(
        Refused, match=r"nosuch\.invalid, .*; tried since [\d:]+, for 0 s: start the node"
    ) as refused:
        wait_for_name(("nosuch.invalid", 29400), 0.0, pytest.fail)
    assert refused.value.kind == "unavailable"
    with pytest.raises(Refused, match="is no name of a host") as refused:
        wait_for_name(("x" * 80, 29400), SLOW, pytest.fail)
    assert refused.value.kind == "usage"


def test_a_name_that_is_known_later() -> None:
    """As that of a pod that has not started yet."""
    answers = [Refused("unavailable", "not known"), Refused("unavailable", "not known"), None]

    def look_up(_: tuple[str, int]) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    wait_for_name(("pod-0", 29400), SLOW, pytest.fail, look_up)
    assert answers == []


def test_which_machine_is_meant() -> None:
    assert is_here(("localhost", 29400))
    assert is_here(("127.0.0.1", 29400))
    assert not is_here(("192.0.2.1", 29400))  # reserved for documentation
    assert local_address(("127.0.0.1", 29400)) == "127.0.0.1"


def test_a_sign_that_does_not_change_is_silence() -> None:
    watch = Watch()
    looks = [watch.look({1: "7", 2: str(i), 3: GONE}, i * PERIOD) for i in range(12)]
    first = next(i for i, silent in enumerate(looks) if silent)
    assert first * PERIOD == 4.0
    assert looks[first] == {1: 4.0}


def test_who_waits_must_show_life_anew() -> None:
    arrivals = Arrivals(4.0)
    assert arrivals.look({"a": "1", "b": "7"}, 0.0) == 0
    assert arrivals.look({"a": "2", "b": "7"}, 1.0) == 1
    assert arrivals.look({"a": "3", "b": "8"}, 2.0) == 2
    assert arrivals.look({"a": "3", "b": "9"}, 6.5) == 1
    assert arrivals.look({"a": "3"}, 7.0) == 0
    assert arrivals.look({"a": "4"}, 8.0) == 1


def test_time_in_which_nobody_looked_is_not_silence() -> None:
    watch = Watch()
    assert watch.look({1: "7"}, 0.0) == {}
    assert watch.look({1: "7"}, 100.0) == {}
    assert watch.look({1: "8"}, 100.5) == {}
    assert watch.look({1: "8"}, 101.0) == {}


def test_where_a_store_listens() -> None:
    """At the endpoint's address and no other one; at all if others reach it at one that is not known here."""
    assert listening_address(("127.0.0.1", 29400), None) == "127.0.0.1"
    assert listening_address(("localhost", 29400), None) == "127.0.0.1"
    assert listening_address(("192.0.2.1", 29400), None) == ""  # translated on the way here
    assert listening_address(("192.0.2.1", 29400), "127.0.0.3") == "127.0.0.3"


# -- others at the store


class Hostile:
    """What a process that reaches the store, but is no node of the job, can do there."""

    def __init__(self, team: Team) -> None:
        from launcher.rendezvous.member.stores import connect

        self.store = connect(*team.endpoint, SLOW)
        self.trace = team.path / "trace"
        STORES.append(self.store)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)

    def overwrite(self, *keys: str) -> None:
        for key in keys:
            assert self.store.check([key])
            self.store.set(key, pickle.dumps(self))

    def all_keys(self) -> list[str]:
        return list(self.store.list_keys())


@pytest.mark.parametrize("secret", [None, "of the nodes alone"])
def test_a_pickle_in_place_of_the_state(team: Team, secret: str | None) -> None:
    """Nobody unpickles it; the nodes put the state right, tell of it once, and go on."""
    team.secret = secret
    host, other = team.add(), team.add()
    team.form()
    hostile = Hostile(team)
    hostile.overwrite("launch.job/state")
    team.wait(lambda: bool(host.news() or other.news()))
    (told,) = host.news() or other.news()
    assert re.search(
        r"^the store at 127.0.0.1:\d+ holds what no node of this job has written \(state\)", told
    )
    hostile.overwrite("launch.job/state")
    team.form()
    for node in team.nodes:
        node.say(kind="on")
    team.wait(lambda: len(host.heard("on")) == len(other.heard("on")) == 2)
    assert not hostile.trace.exists()
    assert not host.failure()


def test_pickles_everywhere(team: Team) -> None:
    """A node that cannot go on says why."""
    team.secret = "of the nodes alone"
    host, other = team.add(), team.add()
    team.form()
    hostile = Hostile(team)
    hostile.overwrite(*hostile.all_keys())
    team.wait(lambda: host.failure() is not None and other.failure() is not None)
    for node in (host, other):
        assert node.failed().kind == "lost"
        assert "others can reach that port" in node.failed().reason
    assert not hostile.trace.exists()


@pytest.mark.parametrize(
    ("theirs", "mine", "reason"),
    [
        (
            "of the others",
            "of mine alone",
            "has another secret than this node (the test): give all nodes the same",
        ),
        (
            "of the others",
            None,
            "know each other by a secret, and this node has none: give all nodes the same",
        ),
        (None, "of mine alone", "has no secret, and this node has one (the test): give all nodes the same"),
    ],
    ids=["other", "missing", "needless"],
)
def test_a_node_with_a_wrong_secret(team: Team, theirs: str | None, mine: str | None, reason: str) -> None:
    """It is told at once, and disturbs nobody."""
    team.least, team.secret = 1, theirs
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.secret = mine
    stranger = team.add()
    stranger.join()
    assert stranger.failed().kind == "usage"
    assert reason in stranger.failed().reason
    assert host.failure() is None
    assert not host.heard("waiting")


def test_nobody_reaches_the_store_at_another_address(team: Team) -> None:
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", team.endpoint[1]))


class Kept:
    """A backend of a rendezvous in this process, that anybody may write to."""

    name = "kept"

    def __init__(self) -> None:
        self.stored: bytes | None = None

    def get_state(self) -> tuple[bytes, Any] | None:
        return None if self.stored is None else (self.stored, self.stored)

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        has_set = token == self.stored
        self.stored = state if has_set else self.stored
        return None if self.stored is None else (self.stored, self.stored, has_set)


def gated(
    secret: bytes | None = b"secret", kept: Kept | None = None, run_id: str = "job"
) -> tuple[Any, Kept]:
    from launcher.rendezvous.member.gate import Gate
    from launcher.rendezvous.member.signing import Signer

    kept = kept or Kept()
    return Gate(kept, Signer(secret, run_id), pause=0.0), kept  # type: ignore[arg-type]


def state_with(*addresses: str) -> bytes:
    """A state of torch's with everything in it, as torch hands it over."""
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

    state = _RendezvousState()
    nodes = [_NodeDesc(address, 7, 0) for address in addresses]
    state.round, state.complete, state.deadline = 3, True, datetime.now(UTC)
    state.participants = {node: rank for rank, node in enumerate(nodes)}
    state.wait_list, state.redundancy_list = set(nodes), set(nodes[:1])
    state.last_heartbeats = dict.fromkeys(nodes, datetime.now(UTC))
    return pickle.dumps(state)


def test_torch_gets_back_what_it_has_written() -> None:
    gate, kept = gated()
    assert gate.get_state() is None
    written = gate.set_state(state_with("a", "b"))
    assert written[2]
    assert vars(pickle.loads(gate.get_state()[0])) == vars(pickle.loads(state_with("a", "b"))) | {
        name: vars(pickle.loads(written[0]))[name] for name in ("deadline", "last_heartbeats")
    }
    assert gate.round_of("a/7") == 3
    assert not gate.set_state(state_with("c"), b"of another state")[2]
    assert gate.participants() == ["a/7", "b/7"]
    assert b"\x80" not in kept.stored  # no pickle


def test_an_older_state_is_replaced_by_the_newest() -> None:
    """Whoever has seen one can put it back, signed as it is."""
    gate, kept = gated()
    gate.set_state(state_with("a"))
    old = kept.stored
    gate.set_state(state_with("a", "b"), kept.stored)
    new, kept.stored = kept.stored, old
    assert gate.participants() == ["a/7", "b/7"]
    assert pickle.loads(gate.get_state()[0]).participants
    assert gated(kept=kept)[0].participants() == ["a/7", "b/7"]
    assert kept.stored == new
    kept.stored = None
    assert gate.participants() == ["a/7", "b/7"]


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"garbage",
        pickle.dumps(Path("x")),
        b"unsigned:{}",
        b"hmac-sha256:",
        b"hmac-sha256:" + b"0" * 64 + b"{}",
    ],
)
def test_a_state_that_is_none(stored: bytes) -> None:
    """Without a state that this node knows it waits for others to put it right, and then gives up."""
    from launcher.rendezvous.member.gate import OverwrittenError

    gate, kept = gated()
    gate.set_state(state_with("a"))
    good, kept.stored = kept.stored, stored
    assert gate.participants() == ["a/7"]
    assert kept.stored == good
    kept.stored = stored
    with pytest.raises(OverwrittenError):
        gated(kept=kept)[0].participants()
    assert kept.stored == stored


def test_what_is_signed_for_another_job_or_key_does_not_count() -> None:
    from launcher.rendezvous.member.signing import ForgedError, Signer

    signer = Signer(b"secret", "job")
    signed = signer.sign("key", b"value")
    assert signer.check("key", signed) == b"value"
    assert Signer(b"secret", "job").check("key", signed) == b"value"
    for other, key in (
        (signer, "other"),
        (Signer(b"another", "job"), "key"),
        (Signer(b"secret", "jo", "b"), "key"),
        (Signer(b"secret", "other"), "key"),
        (signer.within("nonce"), "key"),
        (Signer(None), "key"),
    ):
        with pytest.raises(ForgedError):
            other.check(key, signed)
    with pytest.raises(ForgedError):
        signer.check("key", Signer(None).sign("key", b"value"))
    with pytest.raises(ForgedError):
        signer.check("key", signed[:-1] + b"!")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"round": 1}',
        *(
            json.dumps({**PLAIN, **wrong})
            for wrong in (
                {"round": True},
                {"round": "1"},
                {"closed": 0},
                {"deadline": 5},
                {"deadline": "2026-01-01"},
                {"participants": [[["a", 1], 0]]},
                {"participants": {"a": 0}},
                {"wait_list": [["a", "1", 0]]},
                {"last_heartbeats": [[["a", 1, 0], "never"]]},
                {"more": 1},
            )
        ),
        "[" * 100000,
    ],
)
def test_a_text_that_is_no_state(text: str) -> None:
    from launcher.rendezvous.member.state import StateError, decode_state

    with pytest.raises(StateError):
        decode_state(text)


def test_every_field_of_torchs_state_is_known() -> None:
    """Another version of torch may have others."""
    from launcher.rendezvous.member.state import decode_state, encode_state, from_torch

    state = from_torch(state_with("a", "b"))
    assert vars(decode_state(encode_state(state))) == vars(state)
    assert encode_state(decode_state(json.dumps(PLAIN))) == json.dumps(PLAIN, sort_keys=True)


def test_a_forged_entry_is_replaced_and_one_that_was_read_is_missed() -> None:
    """What lies where the next entry comes is as good as nothing; what replaces one that was read is not."""
    heap = Heap(2)
    heap.store.set("log/0", "garbage")
    heap.nodes[0].start()
    heap.nodes[0].say({"kind": "first"})
    assert heap.hear(0, 1) == [(0, {"kind": "first"})]
    heap.store.set("log/0", "garbage")
    heap.nodes[1].start()
    assert "what the nodes say to each other was overwritten" in heap.failures.get(timeout=SLOW)
    assert heap.heard[1].empty()
    heap.close()


def test_a_sign_of_before_is_none() -> None:
    """Whoever has seen signs of life can write them again."""
    watch = Watch()
    looks = [watch.look({1: "8" if i % 2 else "7", 2: None}, i * PERIOD) for i in range(20)]
    assert set(looks[-1]) == {1, 2}
