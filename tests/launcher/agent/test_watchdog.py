"""The watchdog: what is overdue in a round, by the workers' progress files and a clock that does not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.agent.watchdog import Watchdog
from launcher.agent.workers import Workers
from launcher.events import MessageReceived, WorkersGone
from launcher.run_dir import RankFiles
from tests.kit.rounds import end_request, exited, play, report

WAITING = MessageReceived(0, {"kind": "waiting", "count": 1})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(tmp_path: Path, clock: Clock) -> Workers:
    """Two of them, without any progress."""
    files = [RankFiles(rank, tmp_path, tmp_path, tmp_path, tmp_path / str(rank)) for rank in (0, 1)]
    for one in files:
        one.directory.mkdir()
    return Workers(files, monotonic=clock)


@pytest.fixture
def wait(workers: Workers, clock: Clock) -> Callable[[float], None]:
    def wait(seconds: float) -> None:
        """Let time pass, with looks often enough that it counts."""
        for _ in range(int(seconds)):
            clock.now += 1.0
            workers.read_progress()

    return wait


def report_step(workers: Workers, rank: int, step: int, **facts: object) -> None:
    line = f"{step:20d} {100:20.6f}\n{json.dumps(facts):<469}\n"
    workers.files[rank].progress.write_text(line)


def test_a_hang(workers: Workers, wait: Callable[[float], None]) -> None:
    """All nodes are told, at each look; a node that leaves has its grace instead."""
    watchdog = Watchdog(hang_timeout=10.0, grace=15.0)
    report_step(workers, 0, 1)
    report_step(workers, 1, 1)
    wait(5)
    assert watchdog.after(workers, play(), 1.0) == watchdog
    wait(10)
    assert watchdog.after(workers, play(), 1.0).messages == ({"kind": "hang"},)
    assert not watchdog.after(workers, play(end_request("leave")), 1.0).messages
    assert not Watchdog(0.0, 15.0).after(workers, play(), 1.0).messages


def test_stacks_of_a_stall_are_dumped_once(workers: Workers, wait: Callable[[float], None]) -> None:
    """Without --hang-timeout nothing is killed; another stall is dumped again."""
    watchdog = Watchdog(hang_timeout=None, grace=15.0)
    dumps = []
    for seconds, step in ((599, 1), (2, 1), (100, 1), (1, 2), (601, 2)):
        report_step(workers, 0, step)
        report_step(workers, 1, step)
        wait(seconds)
        watchdog = watchdog.after(workers, play(), 1.0)
        dumps.append(watchdog.wants_stacks)
        assert not watchdog.messages
    assert dumps == [False, True, False, False, True]


def test_workers_that_report_nothing(workers: Workers, wait: Callable[[float], None]) -> None:
    """Said once in a job, although every round begins with a new watchdog."""
    watchdog = Watchdog(hang_timeout=10.0, grace=15.0)
    wait(29)
    assert not watchdog.after(workers, play(), 1.0).misses_progress
    wait(2)
    watchdog = watchdog.after(workers, play(), 1.0)
    assert (watchdog.misses_progress, watchdog.wants_stacks) == (True, True)
    watchdog = watchdog.after(workers, play(), 1.0)
    assert (watchdog.misses_progress, watchdog.wants_stacks) == (False, False)
    assert not watchdog.for_next_round().after(workers, play(), 1.0).misses_progress


def test_nodes_that_wait(workers: Workers, wait: Callable[[float], None]) -> None:
    """They are taken in once workers can drain, or are taken never to; node 0 asks, once."""
    watchdog = Watchdog(hang_timeout=0.0, grace=15.0)
    assert not watchdog.after(workers, play(WAITING), 1.0).messages
    report_step(workers, 0, 1, drains=True)
    wait(1)
    (request,) = watchdog.after(workers, play(WAITING), 1.0).messages
    assert (request["reason"], request["can_drain"]) == ("join", True)
    assert not watchdog.after(workers, play(WAITING, end_request("join")), 1.0).messages
    assert not watchdog.after(workers, play(WAITING, nodes=2, rank=1), 1.0).messages


def test_nodes_that_wait_for_workers_that_never_report(
    workers: Workers, wait: Callable[[float], None]
) -> None:
    wait(31)
    (request,) = Watchdog(0.0, 15.0).after(workers, play(WAITING), 1.0).messages
    assert (request["reason"], request["can_drain"]) == ("join", False)


def test_a_node_that_does_not_answer(workers: Workers) -> None:
    """It is declared lost 15 s after the grace: as long as this node would need for the end of its workers."""
    round_ = play(exited(0, 1), exited(1, -15), WorkersGone(), report(0), nodes=2)
    assert (round_.is_late, round_.silent) == (True, {1})
    watchdog = Watchdog(hang_timeout=0.0, grace=15.0)
    for _ in range(29):
        watchdog = watchdog.after(workers, round_, 1.0)
        assert not watchdog.messages
    (message,) = watchdog.after(workers, round_, 1.0).messages
    assert (message["kind"], message["node"]) == ("lost", 1)
    assert "has said nothing for 30 s" in message["why"]
    assert watchdog.after(workers, play(nodes=2), 1.0).node_silence == 0
