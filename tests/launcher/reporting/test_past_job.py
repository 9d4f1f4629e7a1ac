"""How a job that has ended went, from the events of its journal."""

from __future__ import annotations

import pytest

from launcher.events import SavePersisted
from launcher.reporting.past_job import PastJob
from launcher.reporting.status_board import StatusBoard


def event(time: float, name: str, **fields: object) -> dict[str, object]:
    return {"time": time, "event": name, **fields}


HISTORY = [
    event(0, "job_started"),
    event(1, "job_ended", exit_code=0),
    event(100, "job_started"),
    event(101, "round_started", round=2),
    event(110, "progress", step=30),
    event(111, "persisted", step=20, tier="local"),
    event(112, "failure", cause="killed by SIGKILL", kind="signal"),
    event(113, "round_started", round=3),
    event(150, "progress", step=60),
    event(160, "failure", cause="ValueError: boom", kind="crash", step=62),
]


def test_how_a_job_ended() -> None:
    past = PastJob.of([*HISTORY, event(161, "job_ended", exit_code=77, reason="3 times the same")])
    assert past is not None
    assert past.render("train", 281.0) == [
        "train: ended 2 min ago with exit code 77: 3 times the same",
        "  ran     1 min 1 s, 2 rounds",
        "  step    62",
        "  saved   20 local",
        "  failed  2 times, last: ValueError: boom",
    ]


def test_what_a_status_has_too_is_of_the_same_type() -> None:
    """So that who reads `launch status --json` need not know whether the job has ended."""
    past = PastJob.of([*HISTORY, event(161, "persisted", step=60, tier="remote"), event(162, "failure")])
    assert past is not None
    ended = past.to_json()
    board = StatusBoard("train").failed("signal").failed("crash").failed("unknown")
    for number, tier in ((20, "local"), (60, "remote")):
        board = board.after(SavePersisted(number, tier, "url", 1.0), 111.0 if number == 20 else 161.0)
    running = board.status(170.0).to_json()
    for key in ("failures", "saved"):
        assert ended[key] == running[key]
    assert ended["last_failure"] == "unknown"


def test_a_job_that_was_killed() -> None:
    past = PastJob.of(HISTORY)
    assert past is not None
    assert past.exit_code is None
    assert past.render("train", 161.0)[0] == (
        "train: did not end by itself: its launch was killed, 1 s ago or less"
    )


def test_a_step_that_was_saved_was_reached() -> None:
    for before in ([], [event(2, "progress", step=3)]):
        past = PastJob.of([event(1, "job_started"), *before, event(3, "staged", step=20)])
        assert past is not None
        assert past.step == 20


@pytest.mark.parametrize(("step", "row"), [(60, ["  saved   nothing"]), (None, [])])
def test_that_nothing_was_saved_is_said(step: int | None, row: list[str]) -> None:
    """Of a job that reports steps."""
    past = PastJob.of(
        [event(1, "job_started"), event(2, "progress", step=step), event(3, "job_ended", exit_code=74)]
    )
    assert past is not None
    assert [line for line in past.render("rs", 4.0) if "saved" in line] == row


def test_no_job_ever() -> None:
    assert PastJob.of([]) is None
    assert PastJob.of([event(1, "progress", step=3)]) is None
