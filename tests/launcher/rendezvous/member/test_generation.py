"""One generation with all its nodes in this process."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from launcher.rendezvous.member.generation import Generation
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import SignedStore, serve
from tests.kit.rendezvous_stores import join_generation_threads
from tests.kit.teams import SLOW


class InProcessTeam:
    """The nodes of one generation, with a store of their own."""

    def __init__(self, size: int) -> None:
        self.store = serve("127.0.0.1", "127.0.0.1", 0)
        signed = SignedStore(self.store, Signer(b"secret", "job"))
        self.received: list[queue.SimpleQueue[tuple[int, Any]]] = [queue.SimpleQueue() for _ in range(size)]
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()

        def make(rank: int) -> Generation:
            received = self.received[rank]
            return Generation(
                GenerationInfo(rank, size, signed, rank == 0),
                lambda *message: received.put(message),
                self.failures.put,
                lambda error: self.failures.put(str(error)),
            )

        self.nodes = [make(rank) for rank in range(size)]

    def take(self, rank: int, count: int) -> list[tuple[int, Any]]:
        return [self.received[rank].get(timeout=SLOW) for _ in range(count)]

    def close(self) -> None:
        for node in self.nodes:
            node.retire()
        join_generation_threads()


def test_an_abandoned_generation_is_reported_to_the_nodes_that_have_begun_it() -> None:
    """Else they would wait forever for a node that has not begun it."""
    hasty, slow = (team := InProcessTeam(2)).nodes
    with pytest.raises(TimeoutError, match="not all of 2 nodes said hello"):
        hasty.exchange_hellos({}, 0.05)
    hasty.abandon("it was in a hurry")
    assert len(slow.exchange_hellos({}, SLOW)) == 2
    slow.start()
    assert team.take(1, 1) == [(0, {"kind": "lost", "node": 0, "why": "it was in a hurry"})]
    assert slow.check_heartbeats(0.0) == []
    assert slow.check_heartbeats(100.0) == []
    team.close()


def test_a_node_is_lost_once_and_ignored_from_then_on() -> None:
    """All nodes, the lost one included, receive the same first report, and none of its later messages."""
    team = InProcessTeam(3)
    for node in team.nodes:
        node.broadcast({"kind": "first"})
        node.report_lost(2, f"as {node.rank} sees it")
    for node in team.nodes[:2]:
        node.start()
        node.flush(SLOW)
    late = team.nodes[2]
    late.start()
    assert "as 0 sees it" in team.failures.get(timeout=SLOW)
    for node in team.nodes[:2]:
        node.broadcast({"kind": "last"})
    lost = {"kind": "lost", "node": 2, "why": "as 0 sees it"}
    expected = [(0, {"kind": "first"}), (0, lost), (1, {"kind": "first"})]
    assert team.take(0, 3) == team.take(1, 3) == expected
    last = team.take(0, 2)
    assert last == team.take(1, 2)
    assert {node for node, message in last if message == {"kind": "last"}} == {0, 1}
    assert team.take(2, 2) == expected[:2]
    assert team.received[2].empty()
    team.close()


def test_forged_log_entries() -> None:
    """One in place of the next entry is replaced; one in place of an entry that others have read is reported."""
    team = InProcessTeam(2)
    team.store.set("log/0", "garbage")
    team.nodes[0].start()
    team.nodes[0].broadcast({"kind": "first"})
    assert team.take(0, 1) == [(0, {"kind": "first"})]
    team.store.set("log/0", "garbage")
    team.nodes[1].start()
    assert "what the nodes say to each other was overwritten" in team.failures.get(timeout=SLOW)
    assert team.received[1].empty()
    team.close()
