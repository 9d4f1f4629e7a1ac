"""Nodes of other jobs and of other versions."""

from __future__ import annotations

import socket

from launcher.events import Joined, MessageReceived
from tests.kit.teams import Team


def test_versions_must_be_the_same(team: Team) -> None:
    team.least = 2
    nodes = [team.add(host="alpha", version="1.0"), team.add(host="beta", version="1.1")]
    for node in nodes:
        node.join()
    for node in nodes:
        assert node.wait_for_failure().kind == "usage"
        assert (
            "alpha has shardckpt 1.0" in node.wait_for_failure().reason
            or "alpha has 1.0" in node.wait_for_failure().reason
        )
        assert "1.1" in node.wait_for_failure().reason
        assert "beta" in node.wait_for_failure().reason


def test_another_job_with_the_same_id_is_refused(team: Team) -> None:
    """The running job is not disturbed."""
    node = team.add()
    team.form()
    stranger = team.add(job="other.py")
    stranger.join()
    assert stranger.wait_for_failure().kind == "usage"
    assert (
        f"{socket.gethostname()} runs 'train.py', and this node 'other.py'"
        in stranger.wait_for_failure().reason
    )
    node.broadcast(kind="alive")
    team.wait(lambda: bool(node.received("alive")))
    assert [type(event) for event in node.events] == [Joined, MessageReceived]


def test_two_jobs_that_meet_refuse_each_other(team: Team) -> None:
    """Each of them reports what the other one is."""
    team.least = 2
    nodes = [
        team.add(host="alpha", job="train.py on 2 nodes"),
        team.add(host="beta", job="other.py on 2 nodes"),
    ]
    for node in nodes:
        node.join()
    alpha, beta = (node.wait_for_failure() for node in nodes)
    assert alpha.kind == beta.kind == "usage"
    assert "beta runs 'other.py on 2 nodes', and this node 'train.py on 2 nodes'" in alpha.reason
    assert "alpha runs 'train.py on 2 nodes', and this node 'other.py on 2 nodes'" in beta.reason
    assert "another --rdzv-id" in alpha.reason
