"""Worlds of ranks for tests: threads that meet at barriers, and real processes with gloo on loopback."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardckpt.checkpointer import Checkpointer
from shardckpt.drain import CHECK_INTERVAL, DrainFile, DrainWatch
from shardckpt.format.layouts import WorldLayout
from shardckpt.format.manifest import Manifest, Part
from shardckpt.format.save_plan import SavePlan, plan_save
from shardckpt.loading.fill import fill
from shardckpt.ranks.world import Alone, Ranks, acting_as
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience
from shardckpt.run.pack_writer import persist
from shardckpt.run.places import Place, read_manifest
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import LOCAL, Destination, Tier
from shardckpt.saving.session import SaveHandle, SaveSession
from shardckpt.saving.staging import Copies, StagingBuffer
from shardckpt.state.flatten import FlatState
from shardckpt.state.tensors import TensorShard
from shardckpt.storage import Storage

__all__ = [
    "Checkpoints",
    "PeerGoneError",
    "ThreadRanks",
    "context",
    "load_local",
    "outcomes",
    "plan_shards",
    "run_processes",
    "run_threads",
    "save_local",
    "start_save",
]

LIMIT = 60.0
"""Seconds that no rank waits for the others longer than: then they hang."""


class PeerGoneError(Exception):
    """A rank waits for one that has left: among processes it would hang."""


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self._told: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self._gone: set[int] = set()
        self._changed = threading.Condition()

    def tell(self, number: int, rank: int, value: Any) -> None:
        """What a rank has to say at their meeting of this number."""
        with self._changed:
            self._told[number][rank] = value
            self._changed.notify_all()

    def hear(self, number: int, rank: int) -> list[Any]:
        """What all ranks tell at their meeting of this number."""
        with self._changed:
            told = self._told[number]
            arrived = self._changed.wait_for(
                lambda: len(told) == self.size or self._gone - told.keys(), LIMIT
            )
            assert arrived, f"rank {rank} hangs"
            if len(told) < self.size:
                raise PeerGoneError(f"rank {rank} waits for {self._gone - told.keys()}")
        return [told[rank] for rank in range(self.size)]

    def leave(self, rank: int) -> None:
        """Take part no more."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()


class ThreadRanks:
    """A rank of a world of threads.

    Attributes:
        node: the machine that it says it is on; a test may change it.
    """

    node = "node"

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self._count = 0
        self.rank = rank
        self.size = meeting.size

    def take_over(self, other: ThreadRanks) -> None:
        """Be the rank in the world of `other` from now on, with which that one is done."""
        self._meeting, self._count = other._meeting, other._count

    def gather(self, data: bytes) -> list[bytes]:
        return self._exchange("gather", data)

    def broadcast(self, data: bytes) -> bytes:
        return bytes(self._exchange("broadcast", data)[0])

    def maximum(self, values: Sequence[int], doing: str = "") -> list[int]:  # noqa: ARG002
        return [max(column) for column in zip(*self._exchange("maximum", list(values)), strict=True)]

    def total(self, values: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self._exchange("total", list(values)), strict=True)]

    def start_total(self, values: Sequence[int]) -> Callable[[], list[int]]:
        number = self._tell("start_total", list(values))
        return lambda: [sum(column) for column in zip(*self._hear("start_total", number), strict=True)]

    def start_maximum(self, values: Sequence[int]) -> Callable[[], list[int]]:
        number = self._tell("start_maximum", list(values))
        return lambda: [max(column) for column in zip(*self._hear("start_maximum", number), strict=True)]

    def exchange(
        self, sends: Sequence[tuple[int, memoryview]], receives: Sequence[tuple[int, memoryview]]
    ) -> None:
        sent = self._exchange("exchange", [(peer, bytes(content)) for peer, content in sends])
        arrived = [iter([content for peer, content in messages if peer == self.rank]) for messages in sent]
        for peer, buffer in receives:
            buffer[:] = next(arrived[peer])
        assert not any(list(left) for left in arrived), "something was sent that nobody takes"

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        return self._hear(kind, self._tell(kind, value))

    def _tell(self, kind: str, value: Any) -> int:
        self._count += 1
        self._meeting.tell(self._count, self.rank, (kind, value))
        return self._count

    def _hear(self, kind: str, number: int) -> list[Any]:
        told = self._meeting.hear(number, self.rank)
        assert {kind for kind, _ in told} == {kind}, f"ranks call different methods: {told}"
        return [value for _, value in told]


def outcomes(size: int, function: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What `function` returns or raises on each rank of a world of threads.

    A rank that would wait for one that has left for ever gets PeerGoneError.
    """
    meeting = _Meeting(size)

    def run(rank: int) -> Any:
        try:
            return function(ThreadRanks(meeting, rank))
        except BaseException as error:
            return error
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def run_threads(size: int, function: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What `function` returns on each rank of a world of threads; raises the first error."""
    results = outcomes(size, function)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, PeerGoneError)):
        raise error
    return results


class Checkpoints(Checkpointer):
    """A Checkpointer among ranks that are threads."""

    def __init__(
        self,
        url: Storage | str | Path,
        ranks: Ranks,
        *,
        commit_timeout: float = LIMIT,
        drain_file: Path | None = None,
        drain_interval: float = CHECK_INTERVAL,
        **options: Any,
    ) -> None:
        with acting_as(ranks):
            super().__init__(url, commit_timeout=commit_timeout, **options)
        self._drain = None
        if drain_file is not None:
            self._drain = DrainWatch(DrainFile(str(drain_file)), ranks, interval=drain_interval)


def start_save(session: SaveSession, storage: Storage, state: dict[str, Any], **options: Any) -> SaveHandle:
    """Start one save right at a storage."""
    options = {"step": 1, "attempt": 0, **options}
    return session.start("", [Destination(Tier(LOCAL, storage.url), Place(storage))], state, **options)


def plan_shards(world: Sequence[Sequence[TensorShard]]) -> SavePlan:
    """The plan of a save of tensors as the ranks of a world hold them, `world[rank]`."""
    flat = [FlatState(list(tensors), {}, {}) for tensors in world]
    return plan_save(WorldLayout.of([state.layout(rank) for rank, state in enumerate(flat)]))


def save_local(root: Storage, world: Sequence[Sequence[TensorShard]]) -> tuple[SavePlan, Manifest]:
    """Save tensors as the ranks of a world hold them, `world[rank]`, one rank after another.

    The steps are those of SaveSession below `flatten`, which takes real tensors of a real world.
    """
    plan = plan_shards(world)
    place = Place(root)
    packs = []
    for rank, tensors in enumerate(world):
        buffer = StagingBuffer(plan.writes(rank), plan.pack_sizes[rank])
        buffer.fill(Copies(plan.writes(rank), tensors))
        packs.append(persist(root, buffer.content, plan.locations(rank), rank=rank, per_rank={}))
    values = {tensor.name: {"$tensor": tensor.name} for tensor in plan.tensors}
    proposal = Proposal(SaveInfo("test", "", 1, 0, len(world)), {}, values, plan)
    return plan, commit(place, proposal, Patience(LIMIT), Part(id="test", packs=packs))


def load_local(root: Storage, world: Sequence[Sequence[TensorShard]]) -> None:
    """Fill tensors as the ranks of a world hold them, `world[rank]`, one rank after another."""
    place = Place(root)
    for tensors in world:
        fill(place, read_manifest(place), tensors, Alone())


# -- processes

context = multiprocessing.get_context("forkserver")
"""Starts processes quickly: they are forked from a server that has imported torch."""
# torch._dynamo is what parallel modules import when they are first used
context.set_forkserver_preload(
    ["tests.kit.worlds", "tests.kit.parallel", "tests.kit.faults", "torch._dynamo", "s3fs"]
)


def run_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in `size` processes that make up a gloo world; what each returns.

    The processes are forked from a server that has imported torch. `function` is a module's own, and what
    goes in and out can be pickled. Raises AssertionError with the traceback of the first rank that fails.
    """
    _use_loopback()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            target = (theirs, rank, size, f"{folder}/store", function, arguments)
            process = context.Process(target=_rank_main, args=target, daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return [_wait_result(rank, pipe) for rank, (_, pipe) in enumerate(started)]
        finally:
            for process, pipe in started:
                process.kill()
                process.join()
                pipe.close()


def _use_loopback() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"


def _wait_result(rank: int, pipe: multiprocessing.connection.Connection) -> Any:
    assert pipe.poll(2 * LIMIT), f"rank {rank} hangs"
    try:
        failed, result = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert not failed, f"rank {rank} failed:\n{result}"
    return result


def _rank_main(
    pipe: multiprocessing.connection.Connection,
    rank: int,
    size: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _use_loopback()
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = function(rank, *arguments)
        dist.barrier()
        pipe.send((False, result))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((True, traceback.format_exc()))
