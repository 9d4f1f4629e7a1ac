"""The snapshots that this node holds, and what may happen to each. No sockets, no threads, no storage.

- A trainer writes only into a buffer that was granted to it. The buffer's old snapshot is dropped when the
  trainer begins to write, not before: between saves as many snapshots are held as there are buffers.
- A snapshot is usable when each local rank has staged its part. It is never dropped for a newer one that is
  not, unless it is durable already, nor while it is being persisted or read. So a slow tier that works on one
  snapshot does not keep later ones out of a fast tier.
- While a storage takes nothing, the newest saves are the ones to hold: older ones that wait for it are dropped
  for newer ones, so that a crash during an outage costs no more steps than any other crash.
- A snapshot that failed to become durable is held like any other, until newer ones take its place.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.save_plan import SavePlan, decode_plan
from shardckpt.run.save_info import SaveInfo
from shardckpt.saver.protocol import Stage

__all__ = ["Buffer", "HeldSnapshot", "PackPlan", "Part", "SnapshotStore", "Trainer"]

_REMEMBERED = 1024  # lost saves whose parts may still arrive


@dataclass(eq=False)
class PackPlan:
    """Where the chunks of a rank's packs lie. Rank 0's also has the whole plan, which the commit needs."""

    number: int
    chunks: list[ChunkLocation]
    size: int
    encoded: bytes

    @cached_property
    def whole(self) -> SavePlan:
        """The whole plan. Of rank 0 only."""
        return decode_plan(self.encoded)


@dataclass(eq=False)
class Trainer:
    """A connected trainer, as the rules see it."""

    run: str = ""
    snapshots: int = 1
    wanted: int = 0
    """Size of the buffers that it asks for, in bytes."""
    allocating: int = 0
    """Size of the new memory that is being allocated for it, in bytes."""
    writing: str = ""
    """Id of the save whose part it may be writing."""


@dataclass(eq=False)
class Buffer:
    """Memory for one rank's pack."""

    number: int
    descriptor: int
    size: int
    content: memoryview
    run: str
    owner: Trainer | None = None
    is_granted: bool = False
    snapshot: HeldSnapshot | None = None

    def close(self) -> None:
        """Release this process's hold on the memory."""
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):  # a thread still refers to it: the mapping ends with that
            self.content.release()


@dataclass(eq=False)
class Part:
    """One rank's staged pack."""

    trainer: Trainer
    stage: Stage
    buffer: Buffer
    plan: PackPlan
    values: dict[str, Any]
    """The rank's PerRank values by path."""
    checksums: list[int] | None = None
    """The CRC-32C of each chunk, once they are known."""


@dataclass(eq=False)
class HeldSnapshot:
    """A save, or this node's part of it, in memory."""

    run: str
    info: SaveInfo
    local_ranks: int
    number: int
    """Counts this node's saves in the order in which they arrived."""
    parts: dict[int, Part] = field(default_factory=dict)
    tasks: int = 0
    """Number of tiers that it is being persisted in, or is queued for."""
    durable: set[str] = field(default_factory=set)
    """Tiers in which its step is durable, by this save or by another one of the same step."""
    failed: set[str] = field(default_factory=set)
    """Tiers in which persisting it has failed."""
    readers: set[Trainer] = field(default_factory=set)
    is_stalled: bool = False
    """True while it waits for a storage that takes nothing."""
    is_replaced: bool = False
    """True if a trainer was given its memory while it was queued: it will not be persisted."""
    _readings: int = 0
    _deciding: threading.Lock = field(default_factory=threading.Lock)

    def begin_reading(self) -> bool:
        """Claim its memory for persisting. False if a trainer has the memory. Safe from any thread."""
        with self._deciding:
            self._readings += not self.is_replaced
            return not self.is_replaced

    def end_reading(self) -> None:
        """Undo a `begin_reading` that was True."""
        with self._deciding:
            self._readings -= 1

    def replace(self) -> bool:
        """Let a trainer have its memory, even if it is queued for persisting. False if it is being read."""
        with self._deciding:
            self.is_replaced = self.tasks > 0 and not self._readings
            return not self.tasks or self.is_replaced

    @property
    def may_be_replaced(self) -> bool:
        """True if its memory is neither being read nor about to be."""
        return self.is_idle or (self.is_stalled and not self.readers and not self._readings)

    @property
    def is_whole(self) -> bool:
        """True if every rank of this node has staged its part."""
        return len(self.parts) == self.local_ranks

    @property
    def is_persisted(self) -> bool:
        """True if its step is durable in some tier."""
        return bool(self.durable)

    @property
    def is_idle(self) -> bool:
        """True if its memory is not being read."""
        return not self.tasks and not self.readers

    @property
    def is_orphaned(self) -> bool:
        """True if any trainer that staged it is gone: then its world is."""
        return any(part.buffer.owner is None for part in self.parts.values())

    @property
    def is_at_risk(self) -> bool:
        """True if a trainer may write into its memory at any moment, and so end it."""
        return any(part.buffer.is_granted for part in self.parts.values())

    @cached_property
    def order(self) -> tuple[int, int, str, int]:
        """Sorts a run's saves by attempt, then step, then arrival: the last one is the newest."""
        return (*self.info.order, self.number)


class SnapshotStore:
    """The snapshots of one node, and the trainers that make them."""

    def __init__(self) -> None:
        self.snapshots: dict[str, HeldSnapshot] = {}
        self.trainers: set[Trainer] = set()
        self._saves = 0
        self._lost: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)

    def join(self, trainer: Trainer) -> None:
        """Register a trainer: it counts for buffer limits and for the completeness of saves until `forget`."""
        self.trainers.add(trainer)

    # -- queries

    def of_run(self, run: str) -> list[HeldSnapshot]:
        """The run's snapshots, whole or not. Safe from any thread."""
        return [held for held in list(self.snapshots.values()) if held.run == run]

    def whole(self, run: str) -> list[HeldSnapshot]:
        """The run's whole snapshots."""
        return [held for held in self.of_run(run) if held.is_whole]

    def newest(self, run: str) -> HeldSnapshot | None:
        """The run's newest whole snapshot."""
        return max(self.whole(run), key=lambda held: held.order, default=None)

    def superseded(self, run: str) -> list[HeldSnapshot]:
        """Whole, idle snapshots of trainers that are gone, older than the run's newest; the oldest first.

        Where other nodes lack a part of the newest, the one before it is what the job resumes from.
        """
        newest = self.newest(run)
        found = [h for h in self.whole(run) if h.is_orphaned and h.is_idle and h is not newest]
        return sorted(found, key=lambda held: held.order)

    def is_outdated(self, held: HeldSnapshot) -> bool:
        """True if a later attempt of the run saves. Safe from any thread."""
        attempt = held.order[0]
        return any(other.order[0] > attempt for other in self.of_run(held.run))

    def may_go(self, held: HeldSnapshot | None, trainer: Trainer, *, has_other_buffer: bool) -> bool:
        """True if a snapshot may be dropped once this trainer begins its next save.

        The newest one may go if it is durable, or waits for a storage that takes nothing, and the trainer has no
        other buffer to write into, and none is coming.
        """
        if held is None:
            return True
        if trainer.snapshots > 1 and held is self.newest(held.run):
            is_safe = held.is_persisted if held.is_idle else self._has_older(held)
            return held.may_be_replaced and is_safe and not has_other_buffer
        return held.is_whole and (held.may_be_replaced if trainer.snapshots > 1 else held.is_idle)

    def _has_older(self, newest: HeldSnapshot) -> bool:
        """True if another snapshot can be restored from, should a trainer die while it overwrites the newest."""
        return any(held is not newest and not held.is_at_risk for held in self.whole(newest.run))

    # -- saves

    def stage(
        self, trainer: Trainer, buffer: Buffer, stage: Stage, plan: PackPlan, values: dict[str, Any]
    ) -> HeldSnapshot | None:
        """Take over a rank's part, which is in `buffer`, granted to this trainer.

        Returns None if the save is lost already, since another rank's part will not come. Raises LookupError if
        the pack does not fit the buffer, or the save does not lack this part.
        """
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
        """Note that a save has become durable in a tier, and with it the other snapshots of its step."""
        for other in [held, *self.of_run(held.run)]:
            if other.info.path == held.info.path:
                other.durable.add(tier)

    def abandon(self, save_id: str, run: str) -> HeldSnapshot | None:
        """Drop what there is of a save that will not be whole. Returns it, if there is anything."""
        held = self.snapshots.get(save_id)
        if held is not None and (held.is_whole or held.run != run):
            return None
        self._lost.append((run, save_id))
        if held is not None:
            self.drop(held)
        return held

    def forget(self, trainer: Trainer) -> list[HeldSnapshot]:
        """Unregister a trainer that is gone. Returns the saves that will not be whole without it; they are
        dropped."""
        lost = []
        self.trainers.discard(trainer)
        if trainer.writing not in self.snapshots:
            self.abandon(trainer.writing, trainer.run)
        for held in self.of_run(trainer.run):
            held.readers.discard(trainer)
            takes_part = held.info.id == trainer.writing or any(
                part.trainer is trainer for part in held.parts.values()
            )
            if not held.is_whole and (takes_part or self._is_hopeless(held)):
                self.abandon(held.info.id, held.run)
                lost.append(held)
        return lost

    def drop(self, held: HeldSnapshot) -> None:
        """Forget a snapshot; its buffers hold nothing from here on."""
        self.snapshots.pop(held.info.id, None)
        for part in held.parts.values():
            part.buffer.snapshot = None

    def _is_hopeless(self, held: HeldSnapshot) -> bool:
        """True if fewer trainers live than parts are missing: one has died before it began its own."""
        others = {other for other in self.trainers if other.run == held.run}
        others -= {part.trainer for part in held.parts.values()}
        return len(held.parts) + len(others) < held.local_ranks


def _lacks(held: HeldSnapshot, trainer: Trainer, stage: Stage) -> bool:
    """True if this part belongs to the save, by what the first part says, and is missing."""
    first = next(iter(held.parts.values())).stage
    return (
        held.run == trainer.run
        and stage.rank not in held.parts
        and (stage.info, stage.local_ranks, stage.tiers) == (first.info, first.local_ranks, first.tiers)
    )
