"""Nodes with the wrong secret."""

from __future__ import annotations

import pytest

from tests.kit.teams import Team


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
    """It is refused at once; the running job is not disturbed."""
    team.least, team.secret = 1, theirs
    host = team.add()
    host.join()
    team.wait(lambda: host.size() == 1)
    team.secret = mine
    stranger = team.add()
    stranger.join()
    assert stranger.wait_for_failure().kind == "usage"
    assert reason in stranger.wait_for_failure().reason
    assert host.failure() is None
    assert not host.received("waiting")
