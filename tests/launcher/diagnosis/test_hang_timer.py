"""How long workers make no progress, and when that is a hang."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from launcher.diagnosis.hang_timer import HangTimer
from launcher.progress import Progress


def at(step: int | None, **known: Any) -> Progress:
    """What a worker has told that is at a step."""
    return Progress(step, 100.0, **known)


def busy(when: float = 101.0) -> Progress:
    """What one tells that restores."""
    return at(None, world=2, steps=True, phase="restore", alive=when)


def starting(**known: Any) -> Progress:
    """What one has told that is on the way to its first step."""
    return at(None, world=2, steps=True, joined=1.0, **known)


def test_the_stillest_rank_counts() -> None:
    seen = HangTimer().after({0: at(1), 1: at(1)}, 1.0)
    assert seen.longest == 0
    seen = seen.after({0: at(2), 1: at(1)}, 1.5).after({0: at(3), 1: at(1)}, 2.0)
    assert seen.seconds == {0: 0.0, 1: 3.5}
    assert seen.longest == 3.5
    assert seen.after({0: at(3), 1: at(2)}, 1.0).longest == 1


def test_another_step_is_progress_also_where_training_goes_back() -> None:
    assert HangTimer().after({0: at(7)}, 1.0).after({0: at(7)}, 1.0).after({0: at(3)}, 1.0).longest == 0


def test_time_in_which_nobody_could_look_hardly_counts() -> None:
    """The machine was asleep, or this process was stopped: then workers may have been as well."""
    seen = HangTimer().after({0: at(1)}, 1.0).after({0: at(1)}, 3600.0)
    assert seen.longest == 5
    assert seen.after({0: at(1)}, 4.5).longest == 9.5


def hangs_after(
    progress: dict[int, Progress], *, silent: Collection[int] = (), timeout: float = 4.0, **options: Any
) -> float | None:
    """Seconds after which workers hang that tell nothing new; None: they never do."""
    usual_start = options.pop("usual_start", 0.0)
    seen = HangTimer()
    for second in range(200):
        seen = seen.after(progress, 1.0, silent=silent, **options)
        if seen.is_hang(timeout, usual_start):
            return second
    return None


def test_ranks_that_may_never_tell_of_a_step_never_hang() -> None:
    """A script need not tell of any, or let one rank speak for all."""
    assert hangs_after({}, silent={0, 1}) is None
    assert hangs_after({0: at(None)}) is None
    assert hangs_after({0: at(None, world=1), 1: at(None)}, silent={2}) is None
    assert not HangTimer().after({0: at(None)}, 1.0, silent={1}).is_known


@pytest.mark.parametrize(
    ("told", "silent", "seconds"),
    [
        ({0: at(1), 1: at(1)}, (), 4),
        ({0: busy(), 1: busy()}, (), 4),
        ({0: busy(), 1: starting(restored=2.0)}, (), 4),
        ({0: starting(), 1: starting()}, (), 30),
        ({0: starting()}, (1,), 30),  # it has no Checkpointer yet, and the other one waits for it
        ({0: at(None, world=2)}, (1,), 30),
    ],
)
def test_how_long_nothing_may_be_told(
    told: dict[int, Progress], silent: tuple[int, ...], seconds: float
) -> None:
    """Who restores or trains tells how it gets on; what comes before a first step takes its time."""
    assert hangs_after(told, silent=silent) == seconds


def test_a_start_may_take_as_long_as_others_did() -> None:
    told = {0: starting(), 1: starting()}
    assert hangs_after(told, timeout=20.0) == 60
    assert hangs_after(told, timeout=20.0, usual_start=50.0) == 150
    assert hangs_after({}, silent={0, 1}, are_known=True) == 30


def test_a_slow_restore_is_no_hang() -> None:
    """As long as one rank gets on, the others only wait for it."""
    seen = HangTimer()
    for second in range(100):
        seen = seen.after({0: busy(), 1: busy(101.0 + second)}, 1.0)
        assert not seen.is_hang(4.0)


def test_the_silent_do_not_hang_while_others_train() -> None:
    seen = HangTimer()
    for step in range(100):
        seen = seen.after({0: at(step, world=2)}, 1.0, silent={1})
        assert not seen.is_hang(4.0)


def test_who_waits_for_the_saver_tells_that_it_gets_on() -> None:
    seen = HangTimer()
    for second in range(100):
        seen = seen.after({0: at(9, phase="close", alive=101.0 + second)}, 1.0)
        assert not seen.is_hang(4.0)


def test_who_has_trained_all_does_not_hang() -> None:
    """It may export, evaluate, or wait for others, for as long as it likes; until it trains again."""
    assert hangs_after({0: at(9, over=101.0)}) is None
    assert hangs_after({0: at(9, over=99.0)}) == 4
