"""The rules of who may have which buffer, and what is given up when: without a process, a socket, a storage."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest

from shardckpt.run.places import step_path
from shardckpt.run.save_info import SaveInfo
from shardckpt.saver.buffer_pool import BufferPool
from shardckpt.saver.protocol import Stage
from shardckpt.saver.snapshots import Buffer, HeldSnapshot, PackPlan, SnapshotStore, Trainer

GIB = 1 << 30
SLACK = 4 << 20


def plan(size: int) -> PackPlan:
    return PackPlan(1, [], size, b"")


@dataclass
class Node:
    """A node's snapshots and buffers, the trainers of a run, and what the saver does: serve, allocate, tidy."""

    store: SnapshotStore = field(default_factory=SnapshotStore)
    allocated: int = 0
    """Number of buffers that were allocated."""
    requests: dict[Trainer, list[int]] = field(default_factory=dict)
    granted: dict[Trainer, list[Buffer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BufferPool(self.store)

    def join(self, size: int, snapshots: int = 2, *, run: str = "run") -> Trainer:
        """A trainer that has come, and asked for all of its buffers."""
        trainer = Trainer(run=run, snapshots=snapshots)
        self.store.join(trainer)
        self.granted[trainer] = []
        self.requests[trainer] = []
        self.replan(trainer, size)
        return trainer

    def replan(self, trainer: Trainer, size: int) -> None:
        self.pool.take_back(trainer)
        self.granted[trainer].clear()
        trainer.wanted = size
        self.requests[trainer] = [size] * trainer.snapshots

    def world(self, count: int, size: int, snapshots: int = 2) -> list[Trainer]:
        trainers = [self.join(size, snapshots) for _ in range(count)]
        self.serve()
        return trainers

    def serve(self) -> None:
        """Until nothing more can be handed out."""
        before = None
        while before != (before := (self.allocated, sum(map(len, self.requests.values())))):
            for trainer, sizes in self.requests.items():
                self.serve_one(trainer, sizes)
            self.tidy()

    def serve_one(self, trainer: Trainer, sizes: list[int]) -> None:
        if not sizes:
            return
        if (buffer := self.pool.grant(trainer, sizes[0])) is not None:
            for other, theirs in self.granted.items():
                assert other is trainer or buffer not in theirs, "two trainers have one buffer"
            sizes.pop()
            self.granted[trainer].append(buffer)
        elif self.pool.may_allocate(trainer, sizes[0]):
            self.pool.make_room(trainer.run, sizes[0])
            self.pool.add(trainer, os.open(os.devnull, os.O_RDONLY), sizes[0], memoryview(bytearray(1)))
            self.allocated += 1

    def tidy(self) -> None:
        served = bool(self.requests) and all(
            len(self.pool.owned(trainer)) >= trainer.snapshots for trainer in self.requests
        )
        self.pool.tidy("run", everyone_is_served=served)

    def begin(self, trainer: Trainer, save_id: str) -> Buffer:
        buffer = self.granted[trainer].pop(0)
        self.pool.begin(trainer, buffer.number, save_id)
        return buffer

    def stage(
        self, trainer: Trainer, buffer: Buffer, rank: int, world: int, step: int, attempt: int = 1
    ) -> HeldSnapshot | None:
        path = step_path(f"attempt-{attempt:04d}", step)
        info = SaveInfo(trainer.writing, path, step, attempt, world)
        message = Stage(buffer.number, info, rank, world, [], b"", b"")
        granted = self.pool.granted(trainer, buffer.number)
        held = self.store.stage(trainer, granted, message, plan(trainer.wanted), {})
        self.requests[trainer].append(trainer.wanted)
        return held

    def save(self, world: list[Trainer], step: int, attempt: int = 1) -> HeldSnapshot:
        held = None
        for rank, trainer in enumerate(world):
            buffer = self.begin(trainer, f"{attempt}-{step}")
            held = self.stage(trainer, buffer, rank, len(world), step, attempt)
        assert held is not None
        assert held.is_whole
        return held

    def die(self, trainer: Trainer) -> list[HeldSnapshot]:
        del self.requests[trainer], self.granted[trainer]
        lost = self.store.forget(trainer)
        self.pool.take_back(trainer)
        return lost

    def die_all(self, world: list[Trainer]) -> None:
        for trainer in world:
            self.die(trainer)
        self.tidy()

    @property
    def total(self) -> int:
        return sum(buffer.size for buffer in self.pool.buffers.values())

    @property
    def steps(self) -> list[int]:
        """Steps of the whole snapshots that nobody may write into."""
        return sorted(held.info.step for held in self.store.whole("run") if not held.is_at_risk)


# -- saves of one world


def test_two_snapshots_alternate_and_the_older_is_given_up_at_the_next_begin() -> None:
    node = Node()
    world = node.world(2, GIB)
    for step in (1, 2):
        node.save(world, step)
    assert node.steps == [1, 2]
    node.serve()
    assert node.steps == [2], "what may be written into at any moment is not offered"
    node.die_all(world)
    assert node.steps == [1, 2], "but it is still there, as nobody has written into it"


def test_of_two_saves_of_a_step_the_second_is_the_newest() -> None:
    node = Node()
    (trainer,) = node.world(1, GIB)
    saves = []
    for save_id in ("first", "second"):
        held = node.stage(trainer, node.begin(trainer, save_id), 0, 1, 1)
        assert held is not None
        saves.append(held)
    first, second = saves
    assert node.store.newest("run") is second
    assert (first.is_persisted, second.is_persisted) == (False, False)
    node.store.note_persisted(second, "local")
    assert (first.is_persisted, second.is_persisted) == (True, True)
    node.serve()
    node.begin(trainer, "next")
    assert node.store.whole("run") == [second], "the first is given up before the second"


def test_while_one_is_written_the_newest_whole_one_stays() -> None:
    node = Node()
    world = node.world(2, GIB)
    for step in (1, 2, 3):
        node.save(world, step)
        node.serve()
    for trainer in world:
        node.begin(trainer, "1-4")
    assert node.steps == [3]
    assert [held.info.step for held in node.store.whole("run")] == [3]


def test_the_newest_stays_while_another_buffer_is_being_allocated() -> None:
    """It is durable by then: a crash would cost no step, but the way back from a disk."""
    node = Node()
    trainer = node.join(GIB)
    node.serve_one(trainer, [GIB])
    node.serve_one(trainer, [GIB])
    held = node.save([trainer], 1)
    node.store.note_persisted(held, "local")
    trainer.allocating = GIB
    assert node.pool.grant(trainer, GIB) is None
    trainer.allocating = 0
    assert node.pool.grant(trainer, GIB) is not None, "if none is coming, it may go"


def test_a_snapshot_that_is_persisted_or_read_is_not_granted() -> None:
    node = Node()
    (trainer,) = world = node.world(1, GIB)
    first, second = node.save(world, 1), node.save(world, 2)
    first.tasks = 1
    node.serve()
    assert node.granted[trainer] == []
    first.tasks = 0
    first.readers.add(trainer)
    node.serve()
    assert node.granted[trainer] == []
    first.readers.clear()
    node.serve()
    assert [buffer.snapshot for buffer in node.granted[trainer]] == [first]
    assert not second.is_at_risk
    assert node.allocated == 2


def test_with_one_snapshot_it_is_overwritten_by_the_next() -> None:
    node = Node()
    world = node.world(2, GIB, snapshots=1)
    held = node.save(world, 1)
    held.tasks = 1
    node.serve()
    assert node.steps == [1]
    held.tasks = 0
    node.serve()
    assert node.steps == []
    node.save(world, 2)
    assert node.steps == [2]
    assert (node.allocated, node.total) == (2, 2 * GIB)


def test_a_trainer_writes_only_into_what_it_was_granted() -> None:
    node = Node()
    one, other = node.world(2, GIB)
    (buffer, _) = node.granted[one]
    with pytest.raises(LookupError, match="not this trainer's"):
        node.pool.begin(other, buffer.number, "x")
    node.begin(one, "x")
    node.stage(one, buffer, 0, 2, 1)
    with pytest.raises(LookupError, match="not this trainer's"):
        node.pool.begin(one, buffer.number, "y")
    with pytest.raises(LookupError, match="not this trainer's"):
        node.pool.begin(one, 99, "y")


def test_runs_do_not_share_buffers() -> None:
    node = Node()
    node.die_all(node.world(1, GIB))
    other = node.join(GIB, run="another run")
    node.serve()
    assert node.allocated == 4
    assert {buffer.run for buffer in node.granted[other]} == {"another run"}


# -- deaths


def test_death_in_the_middle_of_a_copy_leaves_the_one_before() -> None:
    node = Node()
    one, other = world = node.world(2, GIB)
    node.save(world, 1)
    node.serve()
    buffer = node.begin(one, "1-2")
    node.begin(other, "1-2")
    node.stage(one, buffer, 0, 2, 2)
    (lost,) = node.die(other)
    assert lost.info.step == 2
    assert node.steps == [1]


def test_a_part_that_comes_after_the_save_was_lost_is_refused() -> None:
    node = Node()
    one, other = node.world(2, GIB)
    buffer = node.begin(one, "1-1")
    node.begin(other, "1-1")
    assert node.die(other) == []
    assert node.stage(one, buffer, 0, 2, 1) is None
    assert node.store.snapshots == {}
    node.serve()
    assert buffer in node.granted[one], "it can be written to again"


def test_a_whole_snapshot_survives_the_death_of_who_staged_it() -> None:
    node = Node()
    world = node.world(3, GIB)
    node.save(world, 1)
    assert [node.die(trainer) for trainer in world] == [[], [], []]
    assert node.steps == [1]


def test_after_a_crash_the_same_world_gets_the_same_memory() -> None:
    node = Node()
    world = node.world(4, GIB)
    for attempt in range(1, 6):
        for step in range(4):
            node.save(world, 4 * attempt + step, attempt)
            node.serve()
        node.die_all(world)
        world = node.world(4, GIB)
        assert all(len(node.granted[trainer]) >= 1 for trainer in world)
    assert node.allocated == 8


def test_the_first_to_come_does_not_take_what_the_others_need() -> None:
    node = Node()
    world = node.world(4, GIB)
    node.save(world, 1)
    node.die_all(world)
    newcomers = [node.join(GIB) for _ in range(4)]
    for trainer in newcomers:  # one by one, and not in turn
        while node.requests[trainer]:
            left = len(node.requests[trainer])
            node.serve_one(trainer, node.requests[trainer])
            if left == len(node.requests[trainer]):
                break
    assert [len(node.granted[trainer]) for trainer in newcomers] == [1, 1, 1, 1]
    assert node.allocated == 8


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 3), (2, 4), (4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("snapshots", [1, 2])
def test_another_world_gets_its_memory_and_the_old_is_given_up(
    before: int, after: int, snapshots: int
) -> None:
    """The state is the same, so each rank's pack has another size."""
    node = Node()
    whole = 24 * GIB
    world = node.world(before, whole // before, snapshots)
    for step in (1, 2):
        node.save(world, step)
        node.serve()
    node.die_all(world)
    world = node.world(after, whole // after, snapshots)
    assert all(node.granted[trainer] for trainer in world), "each can save once"
    if before != after or snapshots == 2:
        assert 2 in node.steps
    for step in (3, 4, 5):
        node.save(world, step, attempt=2)
        node.serve()
        assert all(node.granted[trainer] for trainer in world), f"nobody can save any more after {step}"
    assert 5 in node.steps or snapshots == 1
    assert node.total == snapshots * whole


def test_the_snapshot_before_the_newest_stays_until_living_trainers_have_saved() -> None:
    """Of the newest another node may lack a part; then the one before it is what is resumed from."""
    node = Node()
    world = node.world(2, GIB)
    node.save(world, 1)
    node.save(world, 2)
    node.die_all(world)
    assert node.steps == [1, 2]
    for _ in range(2):
        node.join(GIB)
    node.tidy()
    assert node.steps == [1, 2]


def test_a_change_of_plan_does_not_end_a_save_that_is_not_whole_yet() -> None:
    node = Node()
    one, other = world = node.world(2, GIB)
    node.save(world, 1)
    node.serve()
    first, second = node.begin(one, "1-2"), node.begin(other, "1-2")
    node.stage(one, first, 0, 2, 2)
    node.replan(one, 3 * GIB)  # heard of before the other's part, which was sent before
    node.tidy()
    held = node.stage(other, second, 1, 2, 2)
    assert held is not None
    assert held.is_whole
    assert 2 in node.steps


def test_a_finished_run_gives_up_all_but_what_is_persisted() -> None:
    node = Node()
    world = node.world(2, GIB)
    node.save(world, 1)
    held = node.save(world, 2)
    held.tasks = 1
    node.die_all(world)
    node.pool.release("run")
    assert node.total == 2 * GIB
    held.tasks = 0
    node.pool.release("run")
    assert node.pool.buffers == {}


def test_of_a_finished_run_one_can_be_kept() -> None:
    node = Node()
    world = node.world(2, GIB)
    node.save(world, 1)
    held = node.save(world, 2)
    node.die_all(world)
    node.pool.release("run", keep=held)
    assert node.steps == [2]
    node.pool.release("run")
    assert node.pool.buffers == {}


def test_memory_that_a_thread_still_refers_to_can_be_given_up() -> None:
    node = Node()
    world = node.world(1, GIB)
    views = [memoryview(buffer.content) for buffer in node.pool.buffers.values()]
    node.die_all(world)
    node.pool.release("run")
    assert node.pool.buffers == {}
    assert all(len(view) == 1 for view in views)


# -- zombies


def test_a_zombie_keeps_its_buffers_and_cannot_end_what_the_living_have() -> None:
    node = Node()
    (zombie,) = old = node.world(1, GIB)
    node.save(old, 10)
    node.save(old, 11)
    new = node.world(1, GIB)
    node.save(new, 12, attempt=2)
    held = node.save(new, 13, attempt=2)
    for step in (20, 21, 22, 23):
        node.serve()
        node.save(old, step)
        assert node.store.newest("run") is held
    owned = {buffer.number for buffer in node.pool.owned(zombie)}
    assert owned.isdisjoint(buffer.number for buffer in node.pool.owned(new[0]))
    assert node.total == 4 * GIB


# -- long histories


class History:
    """Random saves, persists, reads, deaths, restarts and changes of plan, and what must hold throughout."""

    def __init__(self, seed: int, snapshots: int) -> None:
        self.random = random.Random(seed)
        self.snapshots = snapshots
        self.node = Node()
        self.world: list[Trainer] = []
        self.zombies: list[Trainer] = []
        self.staging: list[Buffer | None] = []
        self.attempt = 0
        self.step = 0
        self.best: HeldSnapshot | None = None
        self.start()

    def start(self) -> None:
        self.attempt += 1
        self.state = self.random.choice([GIB // 64, 3 * GIB, 24 * GIB, 24 * GIB, 24 * GIB])
        count = self.random.choice([1, 2, 3, 4, 4, 4, 8])
        self.world = [self.node.join(self.share(rank, count), self.snapshots) for rank in range(count)]
        self.staging = []

    def share(self, rank: int, count: int) -> int:
        """Packs differ by a chunk."""
        return self.state // count + (rank % 2) * (2 << 20)

    def act(self) -> None:
        action = self.random.choice(
            ["save"] * 8
            + ["serve"] * 8
            + ["persisted"] * 5
            + ["read"] * 2
            + ["die", "replan", "stop", "end"]
        )
        getattr(self, action)()

    def serve(self) -> None:
        trainers = list(self.node.requests)
        self.random.shuffle(trainers)
        for trainer in trainers:
            before = self.node.total
            made = self.node.allocated
            self.node.serve_one(trainer, self.node.requests[trainer])
            if self.node.allocated > made:
                assert self.node.total <= max(before, self.bound()), "more memory than was promised"
        self.node.tidy()

    def bound(self) -> int:
        """`snapshots` times what those that live save; and, until these have saved, what there is to restore."""
        newest = self.node.store.newest("run")
        parts = newest.parts.values() if newest is not None else ()
        left = sum(part.buffer.size for part in parts if part.buffer.owner is None)
        return left + sum(t.snapshots * (t.wanted + t.wanted // 8 + SLACK) for t in self.node.requests)

    def save(self) -> None:
        """As a world does: all begin, or none; each stages on its own, and some die in between."""
        if not self.world or not all(self.node.granted[trainer] for trainer in self.world):
            return
        self.step += 1
        name = f"{self.attempt}-{self.step}"
        buffers = [self.node.begin(trainer, name) for trainer in self.world]
        count = len(self.world)
        staged = count if self.random.random() < 0.9 else self.random.randrange(count)
        order = self.random.sample(range(count), count)
        for rank in order[:staged]:
            held = self.node.stage(self.world[rank], buffers[rank], rank, count, self.step, self.attempt)
        self.check()
        if staged < count:
            self.die()
            return
        assert held is not None
        assert held.is_whole
        held.tasks = self.random.choice([0, 1, 2])
        self.best = held

    def persisted(self) -> None:
        busy = [held for held in self.node.store.snapshots.values() if held.tasks]
        if busy:
            self.random.choice(busy).tasks -= 1

    def read(self) -> None:
        for held in self.node.store.snapshots.values():
            held.readers.clear()
        usable = [held for held in self.node.store.whole("run") if not held.is_at_risk]
        if usable and self.world:
            self.random.choice(usable).readers.add(self.world[0])

    def die(self) -> None:
        """In any order, with the next world there before the last of this one is gone."""
        for trainer in self.random.sample(self.world, len(self.world)):
            self.node.die(trainer)
            self.check()
        self.start()

    def stop(self) -> None:
        """All of a world are stopped, and a new one is started beside them."""
        if not self.zombies:
            self.zombies = self.world
            self.start()

    def end(self) -> None:
        """Those that were stopped are killed."""
        for trainer in self.zombies:
            self.node.die(trainer)
        self.zombies = []

    def replan(self) -> None:
        self.state = self.random.choice([self.state * 3, self.state // 3, self.state])
        for rank, trainer in enumerate(self.world):
            self.node.replan(trainer, self.share(rank, len(self.world)))

    def check(self) -> None:
        """The newest whole snapshot is there until there is a newer one, unless there is room for one only."""
        newest = self.node.store.newest("run")
        if self.snapshots == 2 and self.best is not None:
            assert newest is not None
            assert newest.order >= self.best.order, "the newest whole snapshot was given up"

    def settle(self) -> None:
        """Persists and reads come to their end: then everybody gets buffers, and the rest is freed."""
        self.end()
        for _ in range(3):
            for held in self.node.store.snapshots.values():
                held.tasks = 0
                held.readers.clear()
            self.node.serve()
            assert all(self.node.granted[trainer] for trainer in self.world), "a trainer waits for ever"
            self.step += 1
            self.node.save(self.world, self.step, self.attempt)
        self.node.serve()
        ours = sum(t.snapshots * (t.wanted + t.wanted // 8 + SLACK) for t in self.world)
        assert self.node.total <= ours
        assert len(self.node.pool.buffers) == self.snapshots * len(self.world)
        self.best = self.node.store.newest("run")


@pytest.mark.parametrize("snapshots", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_a_long_history(seed: int, snapshots: int) -> None:
    """Never more memory than promised; never the newest given up; nobody ever waits for ever."""
    history = History(seed, snapshots)
    for _ in range(10):
        for _ in range(30):
            history.act()
            history.check()
        history.settle()


# -- a storage that takes nothing


def stalled(held: HeldSnapshot, tasks: int = 1) -> None:
    """It waits to be persisted, and nothing gets on."""
    held.tasks, held.is_stalled = tasks, True


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_newest_saves_are_held_in_an_outage(ranks: int) -> None:
    """What waits is given up for what is newer, though nothing is durable; one that is whole is always there."""
    node = Node()
    world = node.world(ranks, GIB)
    for step in range(1, 10):
        stalled(node.save(world, step))
        node.serve()
        assert node.steps == ([1] if step == 1 else [step])
        assert not any(len(node.granted[trainer]) == 0 for trainer in world)


def test_what_is_being_read_is_not_given_up() -> None:
    """The one that a storage hangs in stays; the newest one that waits behind it goes for a newer one."""
    node = Node()
    world = node.world(1, GIB)
    first = node.save(world, 1)
    stalled(first)
    assert first.begin_reading()
    second = node.save(world, 2)
    second.tasks = 1
    node.serve()
    assert node.granted[world[0]] == []
    stalled(second)
    node.serve()
    assert second.is_replaced
    assert not second.begin_reading()
    stalled(node.save(world, 3))
    node.serve()
    assert node.steps == [1]
    assert len(node.granted[world[0]]) == 1
    first.end_reading()
    node.die_all(world)
    assert node.steps == [1, 3]


def test_a_wait_that_is_over_is_no_wait() -> None:
    """Where a persist begins just before a trainer is to have the memory, the trainer waits."""
    node = Node()
    world = node.world(1, GIB)
    first = node.save(world, 1)
    first.tasks = 1
    second = node.save(world, 2)
    second.tasks = 1
    first.is_stalled = True
    assert first.begin_reading()
    node.serve()
    assert node.granted[world[0]] == []
    first.end_reading()
    first.is_stalled, first.tasks = False, 0
    node.serve()
    assert len(node.granted[world[0]]) == 1


def test_one_snapshot_is_not_given_up_in_an_outage() -> None:
    """With room for one, a save waits for the one before."""
    node = Node()
    world = node.world(1, GIB, snapshots=1)
    stalled(node.save(world, 1))
    node.serve()
    assert node.granted[world[0]] == []
    assert node.steps == [1]
