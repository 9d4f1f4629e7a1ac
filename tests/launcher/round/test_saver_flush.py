"""What is said and returned after recorded and invented ends of a saver, without a process or a clock."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from launcher.errors import ExitCode
from launcher.events import (
    DeadlinePassed,
    Event,
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaveStaged,
    StopRequested,
    WorkerExited,
)
from launcher.round.saver_flush import Backlog, Flush


def backlog(*events: Event) -> Backlog:
    result = Backlog()
    for event in events:
        result = result.after(event)
    return result


def drain(*events: Event, timeout: float = 300.0) -> Flush:
    result = Flush(Backlog(), timeout)
    for event in events:
        assert result.ending is None
        result = result.after(event)
    return result


def test_a_save_is_pending_in_each_tier_until_it_is_persisted_or_fails_there() -> None:
    both = backlog(
        SavePersisting(7, "local", 0, 999),
        SavePersisting(7, "remote", 0, 999),
        SavePersisting(7, "local", 999, 999),
        WorkerExited(0, 1, 0, 0.0),
    )
    assert str(both) == "step 7: 999 of 999 B (local), step 7: 0 of 999 B (remote)"
    assert str(both.after(SavePersisted(7, "local", "/x", 1.0))) == "step 7: 0 of 999 B (remote)"
    assert str(both.after(SaveFailed(7, "remote", "s3://x", "e"))) == "step 7: 999 of 999 B (local)"
    assert not backlog(SavePersisted(7, "local", "/x", 1.0)).pending


def test_what_has_failed_and_is_not_made_good() -> None:
    """The newest in each tier, until one that is not older is durable there."""
    full = [SaveFailed(step, "local", "/x", f"no space for {step}") for step in (6, 7)]
    remote = SaveFailed(5, "remote", "s3://x", "no bucket")
    told = drain(*full, remote, full[0], SaverEnded(1)).render(12, "saver.log")
    lost = "step 7 is not durable in /x: no space for 7; step 5 is not durable in s3://x: no bucket"
    assert told == f"{lost}; log: saver.log"
    made_good = drain(*full, remote, SavePersisted(8, "local", "/x", 1.0), SaverEnded(1))
    assert made_good.render(12, "saver.log").startswith("step 5 is not durable in s3://x: no bucket;")
    older = drain(*full, SavePersisted(6, "local", "/x", 1.0), SaverEnded(1))
    assert "step 7" in older.render(12, "saver.log")


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 0, "0 of 0 B"),
        (1, 1024, "0.0 of 1.0 KiB"),
        (2**20 - 1, 2**20 - 1, "1024.0 of 1024.0 KiB"),
        (1_234_567_890, 2_000_000_000, "1.1 of 1.9 GiB"),
        (5 * 2**50, 5 * 2**50, "5120.0 of 5120.0 TiB"),
    ],
)
def test_amounts(done: int, total: int, text: str) -> None:
    assert str(backlog(SavePersisting(1, "local", done, total))) == f"step 1: {text} (local)"


@pytest.mark.parametrize(
    ("ending", "timeout", "code"),
    [
        (SaverEnded(0), 300.0, ExitCode.OK),
        (SaverEnded(1), 300.0, ExitCode.NOT_PERSISTED),
        (SaverEnded(-9), 300.0, ExitCode.NOT_PERSISTED),
        (SaverEnded(1), 0.0, ExitCode.NOT_PERSISTED),
        (DeadlinePassed(), 300.0, ExitCode.NOT_PERSISTED),
        (DeadlinePassed(), 0.0, ExitCode.OK),  # nobody wanted to know
        (StopRequested(2), 300.0, 130),
    ],
)
def test_exit_codes(ending: Event, timeout: float, code: int) -> None:
    """That of the job, unless it is 0 and something is not durable."""
    ended = drain(ending, timeout=timeout)
    assert ended.exit_code(of_job=0) == code
    assert ended.exit_code(of_job=5) == 5
    assert ended.succeeded == (code == 0)


@pytest.mark.parametrize(
    ("ending", "timeout", "told"),
    [
        (SaverEnded(1), 9.0, "not every checkpoint became durable: .* with exit code 1; log: saver.log"),
        (
            SaverEnded(-9),
            9.0,
            r"the saver was lost: .*SIGKILL.*, and of {left} what is missing; .*saver.log",
        ),
        (
            DeadlinePassed(),
            0.0,
            "not waiting .* --drain-timeout 0 says; not persisted yet: {left}; .*pid 12.*",
        ),
        (
            DeadlinePassed(),
            9.0,
            "the saver is not done after 9 s .*; not persisted yet: {left}; .*pid 12.*",
        ),
        (StopRequested(2), 9.0, "SIGINT: not waiting .*; not persisted yet: {left}; .*pid 12.*"),
    ],
)
def test_what_is_told_of_what_is_left(ending: Event, timeout: float, told: str) -> None:
    begun = [SavePersisting(step, "local", 0, 100) for step in (6, 7)]
    ended = drain(*begun, SavePersisted(6, "local", "/x", 1.0), ending, timeout=timeout)
    pattern = told.format(left=re.escape("step 7: 0 of 100 B (local)"))
    assert re.fullmatch(pattern, ended.render(12, "saver.log"))


@pytest.mark.parametrize(
    ("halt", "told"),
    [
        ("stopped by a signal (SIGSTOP)", r"`kill -CONT 12` has it go on"),
        ("in uninterruptible sleep in nfs_wait", "it goes on as soon as the kernel lets it"),
    ],
)
def test_a_saver_that_cannot_go_on_is_named(halt: str, told: str) -> None:
    """After the time that workers have waited for it, and launch."""
    ended = replace(drain(SavePersisting(7, "local", 0, 100)), timeout=4.0, waited=5.0, halt=halt)
    ended = ended.after(DeadlinePassed())
    assert ended.exit_code(0) == ExitCode.NOT_PERSISTED
    assert ended.render(12, "saver.log") == (
        f"the saver (pid 12) is {halt}, and is not done after 9 s (--drain-timeout); not persisted yet: "
        f"step 7: 0 of 100 B (local); {told}"
    )
    waited_for_it_all = replace(drain(timeout=0.0), waited=5.0).after(DeadlinePassed())
    assert waited_for_it_all.exit_code(0) == ExitCode.NOT_PERSISTED


@pytest.mark.parametrize(
    ("since", "code"),
    [
        ([SavedByWorkers(8, "local"), SavedByWorkers(9, "remote")], ExitCode.OK),
        ([SavedByWorkers(8, "local")], ExitCode.NOT_PERSISTED),  # what goes to the other tier is missing
        ([SavedByWorkers(8, "local"), SavedByWorkers(6, "remote")], ExitCode.NOT_PERSISTED),
        ([SavedByWorkers(8, "local"), SavedByWorkers(9, "remote"), SaveStaged(10)], ExitCode.NOT_PERSISTED),
        ([], ExitCode.NOT_PERSISTED),
    ],
)
def test_a_frozen_saver_holds_nothing_that_workers_have_not_saved_since(
    since: list[Event], code: int
) -> None:
    given = [SaveFailed(6, "local", "/x", "e"), SavePersisting(7, "remote", 0, 9), SaveStaged(8)]
    ended = replace(drain(*given, *since, DeadlinePassed(), timeout=9), halt="stopped")
    assert ended.exit_code(of_job=0) == code
    told = ended.render(12, "saver.log")
    assert ("as old as what the ranks have saved by themselves, or older; " in told) == (code == 0)


def test_what_is_told() -> None:
    assert drain(SaverEnded(0)).render(None, "saver.log") == ""
    assert drain().render(None, "saver.log") == ""
    assert "missing" not in Backlog().describe_loss(SaverEnded(-9), "saver.log")
    saves = [SavePersisted(7, "local", "/x", 1.0), SavePersisted(7, "remote", "s3://x", 2.5)]
    told = drain(*saves, SaverEnded(0)).render(None, "saver.log")
    assert told == "persisted step 7 to /x in 1.0 s, step 7 to s3://x in 2.5 s"
    cut_short = Flush(Backlog(), 4.3558, "--grace").after(DeadlinePassed()).render(12, "saver.log")
    assert cut_short.startswith("the saver is not done after 4.36 s (--grace);")
    told = drain(DeadlinePassed(), timeout=2.5).render(12, "saver.log")
    assert told == (
        "the saver is not done after 2.5 s (--drain-timeout); "
        "it goes on in the background (pid 12) until that is done"
    )
