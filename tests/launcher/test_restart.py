"""Recorded and invented histories of a round, without a process or a clock."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import ExitCode
from launcher.events import (
    DeadlinePassed,
    Event,
    RoundDrained,
    SpawnFailed,
    StopRequested,
    WorkerExited,
    WorkerStarted,
    ZygoteLost,
    ZygoteReady,
)
from launcher.restart import Finish, GiveUp, History, Phase, Restart, Round, decide


def exited(rank: int, code: int = 0) -> WorkerExited:
    return WorkerExited(rank, 1000 + rank, code, 1.0)


def play(*events: Event, ranks: int = 2) -> Round:
    round_ = Round(1, ranks, started=0.0)
    for event in events:
        round_ = round_.after(event)
    return round_


def test_a_round_in_which_all_finish() -> None:
    round_ = play(WorkerStarted(0, 1), exited(1), exited(0))
    assert round_.phase is Phase.STOPPING  # what they left running is stopped, too
    round_ = round_.after(RoundDrained())
    assert round_.phase is Phase.OVER
    assert decide(round_, None, History(3)) == Finish(0)


def test_one_that_finishes_does_not_end_a_round() -> None:
    assert play(exited(1)).phase is Phase.RUNNING


@pytest.mark.parametrize(("restarts", "expected"), [(0, Restart(1, 2)), (1, Restart(2, 2))])
def test_a_failure_restarts(restarts: int, expected: Restart) -> None:
    round_ = play(exited(1, 3), exited(0, -15), RoundDrained())
    assert decide(round_, 3, History(2, restarts)) == expected


@pytest.mark.parametrize(("code", "ends_with"), [(3, 3), (-9, 137), (-11, 139)])
def test_restarts_run_out(code: int, ends_with: int) -> None:
    """The exit code is then what a shell would report of the culprit."""
    round_ = play(exited(1, code), exited(0, -15), RoundDrained())
    assert decide(round_, code, History(2, 2)) == GiveUp(ends_with, 2)


def test_a_stop_wins_over_everything() -> None:
    for events in ([exited(0, 1)], [exited(0), exited(1)], []):
        round_ = play(*events, StopRequested(signal.SIGTERM), RoundDrained())
        assert decide(round_, 1, History(3)) == Finish(143)


def test_insisting_kills() -> None:
    round_ = play(StopRequested(signal.SIGINT))
    assert round_.phase is Phase.STOPPING
    assert round_.after(StopRequested(signal.SIGINT)).phase is Phase.KILLING
    assert round_.after(DeadlinePassed()).phase is Phase.KILLING


def test_the_first_stop_during_a_restart_leaves_the_grace() -> None:
    round_ = play(exited(0, 1), StopRequested(signal.SIGINT))
    assert round_.phase is Phase.STOPPING


def test_what_survives_sigkill_ends_the_job() -> None:
    round_ = play(exited(0, 1), DeadlinePassed(), DeadlinePassed())
    assert round_.phase is Phase.OVER
    assert decide(round_, 1, History(3)) == GiveUp(ExitCode.INTERNAL, 0)


@pytest.mark.parametrize("trouble", [ZygoteLost(-9, 1.0), SpawnFailed(1, "no memory")])
def test_trouble_without_a_culprit_restarts_too(trouble: Event) -> None:
    round_ = play(trouble, RoundDrained())
    assert round_.trouble == trouble
    assert decide(round_, None, History(1)) == Restart(1, 1)
    assert decide(round_, None, History(1, 1)) == GiveUp(ExitCode.INTERNAL, 1)


EVENTS = st.one_of(
    st.builds(ZygoteReady, st.floats(0, 1)),
    st.builds(WorkerStarted, st.integers(0, 3), st.integers(1, 9)),
    st.builds(exited, st.integers(0, 3), st.sampled_from([0, 0, 1, -9, -15])),
    st.builds(SpawnFailed, st.integers(0, 3), st.just("no")),
    st.just(RoundDrained()),
    st.builds(ZygoteLost, st.just(-9), st.just(1.0)),
    st.builds(StopRequested, st.sampled_from([2, 15])),
    st.just(DeadlinePassed()),
)


@given(st.lists(EVENTS), st.integers(0, 3), st.integers(0, 3))
def test_any_history(events: list[Event], max_restarts: int, restarts: int) -> None:
    """A round only moves on; failures are kept in order; no more restarts than allowed."""
    round_ = Round(1, 4, started=0.0)
    for event in events:
        after = round_.after(event)
        assert after.phase.value >= round_.phase.value
        round_ = after
    assert list(round_.exits) == [event for event in events if isinstance(event, WorkerExited)]
    decision = decide(round_, 1, History(max_restarts, restarts))
    if isinstance(decision, Restart):
        assert restarts < max_restarts
        assert decision == Restart(restarts + 1, max_restarts)
        assert not round_.succeeded
        assert round_.stop_signal is None
    if isinstance(decision, Finish) and decision.exit_code == 0:
        assert round_.succeeded
