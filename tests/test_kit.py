"""The test kit itself."""

from __future__ import annotations

from tests.kit.worlds import PeerGoneError, outcomes


def test_the_outcomes_of_threads() -> None:
    """The world of threads itself: a rank that leaves early does not hang the one that waits for it."""
    found = outcomes(2, lambda ranks: ranks.gather(b"") if ranks.rank else None)
    assert found[0] is None
    assert isinstance(found[1], PeerGoneError)
