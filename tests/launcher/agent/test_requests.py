"""What a running job answers to its users, by the round and the slots."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from launcher.agent.requests import Reply, reply_to
from launcher.errors import UsageError
from launcher.events import RequestReceived, StopRequested
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.slots import Slots
from tests.kit.rounds import end_request, exited, play


def check_workers(number: int) -> None:
    if number > 4:
        raise UsageError("nproc: expected at most 4")


STATE = {"phase": "starting", "can_drain": True, "ending": None, "check_workers": check_workers}
STOP = StopRequested(signal.SIGTERM, is_asked=True)


def ask(
    verb: str,
    number: int | None = None,
    without: tuple[int, ...] = (),
    round_: Round | None = None,
    **state: object,
) -> Reply:
    asked = RequestReceived(verb, number, 7, without)
    return reply_to(asked, round_ or play(), Slots(2, 2, 1), **{**STATE, **state})  # type: ignore[arg-type]


def error(reply: Reply) -> object:
    assert (reply.request, reply.signals) == (None, ())
    assert reply.answer is not None
    return reply.answer["error"]


def test_a_restart() -> None:
    request = RoundEndRequest("restart", 0, can_drain=True)
    assert ask("restart") == Reply({"can_drain": True}, request)
    assert ask("restart", can_drain=False).request == replace(request, can_drain=False)


def test_a_second_restart_does_not_wait_for_the_step_boundary() -> None:
    draining = play(end_request("restart"))
    assert draining.phase is Phase.DRAINING
    assert ask("restart", round_=draining) == Reply(
        {"at_once": True}, RoundEndRequest("restart", 0, can_drain=False)
    )
    leaving = play(end_request("leave"))
    assert error(ask("restart", round_=leaving)) == "the job is starting: ask again later"


def test_scale() -> None:
    request = RoundEndRequest("scale", 0, can_drain=True, slots=3)
    assert ask("scale", 3) == Reply({"from": 2, "to": 3, "can_drain": True}, request)
    assert ask("scale", 1, (1,)).request == replace(request, slots=1, without=(1,))


@pytest.mark.parametrize(
    ("number", "without", "reason"),
    [
        (5, (), "nproc: expected at most 4"),
        (3, (0, 1), "nproc: expected at most 4"),
        (1, (7,), "--without: expected slots from 0 to 1, found 7"),
    ],
)
def test_a_scale_that_cannot_be(number: int, without: tuple[int, ...], reason: str) -> None:
    assert error(ask("scale", number, without)) == reason


def test_stop() -> None:
    assert ask("stop") == Reply({"can_drain": True}, signals=(STOP,))
    assert ask("stop", can_drain=False).answer == {"can_drain": False}
    assert error(ask("stop", ending="it is stopping already")) == (
        "it is stopping already: --now ends it at once"
    )
    assert ask("kill", ending="it is stopping already") == Reply({}, signals=(STOP, STOP))


def test_stacks_are_answered_later() -> None:
    """As long as there are workers."""
    assert ask("stacks") == ask("stacks", round_=play(end_request("restart"))) == Reply()
    assert "ask again later" in str(error(ask("stacks", round_=play(exited(0, 1)))))


@pytest.mark.parametrize("verb", ["restart", "scale", "stacks"])
def test_between_rounds_the_user_is_asked_to_wait(verb: str) -> None:
    reply = ask(verb, 2 if verb == "scale" else None, round_=Round())
    assert error(reply) == "the job is starting: ask again later"
