"""The saver's process ends in any storage call, or system call, of what it does; trainers end in any step of
theirs; the agent ends in the middle of a persist.

Afterwards the old or the new checkpoint is the newest of each tier and loads bit-equal, never a mixture, and
nothing that was left behind disturbs later saves and prunes, by a saver that has taken over.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import SaveError
from shardckpt.ranks.world import Ranks, current_ranks
from shardckpt.run.places import iter_places
from shardckpt.saver.client import SaverClient
from shardckpt.saving.backend import Save
from shardckpt.saving.saver_backend import SaverBackend
from shardckpt.storage import Storage, open_storage
from tests.jobs.test_crash import checked_step, state_at
from tests.kit.faults import Death, SaverHost, saver_host
from tests.kit.launching import LIMIT, launched
from tests.kit.servers import S3Server, faulty_proxy
from tests.kit.trainers import saver_of, session_of
from tests.kit.worlds import Checkpoints, ThreadRanks, context, run_threads

pytestmark = pytest.mark.usefixtures("no_saver")

PATIENCE = 20.0
"""Seconds; what is over at once takes no longer than that on the slowest machine."""


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has is not lost with a process, so nothing need wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda _fd: None)


@dataclass(frozen=True)
class Job:
    """A job's Checkpointer arguments, with its tiers' URLs by name."""

    tiers: dict[str, str]
    keep: int
    size: int
    snapshots: int = 2
    options: dict[str, Any] | None = None

    def checkpointer(self, ranks: Ranks) -> Checkpointer:
        return Checkpoints(
            list(self.tiers.values())[-1],
            ranks,
            local=self.tiers["local"] if len(self.tiers) > 1 else None,
            keep_last=self.keep,
            snapshots=self.snapshots,
            commit_timeout=PATIENCE,
            storage_options=self.options,
        )

    def root(self, tier: str) -> Storage:
        is_url = tier == list(self.tiers)[-1]
        return open_storage(self.tiers[tier], self.options if is_url else None)


def save_steps(checkpointer: Checkpointer, rank: int, steps: range) -> dict[str, int]:
    """Save these steps one after another, until one fails. The newest that was durable, by tier."""
    durable: dict[str, int] = {}
    for step in steps:
        handle = checkpointer.save(step, state_at(step, rank))
        for tier in handle.tiers:
            try:
                handle.wait(tier)
            except SaveError:
                continue
            durable[tier] = step
        try:
            checkpointer.wait()
        except SaveError:
            break
    return durable


def committed(root: Storage) -> list[int]:
    return [place.order[1] for place in iter_places(root) if place.is_committed()]


def check_tier(root: Storage, at_least: int, steps: tuple[int, ...]) -> None:
    """The tier's newest checkpoint is one of these, is whole, and no older than what was told to be durable."""
    state = state_at(0, 0)
    loaded = shardckpt.load(root, state)
    assert checked_step(state, 0) == loaded.step
    assert loaded.step in steps
    assert loaded.step >= at_least
    for place in iter_places(root):
        if place.is_committed():
            shardckpt.open(place.root.at(place.path)).verify()


def die_and_go_on(job: Job, host: SaverHost, death: Death, *, is_restarted: bool) -> bool:
    """A job that has saved steps 1 and 2 goes on while its saver dies so. Whether the saver did."""
    host.start(death)

    worlds: dict[int, ThreadRanks] = {}

    def first(ranks: ThreadRanks) -> tuple[Checkpointer, dict[str, int]]:
        worlds[ranks.rank] = ranks
        checkpointer = job.checkpointer(ranks)
        state = state_at(0, ranks.rank)
        loaded = checkpointer.restore(state)
        assert loaded is not None
        assert checked_step(state, ranks.rank) == loaded.step == 2
        return checkpointer, save_steps(checkpointer, ranks.rank, range(3, 5))

    def go_on(ranks: ThreadRanks) -> None:
        checkpointer, _ = told[ranks.rank]
        worlds[ranks.rank].take_over(ranks)
        ranks = worlds[ranks.rank]
        if is_restarted:
            session_of(
                checkpointer
            ).close()  # as the end of its process would, which keeps its lease if need be
            checkpointer = job.checkpointer(ranks)
            state = state_at(0, ranks.rank)
            loaded = checkpointer.restore(state)
            assert loaded is not None
            assert checked_step(state, ranks.rank) == loaded.step
            assert loaded.step >= max(told[0][1].get(tier, 2) for tier in job.tiers)
        done = save_steps(checkpointer, ranks.rank, range(5, 7))
        assert done == dict.fromkeys(("memory", *job.tiers), 6)
        checkpointer.close()

    told = run_threads(job.size, first)
    died = host.deaths > 0 or any(is_lost(checkpointer) for checkpointer, _ in told)
    if not died:  # nor is it to die later, but for what it tells at its end
        code = host.drain()
        assert code in (0, -signal.SIGKILL)
        died = code != 0
        host.start()
    for tier in job.tiers:
        check_tier(job.root(tier), max(durable.get(tier, 2) for _, durable in told), (2, 3, 4))
    run_threads(job.size, go_on)
    assert host.drain() == 0
    for tier in job.tiers:
        root = job.root(tier)
        assert [place.order[1] for place in iter_places(root)] == [6, 5][: job.keep]
        check_tier(root, 6, (6,))
    return died


def is_lost(checkpointer: Checkpointer) -> bool:
    """Whether the saver that the last save went to is gone."""
    return saver_of(checkpointer).is_lost


def has_two_steps(job: Job, host: SaverHost) -> None:
    """Save steps 1 and 2."""

    def work(ranks: ThreadRanks) -> None:
        checkpointer = job.checkpointer(ranks)
        save_steps(checkpointer, ranks.rank, range(1, 3))
        checkpointer.close()

    host.start()
    run_threads(job.size, work)
    assert host.drain() == 0


def folders(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize("kind", ["before", "within", "system"])
@pytest.mark.parametrize(
    ("size", "tiers", "dying", "keep"),
    [
        (1, ("local",), "local", 1),
        (2, ("local",), "local", 2),
        (1, ("local", "remote"), "local", 2),
        (1, ("local", "remote"), "remote", 1),
        (2, ("local", "remote"), "remote", 1),
    ],
)
def test_the_saver_dies(
    size: int,
    tiers: tuple[str, ...],
    dying: str,
    keep: int,
    kind: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Save, prune, save, prune; the saver dies in the N-th call that changes something, for every N. The trainers
    go on with another one; or have died too, and are restarted."""
    with saver_host(context) as host:
        before = Job(folders(tmp_path / "0", tiers), keep, size)
        has_two_steps(before, host)
        for number in itertools.count(1):
            job = Job(folders(tmp_path / "now", tiers), keep, size)
            shutil.copytree(tmp_path / "0", tmp_path / "now")
            death = Death(job.tiers[dying], number, kind)
            died = die_and_go_on(job, host, death, is_restarted=number % 2 == 0)
            shutil.rmtree(tmp_path / "now")
            if not died:
                assert number > 8, "hardly anything was tried"
                record_property("cut points", number - 1)
                return


@pytest.mark.parametrize("kind", ["before", "within"])
def test_the_saver_dies_with_object_storage(kind: str, moto_s3: S3Server) -> None:
    """A sample of its calls: each kind of them, in the first save and in the second."""
    with saver_host(context) as host:
        for number in (1, 4, 6, 9):
            job = Job({"remote": moto_s3.url()}, 1, 1, options=dict(moto_s3.options))
            has_two_steps(job, host)
            death = Death(job.tiers["remote"], number, kind)
            assert die_and_go_on(job, host, death, is_restarted=number % 2 == 0)


# -- trainers

POINTS = ["before begin", "before copy", "in copy", "before stage", "after stage"]


def _train(
    pipe: Connection, rank: int, job: Job, address: str, store: str, point: str | None, number: int
) -> None:
    """Save step 1, then step 2, in which the process waits for a word at `point`, and then ends there. Without a
    point it waits for a word before it stages, and tells what became of the save."""
    os.environ["LAUNCH_SAVER"] = address
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if job.size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job.size)
    checkpointer = job.checkpointer(current_ranks())
    checkpointer.restore(state_at(0, rank))
    checkpointer.save(number, state_at(number, rank)).wait()

    def reach(reached: str) -> None:
        if reached == (point or "before stage"):
            pipe.send("there")
            pipe.recv()
            if point is not None:
                os.kill(os.getpid(), signal.SIGKILL)

    begin, move, stage = SaverBackend.begin, ctypes.memmove, SaverClient.stage

    def watched_begin(backend: SaverBackend, save: Save) -> Any:
        reach("before begin")
        buffer = begin(backend, save)
        reach("before copy")
        return buffer

    def watched_move(target: int, source: int, nbytes: int) -> None:
        move(target, source, nbytes // 2)
        reach("in copy")
        move(target, source, nbytes)

    def watched_stage(client: SaverClient, *arguments: Any) -> None:
        reach("before stage")
        stage(client, *arguments)
        reach("after stage")
        if point is None:
            pipe.send("staged")

    SaverBackend.begin, SaverClient.stage = watched_begin, watched_stage  # type: ignore[method-assign]
    ctypes.memmove = watched_move
    handle = checkpointer.save(number + 1, state_at(number + 1, rank))
    try:
        handle.wait("memory")
    except SaveError as error:
        pipe.send(str(error))
    else:
        pipe.send("safe")
    pipe.recv()


@contextmanager
def trainers(
    job: Job, host: SaverHost, folder: Path, points: list[str | None], number: int
) -> Iterator[list[tuple[Any, Connection]]]:
    """A process for each rank, with its point, and a pipe to it."""
    started: list[tuple[Any, Connection]] = []
    try:
        for rank, point in enumerate(points):
            ours, theirs = context.Pipe()
            store = str(folder / "store")
            target = (theirs, rank, job, host.address, store, point, number)
            process = context.Process(target=_train, args=target, daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        yield started
    finally:
        for process, pipe in started:
            process.kill()
            process.join()
            pipe.close()


def hear(pipe: Connection) -> str:
    assert pipe.poll(2 * PATIENCE), "a trainer hangs"
    return str(pipe.recv())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("size", "dying", "snapshots"), [(1, 0, 1), (1, 0, 2), (2, 0, 2), (2, 1, 2)])
def test_trainers_die(size: int, dying: int, snapshots: int, point: str, tmp_path: Path) -> None:
    """One rank dies at a point of its save. Of two, rank 1 dies when rank 0 has staged its part, and rank 0
    before rank 1 stages its own. Then they are all gone, and another world goes on."""
    job = Job(folders(tmp_path, ("local", "remote")), 2, size, snapshots)
    with saver_host(context) as host:
        host.start()
        points = [point if rank == dying else None for rank in range(size)]
        with trainers(job, host, tmp_path, points, 1) as started:
            for _, pipe in started:
                assert hear(pipe) == "there"
            others = [pipe for rank, (_, pipe) in enumerate(started) if rank != dying]
            victim, word = started[dying]
            if dying == 1:
                others[0].send("stage")
                assert hear(others[0]) == "staged"
            word.send("die")
            victim.join(PATIENCE)
            assert victim.exitcode == -signal.SIGKILL
            if dying == 0 and others:
                others[0].send("stage")
                assert hear(others[0]) == "staged"
            is_whole = point == "after stage" and (size == 1 or dying == 1)
            for pipe in others:
                told = hear(pipe)
                assert told == "safe" if is_whole else "a rank ended before it had staged its part" in told
        newest = 2 if is_whole else 1

        def go_on(ranks: ThreadRanks) -> None:
            checkpointer = Job(job.tiers, 2, 1, snapshots).checkpointer(ranks)
            state = state_at(0, 0)
            loaded = checkpointer.restore(state)
            assert loaded is not None
            assert checked_step(state, 0) == loaded.step == newest
            is_gone = snapshots == 1 and not is_whole and point != "before begin"
            assert loaded.tier == ("local" if is_gone else "memory")
            assert save_steps(checkpointer, 0, range(3, 4)) == {"memory": 3, "local": 3, "remote": 3}
            checkpointer.close()

        run_threads(1, go_on)
        assert host.drain() == 0
        for tier in job.tiers:
            assert committed(job.root(tier)) == [3, newest]
            check_tier(job.root(tier), 3, (3,))


# -- the agent

SCRIPT = """
import json, signal, sys, torch, shardckpt
state = {"weight": torch.full((3000,), 1.0)}
checkpointer = shardckpt.Checkpointer(sys.argv[1], storage_options=json.loads(sys.argv[2]), snapshots=2)
checkpointer.restore(state)
checkpointer.save(1, state)
signal.pause()
"""


def test_the_agent_is_killed_in_a_persist(moto_s3: S3Server, tmp_path: Path) -> None:
    """The saver finishes and commits, and then ends by itself."""
    (tmp_path / "train.py").write_text(SCRIPT)
    reached, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and "data.pack" in path:
            reached.set()
            go_on.wait(PATIENCE)

    with faulty_proxy(moto_s3.endpoint) as proxy:
        proxy.faults = hold
        options = json.dumps({**moto_s3.options, "endpoint_url": proxy.endpoint})
        url = moto_s3.url()
        with launched("train.py", url, options, folder=tmp_path) as job:
            assert reached.wait(LIMIT)
            (saver,) = [pid for pid in children(job.pid) if b"shardckpt.saver" in command(pid)]
            ended = os.pidfd_open(saver)
            job.kill()
            job.wait()
            assert not select.select([ended], [], [], 0)[0]
            go_on.set()
            assert select.select([ended], [], [], LIMIT)[0], "the saver hangs"
            os.close(ended)
        state = {"weight": torch.zeros(3000)}
        assert shardckpt.load(url, state, storage_options=moto_s3.options).step == 1
        assert torch.equal(state["weight"], torch.ones(3000))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
