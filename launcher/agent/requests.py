"""What a running job answers to `launch stacks`, `restart`, `scale` and `stop`. Pure."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import UsageError
from launcher.events import RequestReceived, StopRequested
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.slots import Slots

__all__ = ["Reply", "reply_to"]


@dataclass(frozen=True)
class Reply:
    """The answer to a request, and what the agent has to do for it."""

    answer: Mapping[str, object] | None = None
    """For the client; with the key "error" a refusal; None: the answer is the stacks, once they are dumped."""
    request: RoundEndRequest | None = None
    """What all nodes are told."""
    signals: tuple[StopRequested, ...] = ()
    """Signals that the agent acts on as if it had received them."""


def reply_to(
    asked: RequestReceived,
    round_: Round,
    slots: Slots,
    *,
    phase: str,
    can_drain: bool,
    ending: str | None,
    check_workers: Callable[[int], object],
) -> Reply:
    """Answer any request but "status", which the reporter knows.

    Args:
        asked: The request.
        round_: The present round.
        slots: This node's slots.
        phase: What the job does, in words, as `launch status` shows it.
        can_drain: The workers save and leave on request.
        ending: How the job ends, in words; None: nothing has told it to.
        check_workers: Raises `UsageError` if this node cannot run so many workers.
    """
    match asked.verb:
        case "kill":
            return Reply({}, signals=(StopRequested(signal.SIGTERM, is_asked=True),) * 2)
        case "stop" if ending is not None:
            return _refuse(f"{ending}: --now ends it at once")
        case "stop":
            stop = StopRequested(signal.SIGTERM, is_asked=True)
            return Reply({"can_drain": can_drain}, signals=(stop,))
        case "restart" if round_.phase is Phase.DRAINING and not round_.leavers:
            return Reply({"at_once": True}, _end_round(round_, "restart", can_drain=False))
        case "stacks" if round_.phase in (Phase.RUNNING, Phase.DRAINING):
            return Reply()
        case _ if round_.phase is not Phase.RUNNING:
            return _refuse(f"the job is {phase}: ask again later")
        case "restart":
            request = _end_round(round_, "restart", can_drain=can_drain)
            return Reply({"can_drain": can_drain}, request)
        case "scale":
            return _scale(asked, round_, slots, can_drain, check_workers)
        case _:
            raise AssertionError(asked.verb)


def _scale(
    asked: RequestReceived,
    round_: Round,
    slots: Slots,
    can_drain: bool,
    check_workers: Callable[[int], object],
) -> Reply:
    workers, without = asked.number or 0, asked.without
    slots = slots.scaled(workers, without)
    try:
        check_workers(slots.present)
    except UsageError as error:
        return _refuse(str(error))
    unknown = [slot for slot in without if slot >= slots.present]
    if unknown:
        return _refuse(f"--without: expected slots from 0 to {slots.present - 1}, found {unknown[0]}")
    request = _end_round(round_, "scale", can_drain=can_drain, slots=workers, without=without)
    now = len(round_.plan.slots)
    return Reply({"from": now, "to": workers, "can_drain": can_drain}, request)


def _end_round(
    round_: Round,
    reason: str,
    *,
    can_drain: bool,
    slots: int | None = None,
    without: tuple[int, ...] = (),
) -> RoundEndRequest:
    assert round_.team is not None
    return RoundEndRequest(reason, round_.team.rank, can_drain, slots, without)


def _refuse(reason: str) -> Reply:
    return Reply({"error": reason})
