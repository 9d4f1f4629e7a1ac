"""A storage that is out of reach never stops training: not a step, and not a restart that has a snapshot in
memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import OutOfReachError, SaveError, StorageError
from shardckpt.format.manifest import MANIFEST
from shardckpt.run.places import find_place, iter_places, read_manifest
from shardckpt.saver.outage import until_it_answers
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FaultyStorage, HookedStorage, SaverThread, saver_thread
from tests.kit.savers import wait_until
from tests.kit.servers import S3Server, faulty_proxy
from tests.kit.trainers import crash, saver_of
from tests.kit.worlds import Checkpoints, ThreadRanks, run_threads

pytestmark = pytest.mark.usefixtures("no_saver")

LIMIT = 30.0


def state_at(step: int) -> dict[str, Any]:
    return {"weight": torch.full((3000,), float(step)), "step": step}


def committed(url: str | Path) -> list[tuple[int, int]]:
    return [place.order[:2] for place in iter_places(open_storage(url)) if place.is_committed()]


def restored(checkpointer: Checkpointer) -> tuple[str, int]:
    state = state_at(0)
    loaded = checkpointer.restore(state)
    assert loaded is not None
    assert torch.equal(state["weight"], state_at(loaded.step)["weight"])
    return loaded.tier, loaded.step


class Outage:
    """A run's storage, out of reach while `is_on`."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self.is_on = False

    def open(self, url: str, options: dict[str, Any] | None) -> Storage:
        return HookedStorage(open_storage(url, options), self._hook)

    def _hook(self, _method: str, _path: str) -> None:
        if self.is_on:
            raise OutOfReachError(f"{self.url}: cannot reach it")


@pytest.fixture
def outage(tmp_path: Path) -> Outage:
    return Outage(tmp_path / "run")


@pytest.fixture
def saver(outage: Outage) -> Iterator[SaverThread]:
    with saver_thread(outage.open) as made:
        yield made


def crash_in(outage: Outage) -> None:
    """The job's trainers die after step 1, which is durable; then the storage goes out of reach."""
    checkpointer = Checkpointer(outage.url, snapshots=2, every_steps=1)
    assert checkpointer.restore(state_at(0)) is None
    handle = checkpointer.step(1, state_at(1))
    assert handle is not None
    handle.wait()
    crash(checkpointer)
    outage.is_on = True


# -- steps


def _steps(checkpointer: Checkpointer) -> None:
    for step in range(1, 7):
        checkpointer.step(step, state_at(step), {"loss": 0.5})
    checkpointer.save(6, state_at(6))
    checkpointer.save(7, state_at(7))
    checkpointer.save(7, state_at(8), {"loss": 1.0})
    checkpointer.save(3, state_at(3))


@pytest.mark.parametrize("restores", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_no_storage_is_asked_in_a_step(size: int, restores: bool, tmp_path: Path) -> None:
    """Not by the thread that trains: not for whether a step is there, nor for the attempt."""
    training: set[threading.Thread] = set()

    def hook(method: str, path: str) -> None:
        assert threading.current_thread() not in training, f"{method} {path} in a step"

    def train(ranks: ThreadRanks) -> None:
        root = HookedStorage(open_storage(tmp_path), hook)
        checkpointer = Checkpoints(root, ranks, every_steps=2)
        if restores:
            checkpointer.restore(state_at(0))
        training.add(threading.current_thread())
        try:
            _steps(checkpointer)
            checkpointer.step(9, state_at(9))
            if size > 1:  # where `close` looks for the commit itself
                checkpointer.save(9, state_at(9))
                training.discard(threading.current_thread())
            checkpointer.close()
        finally:
            training.discard(threading.current_thread())

    run_threads(size, train)
    assert shardckpt.open(tmp_path).step == 9


def test_one_checkpoint_asks_no_storage_either(tmp_path: Path) -> None:
    training = threading.current_thread()

    def hook(method: str, path: str) -> None:
        assert threading.current_thread() is not training, f"{method} {path}"

    shardckpt.save_async(HookedStorage(open_storage(tmp_path), hook), state_at(1)).wait()  # type: ignore[arg-type]
    assert shardckpt.open(tmp_path).step == 0


@pytest.mark.parametrize("snapshots", [0, 2])
def test_a_storage_that_never_answers_stops_no_step(snapshots: int, moto_s3: S3Server) -> None:
    """A black hole, from the first save on; what is saved last is durable once it answers."""
    go_on = threading.Event()
    with faulty_proxy(moto_s3.endpoint) as proxy, saver_thread() as saver:
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint}
        url = moto_s3.url()
        checkpointer = Checkpointer(url, storage_options=options, snapshots=snapshots, every_steps=1)
        checkpointer.restore(state_at(0))
        proxy.faults = lambda _method, _path: None if go_on.wait(LIMIT) else 503
        for step in range(1, 100):
            checkpointer.step(step, state_at(step))
        assert not go_on.is_set()
        go_on.set()
        checkpointer.close()
        if snapshots:
            assert saver.drain() == 0
    assert shardckpt.load(url, state_at(0), storage_options=moto_s3.options).step == 99


# -- restarts


@pytest.mark.parametrize("crashes", [1, 2, 3])
def test_restarts_in_an_outage(
    crashes: int, outage: Outage, saver: SaverThread, caplog: pytest.LogCaptureFixture
) -> None:
    """Each goes on from memory, with the newest step; the attempts are claimed, in order, when the storage is
    back."""
    crash_in(outage)
    for number in range(crashes):
        checkpointer = Checkpointer(outage.url, snapshots=2, every_steps=1)
        assert restored(checkpointer) == ("memory", number + 1)
        handle = checkpointer.step(number + 2, state_at(number + 2))
        assert handle is not None
        handle.wait("memory")
        assert handle.busy
        if number + 1 < crashes:
            crash(checkpointer)
    assert caplog.text.count("this job goes on from memory, and what it saves stays there") == crashes
    assert committed(outage.url) == [(1, 1)]
    outage.is_on = False
    handle.wait()
    assert "answers again: this job's saves go to attempt-" in caplog.text
    checkpointer.close()
    assert saver.drain() == 0
    newest, *_, oldest = committed(outage.url)
    assert (newest[1], oldest) == (crashes + 1, (1, 1))
    assert handle.url.endswith(f"attempt-{newest[0]:04d}/step-{crashes + 1:08d}")
    manifest = read_manifest(find_place(outage.url))
    assert (manifest.step, manifest.attempt) == (newest[1], newest[0])
    assert restored(Checkpointer(outage.url, snapshots=0)) == ("local", crashes + 1)


def test_an_outage_that_outlasts_the_job(outage: Outage, saver: SaverThread) -> None:
    """The saver does not wait for ever: what is not durable fails, and its exit code says so."""
    crash_in(outage)
    checkpointer = Checkpointer(outage.url, snapshots=2, every_steps=1, commit_timeout=0.5)
    assert restored(checkpointer) == ("memory", 1)
    handle = checkpointer.step(2, state_at(2))
    assert handle is not None
    with pytest.raises(SaveError, match="cannot reach it"):
        handle.wait()
    checkpointer.close()  # the saver answers for it
    assert saver.drain() == 1


def test_an_outage_at_the_end_of_a_job(
    outage: Outage, saver: SaverThread, caplog: pytest.LogCaptureFixture
) -> None:
    """The last save waits for the storage, and is durable when it answers; each end of it is told once."""
    checkpointer = Checkpointer(outage.url, snapshots=2, every_steps=1)
    checkpointer.restore(state_at(0))
    checkpointer.save(1, state_at(1)).wait()
    outage.is_on = True
    handle = checkpointer.step(2, state_at(2))
    assert handle is not None
    wait_until(lambda: "cannot reach it" in caplog.text)
    crash(checkpointer)  # the trainers are gone
    outage.is_on = False
    assert saver.drain() == 0
    assert committed(outage.url) == [(1, 2), (1, 1)]
    told = [record.getMessage() for record in caplog.records if record.name == "shardckpt.saver"]
    assert len(told) == 2
    assert "is out of reach: what is saved stays in memory until it answers" in told[0]
    assert told[1] == f"{outage.url} answers again"


def test_the_answer_to_a_commit_is_lost(tmp_path: Path) -> None:
    """A save that is a checkpoint, though nobody has heard so, is not written again and has not failed."""
    lost: list[str] = []

    class Deaf(FaultyStorage):
        """Loses the answer to the commit."""

        def at(self, path: str) -> Deaf:
            below = Deaf(self._inner.at(path))
            below._log, below._folder = self._log, self._name(path)
            return below

        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if path == MANIFEST and not lost:
                lost.append(path)
                raise OutOfReachError("the connection broke off")

    with saver_thread(lambda url, options: Deaf(open_storage(url, options))) as saver:
        checkpointer = Checkpointer(tmp_path / "run", snapshots=2, every_steps=1)
        checkpointer.restore(state_at(0))
        checkpointer.save(1, state_at(1)).wait()
        checkpointer.close()
        assert saver.drain() == 0
    assert lost == [MANIFEST]
    assert committed(tmp_path / "run") == [(1, 1)]


def test_a_storage_is_tried_until_it_answers() -> None:
    """After pauses that grow, for so many seconds and no longer; what is no outage ends it at once."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def out_of_reach_until(end: float, error: type[Exception] = OutOfReachError) -> list[float]:
        nonlocal now
        now, tries = 0.0, []

        def work() -> None:
            tries.append(now)
            if now < end:
                raise error("gone")

        until_it_answers(work, 20.0, lambda _error: True, sleep=sleep, clock=lambda: now)
        return tries

    assert out_of_reach_until(0.0) == [0.0]
    assert out_of_reach_until(10.0) == [0.0, 0.5, 1.5, 3.5, 7.5, 11.5]
    with pytest.raises(OutOfReachError):
        out_of_reach_until(60.0)
    assert now == 19.5
    with pytest.raises(StorageError):
        out_of_reach_until(60.0, StorageError)
    assert now == 0.0


def test_the_trainer_does_not_look_for_a_save_that_failed(moto_s3: S3Server) -> None:
    """The saver's next messages would wait for that, and with them the memory that they give back."""
    outage = Outage(moto_s3.url("run"))
    with faulty_proxy(moto_s3.endpoint) as proxy, saver_thread(outage.open):
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint}
        with Checkpointer(
            outage.url, storage_options=options, snapshots=2, commit_timeout=0.5
        ) as checkpointer:
            checkpointer.restore(state_at(0))
            checkpointer.save(1, state_at(1)).wait()
            before = len(proxy.requests)
            outage.is_on = True  # for the saver alone
            failed = checkpointer.save(2, state_at(2))
            with pytest.raises(SaveError):
                failed.wait()
            assert proxy.requests[before:] == []
            outage.is_on = False


@pytest.mark.usefixtures("saver")
def test_another_job_that_began_in_the_outage(outage: Outage) -> None:
    """It has taken the number that this job would have had, and is over: this job's next attempt comes after
    it."""
    crash_in(outage)
    checkpointer = Checkpointer(outage.url, snapshots=2, every_steps=1)
    assert restored(checkpointer) == ("memory", 1)
    handle = checkpointer.step(2, state_at(2))
    assert handle is not None
    with Checkpointer(outage.url, snapshots=0) as other:
        other.restore(state_at(0))
        other.save(7, state_at(7))
    outage.is_on = False
    handle.wait()
    assert committed(outage.url) == [(3, 2), (2, 7), (1, 1)]
    crash(checkpointer)
    again = Checkpointer(outage.url, snapshots=2)
    assert restored(again) == ("memory", 2)
    again.close()


def test_restore_without_a_snapshot_waits(tmp_path: Path) -> None:
    """An outage is no failure of the job; and is one only after `url_timeout`."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_at(1))
    left = [3]

    def hook(_method: str, _path: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OutOfReachError("the network is down")

    assert restored(Checkpointer(HookedStorage(open_storage(tmp_path), hook))) == ("remote", 1)  # type: ignore[arg-type]
    left[0] = 1 << 30
    for size in (1, 2):

        def restore(ranks: ThreadRanks) -> None:
            storage = HookedStorage(open_storage(tmp_path), hook)
            with pytest.raises(OutOfReachError, match=r"out of reach for 0\.2 s, and no snapshot"):
                Checkpoints(storage, ranks, url_timeout=0.2).restore(state_at(0))

        run_threads(size, restore)


def test_what_is_no_outage_is_raised_at_once(tmp_path: Path) -> None:
    def hook(_method: str, _path: str) -> None:
        raise StorageError("there is no such bucket")

    with pytest.raises(StorageError, match="no such bucket"):
        Checkpointer(HookedStorage(open_storage(tmp_path), hook)).restore(state_at(0))  # type: ignore[arg-type]


def test_a_load_that_breaks_off_waits_too(tmp_path: Path) -> None:
    """Also where the storage answers when it is looked at, and not when it is read."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_at(1))
    left = [1]

    def hook(method: str, path: str) -> None:
        if method == "read_into" and left[0]:
            left[0] -= 1
            raise OutOfReachError(f"{path}: the network is down")

    assert restored(Checkpointer(HookedStorage(open_storage(tmp_path), hook))) == ("remote", 1)  # type: ignore[arg-type]


def test_an_outage_at_the_first_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a script that never restores: what is saved is durable when the storage answers, and that is told."""
    left = [3]

    def hook(_method: str, _path: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OutOfReachError("the network is down")

    with Checkpointer(HookedStorage(open_storage(tmp_path), hook)) as checkpointer:  # type: ignore[arg-type]
        checkpointer.save(1, state_at(1))
    assert committed(tmp_path) == [(1, 1)]
    assert "what is saved stays in memory until it answers: the network is down" in caplog.text
    assert "answers again: this job's saves go to attempt-0001" in caplog.text


def test_several_nodes_in_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's node claims, and the other's saver finds the claim in the storage, without a word from the
    trainers."""
    outage = Outage(tmp_path / "run")
    savers = [SaverThread(outage.open) for _ in range(2)]
    made: dict[int, Checkpoints] = {}
    lock = threading.Lock()

    def begin(ranks: ThreadRanks) -> Checkpoints:
        with lock:
            monkeypatch.setenv("LAUNCH_SAVER", savers[ranks.rank].address)
            checkpointer = Checkpoints(outage.url, ranks, snapshots=2, every_steps=1)
            saver_of(checkpointer).connect()
        made[ranks.rank] = checkpointer
        return checkpointer

    def first(ranks: ThreadRanks) -> None:
        checkpointer = begin(ranks)
        checkpointer.restore(state_at(0))
        handle = checkpointer.step(1, state_at(1))
        assert handle is not None
        handle.wait()

    def second(ranks: ThreadRanks) -> None:
        checkpointer = begin(ranks)
        assert restored(checkpointer) == ("memory", 1)
        handle = checkpointer.step(2, state_at(2))
        assert handle is not None
        handle.wait("memory")

    run_threads(2, first)
    for checkpointer in made.values():
        crash(checkpointer)
    outage.is_on = True
    run_threads(2, second)
    assert committed(outage.url) == [(1, 1)]
    outage.is_on = False
    run_threads(2, lambda ranks: made[ranks.rank].close())
    assert [saver.drain() for saver in savers] == [0, 0]
    assert committed(outage.url) == [(2, 2), (1, 1)]
    shardckpt.open(outage.url).verify()


@pytest.mark.parametrize("size", [1, 2])
def test_restore_again_where_no_saver_claims(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a first try with a state that did not match: each restore begins an attempt, which is claimed."""
    monkeypatch.setenv("LAUNCH_SAVER", "nobody")

    def train(ranks: ThreadRanks) -> None:
        with Checkpoints(tmp_path, ranks, snapshots=2) as checkpointer:
            for _ in range(3):
                assert checkpointer.restore(state_at(0)) is None
            checkpointer.save(1, state_at(1)).wait()

    run_threads(size, train)
    assert committed(tmp_path) == [(3, 1)]
