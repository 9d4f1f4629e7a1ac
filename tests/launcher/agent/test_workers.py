"""What is made of what workers tell: since when they are still, and how long a recovery took."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.workers import Workers
from launcher.diagnosis.hang_timer import HangTimer
from launcher.progress import Progress
from launcher.round.recovery import Recovery
from launcher.run_dir import RankFiles

# -- stillness


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


# -- recovery


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


# -- workers


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(tmp_path: Path, clock: Clock) -> Workers:
    directories = [tmp_path / "0", tmp_path / "1"]
    for directory in directories:
        directory.mkdir()
    nowhere = tmp_path / "nowhere"
    files = [RankFiles(rank + 4, nowhere, nowhere, nowhere, own) for rank, own in enumerate(directories)]
    return Workers(files, monotonic=clock.monotonic)


def tell(workers: Workers, rank: int, step: int, **facts: object) -> None:
    line = f"{step:20d} {100:20.6f}\n{json.dumps(facts):<469}\n"
    workers.files[rank].progress.write_text(line)


def test_how_far_they_are(two: Workers) -> None:
    two.read_progress()
    assert (two.steps, two.step, two.can_drain) == ({}, None, False)
    tell(two, 4, -1, drains=True)
    tell(two, 5, 7)
    assert two.step is None
    two.read_progress()
    assert (two.steps, two.step, two.can_drain) == ({4: None, 5: 7}, 7, True)
    tell(two, 4, 9, drains=True)
    two.files[5].progress.write_text("torn")
    two.read_progress()
    assert (two.steps, two.step) == ({4: 9, 5: 7}, 9)


def test_all_have_started(two: Workers) -> None:
    two.mark_started(4, 100)
    assert not two.have_all_started
    two.mark_started(5, 101)
    assert two.have_all_started


def test_since_when_they_are_still(two: Workers, clock: Clock) -> None:
    clock.now += 100
    tell(two, 4, 1)
    two.read_progress()
    assert (two.still, two.age) == (0, 100)
    for _ in range(2):
        clock.now += 2
        two.read_progress()
    assert (two.still, two.age) == (4, 104)


def test_those_that_shall_drain_are_still_until_they_have(two: Workers, clock: Clock) -> None:
    """Steps that they still make do not count; nor does it help to ask again."""
    assert not two.are_draining
    two.mark_draining()
    assert two.are_draining
    for step in (1, 2):
        clock.now += 30
        tell(two, 4, step)
        two.read_progress()
        two.mark_draining()
    assert two.still == 60


def test_the_dead_are_not_watched(two: Workers, clock: Clock) -> None:
    tell(two, 4, 1)
    tell(two, 5, 1)
    two.read_progress()
    two.mark_dead(4)
    for _ in range(3):
        clock.now += 2
        tell(two, 5, int(clock.now))
        two.read_progress()
    assert not two.hang(1)


def test_where_they_are(two: Workers) -> None:
    """What the stacks do not tell of those that make no steps."""
    two.read_progress()
    assert two.places() == ("ranks 4-5 starting: no Checkpointer yet",)
    tell(two, 4, -1, joined=1, phase="restore, load_state_dict of 'x'", alive=101.0)
    tell(two, 5, -1, joined=1)
    two.read_progress()
    assert two.places() == ("rank 4 in restore, load_state_dict of 'x'", "rank 5 before restore")
    tell(two, 4, 3, phase="restore", alive=99.0)
    tell(two, 5, -1, joined=1, restored=2)
    two.read_progress()
    assert two.places() == ("rank 5 before the first step",)
    two.mark_dead(5)
    assert two.places() == ()


def test_how_long_a_start_took_is_handed_on(two: Workers, clock: Clock) -> None:
    clock.now += 7
    two.read_progress()
    assert two.usual_start is None
    tell(two, 4, 0)
    two.read_progress()
    clock.now += 9
    two.read_progress()
    assert two.usual_start == 7
