"""Which buffer holds what, and who may have which. Rules only: no socket, no thread, no storage.

- A trainer writes only into a buffer that was granted to it, and what the buffer held is given up at the
  moment of `begin`, not before: between saves as many snapshots are held as there are buffers.
- A snapshot is usable when each local rank has staged its part. It is never given up for a newer one that is
  not, unless it is durable already, nor while it is being persisted or read. So a slow tier that is at work on
  one snapshot does not keep later ones out of a fast one.
- While a storage takes nothing, the newest saves are the ones to hold: what waits for it is given up for newer
  ones, so that a crash in an outage costs no more steps than any other.
- A snapshot that failed to become durable is held like any other: it can be restored from until newer ones
  take its place.
- The buffers of trainers that died are orphans: they are granted to those that come after, which spares
  these the seconds that new memory takes.
- A trainer has at most `snapshots` buffers, each at most an eighth larger than its pack. What those before it
  have left counts, as long as it is in use; so all in all a run takes up `snapshots` + 1 times what its
  trainers save, and less than that once a save of theirs is whole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.save_plan import SavePlan, decode_plan
from shardckpt.run.save_info import SaveInfo
from shardckpt.saver.buffers import empty
from shardckpt.saver.protocol import Stage

__all__ = ["Buffer", "HeldSnapshot", "PackPlan", "Part", "SnapshotStore", "Trainer"]

_REMEMBERED = 1024  # lost saves of which a part may still arrive
_SLACK = 4 << 20


@dataclass(eq=False)
class PackPlan:
    """Where the chunks of a rank's packs lie; of rank 0 also the whole plan, which the commit needs."""

    number: int
    writes: list[ChunkLocation]
    size: int
    encoded: bytes

    @cached_property
    def whole(self) -> SavePlan:
        """The whole plan. Of rank 0 only."""
        return decode_plan(self.encoded)


@dataclass(eq=False)
class Trainer:
    """A connected trainer, as far as the rules are concerned."""

    run: str = ""
    snapshots: int = 1
    wanted: int = 0
    """Bytes of the buffers that it asks for."""
    allocating: int = 0
    """Bytes of new memory that is being made for it."""
    writing: str = ""
    """The save of which it may be writing its part."""


@dataclass(eq=False)
class Buffer:
    """Memory for one rank's pack."""

    number: int
    descriptor: int
    size: int
    content: mmap.mmap
    run: str
    owner: Trainer | None = None
    is_granted: bool = False
    snapshot: HeldSnapshot | None = None

    def close(self) -> None:
        """Give the memory back, as far as this process is concerned."""
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):  # a thread has not forgotten it yet: then by its end
            self.content.close()


@dataclass(eq=False)
class Part:
    """What one rank has staged."""

    trainer: Trainer
    stage: Stage
    buffer: Buffer
    plan: PackPlan
    values: dict[str, Any]
    """The rank's PerRank values by path."""
    checksums: list[int] | None = None
    """By chunk, once they are known."""


@dataclass(eq=False)
class HeldSnapshot:
    """A save, as far as this node has it."""

    run: str
    info: SaveInfo
    local_ranks: int
    number: int
    """Of this node's saves, in the order in which they came."""
    parts: dict[int, Part] = field(default_factory=dict)
    tasks: int = 0
    """Tiers that it is being persisted in, or waits to be."""
    durable: set[str] = field(default_factory=set)
    """Tiers in which its step has become durable, by this save or by another one of the same step."""
    failed: set[str] = field(default_factory=set)
    """Tiers in which it was tried, and failed."""
    readers: set[Trainer] = field(default_factory=set)
    is_stalled: bool = False
    """Whether it waits for a storage that takes nothing."""
    is_replaced: bool = False
    """Whether a trainer has been given its memory while it waited: it will not be persisted."""
    _readings: int = 0
    _deciding: threading.Lock = field(default_factory=threading.Lock)

    def begin_reading(self) -> bool:
        """Its memory is about to be persisted. False if a trainer has it. Safe from any thread."""
        with self._deciding:
            self._readings += not self.is_replaced
            return not self.is_replaced

    def end_reading(self) -> None:
        """Undo a `begin_reading` that was True."""
        with self._deciding:
            self._readings -= 1

    def replace(self) -> bool:
        """Let a trainer have its memory, even if it waits to be persisted. False if it is being read."""
        with self._deciding:
            self.is_replaced = self.tasks > 0 and not self._readings
            return not self.tasks or self.is_replaced

    @property
    def may_be_replaced(self) -> bool:
        """Whether its memory is not being read, and will not be soon."""
        return self.is_idle or (self.is_stalled and not self.readers and not self._readings)

    @property
    def is_whole(self) -> bool:
        """Whether every rank of this node has staged its part."""
        return len(self.parts) == self.local_ranks

    @property
    def is_persisted(self) -> bool:
        """Whether its step is durable in some tier."""
        return bool(self.durable)

    @property
    def is_idle(self) -> bool:
        """Whether its memory is not being read."""
        return not self.tasks and not self.readers

    @property
    def is_orphaned(self) -> bool:
        """Whether any who staged it is gone: then its world is."""
        return any(part.buffer.owner is None for part in self.parts.values())

    @property
    def is_at_risk(self) -> bool:
        """Whether a trainer may write into its memory at any moment, and so end it."""
        return any(part.buffer.is_granted for part in self.parts.values())

    @cached_property
    def order(self) -> tuple[int, int, str, int]:
        """Sorts a run's saves by attempt, then step; of several saves of one step, the last is the newest."""
        return (*self.info.order, self.number)


class SnapshotStore:
    """The buffers and snapshots of one node."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.snapshots: dict[str, HeldSnapshot] = {}
        self._trainers: set[Trainer] = set()
        self._count = 0
        self._saves = 0
        self._lost: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)

    def newest(self, run: str) -> HeldSnapshot | None:
        """The run's newest whole snapshot."""
        return max(self.whole(run), key=lambda held: held.order, default=None)

    def whole(self, run: str) -> list[HeldSnapshot]:
        """The run's whole snapshots."""
        return [held for held in self._of(run) if held.is_whole]

    def is_outdated(self, held: HeldSnapshot) -> bool:
        """Whether a later attempt of the run saves. Safe from any thread."""
        attempt = held.order[0]
        return any(other.order[0] > attempt for other in self._of(held.run))

    # -- buffers

    def join(self, trainer: Trainer) -> None:
        """Reckon with a trainer until `forget`."""
        self._trainers.add(trainer)

    def owned(self, trainer: Trainer) -> list[Buffer]:
        """The buffers that nobody else may write into."""
        return [buffer for buffer in self.buffers.values() if buffer.owner is trainer]

    def grant(self, trainer: Trainer, size: int) -> Buffer | None:
        """The buffer that the trainer shall have now, if there is one."""
        owners = [trainer, None] if self._is_next(trainer) else [trainer]
        fitting = [
            buffer
            for buffer in self.buffers.values()
            if buffer.run == trainer.run
            and buffer.owner in owners
            and not buffer.is_granted
            and size <= buffer.size <= _most(size)
            and self._may_go(buffer.snapshot, trainer)
        ]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda b: (b.snapshot.order if b.snapshot else (-1,), b.size, b.number))
        if buffer.snapshot is not None and not buffer.snapshot.replace():
            return None
        buffer.owner, buffer.is_granted = trainer, True
        return buffer

    def may_allocate(self, trainer: Trainer, size: int) -> bool:
        """Whether new memory is within the bound: `snapshots` times what the run's trainers save.

        For a trainer's first buffer, what can be restored from until they have saved does not count.
        """
        if not self._is_next(trainer):
            return False
        spared = [] if self.owned(trainer) else [self.newest(trainer.run)]
        spared += self._superseded(trainer.run)
        others = [other for other in self._trainers if other.run == trainer.run]
        in_use = sum(len(self.owned(other)) * other.wanted + other.allocating for other in others)
        left = sum(
            buffer.size
            for buffer in self.buffers.values()
            if buffer.run == trainer.run
            and buffer.owner is None
            and buffer.snapshot is not None
            and buffer.snapshot not in spared
        )
        return left + in_use + size <= sum(other.snapshots * other.wanted for other in others)

    def add(self, trainer: Trainer, descriptor: int, size: int, content: mmap.mmap) -> None:
        """Put new memory on the shelf, for the trainer that it was made for, if that still wants it."""
        owner = trainer if trainer in self._trainers and trainer.wanted == size else None
        self.buffers[self._count] = Buffer(self._count, descriptor, size, content, trainer.run, owner)
        self._count += 1

    def take_back(self, trainer: Trainer) -> None:
        """The trainer will not write into any buffer that it has had so far."""
        trainer.wanted = 0
        for buffer in self.buffers.values():
            if buffer.owner is trainer:
                buffer.owner, buffer.is_granted = None, False

    def lacking(self, run: str, count: int) -> int:
        """Bytes that the run's trainers still need until each has `count` buffers."""
        return sum(
            trainer.wanted
            for trainer in self._trainers
            if trainer.run == run and len(self.owned(trainer)) + bool(trainer.allocating) < count
        )

    def surplus(self, trainer: Trainer) -> list[Buffer]:
        """What the trainer has beyond its `snapshots` and could do without."""
        owned = self.owned(trainer)
        count = len(owned) - trainer.snapshots
        if count <= 0:
            return []
        newest = self.newest(trainer.run)
        spare = [b for b in owned if b.is_granted or b.snapshot is None or _is_replaced(b.snapshot, newest)]
        return sorted(spare, key=lambda buffer: buffer.is_granted)[:count]

    def give_back(self, trainer: Trainer, number: int) -> None:
        """The trainer does without a buffer that was granted to it. Raises LookupError if it was not."""
        self.discard(self._granted(trainer, number))

    def discard(self, buffer: Buffer) -> None:
        """Give up a buffer that nobody writes into, with what it holds, though others have it mapped."""
        if buffer.snapshot is not None:
            self._drop(buffer.snapshot)
        empty(buffer.descriptor, buffer.size)
        self._close(buffer)

    def relieve(self, *, may_give_up_newest: bool) -> int:
        """Give up what no run needs: orphans that hold nothing, or a save before the newest; also the newest ones
        of orphans that are durable, if that may be. Returns the bytes that were given up."""
        before = sum(buffer.size for buffer in self.buffers.values())
        for run in {buffer.run for buffer in self.buffers.values()}:
            for held in self._superseded(run):
                self._drop(held)
            newest = self.newest(run)
            if (
                may_give_up_newest
                and newest is not None
                and newest.is_orphaned
                and newest.is_idle
                and newest.is_persisted
            ):
                self._drop(newest)
            for buffer in list(self._spare(run)):
                self._close(buffer)
        return before - sum(buffer.size for buffer in self.buffers.values())

    def make_room(self, run: str, size: int) -> None:
        """Give up orphans that nobody needs, as much as new memory is to take."""
        freed = 0
        spare = sorted(self._spare(run), key=lambda buffer: buffer.size)
        for held in self._superseded(run):
            spare += [part.buffer for part in held.parts.values() if part.buffer.owner is None]
        for buffer in spare:
            if freed >= size:
                return
            freed += buffer.size
            if buffer.snapshot is not None:
                self._drop(buffer.snapshot)
            self._close(buffer)

    # -- snapshots

    def begin(self, trainer: Trainer, number: int, save_id: str) -> None:
        """The trainer is about to write its part into a granted buffer: what this held is given up.

        Raises LookupError if it was not granted.
        """
        buffer = self._granted(trainer, number)
        trainer.writing = save_id
        if buffer.snapshot is not None:
            self._drop(buffer.snapshot)

    def stage(
        self, trainer: Trainer, stage: Stage, plan: PackPlan, values: dict[str, Any]
    ) -> HeldSnapshot | None:
        """A rank's part is in its buffer: from here on the saver answers for it.

        None if the save is lost already, since another rank's part will not come. Raises LookupError if the
        buffer was not granted, or the part is not one that the save lacks.
        """
        buffer = self._granted(trainer, stage.buffer)
        save_id = stage.info.id
        held = self.snapshots.get(save_id)
        if held is not None and not _lacks(held, trainer, stage):
            raise LookupError(f"save {save_id} does not lack such a part of rank {stage.rank}")
        if plan.size > buffer.size:
            raise LookupError(f"a pack of {plan.size} bytes is not in a buffer of {buffer.size}")
        buffer.is_granted = False
        if (trainer.run, save_id) in self._lost:
            return None
        if held is None:
            self._saves += 1
            held = HeldSnapshot(trainer.run, stage.info, stage.local_ranks, self._saves)
            self.snapshots[save_id] = held
        buffer.snapshot = held
        held.parts[stage.rank] = Part(trainer, stage, buffer, plan, values)
        if self._is_hopeless(held):
            self.abandon(save_id, trainer.run)
            return None
        return held

    def note_persisted(self, held: HeldSnapshot, tier: str) -> None:
        """A save has become durable in a tier, and with it what else is held of its step."""
        for other in [held, *self._of(held.run)]:
            if other.info.path == held.info.path:
                other.durable.add(tier)

    def abandon(self, save_id: str, run: str) -> HeldSnapshot | None:
        """A run's save will not be whole: give up what there is of it, and return it, if there is anything."""
        held = self.snapshots.get(save_id)
        if held is not None and (held.is_whole or held.run != run):
            return None
        self._lost.append((run, save_id))
        if held is not None:
            self._drop(held)
        return held

    def forget(self, trainer: Trainer) -> list[HeldSnapshot]:
        """A trainer is gone. Returns the saves that will not be whole for that, which are given up."""
        lost = []
        self._trainers.discard(trainer)
        if trainer.writing not in self.snapshots:
            self.abandon(trainer.writing, trainer.run)
        for held in self._of(trainer.run):
            held.readers.discard(trainer)
            takes_part = held.info.id == trainer.writing or any(
                p.trainer is trainer for p in held.parts.values()
            )
            if not held.is_whole and (takes_part or self._is_hopeless(held)):
                self.abandon(held.info.id, held.run)
                lost.append(held)
        self.take_back(trainer)
        return lost

    def tidy(self, run: str, *, everyone_is_served: bool) -> None:
        """Give up the snapshots of orphans that a newer one of living trainers replaces, and, once every trainer
        of the run has its buffers, the orphans that are left."""
        newest = self.newest(run)
        if everyone_is_served or (newest is not None and not newest.is_orphaned):
            for held in self._superseded(run):
                self._drop(held)
        if everyone_is_served:
            for buffer in list(self._spare(run)):
                self._close(buffer)

    def release(self, run: str, keep: HeldSnapshot | None = None) -> None:
        """Give up what is not in use, but for `keep`: nobody will come for it."""
        for held in self._of(run):
            if held.is_idle and held is not keep:
                self._drop(held)
        for buffer in list(self._spare(run)):
            self._close(buffer)

    def close(self) -> None:
        """Give everything up."""
        for buffer in list(self.buffers.values()):
            self._close(buffer)
        self.snapshots.clear()

    # -- details

    def _of(self, run: str) -> list[HeldSnapshot]:
        return [held for held in list(self.snapshots.values()) if held.run == run]

    def _superseded(self, run: str) -> list[HeldSnapshot]:
        """Whole snapshots of orphans before the newest whole one that nobody reads, the oldest first.

        Where other nodes lack a part of the newest, the one before it is what this job resumes from.
        """
        newest = self.newest(run)
        found = [h for h in self.whole(run) if h.is_orphaned and h.is_idle and h is not newest]
        return sorted(found, key=lambda held: held.order)

    def _spare(self, run: str) -> Iterator[Buffer]:
        """Orphans that hold nothing."""
        for buffer in list(self.buffers.values()):
            if buffer.run == run and buffer.owner is None and buffer.snapshot is None:
                yield buffer

    def _is_next(self, trainer: Trainer) -> bool:
        """Whether the trainer may have another buffer: everyone's first comes before any second."""
        own = len(self.owned(trainer))
        if own == 0:
            return True
        return own < trainer.snapshots and all(
            self.owned(other) or not other.wanted for other in self._trainers if other.run == trainer.run
        )

    def _is_hopeless(self, held: HeldSnapshot) -> bool:
        """Whether fewer trainers live than parts are lacking: one has died before it began its own."""
        others = {other for other in self._trainers if other.run == held.run}
        others -= {part.trainer for part in held.parts.values()}
        return len(held.parts) + len(others) < held.local_ranks

    def _may_go(self, held: HeldSnapshot | None, trainer: Trainer) -> bool:
        """Whether a snapshot may be given up once this trainer begins its next save.

        Of the newest one that is so if it is durable, or waits for a storage that takes nothing, and the
        trainer has nothing else to write into.
        """
        if held is None:
            return True
        if trainer.snapshots > 1 and held is self.newest(held.run):
            has_other = any(buffer.is_granted for buffer in self.owned(trainer))
            is_safe = held.is_persisted if held.is_idle else self._has_older(held)
            return held.may_be_replaced and is_safe and not has_other
        return held.is_whole and (held.may_be_replaced if trainer.snapshots > 1 else held.is_idle)

    def _has_older(self, newest: HeldSnapshot) -> bool:
        """Whether another snapshot can be restored from, should a trainer die while it writes over the newest."""
        return any(held is not newest and not held.is_at_risk for held in self.whole(newest.run))

    def _granted(self, trainer: Trainer, number: int) -> Buffer:
        buffer = self.buffers.get(number)
        if buffer is None or buffer.owner is not trainer or not buffer.is_granted:
            raise LookupError(f"buffer {number} is not this trainer's to write to")
        return buffer

    def _drop(self, held: HeldSnapshot) -> None:
        self.snapshots.pop(held.info.id, None)
        for part in held.parts.values():
            part.buffer.snapshot = None

    def _close(self, buffer: Buffer) -> None:
        del self.buffers[buffer.number]
        buffer.close()


def _lacks(held: HeldSnapshot, trainer: Trainer, stage: Stage) -> bool:
    """Whether a part of this rank belongs to a save that another rank has begun, and is not there yet."""
    first = next(iter(held.parts.values())).stage
    return (
        held.run == trainer.run
        and stage.rank not in held.parts
        and (stage.info, stage.local_ranks, stage.tiers) == (first.info, first.local_ranks, first.tiers)
    )


def _is_replaced(held: HeldSnapshot, newest: HeldSnapshot | None) -> bool:
    """Whether a whole save is not read, and not the newest."""
    return held.is_idle and held.is_whole and held is not newest


def _most(size: int) -> int:
    """The largest buffer that a pack of `size` bytes may take up."""
    return size + size // 8 + _SLACK
