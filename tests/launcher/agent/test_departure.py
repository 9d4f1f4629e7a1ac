"""How a node leaves a job: deadlines of the signals to save and end, and which of them is a second one."""

from __future__ import annotations

import signal

import pytest

from launcher.agent.departure import Departure
from launcher.events import StopRequested
from launcher.round.round import Round
from tests.kit.rounds import play

TERM = StopRequested(signal.SIGTERM)
USR1 = StopRequested(signal.SIGUSR1)
ASKED = StopRequested(signal.SIGTERM, is_asked=True)


def test_no_signal() -> None:
    departure = Departure(grace=20.0)
    assert not departure.is_leaving
    assert not departure.is_second_signal(Round(), TERM)
    assert departure.stop_seconds(0.0, are_draining=False) == 20


def test_the_deadline_is_the_earliest() -> None:
    """Seven tenths of the grace are for the step boundary, the rest is for the end of the workers."""
    departure = Departure(grace=20.0).after(USR1, now=100.0)
    assert departure.leave_by == 120
    assert departure.after(TERM, now=110.0).leave_by == 120
    assert departure.seconds_left(now=105.0) == 15
    assert departure.seconds_left(now=130.0) == 0
    assert departure.drain_seconds(now=100.0) == pytest.approx(14)
    assert departure.stop_seconds(now=105.0, are_draining=False) == 15
    assert departure.stop_seconds(now=105.0, are_draining=True) == pytest.approx(2)


@pytest.mark.parametrize(
    ("first", "second", "is_second"),
    [
        (TERM, TERM, True),
        (TERM, USR1, True),
        (USR1, TERM, False),
        (USR1, USR1, True),
        (USR1, ASKED, True),
        (ASKED, ASKED, True),
        (USR1, None, True),
    ],
)
def test_a_second_signal(first: StopRequested, second: StopRequested | None, is_second: bool) -> None:
    """SIGTERM completes a scheduler's notice by SIGUSR1; anything else insists."""
    departure = Departure(grace=20.0).after(first, now=100.0)
    assert departure.is_second_signal(play(), second) == is_second


def test_after_a_stop_every_signal_is_a_second_one() -> None:
    assert Departure(grace=20.0).is_second_signal(play(StopRequested(signal.SIGINT)), USR1)


def test_a_postponed_notice_is_kept_until_the_node_leaves() -> None:
    departure = Departure(grace=20.0).postpone(USR1)
    assert (departure.postponed, departure.is_leaving) == (USR1, False)
    assert departure.after(USR1, now=100.0).postponed is None
