"""Real members: killed agents, suspended nodes, stores that are gone, nodes that leave."""

from __future__ import annotations

import os
import re
import signal
import socket

import pytest

from launcher.events import Joined, MemberFailed
from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.authentication import authenticate_store
from launcher.rendezvous.member.endpoint import (
    format_endpoint,
)
from launcher.rendezvous.member.signed_backend import SignedBackend, StoreBackend
from launcher.rendezvous.member.signing import Signer
from tests.kit.job import wait_for_death
from tests.kit.rendezvous_stores import Attacker, connect_to
from tests.kit.teams import Node, Team

STORE_IS_GONE = (
    "the node that serves the store is gone, frozen or cut off; start the job again, it goes on from its "
    "checkpoints"
)


def test_a_killed_agent_is_lost_at_once_and_its_store_is_served_on(team: Team) -> None:
    """Its member serves the store. The other node forms a team of one, and takes in a node that comes later."""
    host, other = team.add(), team.add()
    team.form()
    served_by = host.pid
    rank = host.rank
    host.kill_agent()
    assert team.wait(lambda: bool(other.received("lost"))) < 2.0
    assert other.received("lost") == [{"kind": "lost", "node": rank, "why": "its launch was killed"}]
    team.form()
    other.broadcast(kind="alone")
    team.wait(lambda: bool(other.received("alone")))
    third = team.add()
    third.join()
    team.wait(lambda: bool(other.received("waiting")))
    assert other.received("waiting") == [{"kind": "waiting", "count": 1}]
    assert third.events == []
    other.join()
    team.wait(lambda: other.size() == third.size() == 2)
    os.kill(served_by, 0)  # it still exists
    third.leave()
    other.leave()
    wait_for_death(served_by)


def test_a_silent_node_is_lost_and_may_come_back(team: Team) -> None:
    host, other = team.add(), team.add()
    team.form()
    rank = other.rank
    os.kill(other.pid, signal.SIGSTOP)
    try:
        assert team.wait(lambda: bool(host.received("lost"))) < 5.5
        lost = host.received("lost")
        host.join()
        assert team.wait(lambda: host.size() == 1) < 6.0  # no keep-alive has to expire first
    finally:
        os.kill(other.pid, signal.SIGCONT)
    assert [(message["node"], message["why"][:21]) for message in lost] == [(rank, "no sign of life for 4")]
    assert other.wait_for_failure().kind == "lost"
    # It finds the message to it, or that the rendezvous no longer has it, whichever it looks at first.
    assert re.search(
        "given this one up: no sign of life|have gone on without this one", other.wait_for_failure().reason
    )
    team.form()


def test_a_removed_node_finds_out(team: Team) -> None:
    """It was suspended together with the store that it serves, and its keep-alive has expired."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    other = team.add()
    other.join()
    team.wait(lambda: bool(host.received("waiting")))
    joined = next(event for event in host.events if isinstance(event, Joined))
    remove_node(team, joined.hellos[0]["member"])
    team.wait(lambda: other.size() == 1 and host.failure() is not None)
    assert host.failure() == MemberFailed("lost", "the other nodes have gone on without this one")


def remove_node(team: Team, member: str) -> None:
    """Expire a node's keep-alive."""
    settings = RendezvousSettings("c10d", team.endpoint, "job", team.least, team.most)
    store = connect_to(team)
    signer = authenticate_store(store, settings, Signer(None, "job"), is_host=False, is_first=False)
    SignedBackend(StoreBackend(store, "launch.job/state"), signer).remove_node(member)


def test_a_node_outlives_the_store(team: Team) -> None:
    """All nodes report its loss, and may join again at a new store."""
    host, other = team.add(), team.add()
    team.form()
    os.kill(host.pid, signal.SIGKILL)
    assert team.wait(lambda: host.failure() is not None and other.failure() is not None) < 7.0
    assert host.wait_for_failure().kind == other.wait_for_failure().kind == "lost"
    assert "was killed by SIGKILL" in host.wait_for_failure().reason
    endpoint = f"{team.endpoint[0]}:{team.endpoint[1]}"
    assert (
        other.wait_for_failure().reason
        == f"the node that serves the store ({endpoint}) is gone, or cannot be reached"
    )
    assert host.member.descriptors == ()
    team.form()


def host_and_guest(team: Team) -> tuple[Node, Node]:
    """A team of two: the host of the store, and a node with a read timeout of 2 s."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.conf = {"read_timeout": "2"}
    other = team.add()
    team.form()
    return host, other


def test_a_store_that_does_not_answer(team: Team) -> None:
    """As when the network is cut: connections stay open without an answer. The node cannot join again either."""
    host, other = host_and_guest(team)
    os.kill(host.pid, signal.SIGSTOP)
    try:
        assert team.wait(lambda: other.failure() is not None) < 7.0
        assert other.wait_for_failure().kind == "lost"
        assert "has not answered for 5 s" in other.wait_for_failure().reason
        other.join()
        assert other.wait_for_failure().kind == "unavailable"
    finally:
        os.kill(host.pid, signal.SIGCONT)
    assert other.wait_for_failure().reason == (
        f"what listens at {format_endpoint(team.endpoint)} does not answer as the store of a rendezvous would: "
        f"{STORE_IS_GONE}"
    )


def test_a_store_that_is_gone_for_good(team: Team) -> None:
    host, other = host_and_guest(team)
    os.kill(host.pid, signal.SIGKILL)
    assert other.wait_for_failure().kind == "lost"
    other.join()
    assert other.wait_for_failure() == MemberFailed(
        "unavailable",
        f"nobody answers at {format_endpoint(team.endpoint)} within 2 s (Connection refused): {STORE_IS_GONE}",
    )


def test_a_node_that_leaves_is_not_lost(team: Team) -> None:
    """The host of the store stays until the others have left; nodes that join now are refused."""
    team.most = 3
    host, other, late = team.add(), team.add(), team.add()
    team.form()
    served_by = host.pid
    host.broadcast(kind="bye")
    host.leave(outcome=0)
    team.wait(lambda: bool(other.received("bye")) and bool(late.received("bye")))
    late.join()
    assert late.wait_for_failure() == MemberFailed(
        "over", "the job has finished; this node was not needed", 0
    )
    newcomer = team.add()
    newcomer.join()
    assert newcomer.wait_for_failure().kind == "closed"  # it may belong to another job
    assert "has ended: choose another --rdzv-id" in newcomer.wait_for_failure().reason
    assert not other.received("lost")
    other.leave(outcome=0)
    wait_for_death(served_by)


def test_a_store_overwritten_with_pickles(team: Team) -> None:
    """A node that cannot go on reports why."""
    team.secret = "of the nodes alone"
    host, other = team.add(), team.add()
    team.form()
    attacker = Attacker(team)
    attacker.overwrite(*attacker.all_keys())
    team.wait(lambda: host.failure() is not None and other.failure() is not None)
    for node in (host, other):
        assert node.wait_for_failure().kind == "lost"
        assert "others can reach that port" in node.wait_for_failure().reason
    assert not attacker.trace.exists()


def test_the_store_listens_at_one_address(team: Team) -> None:
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", team.endpoint[1]))
