"""The process ends between any two storage calls of a save, in any rank, or in the middle of one.

Afterwards the old or the new checkpoint is the newest and loads bit-equal, never a mixture, and nothing that
was left behind disturbs later saves and prunes.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import SaveError, ShardckptError
from shardckpt.format.manifest import part_path
from shardckpt.run.keep_rules import KeepNewest
from shardckpt.run.places import Place, iter_places, read_manifest
from shardckpt.run.retention import prune
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.protocol import Before
from tests.kit.faults import FaultyStorage, Killed
from tests.kit.worlds import Checkpoints, PeerGoneError, ThreadRanks, context, outcomes, run_threads

pytestmark = pytest.mark.usefixtures("no_saver")

_numbers = itertools.count()


class TornStorage(FaultyStorage):
    """The process ends in the middle of a call: half a pack is there, or half a folder is gone."""

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        alive = not self._log.dead
        try:
            super().write_pack(path, buffer, before)
        except Killed:
            if alive:
                self._inner.write_pack(path, buffer[: len(buffer) // 2])
            raise

    def delete_tree(self, path: str) -> None:
        alive = not self._log.dead
        try:
            super().delete_tree(path)
        except Killed:
            if alive:
                for name in self._inner.list(path)[:2]:
                    self._inner.delete_tree(f"{path}/{name}" if path else name)
                    self._inner.delete(f"{path}/{name}" if path else name)
            raise


@pytest.fixture
def run() -> Iterator[Storage]:
    """An empty run in memory."""
    root = open_storage(f"memory://crash-{next(_numbers)}")
    yield root
    root.delete_tree("")


def state_at(step: int, rank: int) -> dict[str, Any]:
    """A state of which every part tells the step, so that a mixture shows."""
    return {
        "shared": torch.full((300,), step),
        "more": torch.full((7,), step, dtype=torch.float64),
        "own": shardckpt.PerRank(torch.full((5,), 100 * step + rank)),
        "step": step,
    }


def checked_step(state: dict[str, Any], rank: int) -> int:
    """The step that all parts of a state come from."""
    step = int(state["step"])
    wanted = state_at(step, rank)
    for name in ("shared", "more"):
        assert torch.equal(state[name], wanted[name]), f"a mixture: {name} is not of step {step}"
    assert torch.equal(state["own"].value, wanted["own"].value), f"a mixture: own is not of step {step}"
    return step


def saves(root: Storage, ranks: ThreadRanks, steps: range, timeout: float, keep: int) -> list[int]:
    """Resume, and save these steps, one after another; those that were reported as durable on this rank."""
    durable: list[int] = []
    checkpointer = Checkpoints(root, ranks, keep_last=keep, commit_timeout=timeout)
    checkpointer.restore(state_at(0, ranks.rank))
    for step in steps:
        checkpointer.save(step, state_at(step, ranks.rank))
        try:
            checkpointer.wait()
        except SaveError as error:
            if isinstance(error.__cause__, Killed):
                raise error.__cause__ from error
            continue
        durable.append(step)
    return durable


def restored(root: Storage, ranks: ThreadRanks) -> int:
    """The step that the newest good checkpoint has, loaded and checked."""
    state = state_at(0, ranks.rank)
    loaded = Checkpoints(root, ranks).restore(state)
    assert loaded is not None
    step = checked_step(state, ranks.rank)
    assert step == loaded.step
    return step


def committed(root: Storage) -> list[int]:
    return [place.order[1] for place in iter_places(root) if place.is_committed()]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("kind", [FaultyStorage, TornStorage], ids=["between", "within"])
@pytest.mark.parametrize(("size", "dying"), [(1, 0), (2, 0), (2, 1)])
def test_death_at_every_storage_call(size: int, dying: int, kind: type[FaultyStorage], keep: int) -> None:
    """Resume, save, prune, save, prune; rank `dying` dies before or in the N-th call that changes
    something, for every N, the claim of the attempt included."""
    for fail_at in itertools.count(1):
        root = open_storage(f"memory://crash-{next(_numbers)}")
        run_threads(size, lambda ranks, root=root: saves(root, ranks, range(1, 3), 60, keep))
        assert committed(root) == [2, 1][:keep]
        storages = [kind(root, fail_at if rank == dying else None) for rank in range(size)]
        told = outcomes(
            size, lambda ranks, s=storages: saves(s[ranks.rank], ranks, range(3, 5), 0.15, keep)
        )
        died = isinstance(told[dying], Killed)
        assert died == (storages[dying].mutations >= fail_at)
        durable = [result for result in told if isinstance(result, list)]
        for error in told:
            assert isinstance(error, (list, Killed, PeerGoneError, ShardckptError)), error
        steps = run_threads(size, lambda ranks, root=root: restored(root, ranks))
        assert len(set(steps)) == 1, "ranks resume at different steps"
        assert steps[0] in (2, 3, 4)
        assert steps[0] >= max((step for done in durable for step in done), default=2)
        shardckpt.open(root).verify()
        # Whatever was left behind, the next saves work, and leave nothing but what is to be kept.
        done = run_threads(size, lambda ranks, root=root: saves(root, ranks, range(5, 8), 60, keep))
        assert done == [[5, 6, 7]] * size
        assert committed(root) == [7, 6][:keep]
        assert [place.order[1] for place in iter_places(root)] == [7, 6][:keep]
        for place in iter_places(root):
            shardckpt.open(place.url).verify()
        root.delete_tree("")
        if not died:
            assert fail_at > 4, "hardly anything was tried"
            return


@pytest.mark.parametrize("kind", [FaultyStorage, TornStorage], ids=["between", "within"])
def test_death_in_a_prune(kind: type[FaultyStorage], run: Storage) -> None:
    """A prune that ends anywhere leaves the newest checkpoints whole, and the next prune does the rest."""
    for fail_at in itertools.count(1):
        root = run.at(f"{fail_at}")
        run_threads(1, lambda ranks, root=root: saves(root, ranks, range(1, 6), 60, 9))
        newest = next(iter_places(root))
        faulty = kind(root, fail_at)
        try:
            prune(faulty, [KeepNewest(2)], Place(faulty, newest.path))
        except Killed:
            died = True
        else:
            died = False
        assert committed(root)[:2] == [5, 4]
        for place in iter_places(root):
            if place.is_committed():
                shardckpt.open(place.url).verify()
        prune(root, [KeepNewest(2)], Place(root, newest.path))
        assert [place.order[1] for place in iter_places(root)] == [5, 4]
        if not died:
            assert fail_at > 6
            return


def test_the_order_of_a_save(run: Storage) -> None:
    """The manifest is created last, after every rank's pack and part; what is old goes after that."""
    run_threads(1, lambda ranks: saves(run, ranks, range(1, 2), 60, 1))
    storage = FaultyStorage(run)
    run_threads(1, lambda ranks: saves(storage, ranks, range(2, 3), 60, 1))
    changes = [
        (m, p) for m, p in storage.calls if m in ("write", "create", "write_pack", "delete", "delete_tree")
    ]
    step = "attempt-0002/step-00000002"
    save_id = read_manifest(Place(run, step)).id
    assert changes == [
        ("create", "attempt-0002/attempt.json"),
        ("write_pack", f"{step}/rank-00000/data.pack"),
        ("write", f"{step}/{part_path(save_id, 0)}"),
        ("write", f"{step}/refs.json"),
        ("create", f"{step}/manifest.json"),
        ("delete", "attempt-0001/step-00000001/manifest.json"),
        ("delete_tree", "attempt-0001/step-00000001"),
        ("write", "attempt-0002/index.json"),
    ]


def test_a_storage_that_fails(run: Storage) -> None:
    """A rank whose storage is gone cannot even say so: its own wait raises why, the others' that it did
    not finish, nothing is committed, and the next saves work."""

    def save(ranks: ThreadRanks) -> None:
        storage = FaultyStorage(run, 2, OSError("the disk is gone")) if ranks.rank else FaultyStorage(run)
        checkpointer = Checkpoints(storage, ranks, commit_timeout=0.1)
        handle = checkpointer.save(1, state_at(1, ranks.rank))
        with pytest.raises(
            SaveError, match="the disk is gone" if ranks.rank else "rank 1 of 2 did not finish"
        ):
            handle.wait()

    run_threads(2, save)
    assert committed(run) == []
    assert run_threads(2, lambda ranks: saves(run, ranks, range(2, 4), 60, 1)) == [[2, 3], [2, 3]]
    assert run_threads(2, lambda ranks: restored(run, ranks)) == [3, 3]


# -- real ends of real processes


def _save_for_ever(folder: Path, pipe: Any) -> None:
    """Resume and save one step after another, telling of each before and after it is durable."""
    torch.set_num_threads(1)
    checkpointer = shardckpt.Checkpointer(folder, keep_last=2)
    state = _large(0)
    loaded = checkpointer.restore(state)
    step = loaded.step if loaded else 0
    assert int(state["a"][0]) == step
    while True:
        step += 1
        handle = checkpointer.save(step, _large(step))
        pipe.send(("saving", step))
        handle.wait()
        pipe.send(("durable", step))


def _large(step: int) -> dict[str, Any]:
    return {"a": torch.full((200_000,), step), "b": torch.full((100_000,), float(step)), "step": step}


def test_kill_9(tmp_path: Path) -> None:
    """A process that saves is killed, as soon as it has said something, several times over: each time
    the newest checkpoint is whole, and no older than the last one that was durable."""
    newest = 0
    for patience in (1, 4, 6, 2, 3):
        ours, theirs = context.Pipe()
        process = context.Process(target=_save_for_ever, args=(tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        for _ in range(patience):
            assert ours.poll(60), "the process hangs"
            kind, step = ours.recv()
            newest = max(newest, step if kind == "durable" else 0)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        ours.close()
        state = _large(0)
        if newest == 0 and not committed(open_storage(tmp_path)):
            continue
        loaded = shardckpt.load(tmp_path, state)
        assert loaded.step >= newest
        assert {int(n) for n in (*state["a"].unique(), *state["b"].unique(), state["step"])} == {
            loaded.step
        }
        shardckpt.open(tmp_path).verify()
        newest = loaded.step
    checkpointer = shardckpt.Checkpointer(tmp_path, keep_last=1)
    checkpointer.restore(_large(0))
    checkpointer.save(1000, _large(1000))
    checkpointer.close()
    assert [place.order[1] for place in iter_places(open_storage(tmp_path))] == [1000]
