"""Leases: whether another job is at work in a run, and how long it takes to find out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

import shardckpt
from shardckpt.environment import JobEnvironment
from shardckpt.errors import NotACheckpointError, RunInUseError, SaveError, SupersededError
from shardckpt.format import records
from shardckpt.ranks.world import current_ranks
from shardckpt.run.attempt_keeper import AttemptKeeper, Condition
from shardckpt.run.attempts import Attempt, claim_attempt
from shardckpt.run.lease import LEASE, Holder, Lease, Terms, job_names, read_lease
from shardckpt.run.places import ATTEMPT, iter_places
from shardckpt.saving import claim as claiming
from shardckpt.saving.backend import JobAttempt
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import saver_thread
from tests.kit.servers import S3Server

SHORT = Terms(renew_every=0.05, lasts=0.6, skew=0.1)
LIMIT = 30.0


def holder(name: str, **options: Any) -> Holder:
    """Of a job on another host, unless told otherwise."""
    return msgspec.structs.replace(Holder((name,), "node7", "another machine", {"17": 1}), **options)


def begun(root: Storage, by: Holder, terms: Terms = SHORT) -> str:
    """An attempt that was claimed just now."""
    return claim_attempt(root, Attempt.begin(0, by), terms=terms)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def test_a_second_job_is_refused(run: Storage) -> None:
    """As soon as the first one has renewed its lease."""
    keeper = AttemptKeeper(Attempt.begin(0, holder("first")), lambda: run, terms=SHORT)
    keeper.claim()
    assert keeper.wait(LIMIT) == "attempt-0001"
    with pytest.raises(
        RunInUseError, match=r"attempt-0001 is being written by a job on node7, which is at work"
    ):
        begun(run, holder("second"))
    keeper.end(LIMIT, stop=True)
    assert begun(run, holder("second")) == "attempt-0002"  # at once


def test_a_job_that_is_gone_delays_another_for_as_long_as_its_lease_lasts(run: Storage) -> None:
    begun(run, holder("first"))
    told: list[str] = []
    started = time.monotonic()
    attempt = Attempt.begin(0, holder("second"))
    assert claim_attempt(run, attempt, terms=SHORT, tell=told.append) == "attempt-0002"
    assert time.monotonic() - started >= SHORT.lasts
    (text,) = told
    assert (
        "attempt-0001 was begun by a job on node7, which may still be at work: looking for up to 0.6 s"
        in text
    )


FOR_EVER = Terms(lasts=120.0)


@pytest.mark.parametrize(
    "how",
    ["the same job", "dead here", "old", "old by a clock that is behind", "over", "damaged", "no lease"],
)
def test_what_delays_nobody(how: str, run: Storage) -> None:
    first = holder("first")
    if how == "dead here":
        own = Holder.of_this_process(())
        first = holder("first", machine=own.machine, processes={str(os.getpid()): 1})
    name = begun(run, first, FOR_EVER)
    age = {"old": 3600, "old by a clock that is behind": 121 + 30}.get(how, 0)
    lease = Lease("x", first, time.time() - age, 120.0, is_over=how == "over")
    if how in ("old", "old by a clock that is behind", "over"):
        run.at(name).write(LEASE, lease.encode())
    if how == "damaged":
        run.at(name).write(ATTEMPT, b"{}")
    if how == "no lease":  # of an earlier version
        run.at(name).write(
            ATTEMPT, records.encode({"format": records.FORMAT, "id": "x", "created": time.time()})
        )
    second = holder("second", names=("second", "first")) if how == "the same job" else holder("second")
    asked: list[float] = []
    assert claim_attempt(run, Attempt.begin(0, second), sleep=asked.append) == "attempt-0002"
    assert asked == []


def test_clocks_that_differ(run: Storage) -> None:
    """By up to 30 s, in either direction: a job that lives is found out by what it does, not by its clock."""
    name = begun(run, holder("first"), FOR_EVER)
    for off in (-29.0, 29.0, 1000.0):
        count = iter(range(1000))

        def renew(_seconds: float, off: float = off, count: Any = count) -> None:
            lease = Lease("x", holder("first"), time.time() + off + next(count), 120.0)
            run.at(name).write(LEASE, lease.encode())

        renew(0)
        with pytest.raises(RunInUseError):
            claim_attempt(run, Attempt.begin(0, holder("second")), sleep=renew)


def test_a_lease_lasts_no_longer_than_is_sensible(run: Storage) -> None:
    """Whatever it says, nobody waits for two minutes."""
    name = begun(run, holder("first"), Terms(lasts=1e9))
    run.at(name).write(LEASE, Lease("x", holder("first"), time.time() - 151, 1e9).encode())
    assert begun(run, holder("second")) == "attempt-0002"


@pytest.mark.parametrize("number", [(1 << 63) - 1, 10**40])
def test_a_number_that_leaves_none_for_another_attempt(number: int, tmp_path: Path) -> None:
    """What would be saved in that one could not be read: it is an error instead."""
    (tmp_path / f"attempt-{number}").mkdir()
    with pytest.raises(NotACheckpointError, match=f"has an attempt {number}, .*Delete its folder"):
        claim_attempt(open_storage(tmp_path))
    with (
        pytest.raises(SaveError, match=f"has an attempt {number}"),
        shardckpt.Checkpointer(tmp_path, snapshots=0) as checkpointer,
    ):
        checkpointer.save(1, {"a": 1})


def test_the_same_attempt_is_claimed_once(run: Storage) -> None:
    """Another process that takes over finds what the one before has claimed."""
    attempt = Attempt.begin(0, holder("first"))
    assert {claim_attempt(run, attempt) for _ in range(3)} == {"attempt-0001"}


def test_what_nobody_wants_any_more_is_not_claimed_after_others(run: Storage) -> None:
    begun(run, holder("first"))
    mine = Attempt.begin(0, holder("first"))
    with pytest.raises(SupersededError, match="the run has gone on in attempt-0001"):
        claim_attempt(run, mine, is_wanted=lambda: False)
    assert claim_attempt(run, mine) == "attempt-0002"


class Overwriting:
    """A storage without conditional puts."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, data: bytes) -> None:
        self._inner.write(path, data)

    def exclusive(self) -> bool:
        return False


def test_a_job_that_another_one_has_overtaken_is_told(run: Storage) -> None:
    """Where two began at once on a storage that does not keep them apart, or a job was taken for dead."""
    told: list[Condition] = []
    is_told = threading.Event()

    def tell(condition: Condition) -> None:
        told.append(condition)
        if condition.notice:
            is_told.set()

    storage: Any = Overwriting(run)
    keeper = AttemptKeeper(Attempt.begin(0, holder("first")), lambda: storage, tell=tell, terms=SHORT)
    keeper.claim()
    name = keeper.wait(LIMIT)
    other = Attempt.begin(0, holder("second"))
    record = {"format": records.FORMAT, "id": other.id, "created": time.time()}
    run.write(f"{name[:12]}-ffffffff/{ATTEMPT}", records.encode(record))
    assert is_told.wait(LIMIT)
    keeper.end(LIMIT, stop=True)
    assert "the run has gone on in attempt-0001-ffffffff, which another job has begun" in told[-1].notice


def test_a_saver_renews_and_ends_the_lease(tmp_path: Path) -> None:
    """Not the trainer, whose process has a saver; when the job ends, the lease is over."""
    state = {"t": torch.ones(3)}
    with saver_thread() as saver:
        checkpointer = shardckpt.Checkpointer(tmp_path, snapshots=2)
        checkpointer.restore(state)
        folder = open_storage(tmp_path).at("attempt-0001")
        first = read_lease(folder, ATTEMPT)
        assert first is not None
        assert not first.is_over
        assert str(os.getpid()) in first.holder.processes
        checkpointer.save(1, state)
        checkpointer.close()
        assert saver.drain() == 0
    last = read_lease(folder, ATTEMPT)
    assert last is not None
    assert last.is_over


@pytest.mark.parametrize("kind", ["conditional puts", "no conditional puts"])
def test_object_storage(kind: str, moto_s3: S3Server, rclone_s3: S3Server) -> None:
    server = moto_s3 if kind == "conditional puts" else rclone_s3
    root = open_storage(server.url("lease"), dict(server.options))
    keeper = AttemptKeeper(Attempt.begin(0, holder("first")), lambda: root, terms=SHORT)
    keeper.claim()
    keeper.wait(LIMIT)
    with pytest.raises(RunInUseError):
        begun(root, holder("second"), Terms(lasts=5.0))
    keeper.end(LIMIT, stop=True)
    begun(root, holder("second"))
    assert len(root.list()) == 2
    assert list(iter_places(root)) == []


def test_who_is_of_one_job(tmp_path: Path) -> None:
    """All rounds in a run directory, all nodes of a rendezvous, all tries of a Slurm job; nobody else."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = {"LAUNCH_RUN_DIR": str(tmp_path / "a"), "LAUNCH_SAVER": "s1", "TORCHELASTIC_RUN_ID": "a"}
    again = {**a, "LAUNCH_SAVER": "s2"}
    b = {**a, "LAUNCH_RUN_DIR": str(tmp_path / "b"), "LAUNCH_SAVER": "s3", "TORCHELASTIC_RUN_ID": "b"}
    elsewhere = {
        **b,
        "LAUNCH_RUN_DIR": str(tmp_path / "none"),
        "LAUNCH_SAVER": "s4",
        "TORCHELASTIC_RUN_ID": "none",
    }

    def same(one: dict[str, str], other: dict[str, str]) -> bool:
        names, others = (job_names(JobEnvironment.read(environ)) for environ in (one, other))
        return Holder(names).is_same_job(Holder(others))

    assert same(a, again)
    assert not same(a, b)
    assert not same(a, elsewhere)
    assert not same({}, {})
    meeting = {"TORCHELASTIC_RUN_ID": "job7"}
    assert same({**elsewhere, **meeting}, {**elsewhere, **meeting, "LAUNCH_SAVER": "s5"})
    slurm = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}
    assert same(slurm, slurm)
    assert not same(slurm, {**slurm, "SLURM_JOB_ID": "13"})


class _Claiming:
    """A session whose attempt is claimed once it has been looked at so often, and that tells so twice."""

    def __init__(self, notice: str, looks: int) -> None:
        self.notice, self.looks = notice, looks

    def adopt(self, job: JobAttempt) -> None:
        self.job = job
        for _ in range(2):
            job.tell(Condition(notice=self.notice))

    def wait_claimed(self, _patience: float, *, is_urgent: bool) -> str:
        assert not is_urgent
        self.looks -= 1
        if self.looks:
            return ""
        self.job.tell(Condition("attempt-0002"))
        return "attempt-0002"

    def learn(self, name: str) -> None:
        assert name == "attempt-0002"


def test_a_look_at_another_job_is_no_outage(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """However long it takes; and it is told once, though the saver tells it to whoever asks."""
    session = cast("SaveSession", _Claiming("may still be at work", looks=3))
    claim = claiming.RunClaim(run, current_ranks(), session, 0, is_restoring=True, look_seconds=0.0)
    assert claim.wait(0.0, has_snapshot=False)
    assert [record.getMessage() for record in caplog.records] == ["may still be at work"]
