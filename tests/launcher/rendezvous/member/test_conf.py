"""Values of --rdzv-conf."""

from __future__ import annotations

from tests.kit.teams import Team


def test_a_timeout_that_is_no_number(team: Team) -> None:
    team.conf = {"join_timeout": "soon"}
    node = team.add()
    node.join()
    assert node.wait_for_failure().kind == "usage"
    assert node.wait_for_failure().reason.startswith("--rdzv-conf cannot be used: ")
    assert "join_timeout" in node.wait_for_failure().reason
