"""How long each part of a recovery took."""

from __future__ import annotations

import pytest

from launcher.progress import Progress
from launcher.round.recovery import Recovery


def progress(first_step: float | None, **known: float) -> Progress:
    return Progress(1, 100.0, first_step=first_step, **known)  # type: ignore[arg-type]


def test_a_timeline_is_that_of_the_last_rank() -> None:
    recovery = Recovery(100.0, stopped=100.25, forked=100.5)
    told = {
        0: progress(103.0, joined=101.0, restored=102.5),
        1: progress(103.5004, joined=101.5, restored=102.0),
        7: progress(999.0),  # of another node
    }
    assert recovery.timeline([0, 1], told) == {
        "stopped": 0.25,
        "forked": 0.5,
        "joined": 1.5,
        "restored": 2.5,
        "first_step": 3.5,
    }


@pytest.mark.parametrize("other", [{}, {1: progress(None, joined=101.0)}])
def test_a_recovery_is_complete_with_every_ranks_first_step(other: dict[int, Progress]) -> None:
    assert Recovery(100.0).timeline([0, 1], {0: progress(103.0), **other}) is None


def test_what_not_all_tell_is_left_out() -> None:
    told = {0: progress(103.0, joined=101.0), 1: progress(104.0)}
    assert Recovery(100.0).timeline([0, 1], told) == {"first_step": 4.0}
