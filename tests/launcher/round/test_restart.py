"""What comes after a round."""

from __future__ import annotations

import re
import signal

import pytest

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
    ZygoteLost,
)
from launcher.round.restart import Again, Decision, Failure, Finish, GiveUp, History, Limits, decide
from launcher.round.round import Phase, Round
from tests.kit.rounds import PREEMPTED, death, drained, end, end_request, exited, lost, play, report


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_wins_over_everything(signum: int) -> None:
    for events in ([exited(0, 1)], [exited(0), exited(1)], []):
        assert end(*events, StopRequested(signum), WorkersGone(), report()) == Finish(128 + signum)


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


@pytest.mark.parametrize("reason", ["restart", "scale"])
def test_what_a_user_asks_for_costs_no_restart(reason: str) -> None:
    decision = end(
        end_request(reason, slots=1),
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
    failed = [end_request("restart"), exited(0, 1), exited(1, -15), WorkersGone(), told]
    assert play(*failed).has_failed
    decision = end(*failed)
    assert isinstance(decision, Again)
    assert decision.history.restarts == 1


def test_finishing_while_asked_to_drain_is_finishing() -> None:
    told = report(has_finished=True, has_drained=True)
    assert end(end_request("leave"), exited(0), exited(1), WorkersGone(), told) == Finish(0)


@pytest.mark.parametrize(
    ("why", "decision"),
    [
        ([end_request("leave", can_drain=False)], PREEMPTED),
        ([end_request("leave"), DeadlinePassed()], PREEMPTED),
        ([end_request("restart", can_drain=False)], Again(History(), "as asked for")),
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


def test_all_must_have_finished() -> None:
    finished = report(0, has_finished=True, has_drained=True)
    for other in (lost(1), report(1, deaths=(death(2),))):
        assert isinstance(end(exited(0), exited(1), WorkersGone(), finished, other, nodes=2), Again)


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


def test_a_node_that_leaves() -> None:
    assert end(*drained(end_request("leave", 0)), nodes=2) == PREEMPTED
    stays = end(*drained(end_request("leave", 1)), nodes=2)
    assert isinstance(stays, Again)
    assert not stays.same_team
    assert stays.history.losses == 0
    assert stays.reason == "going on without the nodes that were told to leave"


def test_too_few_stay() -> None:
    both = Limits(min_nodes=2)
    for node in (0, 1):
        assert end(*drained(end_request("leave", node)), nodes=2, limits=both) == PREEMPTED
    assert end(*drained(end_request("leave", 0), end_request("leave", 1)), nodes=2) == PREEMPTED


def test_nodes_that_wait_are_taken_in() -> None:
    waiting = MessageReceived(0, {"kind": "waiting", "count": 1})
    failed = [waiting, exited(0, 1), WorkersGone(), report(0, deaths=(death(0),)), report(1)]
    for events in (drained(waiting, end_request("join")), drained(waiting, end_request("restart")), failed):
        decision = end(*events, nodes=2)
        assert isinstance(decision, Again)
        assert not decision.same_team


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
