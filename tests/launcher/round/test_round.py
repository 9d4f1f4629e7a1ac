"""Recorded and invented histories of a round, without a process or a clock."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.diagnosis.reports import Death
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
    WorkersGone,
    WorkerStarted,
    ZygoteLost,
    ZygoteReady,
)
from launcher.rendezvous.team import RankAssignment
from launcher.round.restart import Again, Finish, GiveUp, History, Limits, decide
from launcher.round.round import Phase, Round
from tests.kit.rounds import PREEMPTED, begin, death, end, end_request, exited, lost, play, ready, report


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
    asked = [end_request("restart", can_drain=False), exited(0, -15)]
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
        ([end_request("restart"), report(0, deaths=(OURS,)), report(1)], False),
        ([end_request("restart"), report(0, deaths=(death(0), OURS)), report(1)], True),
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
    assert play(end_request("restart")).is_asked_to_end
    assert play(StopRequested(signal.SIGTERM)).is_asked_to_end


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


def test_a_drain_is_no_failure() -> None:
    round_ = play(end_request("leave"), exited(0, 75), exited(1, 75))
    assert round_.phase is Phase.STOPPING
    assert round_.has_drained
    assert play(exited(0, 0), exited(1, 75)).has_drained
    assert not round_.has_failed_here
    decision = end(
        end_request("leave"), exited(0, 75), exited(1, 75), WorkersGone(), report(has_drained=True)
    )
    assert decision == PREEMPTED


def test_a_drain_that_comes_too_late_is_stopped() -> None:
    round_ = play(end_request("leave"))
    assert round_.phase is Phase.DRAINING
    round_ = round_.after(DeadlinePassed())
    assert round_.phase is Phase.STOPPING
    for event in (exited(0, -15), exited(1, -15), WorkersGone(), report(deaths=())):
        round_ = round_.after(event)
    assert not round_.has_failed
    assert decide(round_, None, None, History(), Limits()) == PREEMPTED


def test_a_second_signal_while_saving_ends_it_at_once() -> None:
    second = StopRequested(signal.SIGTERM)
    assert play(end_request("leave"), second).phase is Phase.KILLING
    assert play(end_request("leave"), DeadlinePassed(), second).phase is Phase.KILLING


def test_workers_that_cannot_save_are_stopped() -> None:
    assert play(end_request("restart", can_drain=False)).phase is Phase.STOPPING


def test_a_request_outside_of_a_round() -> None:
    """Before its start there is nothing to end; after its end others are waited for all the same."""
    gathering = Round().after(Joined(0, [{"host": "a"}, {"host": "b"}]))
    assert gathering.after(end_request("leave")).phase is Phase.SETTLED
    assert play(WorkersGone(), end_request("restart"), nodes=2).phase is Phase.OVER


def test_a_worker_may_hear_of_a_drain_before_its_launch() -> None:
    assert play(exited(0, 75)).phase is Phase.DRAINING
    assert end(exited(0, 75), exited(1, 75), WorkersGone(), report(has_drained=True)) == PREEMPTED


def test_workers_that_leave_while_those_of_another_node_fail() -> None:
    told = [report(0, has_drained=True), report(1, deaths=(death(2),))]
    decision = end(exited(0, 75), exited(1, 75), WorkersGone(), *told, nodes=2)
    assert isinstance(decision, Again)
    assert decision.history.restarts == 1


def test_a_stop_while_a_restart_is_saved_leaves_the_grace() -> None:
    assert play(end_request("restart"), StopRequested(signal.SIGINT)).phase is Phase.STOPPING


def test_who_leaves_while_a_restart_is_saved_needs_it_durable() -> None:
    round_ = play(end_request("restart"))
    assert round_.drain_tiers == "memory"
    assert play(exited(0, 75)).drain_tiers == "durable"  # nobody has asked it to, and it may be for good
    assert round_.after(end_request("leave")).drain_tiers == "durable"


def test_a_restart_that_is_asked_for_again_does_not_wait() -> None:
    stopped = (end_request("restart", can_drain=False), exited(0, -15), exited(1, -15), WorkersGone())
    deaths = tuple(Death(rank, "host0", 1, -15, 1.0, is_ours=True) for rank in (0, 1))
    assert play(end_request("restart"), *stopped).phase is Phase.OVER
    decision = end(end_request("restart"), *stopped, report(deaths=deaths))
    assert isinstance(decision, Again)
    assert decision.history.restarts == 0


def test_a_drain_that_hangs_is_a_hang() -> None:
    events = [
        end_request("restart"),
        MessageReceived(0, {"kind": "hang"}),
        StacksTaken(("where",), "stacks"),
    ]
    deaths = tuple(Death(rank, "host0", 1, -15, 1.0, is_ours=True) for rank in (0, 1))
    events += [exited(0, -15), exited(1, -15), WorkersGone(), report(deaths=deaths, hang=("where",))]
    assert play(*events).has_failed
    assert end(*events, limits=Limits(max_restarts=0)) == GiveUp(ExitCode.HUNG, "no restarts allowed")


def test_what_was_said_in_a_team_before_is_not_heard() -> None:
    assert Round().after(lost(1)) == Round()


def test_a_zygote_that_launch_kills_is_no_trouble() -> None:
    """What failed is on another node, and here nothing was forked yet."""
    round_ = play(MessageReceived(1, {"kind": "ended"}), ZygoteLost(-9, 1.0, is_ours=True), nodes=2)
    assert (round_.phase, round_.trouble) == (Phase.OVER, None)
    assert not round_.has_failed_here


def test_a_failure_elsewhere_stops_this_node() -> None:
    assert play(MessageReceived(1, {"kind": "ended"}), nodes=2).phase is Phase.STOPPING
    assert play(report(1, deaths=(death(3),)), nodes=2).phase is Phase.STOPPING
    assert play(report(1, has_drained=True), nodes=2).phase is Phase.RUNNING


def test_a_round_is_settled_when_all_have_reported() -> None:
    done = {"has_finished": True, "has_drained": True}
    round_ = play(exited(0), exited(1), WorkersGone(), report(0, **done), nodes=2)
    assert round_.phase is Phase.OVER
    assert round_.after(report(1, **done)).phase is Phase.SETTLED
    assert round_.after(lost(1)).phase is Phase.SETTLED
    round_ = play(WorkersGone(), lost(1), report(0), nodes=3)
    assert round_.phase is Phase.OVER
    assert round_.after(lost(2)).phase is Phase.SETTLED


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


def events_of(nodes: int, rank: int) -> st.SearchStrategy[Event]:
    codes = st.sampled_from([0, 1, 75, -9, -15])
    others = [node for node in range(nodes) if node != rank]
    choices: list[st.SearchStrategy[Event]] = [
        st.builds(exited, st.integers(0, 1), codes),
        st.sampled_from([DeadlinePassed(), WorkersGone(), ZygoteLost(-9, 1.0), ZygoteReady(0.1)]),
        st.sampled_from([SpawnFailed(0, "no"), StacksTaken(("s",), "d"), MemberFailed("lost", "x")]),
        st.builds(StopRequested, st.sampled_from([signal.SIGINT, signal.SIGTERM])),
        st.builds(end_request, st.sampled_from(["leave", "join", "restart"]), st.integers(0, nodes - 1)),
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
    end_request("leave", 1),
    end_request("restart", 0),
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
