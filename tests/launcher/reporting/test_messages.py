"""What users read of what happens: each sentence, where it matters which one it is."""

from __future__ import annotations

import signal

import pytest

from launcher.diagnosis.reports import NodeReport
from launcher.errors import ExitCode
from launcher.events import Event, Joined, MessageReceived, SaveFailed, SaveStaged, StopRequested
from launcher.progress import Progress
from launcher.rendezvous.team import Ready
from launcher.reporting import messages
from launcher.reporting.message import Level, Message, Style
from launcher.reporting.status_board import StatusBoard
from launcher.round.restart import Again, Finish, GiveUp, History
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.slots import Slots
from launcher.system.gpus import GpuHolder
from launcher.system.process_state import ProcessState


def played(*events: Event, nodes: int = 1) -> Round:
    """A round of so many nodes with two workers each, after `events`, as node 0 knows it."""
    hellos = [{"host": f"host{node}"} for node in range(nodes)]
    round_ = Round().after(Joined(0, hellos))
    for node in range(nodes):
        ready = Ready((0, 1), f"host{node}", 1000, 1)
        round_ = round_.after(MessageReceived(node, ready.to_json()))
    for event in events:
        round_ = round_.after(event)
    return round_


def text(message: Message | None) -> str:
    return "\n".join(message.lines) if message else ""


def test_a_job_of_one_node_waits_for_no_other() -> None:
    alone = [messages.phase_in_words(phase, is_alone=True) for phase in Phase]
    assert not any("node" in words for words in alone)
    assert messages.phase_in_words(Phase.OVER, is_alone=False) == "waiting for the other nodes"


# -- the end of a job


def test_a_job_that_has_finished() -> None:
    board = StatusBoard("train").began_round(1, {0: "a"}, now=1.0)
    assert text(messages.job_finished(board, 3.0, 0.0)) == "finished in 3 s"
    board = board.sampled({0: Progress(60, 2.0)}, 2.0).after(SaveStaged(60), 2.0)
    assert text(messages.job_finished(board, 61.0, 0.0)) == "finished in 1 min 1 s: step 60"
    board = board.began_round(2, {0: "a"}, now=3.0, restarts=1).sampled({0: Progress(60, 4.0)}, 4.0)
    assert text(messages.job_finished(board, 61.0, 2.34)).endswith(": step 60; 1 restart, 2.3 s lost")


@pytest.mark.parametrize(
    ("step", "durable", "has_drained", "said", "level"),
    [
        (8, [8], True, "saved at step 8; start it again to go on", Level.INFO),
        (8, [], True, "saved at step 8; start it again to go on", Level.INFO),  # where is not known
        (8, [8, 5], False, "stopped at step 8, which is saved; start it again to go on", Level.INFO),
        (8, [10], False, "stopped at step 8, which is saved; start it again to go on", Level.INFO),
        (
            8,
            [5, 2],
            True,
            "stopped at step 8, 3 steps later than what is saved; start it again to go on from step 5",
            Level.WARNING,
        ),
        (None, [5], False, "stopped; start it again to go on from step 5", Level.INFO),
        (
            8,
            [],
            False,
            "stopped at step 8: nothing was saved since this launch began; start it again to go on",
            Level.WARNING,
        ),
    ],
)
def test_what_a_preempted_job_goes_on_from(
    step: int | None, durable: list[int], has_drained: bool, said: str, level: Level
) -> None:
    """It never says that a step is not saved and that the job goes on from it."""
    message = messages.preempted(step, durable, has_drained=has_drained)
    assert (text(message), message.level) == (said, level)


def test_who_told_a_job_to_leave() -> None:
    asked = messages.leaving(StopRequested(signal.SIGTERM, is_asked=True), 30.0, can_save=True)
    assert text(asked) == (
        "launch stop: saving at the next step boundary, to end within 30 s (--grace); "
        "`launch stop --now` ends it at once"
    )
    told = messages.leaving(StopRequested(signal.SIGUSR1), 2.5, can_save=False)
    assert text(told) == (
        "SIGUSR1: stopping, since there is nothing to save yet, to end within 2.5 s (--grace); "
        "another SIGUSR1 ends it at once"
    )
    assert messages.how_it_ends(None) == "it is stopping already"
    assert messages.how_it_ends(12.4) == "it is saving already, to end within 12 s"
    assert messages.how_it_ends(-1.0) == "it is saving already, to end within 0 s"


# -- what nodes broadcast


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (RoundEndRequest("scale", 0, True, 2), "scaling to 2 workers at the next step boundary"),
        (
            RoundEndRequest("scale", 0, False, 1),
            "scaling to 1 worker; those that run cannot save, and are stopped",
        ),
        (RoundEndRequest("restart", 0, True), "a restart at the next step boundary"),
        (RoundEndRequest("join", 0, True), "nodes are taken in at the next step boundary"),
        (RoundEndRequest("leave", 0, True), ""),  # `leaving` says it here
    ],
)
def test_why_a_round_ends(request_: RoundEndRequest, said: str) -> None:
    assert text(messages.message_received(0, request_.to_json(), played())) == said
    if said:
        both = messages.message_received(0, request_.to_json(), played(nodes=2))
        assert text(both) == f"host0: {said}"


def test_what_another_node_says() -> None:
    """Nothing where this node has said it itself, or users need not know it."""
    round_ = played(nodes=2)
    for node, message, said in (
        (1, {"kind": "stop", "signum": 2}, "SIGINT on host1: the job stops"),
        (0, {"kind": "stop", "signum": 2}, ""),
        (1, {"kind": "hang"}, "host1 has found a hang"),
        (
            0,
            {"kind": "lost", "node": 1, "why": "no sign of life"},
            "node 1 (host1) is lost: no sign of life",
        ),
        (0, {"kind": "waiting", "count": 1}, "a node waits to be taken in at a step boundary"),
        (0, {"kind": "waiting", "count": 3}, "3 nodes wait to be taken in at a step boundary"),
        (0, {"kind": "waiting", "count": 0}, ""),
        (
            1,
            RoundEndRequest("leave", 1, True).to_json(),
            "host1: it was told to leave; saving at the next step boundary",
        ),
        (1, {"kind": "of a later version"}, ""),
    ):
        assert text(messages.message_received(node, message, round_)) == said


def test_nodes_that_were_started_with_other_arguments() -> None:
    hellos = [
        {"host": "a", "args": ["--lr", "1 e"]},
        {"host": "b", "args": []},
        {"host": "c", "args": ["--lr", "1 e"]},
    ]
    assert [text(message) for message in messages.arguments_differ(Joined(0, hellos))] == [
        "node 1 (b) has other arguments: none; here: --lr '1 e'"
    ]


# -- a round


def test_how_a_round_ended() -> None:
    again = Again(History(), "as asked for")
    drained = NodeReport(0, "host0", 1, 1.0, has_drained=True)
    report = MessageReceived(0, {"kind": "report", "report": drained.to_json()})
    asked = MessageReceived(0, RoundEndRequest("restart", 0, True).to_json())
    assert text(messages.round_ended(played(report), again, has_saver=True)) == "as asked for"
    at_boundary = messages.round_ended(played(asked, report), again, has_saver=True)
    assert text(at_boundary) == "round ended at a step boundary: as asked for"
    stopped = played(StopRequested(signal.SIGINT))
    finish = Finish(130, "stopped by SIGINT")
    for has_saver, what in ((True, "no worker"), (False, "nothing")):
        said = messages.round_ended(stopped, finish, has_saver=has_saver)
        assert text(said) == f"stopped by SIGINT; {what} is left running"
    assert messages.round_ended(played(), Finish(0), has_saver=True) is None
    given_up = messages.round_ended(played(), GiveUp(69, "no team"), has_saver=True)
    assert given_up == Message(("no team",), Style.RED, Level.ERROR)


def test_what_comes_next() -> None:
    """An outage may pass, so that nothing is said of what would be."""
    assert (
        messages.next_step(Again(History(), "1 of at most 3 restarts"))
        == "restarting: 1 of at most 3 restarts"
    )
    assert messages.next_step(Again(History(), "why", 2.0)) == "restarting in 2 s: why"
    assert messages.next_step(GiveUp(77, "why")) == "giving up: why; exit code 77"
    assert messages.next_step(Finish(ExitCode.PREEMPTED)) == "stopping, as asked; exit code 75"


def test_a_slot_that_is_left_out() -> None:
    slots = Slots(4, 4, 2, left_out=(3,))
    assert text(messages.slots_left_out(slots)).startswith("slot 3 left out, ")
    assert messages.slots_left_out(Slots(2, 2, 2, left_out=(1,))) is None


def test_processes_that_nothing_ends() -> None:
    left = [ProcessState(7, "D", "nfs_wait", "python train.py"), ProcessState(8, "D", "", "sh")]
    said = messages.processes_stuck(left, [GpuHolder(7, "python", "/dev/nvidia0")])
    assert said is not None
    assert said.lines[0] == "2 processes left that even SIGKILL does not end:"
    assert "holds /dev/nvidia0: python train.py" in said.lines[1]
    assert "holds" not in said.lines[2]
    assert messages.processes_stuck([], []) is None


# -- saves


def test_a_failed_save_is_told_in_full_once_and_then_counted() -> None:
    failed = SaveFailed(30, "remote", "s3://b/run", "AccessDenied: " + "x" * 300)
    assert text(messages.save_failed(failed, 0)).startswith(
        "step 30 did not become durable in s3://b/run: AccessDenied: xxx"
    )
    assert text(messages.save_failed(failed, 2)) == (
        "step 30 did not become durable in s3://b/run either: the same error, 3 checkpoints in a row"
    )
