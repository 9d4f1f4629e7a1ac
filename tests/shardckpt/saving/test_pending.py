"""Saves under way: what is skipped, what `wait` and `close` wait for, and what they raise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    SaveError,
    StateError,
    StorageError,
)
from shardckpt.run.places import iter_places
from shardckpt.storage import open_storage
from tests.kit.faults import FailingOnce, FaultyStorage
from tests.kit.runs import SlowStorage, committed, restored, state_at
from tests.kit.worlds import Checkpoints, PeerGoneError, ThreadRanks, outcomes, run_threads


@pytest.fixture
def slow(tmp_path: Path) -> SlowStorage:
    SlowStorage.gate = threading.Event()
    return SlowStorage(open_storage(tmp_path))


def test_a_save_is_skipped_while_one_is_under_way(
    slow: SlowStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`step` does not wait for the save before: it logs that there is none, and training goes on."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=1)
    first = checkpointer.step(1, state_at(1))
    assert first is not None
    assert first.busy
    assert "under way" in repr(first)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert checkpointer.step(2, state_at(2)) is None
        assert checkpointer.step(3, state_at(3)) is None
    assert "no checkpoint at step 2: step 1 is still being written" in caplog.text
    assert "step 3" not in caplog.text  # it is told once, until there is a save again
    slow.gate.set()
    checkpointer.wait()
    assert "committed" in repr(first)
    assert checkpointer.step(3, state_at(3)) is not None
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [3, 1]


@pytest.mark.parametrize("size", [1, 2])
def test_a_last_step_that_was_skipped_is_saved_at_the_end(
    size: int, slow: SlowStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training that is faster than the storage does not lose its end: `close` saves it, with its metrics."""

    def train(ranks: ThreadRanks) -> None:
        with Checkpoints(slow, ranks, every_steps=20) as checkpointer:
            assert checkpointer.step(20, state_at(20)) is not None
            for step in (40, 60):
                assert checkpointer.step(step, state_at(step), {"loss": step / 2}) is None
            ranks.gather(b"")
            slow.gate.set()

    with caplog.at_level(logging.INFO, "shardckpt"):
        run_threads(size, train)
    assert caplog.messages.count("step 60 is saved at the end") == 1
    assert committed(open_storage(tmp_path)) == [60, 20]
    assert restored(tmp_path) == 60
    assert shardckpt.open(tmp_path).metrics == {"loss": 30.0}


def _step_on(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.step(5, state_at(5))


def _save(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.save(4, state_at(4))


def _restore(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.restore(state_at(4))


@pytest.mark.parametrize(("then", "steps"), [(_step_on, [5, 2]), (_save, [4, 2]), (_restore, [2])])
def test_a_step_that_was_skipped_and_not_the_last_is_not_saved(
    then: Callable[[shardckpt.Checkpointer], None], steps: list[int], slow: SlowStorage, tmp_path: Path
) -> None:
    """Whatever comes after it, the state is not what it was."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=2)
    checkpointer.step(2, state_at(2))
    assert checkpointer.step(4, state_at(4)) is None
    slow.gate.set()
    then(checkpointer)
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == steps


def test_a_step_that_was_skipped_is_not_saved_after_an_error(slow: SlowStorage, tmp_path: Path) -> None:
    """Of one rank, perhaps, for which the others would not come. The save under way is waited for."""

    def train(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(slow, ranks, every_steps=1)
        checkpointer.step(1, state_at(1))
        assert checkpointer.step(2, state_at(2)) is None
        ranks.gather(b"")
        slow.gate.set()
        try:
            if ranks.rank == 1:
                raise ZeroDivisionError
            checkpointer.step(3, state_at(3))
        finally:
            checkpointer.close()

    first, second = outcomes(2, train)
    assert isinstance(first, PeerGoneError)
    assert isinstance(second, ZeroDivisionError)
    assert committed(open_storage(tmp_path)) == [1]


def test_a_state_that_was_spoilt_before_the_end(slow: SlowStorage, tmp_path: Path) -> None:
    """What `save` would say, `close` says."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=1)
    checkpointer.step(1, state_at(1))
    state = state_at(2)
    assert checkpointer.step(2, state) is None
    state["t"] = print
    slow.gate.set()
    with pytest.raises(StateError, match="'t'"):
        checkpointer.close()
    assert restored(tmp_path) == 1


def test_save_waits_for_the_one_under_way(slow: SlowStorage, tmp_path: Path) -> None:
    """`save` is not skipped: it waits, and both become durable with their own content."""
    checkpointer = shardckpt.Checkpointer(slow)
    checkpointer.save(1, state_at(1))
    opener = threading.Thread(target=slow.gate.set)
    opener.start()
    checkpointer.save(2, state_at(2))
    opener.join()
    checkpointer.close()
    for place in iter_places(open_storage(tmp_path)):
        assert shardckpt.open(place.url).read("t")[0] == place.order[1]


def test_a_failed_save_is_raised_by_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A background failure is logged, raised once by wait or close, and does not hinder later saves."""
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    checkpointer = shardckpt.Checkpointer(storage, every_steps=1)
    handle = checkpointer.step(1, state_at(1))
    assert handle is not None
    handle.join()
    assert handle.failed
    assert "failed" in repr(handle)
    assert "no more space" in caplog.text
    assert checkpointer.step(2, state_at(2)) is not None
    with pytest.raises(SaveError, match=r"step-00000001 failed: no more space"):
        checkpointer.wait()
    checkpointer.wait()
    assert checkpointer.step(3, state_at(3)) is not None
    checkpointer.close()
    with pytest.raises(SaveError, match="no more space"):
        handle.wait()
    assert committed(open_storage(tmp_path)) == [3, 2]


def test_close_raises_and_with_does_not_hide(tmp_path: Path) -> None:
    """`with` raises a failed save at its end; but an error of the training comes through as it is."""
    storage = FaultyStorage(open_storage(tmp_path), fail_at=2, error=StorageError("gone"))
    with pytest.raises(SaveError, match="gone"), shardckpt.Checkpointer(storage) as checkpointer:
        checkpointer.save(1, state_at(1))
    with pytest.raises(ZeroDivisionError), shardckpt.Checkpointer(storage) as checkpointer:
        raise ZeroDivisionError


def test_a_reason_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where each save fails for the same reason the log says so shortly; on a node's first rank only."""
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        attempt = tmp_path / f"attempt-{int(rank) + 1:04d}"
        checkpointer = shardckpt.Checkpointer(tmp_path, snapshots=0)
        checkpointer.restore(state_at(0))
        for step in (1, 2, 3):
            (attempt / f"step-{step:08d}").write_bytes(b"")  # a file in the way of its folder
            checkpointer.save(step, state_at(step)).join()
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told[1:] == ["step 2 is not saved (local): the same", "step 3 is not saved (local): the same"]
    assert told[0].startswith("step 1 is not saved (local): ")


@pytest.mark.parametrize("launcher", [False, True])
def test_close_is_silent_about_what_a_later_save_made_good(
    launcher: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two saves fails: `close` has nothing to tell, though `wait` has. Of the last one it does."""
    if launcher:  # which knows nothing of saves without its saver
        monkeypatch.setenv("LAUNCH_SAVER", "nobody")
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    with shardckpt.Checkpointer(storage) as checkpointer:
        checkpointer.save(1, state_at(1)).join()
        checkpointer.save(2, state_at(2)).join()
    assert committed(open_storage(tmp_path)) == [2]
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    checkpointer = shardckpt.Checkpointer(storage)
    checkpointer.save(1, state_at(1)).join()
    checkpointer.save(2, state_at(2)).join()
    with pytest.raises(SaveError, match="step-00000001 failed"):
        checkpointer.wait()
    checkpointer.close()
    storage = FaultyStorage(open_storage(tmp_path), fail_at=2, error=StorageError("gone"))
    checkpointer = shardckpt.Checkpointer(storage)
    checkpointer.save(1, state_at(1)).join()
    with pytest.raises(SaveError, match="step-00000001 failed"):
        checkpointer.close()


def test_one_ranks_failure_is_everyones(tmp_path: Path) -> None:
    """If one rank's part of a save fails, wait raises on all ranks, also when `save` has gone on since."""

    def run(ranks: ThreadRanks) -> None:
        inner = open_storage(tmp_path)
        storage = FailingOnce(inner, 1, StorageError("gone")) if ranks.rank == 1 else inner
        checkpointer = Checkpoints(storage, ranks)
        checkpointer.save(1, {"t": torch.ones(4), "own": shardckpt.PerRank(torch.ones(4))})
        checkpointer.save(2, {"t": torch.ones(4), "own": shardckpt.PerRank(torch.ones(4))})
        with pytest.raises(SaveError, match=r"step-00000001 failed: .*(gone|another rank failed)"):
            checkpointer.wait()
        checkpointer.wait()

    run_threads(3, run)
    assert committed(open_storage(tmp_path)) == [2]


@pytest.mark.parametrize("how", ["step", "save"])
def test_waiting_for_what_retention_has_deleted(how: str, tmp_path: Path) -> None:
    """A handle's `wait` returns on every rank once its save was durable, also when it is gone since."""

    def run(ranks: ThreadRanks) -> None:
        root = open_storage(tmp_path)
        checkpointer = Checkpoints(root, ranks, every_steps=1, keep_last=1, commit_timeout=1)
        handles = []
        for step in (1, 2, 3):
            tensor = {"t": torch.full((4,), step)}
            handle = getattr(checkpointer, how)(step, tensor)
            assert handle is not None
            handle.join()
            ranks.gather(b"")
            handles.append(handle)
        for handle in handles:
            handle.wait()

    run_threads(2, run)
    assert committed(open_storage(tmp_path)) == [3]


def test_parts_of_a_failed_save_do_not_count(tmp_path: Path) -> None:
    """The same step again after a failure: what a rank left of the first save is not taken for the second."""
    inner = open_storage(tmp_path)

    def run(ranks: ThreadRanks) -> None:
        def state(value: int) -> dict[str, Any]:
            return {"own": shardckpt.PerRank(torch.full((4,), value))}

        # The first save fails on rank 0 after its claim, the second on rank 1, whose first part is there.
        storage = FailingOnce(inner, 2 if ranks.rank == 0 else 3, StorageError("gone"))
        checkpointer = Checkpoints(storage, ranks)
        for value in (1, 2):
            with pytest.raises(SaveError, match="gone"):
                checkpointer.save(7, state(value)).wait()
        checkpointer.save(7, state(3)).wait()

    run_threads(2, run)
    checkpoint = shardckpt.open(tmp_path)
    checkpoint.verify()
    assert [checkpoint.read(f"own/rank-0000{rank}")[0] for rank in range(2)] == [3, 3]
