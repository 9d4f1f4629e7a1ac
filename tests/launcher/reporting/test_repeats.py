"""Tracebacks that several ranks write."""

from __future__ import annotations

from launcher.reporting.repeats import Repeats

BLOCK = [
    b"Traceback (most recent call last):",
    b'  File "train.py", line 2, in <module>',
    b"ValueError: boom",
]
SAME = [b"the same traceback as rank 0's: ValueError: boom"]


def marked(rank: int) -> list[bytes]:
    return [b"[rank%d]: %s" % (rank, line) for line in BLOCK]


def test_a_traceback_is_shown_once() -> None:
    """Other ranks say that theirs is the same; what comes before and after is shown."""
    repeats = Repeats()
    assert repeats.sift(0, [b"loading", *BLOCK, b"bye"]) == [b"loading", *BLOCK, b"bye"]
    assert repeats.sift(1, [b"loading", *BLOCK, b"bye"]) == [b"loading", *SAME, b"bye"]
    assert repeats.sift(0, BLOCK) == BLOCK  # again, and so of importance
    assert repeats.sift(2, [*BLOCK[:2], b"ValueError: other"]) == [*BLOCK[:2], b"ValueError: other"]


def test_it_may_come_in_pieces() -> None:
    repeats = Repeats()
    repeats.sift(0, BLOCK)
    assert [repeats.sift(1, [line]) for line in BLOCK] == [[], [], SAME]
    assert repeats.sift(2, BLOCK[:2]) == []
    assert repeats.release(2) == BLOCK[:2]
    assert repeats.release(2) == []


def test_torchs_marks_do_not_count() -> None:
    repeats = Repeats()
    assert repeats.sift(0, marked(0)) == marked(0)
    assert repeats.sift(1, marked(1)) == SAME


def test_a_syntax_error_has_no_header() -> None:
    lines = [b'  File "train.py", line 2', b"    x = = 3", b"        ^", b"SyntaxError: invalid syntax"]
    repeats = Repeats()
    assert repeats.sift(3, lines) == lines
    assert repeats.sift(1, lines) == [b"the same traceback as rank 3's: SyntaxError: invalid syntax"]


def test_numbers_in_the_error_may_differ() -> None:
    """Peers of a rank that died name the ports where they were connected to it."""
    repeats = Repeats()
    repeats.sift(0, [*BLOCK[:2], b"RuntimeError: read error [127.0.0.1]:39117"])
    shown = repeats.sift(1, [*BLOCK[:2], b"RuntimeError: read error [127.0.0.1]:50364"])
    assert shown == [b"the same traceback as rank 0's: RuntimeError: read error [127.0.0.1]:50364"]


def test_of_many_ranks_some_are_told() -> None:
    repeats = Repeats()
    lines = [line for rank in range(600) for line in repeats.sift(rank, BLOCK)]
    assert lines[: len(BLOCK)] == BLOCK
    assert lines[len(BLOCK) : -1] == SAME * 8
    assert lines[-1] == SAME[0] + b" (those of other ranks are in their logs only)"
    assert repeats.sift(600, [b"loading"]) == [b"loading"]
