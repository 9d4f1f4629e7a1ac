"""Exit codes that one package ends with and the other acts on: 75 of a worker, 0 and 1 of the saver."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import ExitCode
from launcher.events import Joined, MessageReceived, SaverEnded, WorkerExited
from launcher.rendezvous.team import Ready
from launcher.round.round import Round
from launcher.round.saver_flush import Backlog, Flush
from shardckpt.drain import Drained
from tests.kit.contract import DOCUMENT, section, table

EXIT_CODES = Path(__file__).parents[2] / "docs/exit-codes.md"


def test_a_worker_that_was_drained_has_not_failed() -> None:
    """`Drained` ends the process with the code by which `launch` knows that it has saved and left."""
    code = Drained(7, "preemption", is_saved=True).code
    assert code == ExitCode.PREEMPTED == 75
    ready = Ready((0,), "127.0.0.1", 29500, 1)
    round_ = Round().after(Joined(0, [{"host": "a"}])).after(MessageReceived(0, ready.to_json()))
    after = round_.after(WorkerExited(0, 4711, int(code), 0.0))
    assert after.has_drained
    assert not after.has_finished
    assert not after.failed_exits


@pytest.mark.parametrize(("of_saver", "of_launch"), [(0, 0), (1, ExitCode.NOT_PERSISTED), (-9, 74)])
def test_a_saver_that_has_not_made_all_durable(of_saver: int, of_launch: int) -> None:
    flush = Flush(Backlog(), timeout=300.0).after(SaverEnded(of_saver))
    assert flush.exit_code(ExitCode.OK) == of_launch


def test_codes_are_documented() -> None:
    """Those of the contract there, all of them in the list."""
    listed = " ".join(table("launch", EXIT_CODES))
    assert all(str(code.value) in listed for code in ExitCode)
    assert "`launch` ends with 75" in section("Signals and exit codes")
    assert "74" in section("The saver")
    assert "with exit code 0 if" in DOCUMENT.read_text()
