"""Which buffer holds what, and who may have which. Rules only: no socket, no thread, no storage.

- A trainer writes only into a buffer that was granted to it, and what the buffer held is given up at the
  moment of `begin`, not before: between saves as many snapshots are held as there are buffers.
- A snapshot is usable when each local rank has staged its part. It is never given up for a newer one that is
  not, nor while it is being persisted or read.
- The buffers of trainers that died are orphans: they are granted to those that come after, which spares
  these the seconds that new memory takes.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from shardckpt.plan import SavePlan, decode_plan
from shardckpt.runs import checkpoint_order
from shardckpt.saver.wire import Stage
from shardckpt.writer import Placed

__all__ = ["Buffer", "Held", "PackPlan", "Part", "Shelf", "Trainer"]

_REMEMBERED = 64  # lost saves of which a part may still arrive


@dataclass(eq=False)
class PackPlan:
    """Where the chunks of a rank's packs lie; of rank 0 also the whole plan, which the commit needs."""

    number: int
    writes: list[Placed]
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
    snapshot: Held | None = None

    def close(self) -> None:
        """Give the memory back, as far as this process is concerned."""
        self.content.close()
        os.close(self.descriptor)


@dataclass(eq=False)
class Part:
    """What one rank has staged."""

    trainer: Trainer
    stage: Stage
    buffer: Buffer
    plan: PackPlan
    checksums: list[int] | None = None
    """By chunk, once they are known."""


@dataclass(eq=False)
class Held:
    """A save, as far as this node has it."""

    run: str
    id: str
    path: str
    step: int
    world_size: int
    local_ranks: int
    parts: dict[int, Part] = field(default_factory=dict)
    tasks: int = 0
    """Tiers that it is being persisted in, or waits to be."""
    is_persisted: bool = False
    """Whether it has become durable in some tier."""
    readers: set[Trainer] = field(default_factory=set)

    @property
    def is_whole(self) -> bool:
        """Whether every rank of this node has staged its part."""
        return len(self.parts) == self.local_ranks

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

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts a run's saves by attempt, then step."""
        return checkpoint_order(self.path)


class Shelf:
    """The buffers and snapshots of one node."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.snapshots: dict[str, Held] = {}
        self._count = 0
        self._lost: deque[str] = deque(maxlen=_REMEMBERED)

    def newest(self, run: str) -> Held | None:
        """The run's newest whole snapshot."""
        return max(self.whole(run), key=lambda held: held.order, default=None)

    def whole(self, run: str) -> list[Held]:
        """The run's whole snapshots."""
        return [held for held in self._of(run) if held.is_whole]

    # -- buffers

    def grant(self, trainer: Trainer, size: int) -> Buffer | None:
        """The buffer that the trainer shall have now, if there is one."""
        fitting = [
            buffer
            for buffer in self.buffers.values()
            if buffer.run == trainer.run
            and buffer.owner in (None, trainer)
            and not buffer.is_granted
            and size <= buffer.size <= 2 * size + (4 << 20)
            and self._may_go(buffer.snapshot, trainer)
        ]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda b: (b.snapshot.order if b.snapshot else (-1,), b.size, b.number))
        buffer.owner, buffer.is_granted = trainer, True
        return buffer

    def may_allocate(self, trainer: Trainer, size: int) -> bool:
        """Whether new memory is within the bound: `snapshots` times what the run's trainers hold.

        A trainer's first buffer always is: it cannot save without.
        """
        own = [buffer for buffer in self.buffers.values() if buffer.owner is trainer]
        if not own:
            return True
        if len(own) >= trainer.snapshots:
            return False
        held = sum(buffer.size for buffer in self.buffers.values() if buffer.run == trainer.run)
        trainers = {id(b.owner): b.owner for b in self.buffers.values() if b.owner and b.run == trainer.run}
        bound = trainer.snapshots * sum(other.wanted for other in trainers.values())
        return held + size <= bound + bound // 8 + (8 << 20)

    def add(self, run: str, descriptor: int, size: int, content: mmap.mmap) -> None:
        """Put new memory on the shelf, for whoever asks first."""
        self.buffers[self._count] = Buffer(self._count, descriptor, size, content, run)
        self._count += 1

    def take_back(self, trainer: Trainer) -> None:
        """The trainer will not write into any buffer that it has had so far."""
        for buffer in self.buffers.values():
            if buffer.owner is trainer:
                buffer.owner, buffer.is_granted = None, False

    def make_room(self, run: str, size: int) -> None:
        """Give up orphans that hold nothing, and old snapshots of orphans, before new memory is allocated."""
        for held in self._of(run):
            if held.is_orphaned and held.is_idle and held is not self.newest(run):
                self._drop(held)
        freed = 0
        for buffer in sorted(self._spare(run), key=lambda buffer: buffer.size):
            if freed >= size:
                return
            freed += buffer.size
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

    def stage(self, trainer: Trainer, stage: Stage, plan: PackPlan) -> Held | None:
        """A rank's part is in its buffer: from here on the saver answers for it.

        None if the save is lost already, since another rank's part will not come. Raises LookupError if the
        buffer was not granted.
        """
        buffer = self._granted(trainer, stage.buffer)
        buffer.is_granted = False
        if stage.id in self._lost:
            return None
        held = self.snapshots.get(stage.id)
        if held is None:
            held = self.snapshots[stage.id] = Held(
                trainer.run, stage.id, stage.path, stage.step, stage.world_size, stage.local_ranks
            )
        buffer.snapshot = held
        held.parts[stage.rank] = Part(trainer, stage, buffer, plan)
        return held

    def abandon(self, save_id: str) -> Held | None:
        """A save will not be whole: give up what there is of it, and return it, if there is anything."""
        held = self.snapshots.get(save_id)
        if held is not None and held.is_whole:
            return None
        self._lost.append(save_id)
        if held is not None:
            self._drop(held)
        return held

    def forget(self, trainer: Trainer) -> list[Held]:
        """A trainer is gone. Returns the saves that will not be whole for that, which are given up."""
        lost = []
        if trainer.writing not in self.snapshots:
            self.abandon(trainer.writing)
        for held in list(self.snapshots.values()):
            held.readers.discard(trainer)
            takes_part = held.id == trainer.writing or any(
                p.trainer is trainer for p in held.parts.values()
            )
            if takes_part and not held.is_whole:
                self.abandon(held.id)
                lost.append(held)
        self.take_back(trainer)
        return lost

    def tidy(self, run: str, *, everyone_is_served: bool) -> None:
        """Give up what nobody will ask for: snapshots of orphans before the newest whole one, and, once every
        trainer of the run has its buffers, the orphans that are left."""
        newest = self.newest(run)
        for held in self._of(run):
            if held is not newest and held.is_orphaned and held.is_idle:
                self._drop(held)
        if everyone_is_served:
            for buffer in list(self._spare(run)):
                self._close(buffer)

    def release(self, run: str) -> None:
        """Give up what is not in use: nobody will come for it."""
        for held in self._of(run):
            if held.is_idle:
                self._drop(held)
        for buffer in list(self._spare(run)):
            self._close(buffer)

    def close(self) -> None:
        """Give everything up."""
        for buffer in list(self.buffers.values()):
            self._close(buffer)
        self.snapshots.clear()

    # -- details

    def _of(self, run: str) -> list[Held]:
        return [held for held in self.snapshots.values() if held.run == run]

    def _spare(self, run: str) -> Iterator[Buffer]:
        """Orphans that hold nothing."""
        for buffer in list(self.buffers.values()):
            if buffer.run == run and buffer.owner is None and buffer.snapshot is None:
                yield buffer

    def _may_go(self, held: Held | None, trainer: Trainer) -> bool:
        """Whether a snapshot may be given up once this trainer begins its next save."""
        if held is None:
            return True
        return (
            held.is_idle and held.is_whole and (trainer.snapshots == 1 or held is not self.newest(held.run))
        )

    def _granted(self, trainer: Trainer, number: int) -> Buffer:
        buffer = self.buffers.get(number)
        if buffer is None or buffer.owner is not trainer or not buffer.is_granted:
            raise LookupError(f"buffer {number} is not this trainer's to write to")
        return buffer

    def _drop(self, held: Held) -> None:
        self.snapshots.pop(held.id, None)
        for part in held.parts.values():
            part.buffer.snapshot = None

    def _close(self, buffer: Buffer) -> None:
        del self.buffers[buffer.number]
        buffer.close()
