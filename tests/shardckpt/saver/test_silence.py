"""How long a saver may answer nothing."""

from __future__ import annotations

from shardckpt.saver.silence import Silence


def test_silence_counts_only_while_it_is_listened_to() -> None:
    """A trainer that was stopped itself has not been waiting."""
    silence = Silence(patience=3.0, interval=1.0)
    assert not silence.passed()
    silence.is_asked = True
    assert [silence.passed() for _ in range(3)] == [False, False, True]
    silence.heard()
    assert (silence.seconds, silence.is_asked) == (0.0, False)
    silence.limit(1.0)
    silence.is_asked = True
    assert [silence.passed() for _ in range(2)] == [False, True]
