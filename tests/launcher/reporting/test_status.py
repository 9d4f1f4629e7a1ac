"""What a job's status says, made from plain values."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.events import (
    Event,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaveStaged,
    Tick,
)
from launcher.progress import Progress
from launcher.reporting.status import Saved, Saving, Status
from launcher.reporting.status_board import StatusBoard


def board(ranks: int = 8, **others: Any) -> StatusBoard:
    hosts = {rank: f"node-{rank // 8}" for rank in range(ranks)}
    return StatusBoard("train").began_round(2, hosts, now=1000.0, **others)


def steps(*done: int | None, at: float = 1100.0) -> dict[int, Progress]:
    return {rank: Progress(step, at) for rank, step in enumerate(done)}


def test_before_the_first_round() -> None:
    assert StatusBoard("train").status(1.0).render() == ["train: starting", "  step    none reported"]


def test_a_healthy_job() -> None:
    now = board(restarts=1)
    for second in range(20):
        progress = {rank: Progress(second * 4, 1100.0 + second, loss=2.5) for rank in range(8)}
        now = now.sampled(progress, 1100.0 + second)
    now = now.after(SaveStaged(70), 1118.0).after(SavePersisted(60, "local", "/x", 1.0), 1119.0)
    now = now.after(SavePersisting(70, "remote", 300, 1000), 1119.0)
    assert now.status(1119.0).render() == [
        "train: running, round 2 for 1 min 59 s, 8 ranks, 1 restart",
        "  step    76, 4 steps/s, loss 2.5",
        "  saved   70 in memory (1 s ago), 60 local (0 s ago)",
        "  saving  70 remote 30 %",
    ]


@pytest.mark.parametrize(
    ("done", "row"),
    [
        ([5] * 8, None),
        ([5, 5, 5, 4, 5, 5, 5, 5], None),
        ([5, 5, 5, 3, 5, 5, 4, 5], "0-2+4-5+7 at 5, 6 at 4, 3 at 3"),
        ([5, 5, 5, 5, 5, 5, 5, 3], "0-6 at 5, 7 at 3"),
        ([8, 7, 6, 5, 4, 3, 2, 1], "at 1 to 8, slowest 7 at 1, 6 at 2, 5 at 3"),
        ([5] + [None] * 7, "0 at 5, 1-7 report none"),
        ([5, 4, 3, 2] + [None] * 4, "at 2 to 5, slowest 3 at 2, 2 at 3, 1 at 4, 4-7 report none"),
    ],
)
def test_who_is_behind(done: list[int | None], row: str | None) -> None:
    lines = board().sampled(steps(*done), 1101.0).status(1101.0).render()
    assert [line.removeprefix("  ranks   ") for line in lines if "ranks   " in line] == (
        [row] if row else []
    )


def test_since_when_a_rank_is_behind() -> None:
    now = board().sampled(steps(*[5] * 8, at=1100.0), 1100.0)
    now = now.sampled({rank: Progress(60, 1150.0) for rank in range(7)}, 1150.0)
    assert now.status(1150.0).render()[2] == "  ranks   0-6 at 60, 7 at 5 for 50 s"
    ahead = board().sampled(steps(*[5] * 8, at=1100.0), 1100.0).sampled({0: Progress(6, 1101.0)}, 1101.0)
    assert ahead.status(1103.0).render()[2:] == []
    assert ahead.status(1110.0).render()[2:] == ["  ranks   0 at 6 for 9 s, 1-7 at 5 for 10 s"]
    assert now.status(1190.0).render()[1] == "  step    5, no step for 40 s"


@given(st.sampled_from([1, 2, 8, 64, 1100]), st.integers(0, 2**32), st.floats(0, 1e6))
def test_few_lines_for_any_number_of_ranks(ranks: int, seed: int, later: float) -> None:
    random = Random(seed)
    done = [random.choice([None, random.randrange(10**4)]) for _ in range(ranks)]
    now = board(ranks).sampled(steps(*done), 1100.0)
    lines = now.status(1100.0 + later).render()
    assert len(lines) <= 5
    assert max(map(len, lines)) < 200


def test_the_rate_is_of_the_last_ten_seconds() -> None:
    now = board(1)
    for second in range(100):
        step = second if second < 50 else 10 * second + 5 * (second % 2) - 400
        now = now.sampled({0: Progress(step, 1000.0 + second)}, 1000.0 + second)
    assert now.status(1099.0).rate == pytest.approx(10)


def test_the_rate_of_slow_steps() -> None:
    """Longer than the window: from one step to the next."""
    now = board(1)
    for second in range(200):
        now = now.sampled({0: Progress(second // 40, 1000.0 + second // 40 * 40)}, 1000.0 + second)
    assert now.status(1199.0).rate == pytest.approx(1 / 40)
    assert "40 s/step" in now.status(1199.0).render()[1]


@pytest.mark.parametrize(("seconds", "overdue"), [(1, 6), (10, 31)])
def test_a_step_that_is_overdue(seconds: int, overdue: int) -> None:
    """After a few seconds, or three times what steps take."""
    now = board(1)
    for number in range(10):
        now = now.sampled({0: Progress(number, 1000.0 + seconds * number)}, 1000.0 + seconds * number)
    last = 1000.0 + seconds * 9
    before, after = now.status(last + overdue - 2), now.status(last + overdue)
    assert before.rate == pytest.approx(1 / seconds)
    assert "no step for" not in before.render()[1]
    assert after.rate == 0
    assert after.render()[1] == f"  step    9, no step for {overdue} s"


def test_the_rate_is_forgotten_where_training_goes_back() -> None:
    now = board(1).sampled({0: Progress(50, 1000.0)}, 1000.0).sampled({0: Progress(60, 1001.0)}, 1001.0)
    assert now.status(1001.0).rate == pytest.approx(10)
    for step, time in ((40, 1002.0), (70, 1000.5)):  # it may be another rank's that is the last now
        after = now.sampled({0: Progress(step, time)}, 1002.0)
        assert after.status(1002.0).rate is None
        assert after.status(1002.0).step == step


def test_the_loss_is_the_lowest_ranks() -> None:
    progress = {
        0: Progress(5, 1.0),
        3: Progress(5, 1.0, loss=3.0),
        5: Progress(5, 1.0, loss=5.0),
    }
    now = board().sampled(progress, 1.0)
    assert now.status(1.0).loss == 3.0
    now = now.sampled({3: Progress(6, 2.0, loss=math.nan)}, 2.0)
    assert "loss nan" in now.status(2.0).render()[1]


def test_a_new_round_begins_anew() -> None:
    """But for what is saved, and how often it has failed."""
    now = (
        board()
        .sampled({**steps(*[5] * 8), 0: Progress(5, 1100.0, loss=2.5)}, 1100.0)
        .after(SaveStaged(5), 1100.0)
        .failed("crash")
        .failed("crash")
    )
    now = now.began_round(3, {0: "a", 1: "b"}, now=1200.0, restarts=1, world=4, nodes=2)
    status = now.status(1201.0)
    assert (status.round, status.step, status.rate, status.world) == (3, None, None, 4)
    assert status.loss is None
    assert [rank.step for rank in status.ranks] == [None, None]
    assert status.saved == {"memory": Saved(5, 1100.0)}
    assert status.failures == {"crash": 2}
    assert status.render()[0] == "train: running, round 3 for 1 s, 4 ranks on 2 nodes, 1 restart"


def test_a_rank_of_another_round_does_not_count() -> None:
    assert board(2).sampled({7: Progress(5, 1.0)}, 1.0).status(1.0).step is None


@pytest.mark.parametrize(
    ("events", "saved", "saving"),
    [
        ([SavePersisted(5, "remote", "u", 1.0), SaveStaged(6)], ["memory", "remote"], []),
        ([SavePersisting(5, "local", 1, 2), SavePersisting(5, "remote", 0, 2)], [], ["local", "remote"]),
        ([SavePersisting(5, "local", 1, 2), SavePersisting(5, "local", 2, 2)], [], ["local"]),
        ([SavePersisting(5, "local", 1, 2), SavePersisted(5, "local", "u", 1.0)], ["local"], []),
        ([SavePersisting(5, "local", 1, 2), SaveFailed(5, "local", "u", "e")], [], []),
        ([SaveStaged(5), SavePersisted(4, "local", "u", 1.0), SaverEnded(-9)], ["local"], []),
        ([SavePersisting(5, "local", 1, 2), SaverEnded(-9)], [], []),
        ([Tick()], [], []),
    ],
)
def test_saves(events: list[Event], saved: list[str], saving: list[str]) -> None:
    now = board()
    for event in events:
        now = now.after(event, 1100.0)
    status = now.status(1100.0)
    assert list(status.saved) == saved
    assert [save.tier for save in status.saving] == saving


def test_how_much_of_a_save_is_done() -> None:
    now = (
        board()
        .after(SavePersisting(5, "local", 0, 0), 1.0)
        .after(SavePersisting(5, "remote", 199, 200), 1.0)
    )
    assert now.status(1.0).render()[-1] == "  saving  5 local 0 %, 5 remote 99 %"


def test_json_and_back() -> None:
    now = board().sampled({0: Progress(5, 1.0, loss=math.inf), 1: Progress(7, 2.0)}, 2.0)
    now = now.after(SaveStaged(5), 3.0).after(SavePersisting(5, "local", 1, 2), 3.0).failed("hang")
    status = now.status(4.0)
    text = json.dumps(status.to_json(), allow_nan=False)
    assert Status.from_json(json.loads(text)) == status
    assert status.saving == (Saving(5, "local", 1, 2),)


def test_what_is_saved_where() -> None:
    now = board().after(SaveStaged(5), 1.0)
    assert (now.newest_saved, now.is_only_in_memory) == (5, True)
    now = now.after(SavePersisted(5, "remote", "s3://b", 1.0), 2.0)
    assert (now.newest_saved, now.is_only_in_memory) == (5, False)
    assert (board().newest_saved, board().is_only_in_memory) == (None, False)
