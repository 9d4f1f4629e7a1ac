"""The static rendezvous: ranks that a scheduler assigns."""

from __future__ import annotations

from tests.kit.teams import Team


def test_static_ranks(team: Team) -> None:
    """Nodes keep their assigned numbers in every generation, also after one was restarted."""
    team.backend, team.least = "static", 2
    first, second = team.add(node_rank=0), team.add(node_rank=1)
    team.form()
    assert (first.rank, second.rank) == (0, 1)
    second.kill_agent()
    team.wait(lambda: bool(first.received("lost")))
    team.add(node_rank=1)
    team.form()
    assert [node.rank for node in team.nodes] == [0, 1]
