"""Which trainer may have which buffer. Rules only: no sockets, no threads, no storage.

- Buffers of trainers that died are orphans: they are granted to the trainers that come after them, which spares
  these the seconds that new memory takes.
- A trainer has at most `snapshots` buffers, each at most an eighth larger than its pack. Orphans count as long as
  they are in use. So a run takes up `snapshots` + 1 times what its trainers save at most, and less once a save of
  theirs is whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardckpt.saver.buffers import empty
from shardckpt.saver.snapshots import Buffer, HeldSnapshot, SnapshotStore, Trainer

__all__ = ["BufferPool"]

_SLACK = 4 << 20


class BufferPool:
    """The buffers of one node. Dropping a snapshot of `store` leaves its buffers here, empty."""

    def __init__(self, store: SnapshotStore) -> None:
        self.buffers: dict[int, Buffer] = {}
        self._store = store
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(buffer.size for buffer in self.buffers.values())

    @property
    def runs(self) -> set[str]:
        """The runs that have buffers."""
        return {buffer.run for buffer in self.buffers.values()}

    def owned(self, trainer: Trainer) -> list[Buffer]:
        """The buffers that no other trainer may write into."""
        return [buffer for buffer in self.buffers.values() if buffer.owner is trainer]

    def granted(self, trainer: Trainer, number: int) -> Buffer:
        """A buffer that this trainer may write into. Raises LookupError if it was not granted to it."""
        buffer = self.buffers.get(number)
        if buffer is None or buffer.owner is not trainer or not buffer.is_granted:
            raise LookupError(f"buffer {number} is not this trainer's to write to")
        return buffer

    # -- giving out

    def grant(self, trainer: Trainer, size: int) -> Buffer | None:
        """Give the trainer a buffer of at least `size` bytes, if there is one that it may have now."""
        owners = [trainer, None] if self._is_next(trainer) else [trainer]
        has_other = trainer.allocating > 0 or any(buffer.is_granted for buffer in self.owned(trainer))
        fitting = [
            buffer
            for buffer in self.buffers.values()
            if buffer.run == trainer.run
            and buffer.owner in owners
            and not buffer.is_granted
            and size <= buffer.size <= _largest(size)
            and self._store.may_go(buffer.snapshot, trainer, has_other_buffer=has_other)
        ]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda b: (b.snapshot.order if b.snapshot else (-1,), b.size, b.number))
        if buffer.snapshot is not None and not buffer.snapshot.replace():
            return None
        buffer.owner, buffer.is_granted = trainer, True
        return buffer

    def may_allocate(self, trainer: Trainer, size: int) -> bool:
        """True if new memory is within the bound: `snapshots` times what the run's trainers save.

        For a trainer's first buffer, what can be restored from until they have saved does not count.
        """
        if not self._is_next(trainer):
            return False
        spared = [] if self.owned(trainer) else [self._store.newest(trainer.run)]
        spared += self._store.superseded(trainer.run)
        others = [other for other in self._store.trainers if other.run == trainer.run]
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

    def add(self, trainer: Trainer, descriptor: int, size: int, content: memoryview) -> None:
        """Add new memory, for the trainer that it was allocated for if that still wants it."""
        owner = trainer if trainer in self._store.trainers and trainer.wanted == size else None
        self.buffers[self._count] = Buffer(self._count, descriptor, size, content, trainer.run, owner)
        self._count += 1

    def begin(self, trainer: Trainer, number: int, save_id: str) -> None:
        """Drop what a granted buffer holds: the trainer is about to write its part of a save into it.

        Raises LookupError if it was not granted.
        """
        buffer = self.granted(trainer, number)
        trainer.writing = save_id
        if buffer.snapshot is not None:
            self._store.drop(buffer.snapshot)

    def lacking(self, run: str, count: int) -> int:
        """Bytes that the run's trainers still need until each of them has `count` buffers."""
        return sum(
            trainer.wanted
            for trainer in self._store.trainers
            if trainer.run == run and len(self.owned(trainer)) + bool(trainer.allocating) < count
        )

    def _is_next(self, trainer: Trainer) -> bool:
        """True if the trainer may have another buffer: everyone's first comes before any second."""
        own = len(self.owned(trainer))
        if own == 0:
            return True
        return own < trainer.snapshots and all(
            self.owned(other) or not other.wanted
            for other in self._store.trainers
            if other.run == trainer.run
        )

    # -- taking back

    def take_back(self, trainer: Trainer) -> None:
        """Make orphans of the trainer's buffers: it will not write into any of them again."""
        trainer.wanted = 0
        for buffer in self.buffers.values():
            if buffer.owner is trainer:
                buffer.owner, buffer.is_granted = None, False

    def surplus(self, trainer: Trainer) -> list[Buffer]:
        """What the trainer has beyond its `snapshots` and can do without."""
        owned = self.owned(trainer)
        count = len(owned) - trainer.snapshots
        if count <= 0:
            return []
        newest = self._store.newest(trainer.run)
        spare = [b for b in owned if b.is_granted or b.snapshot is None or _is_replaced(b.snapshot, newest)]
        return sorted(spare, key=lambda buffer: buffer.is_granted)[:count]

    def give_back(self, trainer: Trainer, number: int) -> None:
        """Free a buffer that was granted to the trainer. Raises LookupError if it was not."""
        self.discard(self.granted(trainer, number))

    def discard(self, buffer: Buffer) -> None:
        """Free a buffer that no trainer writes into, and drop what it holds, though trainers have it mapped."""
        if buffer.snapshot is not None:
            self._store.drop(buffer.snapshot)
        empty(buffer.descriptor, buffer.size)
        self._close(buffer)

    def make_room(self, run: str, size: int) -> None:
        """Free orphans that nobody needs, as many as new memory of `size` bytes takes the place of."""
        freed = 0
        spare = sorted(self._spare(run), key=lambda buffer: buffer.size)
        for held in self._store.superseded(run):
            spare += [part.buffer for part in held.parts.values() if part.buffer.owner is None]
        for buffer in spare:
            if freed >= size:
                return
            freed += buffer.size
            if buffer.snapshot is not None:
                self._store.drop(buffer.snapshot)
            self._close(buffer)

    def relieve(self, *, may_drop_newest: bool) -> int:
        """Free what no run needs: orphans that hold nothing, or a save before the newest.

        With `may_drop_newest`, also the newest save of trainers that are gone, if it is durable. Returns the
        bytes that were freed.
        """
        before = self.nbytes
        for run in self.runs:
            self._drop_superseded(run)
            newest = self._store.newest(run)
            is_spare = newest is not None and newest.is_orphaned and newest.is_idle and newest.is_persisted
            if may_drop_newest and newest is not None and is_spare:
                self._store.drop(newest)
            self._close_spare(run)
        return before - self.nbytes

    def tidy(self, run: str, *, everyone_is_served: bool) -> None:
        """Drop snapshots of trainers that are gone once living ones have a newer one. Free the orphans
        left over once every trainer of the run has its buffers."""
        newest = self._store.newest(run)
        if everyone_is_served or (newest is not None and not newest.is_orphaned):
            self._drop_superseded(run)
        if everyone_is_served:
            self._close_spare(run)

    def release(self, run: str, keep: HeldSnapshot | None = None) -> None:
        """Drop the idle snapshots of a finished run, except `keep`, and free its orphans."""
        for held in self._store.of_run(run):
            if held.is_idle and held is not keep:
                self._store.drop(held)
        self._close_spare(run)

    def close(self) -> None:
        """Free everything."""
        for buffer in list(self.buffers.values()):
            self._close(buffer)
        self._store.snapshots.clear()

    def _drop_superseded(self, run: str) -> None:
        for held in self._store.superseded(run):
            self._store.drop(held)

    def _spare(self, run: str) -> Iterator[Buffer]:
        """Orphans that hold nothing."""
        for buffer in list(self.buffers.values()):
            if buffer.run == run and buffer.owner is None and buffer.snapshot is None:
                yield buffer

    def _close_spare(self, run: str) -> None:
        for buffer in self._spare(run):
            self._close(buffer)

    def _close(self, buffer: Buffer) -> None:
        del self.buffers[buffer.number]
        buffer.close()


def _is_replaced(held: HeldSnapshot, newest: HeldSnapshot | None) -> bool:
    """True if a whole save is not being read, and not the newest."""
    return held.is_idle and held.is_whole and held is not newest


def _largest(size: int) -> int:
    """Size of the largest buffer that a pack of `size` bytes may take up."""
    return size + size // 8 + _SLACK
