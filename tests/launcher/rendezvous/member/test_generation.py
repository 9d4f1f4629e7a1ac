"""One generation with all its nodes in this process."""

from __future__ import annotations

import queue
import random
from concurrent.futures import ThreadPoolExecutor
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

    def exchange_hellos(self) -> None:
        """Of all nodes at once."""
        with ThreadPoolExecutor(len(self.nodes)) as threads:
            list(threads.map(lambda node: node.exchange_hellos({"node": node.rank}, SLOW), self.nodes))
        expected = [{"node": rank} for rank in range(len(self.nodes))]
        assert [node.hellos for node in self.nodes] == [expected] * len(self.nodes)

    def close(self) -> None:
        for node in self.nodes:
            node.retire()
        self.nodes.clear()
        del self.store  # ends what waits for it
        join_generation_threads()


def test_all_nodes_get_all_hellos_or_none_does() -> None:
    """Whether all have come in time is decided once, also for nodes that would have waited longer."""
    hasty, slow, _ = (team := InProcessTeam(3)).nodes
    with pytest.raises(TimeoutError, match="not all of 3 nodes said hello"):
        hasty.exchange_hellos({}, 0.05)
    with pytest.raises(TimeoutError, match="not all of 3 nodes said hello"):
        slow.exchange_hellos({}, SLOW)
    team.close()


def test_hellos_without_node_0() -> None:
    """The first node that has waited long enough ends it for all, node 0 included."""
    late, hasty = (team := InProcessTeam(2)).nodes
    with pytest.raises(TimeoutError):
        hasty.exchange_hellos({}, 0.05)
    assert hasty.first_hello() is None
    with pytest.raises(TimeoutError):
        late.exchange_hellos({"host": "late"}, SLOW)
    assert hasty.first_hello() == {"host": "late"}
    team.close()


def test_an_abandoned_generation_is_reported_to_the_nodes_that_have_begun_it() -> None:
    """Else they would wait forever for a node that has not begun it."""
    team = InProcessTeam(2)
    team.exchange_hellos()
    other, leaver = team.nodes
    leaver.abandon("it has other plans")
    other.start()
    assert team.take(0, 1) == [(1, {"kind": "lost", "node": 1, "why": "it has other plans"})]
    assert other.check_heartbeats(0.0) == []
    assert other.check_heartbeats(100.0) == []
    team.close()


def test_messages_without_the_relay() -> None:
    """Node 0, which should relay, does not answer; so others do, and it finds all when it is back."""
    team = InProcessTeam(4)
    for node in team.nodes[1:]:
        node.start()
        for count in range(3):
            node.broadcast({"kind": "said", "count": count})
    received = team.take(1, 9)
    assert team.take(2, 9) == team.take(3, 9) == received
    for rank in (1, 2, 3):
        assert [message["count"] for node, message in received if node == rank] == [0, 1, 2]
    team.nodes[0].start()
    team.nodes[0].broadcast({"kind": "back"})
    assert [team.take(rank, 10 if rank == 0 else 1)[-1] for rank in range(4)] == [(0, {"kind": "back"})] * 4
    team.close()


def test_the_loss_of_the_relay_is_reported_at_once() -> None:
    """All others find out at the same time; one of them relays what comes after it."""
    team = InProcessTeam(5)
    for node in team.nodes:
        node.start()
    team.nodes[0].broadcast({"kind": "first"})
    for rank in range(5):
        team.take(rank, 1)
    team.nodes[0].stop()
    for node in team.nodes[1:]:
        node.report_lost(0, "it is silent")
        node.broadcast({"kind": "last"})
    received = team.take(1, 5)
    assert received[0][1] == {"kind": "lost", "node": 0, "why": "it is silent"}
    assert sorted(node for node, message in received if message == {"kind": "last"}) == [1, 2, 3, 4]
    assert [team.take(rank, 5) for rank in (2, 3, 4)] == [received] * 3
    team.close()


def test_large_messages() -> None:
    """What fits into no entry together comes in several, and is compressed."""
    team = InProcessTeam(2)
    texts = [random.Random(n).randbytes(1 << 20).hex() for n in range(5)]
    for text in texts:
        team.nodes[1].broadcast({"kind": "large", "text": text})
    for node in team.nodes:
        node.start()
    expected = [(1, {"kind": "large", "text": text}) for text in texts]
    assert team.take(0, 5) == team.take(1, 5) == expected
    team.close()


def test_what_others_put_into_an_inbox_is_passed_over() -> None:
    """Neither lines that no node has written, nor half of one, keep messages from the log."""
    team = InProcessTeam(2)
    team.store.append("inbox/0", "garbage\nmore of")
    for node in team.nodes:
        node.start()
    team.nodes[1].broadcast({"kind": "first"})
    assert team.take(0, 1) == team.take(1, 1) == [(1, {"kind": "first"})]
    team.store.set("inbox/2", "hmac-sha256:")
    team.nodes[0].broadcast({"kind": "last"})
    assert team.take(0, 1) == team.take(1, 1) == [(0, {"kind": "last"})]
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
