"""What is read from a failed rank's files, and the verdict that is made of it, on one node and on several."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.diagnosis.death import read_death
from launcher.diagnosis.judge import find_culprit, fingerprint, judge
from launcher.diagnosis.reports import Death, NodeReport
from launcher.diagnosis.verdict import Verdict
from launcher.events import WorkerExited
from launcher.run_dir import RankFiles
from launcher.system.oom import OomWatch

TRACEBACK = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    f()
KeyError: 'x'
"""


@pytest.fixture
def files(tmp_path: Path) -> RankFiles:
    for name in ("out", "err"):
        (tmp_path / name).touch()
    return RankFiles(0, tmp_path / "out", tmp_path / "err", tmp_path / "error", tmp_path)


def gathered(
    files: RankFiles, code: int = 1, oom: OomWatch | None = None, *, is_ours: bool = False
) -> Death:
    return read_death(files, WorkerExited(0, 100, code, 1.0), "here", 1e9, oom, is_ours)


# -- what is gathered


def test_everything_is_gathered(files: RankFiles) -> None:
    files.err.write_text(f"loading\n{TRACEBACK}bye\n")
    files.progress.write_text(f"{1200:20d} {1e9:20.6f}\n")
    death = gathered(files)
    assert (death.rank, death.pid, death.code, death.host, death.at) == (0, 100, 1, "here", 1e9)
    assert death.step == 1200
    assert death.has_traceback
    assert death.error == "KeyError: 'x'"
    assert "\n".join(death.lines) + "\n" == TRACEBACK
    assert death.log == str(files.err)


def test_last_lines_without_a_traceback(files: RankFiles) -> None:
    """stderr's, or stdout's if there is nothing on stderr; of a progress bar its last state."""
    files.out.write_text("".join(f"step {i}\n" for i in range(100)))
    assert gathered(files).lines == tuple(f"step {i}" for i in range(90, 100))
    files.err.write_bytes(b"\r 1%\r 2%\r 3%\xff")
    assert gathered(files).lines == (" 3%\ufffd",)
    assert gathered(files).error is None


def test_the_error_file_of_torchelastic(files: RankFiles) -> None:
    message = {"message": "KeyError: 'z'", "extraInfo": {"py_callstack": TRACEBACK.replace("x", "z")}}
    files.error.write_text(json.dumps({"message": message}))
    assert gathered(files).error == "KeyError: 'z'"
    assert gathered(files).has_traceback
    files.error.write_text(json.dumps({"message": "no call stack was told"}))
    files.err.write_text("a line\n")
    assert gathered(files).error == "no call stack was told"
    assert gathered(files).lines == ("a line",)
    assert not gathered(files).has_traceback
    for garbage in ("", "{", "[]", '{"message": {}}', "1"):
        files.error.write_text(garbage)
        assert gathered(files).error is None


def test_missing_files_are_no_evidence(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    death = gathered(RankFiles(0, nowhere, nowhere, nowhere, nowhere))
    assert (death.lines, death.error, death.step) == ((), None, None)


@pytest.fixture
def oom(tmp_path: Path) -> OomWatch:
    """A machine whose kernel has killed once for want of memory since the round's start."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("oom_kill 0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 62500000 kB\n")
    watch = OomWatch(tmp_path)
    (tmp_path / "proc/vmstat").write_text("oom_kill 1\n")
    return watch


def test_whose_sigkill_it_was(files: RankFiles, oom: OomWatch) -> None:
    assert "(the machine's 64.0 GB)" in (gathered(files, -9, oom).kill or "")
    assert gathered(files, -9, oom, is_ours=True).kill is None
    assert gathered(files, -11, oom).kill is None
    assert gathered(files, -9).kill is None


def test_memory_that_a_dataloader_worker_lacked(files: RankFiles, oom: OomWatch) -> None:
    said = TRACEBACK.replace(
        "KeyError: 'x'", "RuntimeError: DataLoader worker (pid 23018) is killed by signal: Killed. "
    )
    files.err.write_text(said)
    death = gathered(files, 1, oom)
    assert (death.kill or "").startswith("its DataLoader worker was ")
    assert "killed a DataLoader worker" in (verdict_on(death).hint or "")
    assert verdict_on(death).cause.endswith(f" (exit code 1); {death.kill}")
    assert find_culprit([death]) is death
    oom.mark()
    assert gathered(files, 1, oom).kill is None  # the kernel has not killed for that


def test_a_dataloader_worker_that_died_of_something_else(files: RankFiles, oom: OomWatch) -> None:
    said = "RuntimeError: DataLoader worker (pid 23018) is killed by signal: Segmentation fault. "
    files.err.write_text(TRACEBACK.replace("KeyError: 'x'", said))
    assert gathered(files, 1, oom).kill is None


# -- who is to blame


def died(rank: int, code: int = 1, error: str | None = None, **fields: object) -> Death:
    known = {"has_traceback": error is not None, "lines": (error,) if error else (), **fields}
    return Death(rank, "here", 100 + rank, code, 1e9 + rank / 8, error=error, **known)  # type: ignore[arg-type]


GLOO = "RuntimeError: [/w/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:642: "
RESET = f"{GLOO}Connection reset by peer. This is typically caused by a remote worker hanging"
CLOSED = "RuntimeError: [/w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8388."
TIMEOUT = "RuntimeError: [/w/gloo/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation"
BARRIER = "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms (ProcessGroup)"
STORE = "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cpu//0"
WATCHDOG = (
    "[PG 0 Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=42, OpType=ALLREDUCE"
)
ABORTED = "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 0."
REMOTE = (
    "torch.distributed.DistBackendError: NCCL error, remote process exited or there was a network error"
)
UNHANDLED = (
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:20, unhandled cuda error"
)
OWN = "ValueError: boom"
DATA_SERVER = "ConnectionResetError: [Errno 104] Connection reset by peer"


@pytest.mark.parametrize(
    ("deaths", "culprit"),
    [
        ([died(2, 1, OWN), died(0, -15, is_ours=True)], 2),
        ([died(2, -9), died(1, 1, RESET)], 2),
        # Interpreters take their time to end: a victim may be gone before its culprit.
        ([died(0, 1, RESET), died(2, 1, OWN)], 2),
        ([died(0, 1, CLOSED), died(2, -15, OWN, is_ours=True)], 2),
        ([died(0, 1, RESET), died(1, -15, is_ours=True), died(2, -9)], 2),
        ([died(0, 1, TIMEOUT), died(1, 1, RESET), died(2, -11)], 2),
        ([died(0, -6, WATCHDOG), died(1, 1, ABORTED), died(2, 1, UNHANDLED)], 2),
        ([died(0, 1, ABORTED), died(1, 1, REMOTE), died(2, 1, DATA_SERVER)], 2),
        ([died(0, 1, "SystemExit: 1", is_ours=True), died(2, 3)], 2),
        ([died(0, 1, "KeyboardInterrupt", is_ours=True), died(2, 1, OWN)], 2),
        ([died(0, -9, is_ours=True), died(2, -9, kill="killed by the kernel, out of memory")], 2),
        # Nobody did anything but wait: those that waited in vain come before those that this broke.
        ([died(0, 1, RESET), died(1, 1, RESET)], 0),
        ([died(0, 1, RESET), died(1, 1, BARRIER)], 1),
        ([died(0, 1, STORE), died(1, 1, STORE)], 0),
        ([died(0, -15), died(1, -15, is_ours=True)], 0),
        ([died(0, 1, is_ours=True)], 0),
    ],
)
def test_the_culprit(deaths: list[Death], culprit: int) -> None:
    found = find_culprit(deaths)
    assert found is not None
    assert found.rank == culprit


def test_a_rank_that_passes_on_the_failure_of_another_is_its_victim() -> None:
    """An operation of all ranks raises on all what went wrong on one; who ends first is chance."""
    own = died(0, 1, "shardckpt.errors.CredentialsError: s3://bucket: no credentials")
    told = died(1, 1, "shardckpt.errors.CredentialsError: rank 0: s3://bucket: no credentials")
    assert find_culprit([told, own]) is own
    [victim] = judged(reported(told, own)).victims
    assert (victim.how, victim.of_it, victim.later) == ("told of rank 0's failure", True, 0.125)
    first = replace(died(2, 1, OWN), at=1e9 - 1)
    assert judged(reported(first, own, told)).victims[1].how == told.error
    itself = died(0, 1, "CredentialsError: rank 0: s3://bucket: no credentials")
    assert find_culprit([told, itself]) is itself
    assert find_culprit([told]) is told
    mutual = died(0, 1, "ValueError: rank 1: bad")
    assert find_culprit([told, mutual]) is told
    stopped = died(0, -15, is_ours=True)
    assert find_culprit([told, stopped]) is told


def test_no_culprit() -> None:
    assert find_culprit([]) is None
    assert find_culprit([died(0, -15, is_ours=True), died(1, -9, is_ours=True)]) is None


def test_a_lost_node_explains_what_peers_say() -> None:
    assert find_culprit([died(0, 1, RESET), died(1, 1, TIMEOUT)], is_explained=True) is None
    own = died(2, 1, OWN)
    assert find_culprit([died(0, 1, RESET), own], is_explained=True) is own


# -- what repeats

IN_F = ('  File "/a/t.py", line 3, in f',)
IN_G = ('  File "/a/t.py", line 9, in g',)


@pytest.mark.parametrize(
    ("once", "again"),
    [
        (
            died(
                0,
                1,
                "ValueError: bad 17 in /tmp/a/x.bin at 0x7f3a",
                lines=('  File "/a/t.py", line 3, in f',),
            ),
            died(
                5,
                1,
                "ValueError: bad 4 in /tmp/b/x.bin at 0x1234",
                lines=('  File "/b/t.py", line 3, in f',),
            ),
        ),
        (died(0, -11), died(3, -11)),
        (died(0, -6, "what it says: 12"), died(0, -6, "what it says: 13")),
        (
            died(0, -9, kill="killed by the kernel, out of memory (a)"),
            died(1, -9, kill="out of memory (b)"),
        ),
        (died(0, 3, lines=("no data in step 7",)), died(0, 3, lines=("no data in step 8",))),
        (
            died(0, 1, "RuntimeError: DataLoader worker (pid 1) is killed by signal: Killed.", lines=IN_F),
            died(0, 1, "RuntimeError: DataLoader worker (pid 2) is killed by signal: Killed.", lines=IN_G),
        ),
        (
            died(0, 1, "bad 17", has_traceback=False, lines=("a",)),
            died(0, 1, "bad 18", has_traceback=False, lines=("b",)),
        ),
    ],
)
def test_the_same_failure_has_the_same_fingerprint(once: Death, again: Death) -> None:
    assert fingerprint(once) is not None
    assert fingerprint(once) == fingerprint(again)


def test_different_failures_have_different_fingerprints() -> None:
    frame = ('  File "/a/train.py", line 3, in f',)
    other = ('  File "/a/train.py", line 4, in f',)
    deaths = [
        died(0, 1, "ValueError: a", lines=frame),
        died(0, 1, "ValueError: b", lines=frame),
        died(0, 1, "KeyError: a", lines=frame),
        died(0, 1, "ValueError: a", lines=other),
        died(0, -11),
        died(0, -6),
        died(0, -9, kill="killed by the kernel, out of memory"),
        died(0, 3, lines=("a",)),
        died(0, 4, lines=("a",)),
    ]
    prints = [fingerprint(death) for death in deaths]
    assert None not in prints
    assert len(set(prints)) == len(deaths)


@pytest.mark.parametrize(
    "death",
    [
        died(0, -9, lines=("step 3",)),
        died(0, -15),
        died(0, 1),
        died(0, 1, "shardckpt.errors.OutOfReachError: s3://b/run has been out of reach for 1800 s"),
    ],
)
def test_nothing_can_be_said_of_some(death: Death) -> None:
    assert fingerprint(death) is None


# -- the verdict


def reported(*deaths: Death, node: int = 0, host: str = "here", **fields: object) -> NodeReport:
    at = deaths[0].at if deaths else 1e9 + 9
    known = {"at": at, "seconds": at - 1e9 + 0.5, "deaths": deaths, **fields}
    return NodeReport(node, host, 2, **known)  # type: ignore[arg-type]


def judged(
    *reports: NodeReport, lost: dict[int, tuple[str, str]] | None = None, saved: int | None = None
) -> Verdict:
    return judge(reports, lost or {}, "restarting", newest_saved=saved)


def verdict_on(death: Death) -> Verdict:
    return judged(reported(death))


def test_verdict_on_one_node() -> None:
    """One block says who, why, who else, and what comes next; the same goes to the JSON file."""
    lines = ("Traceback …", "ValueError: boom")
    first = replace(died(1, 1, OWN), lines=lines, step=1203, log="/r/logs/rank-00001.err")
    others = [died(rank, 1, RESET) for rank in (2, 3, 5)]
    own = died(6, -11)
    stopped = [died(rank, -15, is_ours=True) for rank in (7, 8)]
    verdict = judged(reported(first, *others, own, *stopped, step=1203), saved=1200)
    moment = time.strftime("%H:%M:%S", time.localtime(1e9))
    assert verdict.render() == [
        "round 2 failed after 0.6 s",
        f"  rank 1 failed first, at {moment}.125: ValueError: boom (exit code 1)",
        "  its traceback:",
        "    Traceback …",
        "    ValueError: boom",
        "  then, of it: ranks 2-3, 5: connection reset by peer",
        "  then: rank 6: killed by SIGSEGV (signal 11, a crash in native code)",
        "  stopped: ranks 7-8",
        "  step 1203 reached, snapshot of step 1200: 3 steps lost",
        "  log: /r/logs/rank-00001.err",
        "  restarting",
    ]
    record = json.loads(json.dumps(verdict.to_json()))
    assert (record["round"], record["rank"], record["code"], record["step"]) == (2, 1, 1, 1203)
    assert (record["newest_saved"], record["steps_lost"]) == (1200, 3)
    assert record["stopped"] == [7, 8]
    assert record["victims"][0] == {
        "rank": 2,
        "how": "connection reset by peer",
        "of_it": True,
        "later": 0.125,
    }
    assert "here" not in "\n".join(verdict.render())


@pytest.mark.parametrize(
    ("step", "saved", "line"),
    [
        (5, None, "  step 5 reached"),
        (5, 5, "  step 5 reached and saved: nothing is lost"),
        (5, 4, "  step 5 reached, snapshot of step 4: 1 step lost"),
        (5, 0, "  step 5 reached, snapshot of step 0: 5 steps lost"),
    ],
)
def test_steps_lost(step: int, saved: int | None, line: str) -> None:
    assert line in judged(reported(died(0, 1, OWN), step=step), saved=saved).render()


@pytest.mark.parametrize(("step", "saved"), [(None, 5), (5, None), (None, None)])
def test_steps_lost_that_are_not_known(step: int | None, saved: int | None) -> None:
    verdict = judged(reported(died(0, 1, OWN), step=step), saved=saved)
    assert json.loads(json.dumps(verdict.to_json()))["steps_lost"] is None


def test_a_snapshot_in_memory_alone_is_not_promised() -> None:
    verdict = judge([reported(died(0, 1, OWN), step=5)], {}, "", newest_saved=5, is_only_in_memory=True)
    assert "  step 5 reached; snapshot of step 5 in memory" in verdict.render()


def test_a_worker_that_leaves_without_the_others() -> None:
    stopped = died(1, -signal.SIGTERM, is_ours=True)
    verdict = judged(reported(stopped, ended=((0, 75, 1e9),)))
    assert verdict.rank is None
    cause = "  rank 0 had ended before the others, with exit code 75, as after saving to leave"
    assert verdict.render()[1:3] == [cause, "  stopped: rank 1"]


def test_a_worker_that_failed_and_was_stopped_before_it_had_ended() -> None:
    """The signal by which it ended then says nothing of why, nor does it give the exit code."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        verdict = judged(reported(died(0, -signum, OWN, is_ours=True)))
        assert (verdict.cause, verdict.code) == (f"{OWN} (exit code 1)", 1)


@pytest.mark.parametrize(
    ("code", "error", "expected"),
    [
        (-signal.SIGTERM, OWN, 1),
        (-signal.SIGKILL, OWN, 1),
        (-signal.SIGTERM, "SystemExit: 3", 3),
        (-signal.SIGTERM, "SystemExit: no data", 1),
        (-signal.SIGTERM, "KeyboardInterrupt", -signal.SIGTERM),
        (-signal.SIGTERM, None, -signal.SIGTERM),
        (7, OWN, 7),
    ],
)
def test_what_it_would_have_ended_with(code: int, error: str | None, expected: int) -> None:
    death = replace(died(0, code, error or "", is_ours=True), error=error, has_traceback=error is not None)
    assert death.failure_code == expected
    others = replace(death, is_ours=False)
    assert others.failure_code == code


def test_an_answer_to_a_stop_is_no_failure(files: RankFiles) -> None:
    """A worker may handle SIGTERM, and raise; what it had raised before that is its own."""
    exit_ = WorkerExited(0, 100, 1, 1.0)
    files.err.write_text("loading\n")
    before = files.err.stat().st_size
    files.err.write_text(f"loading\n{TRACEBACK}")
    answer = read_death(files, exit_, "here", 1e9, None, True, before)
    assert not answer.has_traceback
    assert find_culprit([answer], is_explained=True) is None  # a hang, or a node that is lost
    own = read_death(files, exit_, "here", 1e9, None, True, before + 60)
    assert find_culprit([own]) == own


def test_an_error_marked_as_uncaught_counts_however_the_teardown_went_on(files: RankFiles) -> None:
    marked = "".join(f"[rank0]: {line}\n" for line in TRACEBACK.splitlines())
    files.err.write_text(f"{marked}closing the loader\nstill closing\n")
    death = gathered(files, -signal.SIGKILL, is_ours=True)
    assert (death.error, death.failure_code) == ("KeyError: 'x'", 1)


@pytest.mark.parametrize("error", [CLOSED, TIMEOUT])
def test_a_rank_that_had_ended_explains_that_others_lost_it(error: str) -> None:
    """sys.exit(0) in one rank breaks the others, and is no failure itself."""
    report = reported(died(1, 1, error), ended=((0, 0, 1e9), (2, 0, 1e9 + 5)))
    verdict = judged(NodeReport.from_json(json.loads(json.dumps(report.to_json()))))
    assert (verdict.rank, verdict.finished, verdict.hint) == (None, (0,), None)
    assert verdict.render()[1] == "  rank 0 had ended before the others, with exit code 0"
    assert verdict.render()[2] == "  rank 1's traceback:"
    assert "  then, of it: rank 1: " in "\n".join(verdict.render())
    left = judged(reported(died(1, 1, error), ended=((0, 75, 1e9),)))
    assert (left.finished, left.drained) == ((), (0,))
    assert left.render()[1].startswith("  rank 0 had ended before the others, with exit code 75")
    assert judged(reported(died(1, 1, OWN), ended=((0, 0, 1e9),))).finished == ()


def test_headlines_are_short_and_paths_as_they_would_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = replace(died(0, 1, f"ValueError: {'x' * 3000}"), log=str(tmp_path / "runs/a/rank-00000.err"))
    text = verdict_on(long).render()
    assert len(text[1]) < 280
    assert text[1].endswith("x… (exit code 1)")
    assert "  log: runs/a/rank-00000.err" in text
    assert "x" * 3000 in "\n".join(text)


def test_verdict_on_several_nodes() -> None:
    """Order is that of death on all nodes, and the first one's host is told."""
    near = reported(died(0, 1, RESET), died(1, 1, CLOSED), step=7)
    far = reported(replace(died(9, -9), host="far"), node=1, host="far", step=8)
    verdict = judged(near, far)
    assert (verdict.rank, verdict.host, verdict.node, verdict.step) == (9, "far", 1, 8)
    text = verdict.render()
    assert text[1].startswith("  rank 9 on far failed first, at ")
    assert "  then, of it: rank 0: connection reset by peer" in text
    assert "  then, of it: rank 1: connection closed by peer" in text
    assert verdict.time == 1e9 + 9 / 8
    earlier = reported(replace(died(8, 1, OWN), at=1e9 - 1), node=1, host="far")
    assert judged(reported(died(0, 1, OWN), died(1, 1, OWN)), earlier).rank == 8
    without = judged(reported(at=1e9 + 2), reported(at=1e9 + 1, node=1, host="far"))
    assert (without.rank, without.time) == (None, 1e9 + 1)


def test_a_report_passes_through_json() -> None:
    report = reported(died(1, 1, OWN), ended=((0, 0, 1e9),), hang=("where",), trouble="it", step=7)
    assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_verdict_on_a_lost_node() -> None:
    near = reported(died(0, 1, RESET), died(1, 1, RESET))
    verdict = judged(near, lost={1: ("far", "no sign of life for 5 s")})
    assert verdict.rank is None
    text = verdict.render()
    assert text[1] == "  lost: node 1 (far): no sign of life for 5 s"
    assert text[2] == "  then, of it: ranks 0-1: connection reset by peer"
    assert sum("no sign of life" in line for line in text) == 1
    text = judged(reported(died(0, 1, OWN)), lost={1: ("far", "gone")}).render()
    assert "ValueError: boom" in text[1]
    assert "  lost: node 1 (far): gone" in text


def test_verdict_on_a_hang() -> None:
    stacks = (
        "rank 3 is behind: step 118, in train.py:88 in load_batch",
        "ranks 0-2 wait for it in all_reduce",
    )
    stopped = [died(rank, -15, is_ours=True) for rank in range(4)]
    verdict = judged(reported(*stopped, hang=stacks, step=119))
    assert verdict.rank is None
    assert verdict.cause == "no rank made progress any more"
    assert verdict.render() == [
        "round 2 hung after 0.5 s",
        "  no rank made progress any more:",
        f"  {stacks[0]}",
        f"  {stacks[1]}",
        "  stopped: ranks 0-3",
        "  step 119 reached",
        "  restarting",
    ]


def test_a_round_lasts_as_long_as_it_did() -> None:
    """Though the system's clock was set back by an hour meanwhile, on one of two nodes."""
    late = replace(died(0, 1, OWN), at=1e9 - 3600)
    verdict = judged(reported(late, seconds=12.5), reported(node=1, host="far", seconds=11.0))
    assert verdict.render()[0] == "round 2 failed after 12.5 s"


def test_verdict_on_other_trouble() -> None:
    verdict = judged(reported(trouble="rank 1 could not be started: no memory"))
    assert verdict.render()[1:3] == ["  rank 1 could not be started: no memory", "  restarting"]
    both = judged(reported(died(0, 1, OWN), trouble="processes are left"), reported(node=1, host="far"))
    assert "  here: processes are left" in both.render()


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "the GPU's memory is full",
        ),
        ("RuntimeError: CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "nvidia-smi"),
        (UNHANDLED, "NCCL_DEBUG"),
        ("MemoryError", "more memory was asked for at once than could be had"),
        ("RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly", "its own words are in the log"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "/dev/shm"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", "dmesg"),
        ("OSError: [Errno 28] inotify watch limit reached", "max_user_watches"),
        ("OSError: [Errno 28] No space left on device", "full"),
        ("OSError: [Errno 24] Too many open files", "ulimit"),
    ],
)
def test_hints(error: str, hint: str) -> None:
    verdict = verdict_on(died(0, 1, error))
    assert hint in (verdict.hint or "")
    assert f"  hint: {verdict.hint}" in verdict.render()


@pytest.mark.parametrize(
    ("error", "one_rank", "one_host", "two_hosts"),
    [
        (RESET, None, "what the others wrote is in their logs", "the network between the nodes"),
        (TIMEOUT, None, "--hang-timeout", "--hang-timeout"),
    ],
)
def test_hints_about_peers(
    error: str, one_rank: str | None, one_host: str | None, two_hosts: str | None
) -> None:
    """A job of one rank has none, and one host no network."""
    first, second = died(0, 1, error), died(1, -15, is_ours=True)
    for reports, hint in (
        ([reported(first)], one_rank),
        ([reported(first, second)], one_host),
        ([reported(first), reported(second, node=1, host="far")], two_hosts),
    ):
        found = judged(*reports).hint
        assert found is None if hint is None else hint in (found or "")


def test_a_storage_out_of_reach_is_no_peer() -> None:
    """Though words of it are in the paths."""
    lines = (
        '  File "/env/shardckpt/storage.py", line 3, in get',
        "OSError: Connection refused by s3.local",
    )
    first = died(0, 1, lines[1], lines=lines, has_traceback=True)
    verdict = judged(reported(first, died(1, 1, RESET)))
    assert verdict.rank == 0
    assert verdict.hint is None
    assert [victim.of_it for victim in verdict.victims] == [True]


def test_no_hint_where_none_is_known() -> None:
    assert verdict_on(died(0, 1, OWN)).hint is None


def test_a_kill_by_the_kernel_is_the_cause() -> None:
    death = died(0, -9, kill="killed by the kernel, out of memory (cgroup limit 64.0 GB)")
    assert verdict_on(death).cause == death.kill
    assert "it left no output" in "\n".join(verdict_on(death).render())


# -- with the torch that is installed

PAIR = """\
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
rank, path, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=2)
)
x = torch.ones(1)
dist.all_reduce(x)
if rank == 1 and how == "dies":
    os._exit(3)
elif rank == 1:
    sys.stdin.read()
dist.all_reduce(x)
"""

LOADER = """\
import os, signal, torch
from torch.utils.data import DataLoader, Dataset
class Data(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)
for _ in DataLoader(Data(), num_workers=1):
    pass
"""


@pytest.mark.parametrize("how", ["dies", "lags"])
def test_what_gloo_says_of_a_peer(how: str, files: RankFiles, tmp_path: Path) -> None:
    """A real victim is told from its culprit, or from a peer that did not come in time."""
    script = [sys.executable, "-c", PAIR]
    with open(files.err, "wb") as err:
        ranks = [
            subprocess.Popen(
                [*script, str(rank), str(tmp_path / "store"), how],
                stdin=subprocess.PIPE,
                stderr=err if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        code = ranks[0].wait()
    codes = [code, ranks[1].poll() if how == "lags" else ranks[1].wait()]
    ranks[1].kill()
    ranks[1].communicate()
    victim = gathered(files, code)
    assert victim.has_traceback
    assert victim.code == 1
    other = reported(died(7, -15, is_ours=True), node=1, host="far")
    hint = judged(reported(victim), other).hint or ""
    if how == "dies":
        culprit = died(1, 3)
        assert codes[1] == 3
        assert find_culprit([victim, culprit]) is culprit
        assert "network" in hint
    else:
        assert codes[1] is None
        assert find_culprit([victim]) is victim
        assert "did not come to this collective in time" in hint


def test_what_a_dataloader_says_of_its_worker(files: RankFiles) -> None:
    with open(files.err, "wb") as err:
        code = subprocess.run([sys.executable, "-c", LOADER], stderr=err, check=False).returncode
    death = gathered(files, code)
    assert death.error is not None
    assert "is killed by signal: Killed" in death.error
    assert find_culprit([died(2, 1, RESET), death]) is death
    assert "killed a DataLoader worker" in (verdict_on(death).hint or "")
    assert signal.SIGKILL.name not in verdict_on(death).cause
