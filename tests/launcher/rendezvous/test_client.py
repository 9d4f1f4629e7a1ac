"""Clients of a team: a single node's, and handles of real member processes on the loopback interface."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from launcher.events import Joined, MessageReceived
from launcher.rendezvous.client import SingleNodeClient
from tests.kit.teams import Team


def test_a_single_node_receives_its_messages_at_once() -> None:
    """No process is started; messages pass through JSON, as between nodes."""
    client = SingleNodeClient()
    client.join({"host": "here"})
    client.broadcast({"kind": "report", "ranks": (1, 2)})
    poll = select.poll()
    poll.register(client.descriptors[0], select.POLLIN)
    assert poll.poll(0)
    assert client.receive() == [
        Joined(0, [{"host": "here"}]),
        MessageReceived(0, {"kind": "report", "ranks": [1, 2]}),
    ]
    assert not poll.poll(0)
    assert client.receive() == []
    client.broadcast({"kind": "old"})
    client.join({})
    assert client.receive() == [Joined(0, [{}])]
    client.leave()
    client.close()
    assert client.descriptors == ()
    assert client.receive() == []


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A team of three; every test leaves it complete."""
    team = Team(tmp_path_factory.mktemp("trio"), 3, 3)
    for _ in range(3):
        team.add()
    team.form()
    yield team
    team.close()


def test_every_node_receives_the_same_messages_in_the_same_order(trio: Team) -> None:
    trio.form()
    for number in range(40):
        for node in trio.nodes:
            node.broadcast(kind="count", rank=node.rank, number=number)
    trio.wait(lambda: all(len(node.received("count")) == 120 for node in trio.nodes))
    first = [event for event in trio.nodes[0].events if isinstance(event, MessageReceived)]
    for node in trio.nodes:
        assert [event for event in node.events if isinstance(event, MessageReceived)] == first
        own = [event.message["number"] for event in first if event.node == node.rank]
        assert own == list(range(40))
        assert all(event.message["rank"] == event.node for event in first)


def test_every_node_receives_all_hellos(trio: Team) -> None:
    joined = [event for node in trio.nodes for event in node.events if isinstance(event, Joined)]
    assert sorted(event.rank for event in joined) == [0, 1, 2]
    assert all(event.hellos == joined[0].hellos for event in joined)
    for node in trio.nodes:
        hello = joined[0].hellos[node.rank]
        assert hello["number"] == node.hello["number"]
        assert hello["host"] == socket.gethostname()
        assert hello["addr"] == "127.0.0.1"
        assert hello["version"]


def test_messages_of_an_older_generation_are_not_received(trio: Team) -> None:
    """Not even messages that were on their way when a node joined again; earlier ones reach the other nodes."""
    for node in trio.nodes[1:]:
        node.broadcast(kind="old")
    receiver = trio.nodes[0]
    trio.wait(lambda: len(receiver.received("old")) == 2)
    receiver.broadcast(kind="old")
    trio.form()
    for node in trio.nodes:
        node.broadcast(kind="new")
    trio.wait(lambda: all(len(node.received("new")) == 3 for node in trio.nodes))
    assert not any(node.received("old") or node.received("lost") for node in trio.nodes)


def test_signals_are_left_to_the_agent(trio: Team) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(trio.nodes[0].pid, signum)
    trio.nodes[0].broadcast(kind="alive")
    trio.wait(lambda: all(node.received("alive") for node in trio.nodes))
    trio.form()
