"""Which rank is to blame, which failures are the same, and what torch's own messages say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.diagnosis.judge import find_culprit, fingerprint
from launcher.diagnosis.reports import Death, NodeReport
from launcher.run_dir import RankFiles
from tests.kit.failures import (
    ABORTED,
    BARRIER,
    CLOSED,
    DATA_SERVER,
    OWN,
    REMOTE,
    RESET,
    STORE,
    TIMEOUT,
    UNHANDLED,
    WATCHDOG,
    died,
    gathered,
    judged,
    reported,
    verdict_on,
)


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


def test_a_worker_that_failed_and_was_stopped_before_it_had_ended() -> None:
    """The signal by which it ended then says nothing of why, nor does it give the exit code."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        verdict = judged(reported(died(0, -signum, OWN, is_ours=True)))
        assert (verdict.cause, verdict.code) == (f"{OWN} (exit code 1)", 1)


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


def test_a_round_lasts_as_long_as_it_did() -> None:
    """Though the system's clock was set back by an hour meanwhile, on one of two nodes."""
    late = replace(died(0, 1, OWN), at=1e9 - 3600)
    verdict = judged(reported(late, seconds=12.5), reported(node=1, host="far", seconds=11.0))
    assert verdict.render()[0] == "round 2 failed after 12.5 s"


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
