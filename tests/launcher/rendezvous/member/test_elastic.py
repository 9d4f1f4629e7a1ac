"""Nodes that come and go: newcomers, spares, suspended nodes, too few nodes."""

from __future__ import annotations

import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from launcher.events import MemberFailed
from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.generation import Generation
from launcher.rendezvous.member.rendezvous import open_with_backend
from launcher.rendezvous.member.signing import Signer
from tests.kit.rendezvous_stores import join_generation_threads
from tests.kit.teams import SLOW, Team


def test_a_suspended_newcomer_does_not_count(team: Team) -> None:
    """Else the others would stop for it in vain, again and again. A newcomer that is alive is announced."""
    team.most = 3
    host, late, third = (team.add() for _ in range(3))
    host.join()
    team.wait(lambda: host.size() == 1)
    late.join()
    team.wait(lambda: bool(host.received("waiting")))
    os.kill(late.pid, signal.SIGSTOP)
    try:
        host.join()
        team.wait(lambda: host.size() == 1)
        third.join()
        team.wait(lambda: bool(host.received("waiting")))
        assert host.received("waiting") == [{"kind": "waiting", "count": 1}]
        host.join()
        team.wait(lambda: host.size() > 0)
        assert (host.size(), third.size() or 2) == (2, 2)  # the third was announced
    finally:
        os.kill(late.pid, signal.SIGCONT)
    team.wait(lambda: bool(host.received("waiting")))


@pytest.mark.parametrize("outcome", [0, 3])
def test_a_spare_that_is_not_needed(team: Team, outcome: int) -> None:
    """It reports that it waits, and fails with the job's exit code at the end."""
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
    assert (spare.wait_for_failure().kind, spare.wait_for_failure().outcome) == ("over", outcome)
    assert spare.wait_for_failure().reason.endswith("; this node was not needed")
    assert len(spare.news()) == 1


def test_a_newcomer_to_a_running_job_waits_beyond_the_join_timeout(team: Team) -> None:
    """It is taken in at the next step boundary, or when another node is lost."""
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.conf = {"join_timeout": "1"}
    newcomer = team.add()
    newcomer.join()
    team.wait(lambda: len(host.received("waiting")) > 1)  # it has tried again
    assert newcomer.events == []
    host.join()
    team.wait(lambda: host.size() == newcomer.size() == 2)


def test_too_few_nodes(team: Team) -> None:
    team.least = 2
    team.conf = {"join_timeout": "1"}
    node = team.add()
    node.join()
    assert node.wait_for_failure() == MemberFailed("quorum", "1 of at least 2 nodes came within 1 s")


def test_a_store_that_cannot_compare_and_set(tmp_path: Path) -> None:
    """As etcd's cannot: node 0 of each generation serves one that can. The nodes are threads here."""
    settings = RendezvousSettings("etcd-v2", ("127.0.0.1", 1), "job", 2, 2)
    path = str(tmp_path / "store")
    received: dict[int, queue.SimpleQueue[tuple[int, Any]]] = {
        0: queue.SimpleQueue(),
        1: queue.SimpleQueue(),
    }

    def take_part(number: int) -> Generation:
        store = FileStore(path)
        backend = C10dRendezvousBackend(store, "job")
        info = open_with_backend(
            settings, "127.0.0.1", Signer(b"secret", "job"), backend, store
        ).next_generation()
        generation = Generation(info, lambda *one: received[info.rank].put(one), pytest.fail, pytest.fail)
        assert len(generation.exchange_hellos({"number": number}, SLOW)) == 2
        assert info.is_host == (info.rank == 0)
        generation.start()
        return generation

    with ThreadPoolExecutor() as threads:
        generations = list(threads.map(take_part, range(2)))
    for generation in generations:
        generation.broadcast({"rank": generation.rank})
    messages = [[received[rank].get(timeout=SLOW) for _ in range(2)] for rank in range(2)]
    assert messages[0] == messages[1]
    assert sorted(messages[0]) == [(0, {"rank": 0}), (1, {"rank": 1})]
    for generation in generations:
        generation.retire()
    join_generation_threads()
