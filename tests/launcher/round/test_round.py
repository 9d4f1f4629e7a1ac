"""Recorded and invented histories of a round, without a process or a clock."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.diagnosis.reports import Death, NodeReport
from launcher.errors import ExitCode
from launcher.events import (
    DeadlinePassed,
    Event,
    Joined,
    MemberFailed,
    MessageReceived,
    SpawnFailed,
    StacksTaken,
    StopRequested,
    WorkerExited,
    WorkersGone,
    WorkerStarted,
    ZygoteLost,
    ZygoteReady,
)
from launcher.rendezvous.team import RankAssignment, Ready
from launcher.round.restart import Again, Decision, Failure, Finish, GiveUp, History, Limits, decide
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.slots import Slots

PREEMPTED = Finish(ExitCode.PREEMPTED, is_final=False)


def ready(node: int, workers: int = 2, number: int = 1) -> MessageReceived:
    return MessageReceived(node, Ready(tuple(range(workers)), f"host{node}", 1000 + node, number).to_json())


def wish(
    reason: str, node: int = 0, *, can_drain: bool = True, slots: int | None = None
) -> MessageReceived:
    return MessageReceived(node, RoundEndRequest(reason, node, can_drain, slots).to_json())


def lost(node: int) -> MessageReceived:
    return MessageReceived(0, {"kind": "lost", "node": node, "why": "no sign of life"})


def exited(rank: int, code: int = 0) -> WorkerExited:
    return WorkerExited(rank, 1000 + rank, code, 1.0)


def death(rank: int, code: int = 1, at: float = 1.0) -> Death:
    return Death(rank, "host0", 1000 + rank, code, at)


def report(node: int = 0, **fields: object) -> MessageReceived:
    told = NodeReport(node, f"host{node}", 1, 1.0, **fields)  # type: ignore[arg-type]
    return MessageReceived(node, {"kind": "report", "report": told.to_json()})


def begin(nodes: int = 1, rank: int = 0) -> list[Event]:
    hellos = [{"host": f"host{node}"} for node in range(nodes)]
    return [Joined(rank, hellos), *(ready(node) for node in range(nodes))]


def play(*events: Event, nodes: int = 1, rank: int = 0) -> Round:
    round_ = Round()
    for event in [*begin(nodes, rank), *events]:
        round_ = round_.after(event)
    return round_


def end(
    *events: Event,
    nodes: int = 1,
    history: History | None = None,
    limits: Limits | None = None,
    mark: str = "x",
) -> Decision:
    """What is decided after a round with these events. The first death told of is to blame."""
    round_ = play(*events, nodes=nodes)
    assert round_.phase is Phase.SETTLED
    culprit = next((one for one in round_.deaths if not one.is_ours), None)
    return decide(round_, culprit, mark if culprit else None, history or History(), limits or Limits())


# -- one node


def test_a_round_in_which_all_finish() -> None:
    round_ = play(WorkerStarted(0, 1), exited(1), exited(0))
    assert round_.phase is Phase.STOPPING  # what they left running is stopped, too
    round_ = round_.after(WorkersGone())
    assert round_.phase is Phase.OVER
    assert round_.has_finished
    round_ = round_.after(report(has_finished=True, has_drained=True))
    assert round_.phase is Phase.SETTLED
    assert decide(round_, None, None, History(), Limits()) == Finish(0)


def test_one_that_finishes_does_not_end_a_round() -> None:
    round_ = play(exited(1))
    assert round_.phase is Phase.RUNNING
    assert not (round_.has_finished or round_.has_drained or round_.has_failed_here)
    assert not play(exited(1), exited(0, 1)).has_drained


def test_workers_start_when_all_nodes_are_ready() -> None:
    round_ = Round().after(Joined(1, [{"host": "a"}, {"host": "b"}])).after(ready(1, workers=3, number=7))
    assert round_.phase is Phase.GATHERING
    round_ = round_.after(ready(0, workers=2, number=4))
    assert round_.phase is Phase.RUNNING
    assert round_.plan == RankAssignment(7, 1, (2, 3), (0, 1, 2), "host0", 1000)
    assert (round_.plan.world, list(round_.plan.ranks)) == (5, [2, 3, 4])


def test_what_is_ours() -> None:
    """A worker that ends by the signal it was sent, after it was sent."""
    round_ = play(exited(1, -15), exited(0, -15))
    assert [round_.is_ours(exit_) for exit_ in round_.exits] == [False, True]
    assert round_.has_failed_here
    asked = [wish("restart", can_drain=False), exited(0, -15)]
    killed = play(*asked, DeadlinePassed(), exited(1, -9), WorkersGone())
    assert [killed.is_ours(exit_) for exit_ in killed.exits] == [True, True]
    assert not killed.has_failed_here
    assert play(*asked, exited(1, -9), DeadlinePassed()).has_failed_here


OURS = Death(1, "host0", 1001, -15, 2.0, is_ours=True)


@pytest.mark.parametrize(
    ("events", "has_failed"),
    [
        ([report(0, has_drained=True), report(1, has_drained=True)], False),
        ([report(0), report(1, deaths=(death(2),))], True),
        ([report(0), report(1, trouble="it")], True),
        ([report(0), lost(1)], True),
        ([wish("restart"), report(0, deaths=(OURS,)), report(1)], False),
        ([wish("restart"), report(0, deaths=(death(0), OURS)), report(1)], True),
        ([StopRequested(signal.SIGTERM), report(0, deaths=(death(0),)), report(1)], False),
    ],
)
def test_whether_a_round_has_failed(events: list[Event], has_failed: bool) -> None:
    assert play(*events, WorkersGone(), nodes=2).has_failed is has_failed


def test_what_explains_that_workers_failed() -> None:
    """Something that is known of one node explains those of all."""
    for told in (report(1, trouble="it"), report(1, hang=("where",)), lost(1)):
        assert play(report(0, deaths=(death(0),)), told, nodes=2).is_explained
    assert not play(report(0, deaths=(death(0),)), report(1), nodes=2).is_explained


def test_who_wants_a_round_to_end() -> None:
    assert not play(exited(0, 1)).is_asked_to_end
    assert play(wish("restart")).is_asked_to_end
    assert play(StopRequested(signal.SIGTERM)).is_asked_to_end


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_wins_over_everything(signum: int) -> None:
    for events in ([exited(0, 1)], [exited(0), exited(1)], []):
        assert end(*events, StopRequested(signum), WorkersGone(), report()) == Finish(128 + signum)


def test_insisting_kills() -> None:
    round_ = play(StopRequested(signal.SIGINT))
    assert round_.phase is Phase.STOPPING
    assert round_.after(StopRequested(signal.SIGINT)).phase is Phase.KILLING
    assert round_.after(DeadlinePassed()).phase is Phase.KILLING


def test_the_first_stop_during_a_restart_leaves_the_grace() -> None:
    round_ = play(exited(0, 1), StopRequested(signal.SIGINT))
    assert round_.phase is Phase.STOPPING


def test_a_stop_while_other_nodes_are_not_done_waits_for_them() -> None:
    round_ = play(exited(0, 1), WorkersGone(), StopRequested(signal.SIGINT), nodes=2)
    assert round_.phase is Phase.OVER
    assert round_.after(StopRequested(signal.SIGINT)).phase is Phase.SETTLED


def test_a_stop_on_another_node() -> None:
    said = MessageReceived(1, {"kind": "stop", "signum": 2})
    assert play(said, nodes=2).phase is Phase.STOPPING
    gathering = Round().after(Joined(0, [{"host": "a"}, {"host": "b"}])).after(said)
    assert gathering.phase is Phase.SETTLED
    assert decide(gathering, None, None, History(), Limits()) == Finish(130)
    assert play(WorkersGone(), report(0), said, nodes=2).phase is Phase.OVER
    assert play(WorkersGone(), report(0), said, report(1), nodes=2).phase is Phase.SETTLED


def test_a_stop_between_rounds_ends_the_job() -> None:
    """Of the whole team; of a node that is in none it ends this node's part alone."""
    alone = Round().after(StopRequested(signal.SIGINT))
    assert alone.phase is Phase.SETTLED
    assert decide(alone, None, None, History(), Limits()) == Finish(130, is_final=False)
    joined = Round().after(Joined(0, [{"host": "a"}])).after(StopRequested(signal.SIGINT))
    assert decide(joined, None, None, History(), Limits()) == Finish(130)
    cut_off = end(MemberFailed("lost", "x"), StopRequested(signal.SIGINT), WorkersGone(), nodes=2)
    assert cut_off == Finish(130, is_final=False)


def test_what_survives_sigkill_ends_the_job() -> None:
    round_ = play(exited(0, 1), DeadlinePassed(), DeadlinePassed())
    assert round_.phase is Phase.OVER
    assert "SIGKILL" in (round_.trouble_in_words or "")
    decision = end(exited(0, 1), DeadlinePassed(), DeadlinePassed(), report(is_stuck=True))
    assert isinstance(decision, GiveUp)
    assert (decision.exit_code, decision.is_final) == (ExitCode.INTERNAL, True)


@pytest.mark.parametrize(
    ("trouble", "words"), [(SpawnFailed(1, "no"), "rank 1 .*: no"), (ZygoteLost(-9, 1.0), ".* SIGKILL")]
)
def test_trouble_of_our_own_is_a_failure(trouble: SpawnFailed | ZygoteLost, words: str) -> None:
    round_ = play(trouble)
    assert re.match(words, round_.trouble_in_words or "")
    assert round_.has_failed_here
    assert round_.phase is (Phase.STOPPING if isinstance(trouble, SpawnFailed) else Phase.OVER)
    ended = [trouble, WorkersGone(), report(trouble="it")]
    assert play(*ended).has_failed
    assert isinstance(end(*ended), Again)
    assert end(*ended, limits=Limits(max_restarts=0)) == GiveUp(ExitCode.INTERNAL, "no restarts allowed")


# -- failures, one after the other


def test_restarts_and_their_end() -> None:
    history = History()
    pauses = []
    for _ in range(3):
        decision = end(exited(1, 3), WorkersGone(), report(deaths=(death(1, 3),)), history=history, mark="")
        assert isinstance(decision, Again)
        history = History(
            decision.history.restarts, None, tuple(Failure(None) for _ in decision.history.failures)
        )
        pauses.append(decision.pause)
    assert pauses == [0.0, 0.5, 1.0]
    decision = end(exited(1, 3), WorkersGone(), report(deaths=(death(1, 3),)), history=history)
    assert decision == GiveUp(3, "3 restarts used up")
    decision = failing_at(30, History(4, 30, (Failure(30, "y"),)), limits=Limits(max_restarts=1))
    assert decision == GiveUp(1, "1 restart used up without getting beyond step 30")


@pytest.mark.parametrize(("code", "ends_with"), [(3, 3), (-9, 137), (-11, 139)])
def test_the_exit_code_is_the_culprits(code: int, ends_with: int) -> None:
    decision = end(
        exited(1, code), WorkersGone(), report(deaths=(death(1, code),)), limits=Limits(max_restarts=0)
    )
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == ends_with


def failing_at(
    step: int | None, history: History, mark: str = "x", limits: Limits | None = None
) -> Decision:
    told = report(deaths=(death(1),), step=step)
    return end(exited(1, 1), WorkersGone(), told, history=history, mark=mark, limits=limits)


def test_the_same_failure_at_the_same_step() -> None:
    """Three times is enough, however many restarts there are; another failure in between does not help."""
    limits = Limits(max_restarts=100)
    history = History()
    for mark in ("x", "y", "x"):
        decision = failing_at(1200, history, mark, limits)
        assert isinstance(decision, Again)
        history = decision.history
    decision = failing_at(1200, history, "x", limits)
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == ExitCode.CRASH_LOOP
    assert decision.reason.startswith("failed with the same error 3 times at step 1200 (")
    decision = failing_at(None, History(), limits=Limits(crash_loop=1))
    assert isinstance(decision, GiveUp)
    assert decision.reason.startswith("failed with the same error 1 time before its first step (")
    assert isinstance(failing_at(7, History(4, 7, (Failure(7, "x"),) * 4), limits=Limits(9, 0)), Again)


def test_progress_refills_the_budget() -> None:
    history = History()
    for step in range(10, 100, 10):
        decision = failing_at(step, history, limits=Limits(max_restarts=1))
        assert isinstance(decision, Again)
        assert decision.pause == 0
        history = decision.history
    assert history.restarts == 9
    assert isinstance(failing_at(50, history, "y", Limits(max_restarts=1)), GiveUp)


def test_failures_that_cannot_be_compared_are_no_loop() -> None:
    told = report(deaths=(death(1, -9),))
    history = History(5, None, tuple(Failure(None) for _ in range(5)))
    round_ = play(exited(1, -9), WorkersGone(), told)
    assert isinstance(decide(round_, death(1, -9), None, history, Limits(max_restarts=9)), Again)


def test_a_pause_has_a_limit() -> None:
    decision = failing_at(None, History(99, None, (Failure(None),) * 99), limits=Limits(max_restarts=200))
    assert isinstance(decision, Again)
    assert decision.pause == 30


def test_the_same_hang_at_the_same_step() -> None:
    hung = [MessageReceived(0, {"kind": "hang"}), StacksTaken((), "stacks"), WorkersGone(), report(step=7)]
    history = History()
    for _ in range(2):
        decision = end(*hung, history=history, limits=Limits(max_restarts=100))
        assert isinstance(decision, Again)
        history = decision.history
    decision = end(*hung, history=history, limits=Limits(max_restarts=100))
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == ExitCode.CRASH_LOOP
    assert decision.reason.startswith("hung 3 times at step 7")


def test_a_failure_is_no_hang() -> None:
    """What is told of a round that ends already does not make it one, nor do stacks that a user asks for."""
    assert not play(exited(0, 1), MessageReceived(0, {"kind": "hang"})).is_hung
    assert play(StacksTaken(("where",), "stacks")).phase is Phase.RUNNING


def test_a_hang_is_looked_at_before_anything_is_stopped() -> None:
    round_ = play(MessageReceived(0, {"kind": "hang"}))
    assert round_.phase is Phase.DIAGNOSING
    round_ = round_.after(StacksTaken(("rank 1 is behind",), "stacks"))
    assert round_.phase is Phase.STOPPING
    assert round_.hang == ("rank 1 is behind",)
    for event in (exited(0, -15), exited(1, -15), WorkersGone(), report(hang=round_.hang, step=7)):
        round_ = round_.after(event)
    assert round_.has_failed
    decision = decide(round_, None, None, History(), Limits(max_restarts=0))
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == ExitCode.HUNG


# -- drains


def test_a_drain_is_no_failure() -> None:
    round_ = play(wish("leave"), exited(0, 75), exited(1, 75))
    assert round_.phase is Phase.STOPPING
    assert round_.has_drained
    assert play(exited(0, 0), exited(1, 75)).has_drained
    assert not round_.has_failed_here
    decision = end(wish("leave"), exited(0, 75), exited(1, 75), WorkersGone(), report(has_drained=True))
    assert decision == PREEMPTED


def test_a_drain_that_comes_too_late_is_stopped() -> None:
    round_ = play(wish("leave"))
    assert round_.phase is Phase.DRAINING
    round_ = round_.after(DeadlinePassed())
    assert round_.phase is Phase.STOPPING
    for event in (exited(0, -15), exited(1, -15), WorkersGone(), report(deaths=())):
        round_ = round_.after(event)
    assert not round_.has_failed
    assert decide(round_, None, None, History(), Limits()) == PREEMPTED


def test_a_second_signal_while_saving_ends_it_at_once() -> None:
    second = StopRequested(signal.SIGTERM)
    assert play(wish("leave"), second).phase is Phase.KILLING
    assert play(wish("leave"), DeadlinePassed(), second).phase is Phase.KILLING


def test_workers_that_cannot_save_are_stopped() -> None:
    assert play(wish("restart", can_drain=False)).phase is Phase.STOPPING


def test_a_wish_outside_of_a_round() -> None:
    """Before its start there is nothing to end; after its end others are waited for all the same."""
    gathering = Round().after(Joined(0, [{"host": "a"}, {"host": "b"}]))
    assert gathering.after(wish("leave")).phase is Phase.SETTLED
    assert play(WorkersGone(), wish("restart"), nodes=2).phase is Phase.OVER


def test_a_worker_may_hear_of_a_drain_before_its_launch() -> None:
    assert play(exited(0, 75)).phase is Phase.DRAINING
    assert end(exited(0, 75), exited(1, 75), WorkersGone(), report(has_drained=True)) == PREEMPTED


def test_workers_that_leave_while_those_of_another_node_fail() -> None:
    told = [report(0, has_drained=True), report(1, deaths=(death(2),))]
    decision = end(exited(0, 75), exited(1, 75), WorkersGone(), *told, nodes=2)
    assert isinstance(decision, Again)
    assert decision.history.restarts == 1


def test_a_stop_while_a_restart_is_saved_leaves_the_grace() -> None:
    assert play(wish("restart"), StopRequested(signal.SIGINT)).phase is Phase.STOPPING


def test_who_leaves_while_a_restart_is_saved_needs_it_durable() -> None:
    round_ = play(wish("restart"))
    assert round_.drain_tiers == "memory"
    assert play(exited(0, 75)).drain_tiers == "durable"  # nobody has asked it to, and it may be for good
    assert round_.after(wish("leave")).drain_tiers == "durable"


def test_a_restart_that_is_asked_for_again_does_not_wait() -> None:
    stopped = (wish("restart", can_drain=False), exited(0, -15), exited(1, -15), WorkersGone())
    deaths = tuple(Death(rank, "host0", 1, -15, 1.0, is_ours=True) for rank in (0, 1))
    assert play(wish("restart"), *stopped).phase is Phase.OVER
    decision = end(wish("restart"), *stopped, report(deaths=deaths))
    assert isinstance(decision, Again)
    assert decision.history.restarts == 0


def test_a_drain_that_hangs_is_a_hang() -> None:
    events = [wish("restart"), MessageReceived(0, {"kind": "hang"}), StacksTaken(("where",), "stacks")]
    deaths = tuple(Death(rank, "host0", 1, -15, 1.0, is_ours=True) for rank in (0, 1))
    events += [exited(0, -15), exited(1, -15), WorkersGone(), report(deaths=deaths, hang=("where",))]
    assert play(*events).has_failed
    assert end(*events, limits=Limits(max_restarts=0)) == GiveUp(ExitCode.HUNG, "no restarts allowed")


def test_told_to_leave_before_there_is_a_team() -> None:
    round_ = Round().withdrawn()
    assert round_.phase is Phase.SETTLED
    assert decide(round_, None, None, History(), Limits()) == PREEMPTED


def test_told_to_leave_while_cut_off() -> None:
    failed = Round().after(MemberFailed("unavailable", "x")).withdrawn()
    assert decide(failed, None, None, History(), Limits()) == PREEMPTED
    round_ = play(MemberFailed("lost", "x"), nodes=2, rank=1).withdrawn()
    assert round_.phase is Phase.STOPPING
    round_ = round_.after(WorkersGone())
    assert decide(round_, None, None, History(), Limits()) == PREEMPTED


def test_what_was_said_in_a_team_before_is_not_heard() -> None:
    assert Round().after(lost(1)) == Round()


def test_a_zygote_that_launch_kills_is_no_trouble() -> None:
    """What failed is on another node, and here nothing was forked yet."""
    round_ = play(MessageReceived(1, {"kind": "ended"}), ZygoteLost(-9, 1.0, is_ours=True), nodes=2)
    assert (round_.phase, round_.trouble) == (Phase.OVER, None)
    assert not round_.has_failed_here


@pytest.mark.parametrize("reason", ["restart", "scale"])
def test_what_a_user_asks_for_costs_no_restart(reason: str) -> None:
    decision = end(
        wish(reason, slots=1),
        exited(0, 75),
        exited(1, 75),
        WorkersGone(),
        report(has_drained=True, step=5),
    )
    assert isinstance(decision, Again)
    assert (decision.history.restarts, decision.history.best_step, decision.same_team) == (0, 5, True)
    assert decision.pause == 0


def test_a_failure_while_draining_counts() -> None:
    told = report(deaths=(death(0, 1), Death(1, "host0", 1001, -15, 2.0, is_ours=True)))
    failed = [wish("restart"), exited(0, 1), exited(1, -15), WorkersGone(), told]
    assert play(*failed).has_failed
    decision = end(*failed)
    assert isinstance(decision, Again)
    assert decision.history.restarts == 1


def test_finishing_while_asked_to_drain_is_finishing() -> None:
    told = report(has_finished=True, has_drained=True)
    assert end(wish("leave"), exited(0), exited(1), WorkersGone(), told) == Finish(0)


@pytest.mark.parametrize(
    ("why", "decision"),
    [
        ([wish("leave", can_drain=False)], PREEMPTED),
        ([wish("leave"), DeadlinePassed()], PREEMPTED),
        ([wish("restart", can_drain=False)], Again(History(), "as asked for")),
        (
            [MessageReceived(0, {"kind": "hang"}), StacksTaken(("where",), "stacks")],
            GiveUp(ExitCode.HUNG, ""),
        ),
    ],
    ids=["told to leave", "too late", "a restart", "a hang"],
)
def test_workers_that_answer_sigterm_with_0_have_not_finished(why: list[Event], decision: Decision) -> None:
    round_ = play(*why, exited(0), exited(1), WorkersGone())
    assert not (round_.has_finished or round_.has_drained)
    ended = end(*why, exited(0), exited(1), WorkersGone(), report(), limits=Limits(max_restarts=0))
    match ended, decision:
        case (GiveUp(exit_code=code), GiveUp(exit_code=expected)):
            assert code == expected
        case _:
            assert ended == decision


# -- slots


def test_a_device_that_fails_twice_at_the_start_is_left_out() -> None:
    slots = Slots(present=8, wanted=8, minimum=6)
    for _ in range(2):
        round_ = play(exited(1, 1), WorkersGone(), report(deaths=(death(1),)))
        slots = round_.slots_after(slots, death(1))
    assert slots.left_out == (1,)
    assert slots.chosen == (0, 2, 3, 4, 5, 6, 7)


def test_only_what_fails_here_before_any_step_is_held_against_a_device() -> None:
    slots, once = Slots(2, 2, 1), Slots(2, 2, 1, suspect=1, strikes=1)
    here, far = play(nodes=2, rank=1), play(nodes=2)
    assert here.slots_after(slots, death(3)) == once
    assert far.slots_after(slots, death(3)) == slots
    assert here.slots_after(slots, replace(death(3), step=7)) == slots
    assert play(report(step=7)).slots_after(once, None) == slots
    assert play(report()).slots_after(once, None) == once


def test_devices_that_fail_by_turns_stay() -> None:
    slots = Slots(8, 8, 6)
    for slot in (1, 2, 1, 2):
        slots = slots.after_failed_start(slot)
    assert slots.left_out == ()


def test_nothing_is_left_out_where_all_are_needed() -> None:
    slots = Slots(8, 8, 8)
    for _ in range(5):
        slots = slots.after_failed_start(3)
    assert slots.chosen == tuple(range(8))


def test_progress_clears_a_device() -> None:
    slots = Slots(8, 8, 6).after_failed_start(3).after_progress().after_failed_start(3)
    assert slots.chosen == tuple(range(8))


def test_too_few_devices() -> None:
    slots = Slots(2, 2, 1)
    for slot in (0, 0, 1, 1):
        slots = slots.after_failed_start(slot)
    assert slots.chosen == ()
    assert slots.scaled(2).chosen == (0, 1)
    assert Slots(4, 4, 3, left_out=(0, 1)).chosen == ()


def test_a_spare_device_takes_the_place_of_a_dead_one() -> None:
    slots = Slots(present=8, wanted=4, minimum=3)
    slots = slots.after_failed_start(0).after_failed_start(0)
    assert slots.chosen == (1, 2, 3, 4)


def test_scaling() -> None:
    round_ = play(wish("scale", slots=1), exited(0, 75), exited(1, 75))
    assert round_.slots_after(Slots(2, 2, 2), None).chosen == (0,)
    more = play(wish("scale", slots=1), wish("scale", slots=3), wish("scale", node=1, slots=4), nodes=2)
    assert more.slots_after(Slots(2, 2, 2), None) == Slots(3, 3, 2)
    assert Slots(8, 8, 6).scaled(4) == Slots(8, 4, 4)


def test_giving_up_a_device() -> None:
    """Those that are left take its place, if there are more than workers."""
    slots = Slots(8, 8, 8).scaled(7, (3,))
    assert slots.chosen == (0, 1, 2, 4, 5, 6, 7)
    assert slots.scaled(6, (0, 3)).chosen == (1, 2, 4, 5, 6, 7)
    assert slots.scaled(8).chosen == tuple(range(8))
    assert Slots(7, 7, 7).scaled(7, (3,)).chosen == (0, 1, 2, 4, 5, 6, 7)


# -- several nodes


def test_a_failure_elsewhere_stops_this_node() -> None:
    assert play(MessageReceived(1, {"kind": "ended"}), nodes=2).phase is Phase.STOPPING
    assert play(report(1, deaths=(death(3),)), nodes=2).phase is Phase.STOPPING
    assert play(report(1, has_drained=True), nodes=2).phase is Phase.RUNNING


def test_all_must_have_finished() -> None:
    finished = report(0, has_finished=True, has_drained=True)
    for other in (lost(1), report(1, deaths=(death(2),))):
        assert isinstance(end(exited(0), exited(1), WorkersGone(), finished, other, nodes=2), Again)


def test_a_round_is_settled_when_all_have_reported() -> None:
    done = {"has_finished": True, "has_drained": True}
    round_ = play(exited(0), exited(1), WorkersGone(), report(0, **done), nodes=2)
    assert round_.phase is Phase.OVER
    assert round_.after(report(1, **done)).phase is Phase.SETTLED
    assert round_.after(lost(1)).phase is Phase.SETTLED
    round_ = play(WorkersGone(), lost(1), report(0), nodes=3)
    assert round_.phase is Phase.OVER
    assert round_.after(lost(2)).phase is Phase.SETTLED


def test_a_lost_node_costs_no_restart() -> None:
    assert play(lost(1), nodes=2).phase is Phase.STOPPING
    cut = report(0, deaths=(death(0, 1),))
    for least in (1, 2):  # if too few are left they wait for others
        events = [lost(1), exited(0, 1), exited(1, -15), WorkersGone(), cut]
        decision = end(*events, nodes=2, limits=Limits(min_nodes=least))
        assert isinstance(decision, Again)
        assert (decision.same_team, decision.history.restarts) == (False, 0)


def test_a_node_that_is_lost_again_and_again() -> None:
    """Without progress, the others wait longer each time before they come together."""
    history, pauses = History(), []
    for step in (None, None, 5, 5, 5):
        decision = end(lost(1), WorkersGone(), report(0, step=step), nodes=2, history=history)
        assert isinstance(decision, Again)
        history = History.of_team([History.from_json(decision.history.to_json()), History()])
        pauses.append(decision.pause)
    assert pauses == [0, 0.5, 0, 0.5, 1]
    assert history.restarts == 0


def test_a_node_with_processes_that_nothing_ends() -> None:
    """It gives up alone, if the others may go on without it."""
    left = [exited(0, 1), WorkersGone(), report(0, deaths=(death(0),)), report(1, is_stuck=True)]
    others, both = end(*left, nodes=2), end(*left, nodes=2, limits=Limits(min_nodes=2))
    assert isinstance(others, Again)
    assert not others.same_team
    assert others.reason == "going on without the nodes that cannot get rid of their processes"
    assert both == GiveUp(ExitCode.INTERNAL, both.reason)
    itself = end(WorkersGone(), report(0, is_stuck=True), report(1), nodes=2)
    assert itself == GiveUp(ExitCode.INTERNAL, both.reason, is_final=False)
    cut_off = end(MemberFailed("lost", "x"), DeadlinePassed(), DeadlinePassed(), nodes=2)
    assert cut_off == itself


def test_who_is_late() -> None:
    """Nodes may take as long as they want for what they were started for; not for coming to an end."""
    gathering = Round().after(Joined(0, [{"host": "a"}, {"host": "b"}, {"host": "c"}]))
    assert not gathering.is_late
    assert (gathering.after(ready(0)).is_late, gathering.after(ready(0)).silent) == (True, {1, 2})
    done = [WorkersGone(), report(0, has_finished=True, has_drained=True)]
    assert not play(nodes=2).is_late
    assert not play(*done, nodes=2).is_late
    assert not play(MessageReceived(1, {"kind": "ended"}), nodes=2).is_late
    failed = play(exited(0, 1), WorkersGone(), report(0, deaths=(death(0),)), nodes=3)
    assert (failed.is_late, failed.silent) == (True, {1, 2})
    assert failed.after(report(2)).after(lost(1)).phase is Phase.SETTLED


def test_a_node_lost_before_the_start() -> None:
    round_ = Round().after(Joined(0, [{"host": "a"}, {"host": "b"}])).after(lost(1))
    assert round_.phase is Phase.SETTLED
    decision = decide(round_, None, None, History(), Limits())
    assert isinstance(decision, Again)
    assert not decision.same_team


def drained(*events: Event, nodes: int = 2) -> list[Event]:
    told = [report(node, has_drained=True) for node in range(nodes)]
    return [*events, exited(0, 75), exited(1, 75), WorkersGone(), *told]


def test_a_node_that_leaves() -> None:
    assert end(*drained(wish("leave", 0)), nodes=2) == PREEMPTED
    stays = end(*drained(wish("leave", 1)), nodes=2)
    assert isinstance(stays, Again)
    assert not stays.same_team
    assert stays.history.losses == 0
    assert stays.reason == "going on without the nodes that were told to leave"


def test_too_few_stay() -> None:
    both = Limits(min_nodes=2)
    for node in (0, 1):
        assert end(*drained(wish("leave", node)), nodes=2, limits=both) == PREEMPTED
    assert end(*drained(wish("leave", 0), wish("leave", 1)), nodes=2) == PREEMPTED


def test_nodes_that_wait_are_taken_in() -> None:
    waiting = MessageReceived(0, {"kind": "waiting", "count": 1})
    failed = [waiting, exited(0, 1), WorkersGone(), report(0, deaths=(death(0),)), report(1)]
    for events in (drained(waiting, wish("join")), drained(waiting, wish("restart")), failed):
        decision = end(*events, nodes=2)
        assert isinstance(decision, Again)
        assert not decision.same_team


def test_this_node_is_cut_off() -> None:
    failed = MemberFailed("lost", "the store cannot be reached")
    assert play(failed, nodes=2).phase is Phase.STOPPING
    history = History(failed_joins=3)
    decision = end(failed, exited(0, -15), exited(1, -15), WorkersGone(), nodes=2, history=history)
    assert decision == Again(History(), "joining again", same_team=False)


@pytest.mark.parametrize("ends", [[ZygoteLost(-9, 1.0)], [DeadlinePassed(), DeadlinePassed()]])
def test_trouble_of_a_node_that_is_cut_off(ends: list[Event]) -> None:
    """It must not wait for a report that nobody hears."""
    assert play(MemberFailed("lost", "x"), *ends, nodes=2).phase is Phase.SETTLED


def test_joining_fails_again_and_again() -> None:
    """Each time after a longer pause; a node that has joined starts anew."""
    failed = Round().after(MemberFailed("lost", "it cannot be started"))
    history, pauses = History(), []
    while isinstance(decision := decide(failed, None, None, history, Limits()), Again):
        history = decision.history
        pauses.append(decision.pause)
    assert pauses == [0.5, 1, 2, 4]
    assert decision == GiveUp(ExitCode.UNAVAILABLE, "it cannot be started", is_final=False)
    assert History.of_team([History.from_json(history.to_json())]).failed_joins == 0


@pytest.mark.parametrize(
    ("kind", "code"), [("usage", 2), ("unavailable", 69), ("closed", 69), ("quorum", 78)]
)
def test_no_team_to_join(kind: str, code: int) -> None:
    round_ = Round().after(MemberFailed(kind, "why"))
    assert round_.phase is Phase.SETTLED
    assert decide(round_, None, None, History(), Limits()) == GiveUp(code, "why", is_final=False)


def test_histories_of_a_team() -> None:
    old, new = History(2, 30, (Failure(30, "x"),)), History()
    assert History.of_team([new, old, new]) == old
    for longer in (History(best_step=30), History(losses=1)):
        assert History.of_team([new, longer, new]) == longer
    assert History.from_json(old.to_json()) == old


# -- anything at all


def events_of(nodes: int, rank: int) -> st.SearchStrategy[Event]:
    codes = st.sampled_from([0, 1, 75, -9, -15])
    others = [node for node in range(nodes) if node != rank]
    choices: list[st.SearchStrategy[Event]] = [
        st.builds(exited, st.integers(0, 1), codes),
        st.sampled_from([DeadlinePassed(), WorkersGone(), ZygoteLost(-9, 1.0), ZygoteReady(0.1)]),
        st.sampled_from([SpawnFailed(0, "no"), StacksTaken(("s",), "d"), MemberFailed("lost", "x")]),
        st.builds(StopRequested, st.sampled_from([signal.SIGINT, signal.SIGTERM])),
        st.builds(wish, st.sampled_from(["leave", "join", "restart"]), st.integers(0, nodes - 1)),
        st.builds(report, st.integers(0, nodes - 1), has_finished=st.booleans(), has_drained=st.booleans()),
        st.sampled_from(
            [MessageReceived(0, {"kind": kind}) for kind in ("ended", "hang", "of a later version")]
        ),
    ]
    if others:
        choices.append(st.builds(lost, st.sampled_from(others)))
    return st.one_of(choices)


@given(st.lists(events_of(2, 0), max_size=12))
def test_a_round_only_ever_goes_on(events: Sequence[Event]) -> None:
    round_ = play(nodes=2)
    for event in events:
        after = round_.after(event)
        assert after.phase.value >= round_.phase.value
        round_ = after
    if round_.phase is Phase.SETTLED:
        decision = decide(round_, None, None, History(), Limits())
        assert isinstance(decision, Again | Finish | GiveUp)


SAID = [
    lost(2),
    wish("leave", 1),
    wish("restart", 0),
    MessageReceived(1, {"kind": "ended"}),
    MessageReceived(1, {"kind": "hang"}),
]


@given(st.sets(st.integers(0, len(SAID) - 1)), st.permutations(range(2)), st.randoms())
def test_all_nodes_decide_the_same(said: set[int], order: Sequence[int], random: Random) -> None:
    """Each plays its own part of the round; what they have heard is the same, and so is what they do."""
    heard = [SAID[index] for index in said]
    random.shuffle(heard)
    told = [report(node, step=3) for node in order]
    if 0 not in said:
        told.append(report(2, step=3))
    for one in told:  # what a node says of its round it says after all else
        heard.insert(random.randint(0, len(heard)), one)
    decisions = []
    for rank in (0, 1):
        round_ = Round()
        for event in begin(3, rank):
            round_ = round_.after(event)
        for event in heard:
            if isinstance(event, MessageReceived) and event.node == rank and event in told:
                round_ = round_.after(WorkersGone())
            round_ = round_.after(event)
        assert round_.phase is Phase.SETTLED
        decisions.append(decide(round_, None, None, History(), Limits(min_nodes=3)))
    assert decisions[0] == decisions[1]


def test_the_failure_that_explains_a_hang_gives_the_code() -> None:
    """A rank that has raised, and hangs in its teardown, is what the verdict names."""
    raised = Death(1, "host0", 1, -9, 1.0, error="ValueError: boom", has_traceback=True, is_ours=True)
    stopped = Death(0, "host0", 1, -15, 1.0, is_ours=True)
    round_ = play(
        MessageReceived(0, {"kind": "hang"}),
        StacksTaken(("where",), "stacks"),
        exited(0, -15),
        exited(1, -9),
        WorkersGone(),
        report(deaths=(stopped, raised), hang=("where",)),
    )
    decision = decide(round_, raised, "boom", History(), Limits(max_restarts=0))
    assert decision == GiveUp(1, "no restarts allowed")
    again = decide(round_, raised, "boom", History(), Limits())
    assert isinstance(again, Again)
    assert again.history.failures == (Failure(None, "boom"),)
