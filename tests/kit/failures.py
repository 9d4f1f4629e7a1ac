"""Deaths, reports of nodes and verdicts on them, for tests of what is made of failures."""

from __future__ import annotations

from launcher.diagnosis.death import read_death
from launcher.diagnosis.judge import judge
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
"""What gloo, NCCL, torch's stores and a script write."""


def gathered(
    files: RankFiles, code: int = 1, oom: OomWatch | None = None, *, is_ours: bool = False
) -> Death:
    """What is read from the files of a rank that ended with `code`."""
    return read_death(files, WorkerExited(0, 100, code, 1.0), "here", 1e9, oom, is_ours)


def died(rank: int, code: int = 1, error: str | None = None, **fields: object) -> Death:
    """A rank that failed, an eighth of a second after the rank before it."""
    known = {"has_traceback": error is not None, "lines": (error,) if error else (), **fields}
    return Death(rank, "here", 100 + rank, code, 1e9 + rank / 8, error=error, **known)  # type: ignore[arg-type]


def reported(*deaths: Death, node: int = 0, host: str = "here", **fields: object) -> NodeReport:
    """One node's report of round 2."""
    at = deaths[0].at if deaths else 1e9 + 9
    known = {"at": at, "seconds": at - 1e9 + 0.5, "deaths": deaths, **fields}
    return NodeReport(node, host, 2, **known)  # type: ignore[arg-type]


def judged(
    *reports: NodeReport, lost: dict[int, tuple[str, str]] | None = None, saved: int | None = None
) -> Verdict:
    """The verdict on what these nodes report."""
    return judge(reports, lost or {}, "restarting", newest_saved=saved)


def verdict_on(death: Death) -> Verdict:
    """The verdict on a round in which one rank failed."""
    return judged(reported(death))
