"""Commits among the savers of several nodes, in crashes and outages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import OutOfReachError, SaveError, SaverError
from shardckpt.format.manifest import MANIFEST
from shardckpt.ranks.world import Alone
from shardckpt.run.attempts import claim_attempt
from shardckpt.run.places import FAILED
from shardckpt.saving.backend import Save
from shardckpt.saving.staging import Copies, StagingBuffer
from shardckpt.storage import open_storage
from tests.kit.faults import HookedStorage, Killed, SaverThread, saver_thread
from tests.kit.trainers import crash, saver_of
from tests.kit.worlds import Checkpoints, ThreadRanks, run_threads
from tests.shardckpt.run.helpers import FOR_EVER, committed, state_at

LIMIT = 30.0
"""Seconds that nothing takes longer than, unless it hangs."""


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}"
        time.sleep(0.01)


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
        return any(self.run.glob(f"attempt-0001/step-00000001/parts-*/rank-{rank:05d}.json"))


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
