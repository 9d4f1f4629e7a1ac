"""Waiting for the parts of others: until they are there, and not when nobody will write them any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.errors import SaveError, StorageError, SupersededError
from shardckpt.format.layouts import WorldLayout
from shardckpt.format.manifest import Manifest, Part
from shardckpt.format.save_plan import SavePlan, plan_save
from shardckpt.run.attempts import claim_attempt
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience, wait_committed
from shardckpt.run.failure_reports import report_failure
from shardckpt.run.pack_writer import persist
from shardckpt.run.parts import write_part
from shardckpt.run.places import FAILED, Place, step_path
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.saving.staging import Copies, StagingBuffer
from shardckpt.state.flatten import FlatState, flatten
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage, HookedStorage
from tests.shardckpt.run.helpers import FOR_EVER, committed, save_alone

LIMIT = 30.0
"""Seconds that nothing takes longer than, unless it hangs."""


class Waiting:
    """Two ranks' save of attempt 1, step 1, of which rank 0's part is there; its committer waits for rank 1's."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.looks = 0
        self.refuses = False
        self._looked = threading.Semaphore(0)
        root = open_storage(run)
        attempt = claim_attempt(root)
        self.place = Place(HookedStorage(root, self._count), step_path(attempt, 1))
        flat = [flatten({f"w{rank}": torch.ones(10)}, rank) for rank in range(2)]
        self._flat: list[FlatState] = flat
        self._plan: SavePlan = plan_save(
            WorldLayout.of([each.layout(rank) for rank, each in enumerate(flat)])
        )
        self.write(0)

    def _count(self, method: str, path: str) -> None:
        if method == "list" and not path:
            self.looks += 1
            self._looked.release()
            if self.refuses:
                raise StorageError("the storage cannot be listed")

    def write(self, rank: int) -> None:
        """Have this rank's part in the storage."""
        writes, size = self._plan.writes(rank), self._plan.pack_sizes[rank]
        buffer = StagingBuffer(writes, size)
        buffer.fill(Copies(writes, self._flat[rank].tensors))
        storage = self.place.storage
        pack = persist(storage, buffer.content, self._plan.locations(rank), rank=rank, per_rank={})
        write_part(storage, Part(id="x", packs=[pack]))

    def commit(self, timeout: float = FOR_EVER, **options: Any) -> Manifest:
        proposal = Proposal(SaveInfo("x", self.place.path, 1, 1, 2), {}, self._flat[0].values, self._plan)
        return commit(self.place, proposal, Patience(timeout, **{"own_seconds": 0.0, **options}))

    @contextmanager
    def committing(self, **options: Any) -> Iterator[Future[Manifest]]:
        """Does so in the background, and has looked for newer attempts at least once."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.commit, look_every=0.0, **options)
            for _ in range(2):
                assert self._looked.acquire(timeout=LIMIT)
            yield future


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    return Waiting(tmp_path)


def test_a_newer_checkpoint_ends_the_wait(waiting: Waiting) -> None:
    with waiting.committing() as future:
        assert not future.done()
        save_alone(waiting.run)
        with pytest.raises(SupersededError, match=r"newer attempt, and rank 1 of 2 has not finished"):
            future.result(LIMIT)
    assert committed(waiting.run) == [(2, 1)]


def test_a_newer_checkpoint_does_not_hurry_who_writes_as_long_as_this_one_did(waiting: Waiting) -> None:
    save_alone(waiting.run)
    with waiting.committing(own_seconds=LIMIT) as future:
        waiting.write(1)
        assert future.result(LIMIT).world_size == 2
    assert committed(waiting.run) == [(2, 1), (1, 1)]


def test_that_a_newer_attempt_has_started_leaves_some_time(waiting: Waiting) -> None:
    claim_attempt(open_storage(waiting.run))
    with waiting.committing() as future:
        waiting.write(1)
        future.result(LIMIT)
    waiting = Waiting(waiting.run)
    claim_attempt(open_storage(waiting.run))
    with waiting.committing(aftermath=0.1) as future, pytest.raises(SupersededError):
        future.result(LIMIT)


@pytest.mark.parametrize("refuses", [False, True])
def test_without_a_newer_attempt_it_waits_and_then_has_failed(refuses: bool, waiting: Waiting) -> None:
    """Nor do older attempts, or what cannot be listed, end the wait."""
    save_alone(waiting.run)
    newest = Waiting(waiting.run)
    newest.refuses = refuses
    with pytest.raises(SaveError, match=r"rank 1 of 2 did not finish writing: .* for 0\.2 s") as error:
        newest.commit(0.2, look_every=0.0)
    assert not isinstance(error.value, SupersededError)
    assert newest.looks


def test_who_waits_for_the_commit_hears_why_there_is_none(waiting: Waiting) -> None:
    """What the committer has given up is no failure for the others either."""
    with pytest.raises(SaveError, match=r"no commit was seen for 0\.1 s"):
        wait_committed(waiting.place, "x", Patience(0.1))
    assert not waiting.looks
    report_failure(waiting.place.storage, FAILED, "another", StorageError("full"))
    with pytest.raises(SaveError, match="no commit was seen"):
        wait_committed(waiting.place, "x", Patience(0.1))
    report_failure(waiting.place.storage, FAILED, "x", StorageError("full"))
    with pytest.raises(SaveError, match="StorageError: full") as error:
        wait_committed(waiting.place, "x", Patience(FOR_EVER))
    assert not isinstance(error.value, SupersededError)
    report_failure(waiting.place.storage, FAILED, "x", SupersededError("of no use"))
    with pytest.raises(SupersededError, match="of no use"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER))


def test_a_newer_checkpoint_ends_the_wait_for_a_commit(waiting: Waiting) -> None:
    with pytest.raises(SupersededError, match="has not committed it"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER, lambda: True, LIMIT, look_every=0.0))
    save_alone(waiting.run)
    with pytest.raises(SupersededError, match=r"newer attempt, and rank 0's process has not committed it"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER, own_seconds=0.1, look_every=0.0))


def test_looks_are_rare(waiting: Waiting) -> None:
    """Parts are looked for meanwhile, often; but the run's folders are not listed for that."""
    with pytest.raises(SaveError):
        waiting.commit(0.5)
    assert not waiting.looks


def test_who_waits_for_the_commit_lists_nothing(waiting: Waiting) -> None:
    """It asks up to four times a second, on every node."""
    storage = FaultyStorage(waiting.place.root)
    with pytest.raises(SaveError, match="no commit was seen"):
        wait_committed(Place(storage, waiting.place.path), "x", Patience(0.1))
    assert {method for method, _ in storage.calls} == {"read"}
