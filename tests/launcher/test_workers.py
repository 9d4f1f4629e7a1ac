"""What is made of what workers tell: since when they are still, and how long a recovery took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.progress import Progress
from launcher.recovery import Recovery
from launcher.run_dir import RankFiles
from launcher.stillness import Stillness
from launcher.workers import Workers

# -- stillness


def test_the_stillest_rank_counts() -> None:
    seen = Stillness().after({0: 1, 1: 1}, 1.0)
    assert seen.longest == 0
    seen = seen.after({0: 2, 1: 1}, 1.5).after({0: 3, 1: 1}, 2.0)
    assert seen.seconds == {0: 0.0, 1: 3.5}
    assert seen.longest == 3.5
    assert seen.after({0: 3, 1: 2}, 1.0).longest == 1


def test_another_step_is_progress_also_where_training_goes_back() -> None:
    assert Stillness().after({0: 7}, 1.0).after({0: 7}, 1.0).after({0: 3}, 1.0).longest == 0


def test_ranks_that_report_no_step_are_not_still() -> None:
    seen = Stillness()
    assert seen.longest == 0
    for _ in range(3):
        seen = seen.after({0: None}, 2.0)
    assert (seen.steps, seen.longest) == ({}, 0)
    assert seen.after({0: 0}, 2.0).after({0: 0}, 2.0).longest == 2


def test_time_in_which_nobody_could_look_hardly_counts() -> None:
    """The machine was asleep, or this process was stopped: then workers may have been as well."""
    seen = Stillness().after({0: 1}, 1.0).after({0: 1}, 3600.0)
    assert seen.longest == 5
    assert seen.after({0: 1}, 4.5).longest == 9.5


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


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("launcher.workers.time", clock)
        yield clock


@pytest.fixture
def two(tmp_path: Path) -> Workers:
    directories = [tmp_path / "0", tmp_path / "1"]
    for directory in directories:
        directory.mkdir()
    nowhere = tmp_path / "nowhere"
    return Workers(
        RankFiles(rank + 4, nowhere, nowhere, nowhere, own) for rank, own in enumerate(directories)
    )


def tell(workers: Workers, rank: int, step: int, **facts: object) -> None:
    line = f"{step:20d} {100:20.6f}\n{json.dumps(facts):<213}\n"
    workers.files[rank].progress.write_text(line)


def test_how_far_they_are(two: Workers) -> None:
    two.look()
    assert (two.steps, two.step, two.can_drain) == ({}, None, False)
    tell(two, 4, -1, drains=True)
    tell(two, 5, 7)
    assert two.step is None
    two.look()
    assert (two.steps, two.step, two.can_drain) == ({4: None, 5: 7}, 7, True)
    tell(two, 4, 9, drains=True)
    two.files[5].progress.write_text("torn")
    two.look()
    assert (two.steps, two.step) == ({4: 9, 5: 7}, 9)


def test_all_have_started(two: Workers) -> None:
    two.pids[4] = 100
    assert not two.have_all_started
    two.pids[5] = 101
    assert two.have_all_started


def test_since_when_they_are_still(two: Workers, clock: Clock) -> None:
    clock.now += 100
    tell(two, 4, 1)
    two.look()
    assert (two.still, two.age) == (0, 100)
    for _ in range(2):
        clock.now += 2
        two.look()
    assert (two.still, two.age) == (4, 104)


def test_those_that_shall_drain_are_still_until_they_have(two: Workers, clock: Clock) -> None:
    """Steps that they still make do not count; nor does it help to ask again."""
    assert not two.are_draining
    two.ask_to_drain()
    assert two.are_draining
    for step in (1, 2):
        clock.now += 30
        tell(two, 4, step)
        two.look()
        two.ask_to_drain()
    assert two.still == 60
