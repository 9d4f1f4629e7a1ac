"""What is known of a round's workers from their progress files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.agent.workers import Workers
from launcher.run_dir import RankFiles


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
