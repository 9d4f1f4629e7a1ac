"""Waiting for the parts of others: until they are there, and not when nobody will write them any more."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.errors import OutOfReachError, SaveError, SaverError, StorageError, SupersededError
from shardckpt.format.manifest import MANIFEST, Manifest
from shardckpt.format.save_plan import SavePlan, plan_save
from shardckpt.ranks.world import Alone
from shardckpt.run.attempts import claim_attempt
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience, wait_committed
from shardckpt.run.failure_reports import report_failure
from shardckpt.run.pack_writer import persist
from shardckpt.run.places import BAD, FAILED, Place, Succession, iter_places, step_path, succession
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.saving.backend import Save
from shardckpt.saving.staging import Copies, StagingBuffer
from shardckpt.state.flatten import FlatState, flatten
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage, HookedStorage, Killed, SaverThread, saver_thread
from tests.kit.trainers import crash, saver_of
from tests.kit.worlds import Checkpoints, ThreadRanks, run_threads

LIMIT = 30.0
"""Seconds that nothing takes longer than, unless it hangs."""

FOR_EVER = 600.0


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}"
        time.sleep(0.01)


def state_at(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "step": step}


def committed(url: Path) -> list[tuple[int, int]]:
    """(attempt, step) of what exists, the newest first."""
    return [place.order[:2] for place in iter_places(open_storage(url)) if place.is_committed()]


def save_alone(run: Path, step: int = 1) -> None:
    """A new attempt, by a job on its own."""
    Checkpoints(open_storage(run), Alone()).save(step, state_at(step)).wait()


# -- one committer


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
        self._plan: SavePlan = plan_save([each.layouts() for each in flat])
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
        persist(
            self.place.storage,
            buffer.content,
            self._plan.locations(rank),
            save_id="x",
            rank=rank,
            per_rank={},
        )

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
    report_failure(waiting.place.storage, "", "another", StorageError("full"))
    with pytest.raises(SaveError, match="no commit was seen"):
        wait_committed(waiting.place, "x", Patience(0.1))
    report_failure(waiting.place.storage, "", "x", StorageError("full"))
    with pytest.raises(SaveError, match="StorageError: full") as error:
        wait_committed(waiting.place, "x", Patience(FOR_EVER))
    assert not isinstance(error.value, SupersededError)
    report_failure(waiting.place.storage, "", "x", SupersededError("of no use"))
    with pytest.raises(SupersededError, match="of no use"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER))


def test_a_newer_checkpoint_ends_the_wait_for_a_commit(waiting: Waiting) -> None:
    with pytest.raises(SupersededError, match="has not committed it"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER, lambda: True, LIMIT, look_every=0.0))
    save_alone(waiting.run)
    with pytest.raises(SupersededError, match=r"newer attempt, and rank 0's process has not committed it"):
        wait_committed(waiting.place, "x", Patience(FOR_EVER, own_seconds=0.1, look_every=0.0))


def test_looks_are_rare(waiting: Waiting) -> None:
    """Parts are looked for a hundred times meanwhile; but to list costs, and takes long."""
    with pytest.raises(SaveError):
        waiting.commit(0.5)
    assert not waiting.looks


def test_who_waits_for_the_commit_lists_nothing(waiting: Waiting) -> None:
    """It asks up to four times a second, on every node."""
    storage = FaultyStorage(waiting.place.root)
    with pytest.raises(SaveError, match="no commit was seen"):
        wait_committed(Place(storage, waiting.place.path), "x", Patience(0.1))
    assert {method for method, _ in storage.calls} == {"read"}


def test_succession(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    place = Place(root, step_path(claim_attempt(root), 7))
    assert succession(place) is Succession.NONE
    claim_attempt(root)
    assert succession(place) is Succession.CLAIMED
    save_alone(tmp_path, 1)
    assert succession(place) is Succession.COMMITTED
    newer = next(iter_places(root))
    assert succession(newer) is Succession.NONE
    newer.storage.write(BAD, b"{}")
    assert succession(place) is Succession.CLAIMED, "nobody can resume from that one"
    assert succession(Place(root)) is Succession.NONE, "it is in no run"


# -- the savers of two nodes


class Nodes:
    """A run's two ranks, each with a saver of its own."""

    def __init__(self, run: Path, savers: list[SaverThread], monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self._savers = savers
        self._patch = monkeypatch
        self._turn = threading.Lock()

    def checkpoints(self, node: int, ranks: ThreadRanks | Alone, **options: Any) -> Checkpoints:
        """A Checkpointer with this node's saver."""
        with self._turn:  # the environment is everyone's
            self._patch.setenv("LAUNCH_SAVER", self._savers[node].address)
            made = Checkpoints(self.run, ranks, **{"snapshots": 2, "commit_timeout": FOR_EVER, **options})
            saver_of(made).connect()
            return made

    def save_and_die(self, *, tier: str, **options: Any) -> None:
        """Attempt 1 saves step 1, until it is in this tier; then all trainers are dead."""

        def train(ranks: ThreadRanks) -> None:
            checkpointer = self.checkpoints(ranks.rank, ranks, every_steps=1, **options)
            handle = checkpointer.step(1, state_at(1))
            assert handle is not None
            handle.wait(tier)
            crash(checkpointer)

        run_threads(2, train)

    def stop_in_copy(self, rank: int) -> None:
        """Attempt 1 saves step 1; all trainers die, this one in the middle of its copy."""

        def train(ranks: ThreadRanks) -> None:
            checkpointer = self.checkpoints(ranks.rank, ranks, every_steps=1)
            if ranks.rank == rank:
                Copy(within=Killed()).spoil(checkpointer)
            with contextlib.suppress(Killed):
                handle = checkpointer.step(1, state_at(1))
                assert handle is not None
                handle.wait("memory")
            crash(checkpointer)

        run_threads(2, train)

    def has_part(self, rank: int) -> bool:
        return any(self.run.glob(f"attempt-0001/step-00000001/rank-{rank:05d}/part.json"))


@pytest.fixture
def hooks() -> dict[int, Callable[[str, str], object]]:
    """What to call before each storage call of a node's saver."""
    return {}


@pytest.fixture
def savers(hooks: dict[int, Callable[[str, str], object]]) -> Iterator[list[SaverThread]]:
    def opener(node: int) -> Callable[[str, dict[str, Any] | None], HookedStorage]:
        def hook(method: str, path: str) -> None:
            if node in hooks:
                hooks[node](method, path)

        return lambda url, options: HookedStorage(open_storage(url, options), hook)

    with saver_thread(opener(0)) as one, saver_thread(opener(1)) as other:
        yield [one, other]


@pytest.fixture
def nodes(tmp_path: Path, savers: list[SaverThread], monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(tmp_path / "run", savers, monkeypatch)


@pytest.mark.parametrize("node", [0, 1])
def test_a_saver_whose_node_was_left_behind_ends(
    node: int, nodes: Nodes, savers: list[SaverThread]
) -> None:
    """Its agent is dead, so it persists its part of the newest snapshot; the other saver, whose job goes on, will
    not. Nothing has failed."""
    nodes.save_and_die(tier="memory", url_every_steps=1000)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(savers[node].drain)
        wait_until(lambda: nodes.has_part(node), f"the part of node {node}")
        assert not end.done()
        going_on = nodes.checkpoints(1 - node, Alone())
        assert going_on.restore(state_at(0)) is None
        going_on.save(1, state_at(1)).wait()
        assert end.result() == 0
    going_on.close()
    assert savers[1 - node].drain() == 0
    assert committed(nodes.run) == [(2, 1)]


def test_what_all_savers_persist_is_not_lost_to_a_newer_attempt(
    nodes: Nodes, savers: list[SaverThread]
) -> None:
    nodes.save_and_die(tier="memory", url_every_steps=1000)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(savers[0].drain)
        wait_until(lambda: nodes.has_part(0), "the part of node 0")
        claim_attempt(open_storage(nodes.run))
        assert savers[1].drain() == 0
        assert end.result() == 0
    assert committed(nodes.run) == [(1, 1)]


@dataclass
class Copy:
    """What becomes of rank 1's copy of step 1: raised in it, or instead of it."""

    before: Exception | None = None
    within: BaseException | None = None

    def spoil(self, checkpointer: Checkpoints) -> None:
        backend = saver_of(checkpointer)
        begin = backend.begin

        def spoilt(save: Save) -> StagingBuffer:
            if self.before is not None:
                raise self.before
            buffer = begin(save)
            if self.within is not None:
                buffer.fill = self.fail  # type: ignore[method-assign]
            return buffer

        backend.begin = spoilt  # type: ignore[method-assign]
        if isinstance(self.within, Killed):  # who is dead tells nobody
            backend.abandon = lambda *_: None  # type: ignore[method-assign]

    def fail(self, _copies: Copies) -> None:
        assert self.within is not None
        raise self.within


@pytest.mark.parametrize(
    ("copy", "reason"),
    [
        (Copy(within=Killed()), "a rank ended before it had staged its part"),
        (Copy(before=MemoryError("no memory for it")), "no memory for it"),
        (Copy(within=MemoryError("in the middle")), "in the middle"),
        (Copy(before=SaverError("its saver is gone")), "its saver is gone"),
    ],
    ids=["killed", "no memory", "no memory to copy with", "no saver"],
)
@pytest.mark.parametrize("spoilt", [0, 1])
def test_nobody_waits_for_a_part_that_is_not_staged(
    spoilt: int, copy: Copy, reason: str, nodes: Nodes
) -> None:
    """The other node has nobody to ask: neither its committer, nor who waits for the commit."""

    def train(ranks: ThreadRanks) -> str:
        checkpointer = nodes.checkpoints(ranks.rank, ranks, every_steps=1, commit_timeout=LIMIT)
        if ranks.rank == spoilt:
            copy.spoil(checkpointer)
        try:
            handle = checkpointer.step(1, state_at(1))
            assert handle is not None
            handle.wait()
        except Killed:
            return reason
        except SaveError as error:
            return str(error)
        finally:
            crash(checkpointer)
        return "it is saved"

    told = run_threads(2, train)
    assert all(reason in each for each in told), told
    assert committed(nodes.run) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_nobody_waits_for_a_part_that_is_lost_with_its_saver(
    lost: int, nodes: Nodes, hooks: dict[int, Callable[[str, str], object]]
) -> None:
    go_on = threading.Event()
    hooks[lost] = lambda method, _path: method != "write_pack" or go_on.wait(LIMIT)

    def train(ranks: ThreadRanks) -> str:
        checkpointer = nodes.checkpoints(ranks.rank, ranks, every_steps=1, commit_timeout=LIMIT)
        handle = checkpointer.step(1, state_at(1))
        assert handle is not None
        handle.wait("memory")
        if ranks.rank == lost:
            crash(checkpointer)
        with pytest.raises(SaveError) as error:
            handle.wait()
        crash(checkpointer)
        return str(error.value)

    told = run_threads(2, train)
    go_on.set()
    assert all("the saver of this node is gone" in each for each in told), told


def test_a_saver_does_not_end_before_the_others_know(
    nodes: Nodes, savers: list[SaverThread], hooks: dict[int, Callable[[str, str], object]]
) -> None:
    """Of a job that is stopped in the middle of a copy."""
    reported, go_on = threading.Event(), threading.Event()

    def hook(_method: str, path: str) -> None:
        if path.endswith(FAILED):
            reported.set()
            go_on.wait(LIMIT)

    hooks[1] = hook
    nodes.stop_in_copy(1)
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(saver.drain) for saver in savers]
        assert reported.wait(LIMIT)
        assert not ends[1].done()
        go_on.set()
        assert [end.result(LIMIT) for end in ends] == [1, 0]
    assert committed(nodes.run) == []


def test_a_saver_that_goes_on_has_not_failed(
    nodes: Nodes, savers: list[SaverThread], hooks: dict[int, Callable[[str, str], object]]
) -> None:
    """It gives up an older attempt's save, which another node lacks, for a newer one of its own."""
    go_on = threading.Event()
    hooks[1] = lambda method, _path: method != "write_pack" or go_on.wait(LIMIT)
    nodes.save_and_die(tier="memory")
    wait_until(lambda: nodes.has_part(0), "the part of node 0")
    with nodes.checkpoints(0, Alone()) as going_on:
        going_on.save(2, state_at(2)).wait()
    assert savers[0].drain() == 0
    assert committed(nodes.run) == [(2, 2)]
    go_on.set()


@pytest.mark.parametrize(
    ("node", "method", "path"),
    [(1, "write_pack", "rank-00001"), (1, "write", "rank-00001"), (0, "create", MANIFEST)],
)
def test_a_save_that_is_tried_again_has_failed_on_no_node(
    node: int,
    method: str,
    path: str,
    nodes: Nodes,
    savers: list[SaverThread],
    hooks: dict[int, Callable[[str, str], object]],
) -> None:
    """One node's storage is out of reach for a moment."""
    left = [1]

    def hook(called: str, where: str) -> None:
        if called == method and path in where and left[0]:
            left[0] -= 1
            raise OutOfReachError("the network is down")

    hooks[node] = hook

    def train(ranks: ThreadRanks) -> None:
        with nodes.checkpoints(ranks.rank, ranks) as checkpointer:
            checkpointer.save(1, state_at(1)).wait()

    run_threads(2, train)
    assert left == [0]
    assert [saver.drain() for saver in savers] == [0, 0]
    assert committed(nodes.run) == [(1, 1)]
    assert not list(nodes.run.rglob(FAILED))


def test_an_outage_of_one_node_that_lasts_is_told_to_the_others(
    nodes: Nodes, hooks: dict[int, Callable[[str, str], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not wait for its part."""
    monkeypatch.setenv("LAUNCH_DRAIN_TIMEOUT", "0.6")  # so no longer than that is the storage waited for
    tries: list[str] = []

    def hook(method: str, path: str) -> None:
        if method == "write_pack":
            tries.append(path)
            raise OutOfReachError("the network is down")

    hooks[1] = hook

    def train(ranks: ThreadRanks) -> None:
        checkpointer = nodes.checkpoints(ranks.rank, ranks)
        with pytest.raises(SaveError, match="OutOfReachError: the network is down"):
            checkpointer.save(1, state_at(1)).wait()
        crash(checkpointer)

    run_threads(2, train)
    assert len(tries) == 2
    assert committed(nodes.run) == []
