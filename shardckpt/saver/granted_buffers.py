"""The snapshot buffers that the saver has granted to a trainer, mapped into its memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shardckpt.errors import SaverError
from shardckpt.huge_pages import map_shared
from shardckpt.progress import alive
from shardckpt.saver.protocol import ChunkTable, GiveBack, GivenBack, Request, Reserve, Reserved

__all__ = ["GrantedBuffers", "Memory"]

_BEAT = 1.0  # seconds between two signs of life of a trainer that waits


@dataclass(frozen=True, eq=False)
class Memory:
    """A snapshot buffer, mapped into this process."""

    number: int
    content: memoryview


class GrantedBuffers:
    """Asks for buffers, and keeps those that are not in use. `take` is for the trainer's thread; what comes from
    the saver arrives in another.

    Args:
        send: sends a request; raises SaverError once the saver is gone.
    """

    def __init__(self, send: Callable[[Request], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._plan = ChunkTable(0, [], [], [], 0, b"")
        self._granted: deque[Memory] = deque()
        self._mapped: dict[int, memoryview] = {}
        self._former: dict[int, memoryview] = {}  # of the plan before, which may be granted again
        self._unasked = 0  # buffers still to be asked for
        self.is_waited_for = False
        """True while `take` waits."""
        self._is_full = False
        self._refused = ""  # why there is no memory
        self._loss: Callable[[], SaverError] | None = None

    def plan(self, plan: ChunkTable, count: int) -> None:
        """Ask for `count` buffers for packs of another plan. Those of the plan before are given back by that.

        Raises SaverError.
        """
        with self._changed:
            self._plan = plan
            self._granted.clear()
            self._former |= self._mapped
            self._mapped = {}
            self._refused = ""
            self._is_full = False
            self._unasked = count - 1  # every rank's first buffer comes before any second
        self._send(plan)
        self.ask()

    def ask(self) -> None:
        """Ask for one more buffer. Raises SaverError."""
        self._send(Reserve(self._plan.size))

    def ask_after_use(self) -> None:
        """Ask for a buffer in place of one that was used, and for the one that was to come after it.

        Raises SaverError.
        """
        with self._changed:
            self._former.clear()
        self._ask_for_next()
        self.ask()

    @property
    def has_any(self) -> bool:
        """True if `take` would not wait."""
        with self._changed:
            return bool(self._granted)

    @property
    def is_full(self) -> bool:
        """True if `take` would wait for earlier saves, rather than for new memory, or not at all."""
        with self._changed:
            return not self._granted and (bool(self._mapped) or self._is_full)

    def take(self) -> Memory:
        """A buffer to stage a pack in. Waits until there is one, as long as the saver answers.

        Raises MemoryError if there is no memory for it; the next call tries again. Raises SaverError.
        """
        if not self.has_any:
            self._ask_for_next()
        with self._changed:
            self.is_waited_for = True
            while not self._changed.wait_for(lambda: self._granted or self._loss or self._refused, _BEAT):
                alive()  # so is the saver, or it would be given up
            self.is_waited_for = False
            if self._loss is not None:
                raise self._loss()
            if self._granted:
                return self._granted.popleft()
            refused, self._refused = self._refused, ""
        self.ask()
        raise MemoryError(refused)

    def put_back(self, memory: Memory) -> None:
        """Return a buffer that was taken, and will not be staged: `take` gives it out again."""
        with self._changed:
            if self._mapped.get(memory.number) is memory.content:  # else it was for another plan
                self._granted.appendleft(memory)

    def _ask_for_next(self) -> None:
        """Ask for the buffer that was to come after one that is here. Raises SaverError."""
        with self._changed:
            is_due = self._unasked > 0 and bool(self._mapped)
            self._unasked -= is_due
        if is_due:
            self.ask()

    # -- from the saver

    def on_reserved(self, reserved: Reserved, descriptors: list[int]) -> None:
        """Map a buffer that has come; or note why none has."""
        with self._changed:
            is_current = reserved.plan == self._plan.number
            mapping = self._mapped.get(reserved.buffer) or self._former.get(reserved.buffer)
        if mapping is None and is_current and descriptors:
            mapping = map_shared(descriptors[0], reserved.size)
        for descriptor in descriptors:
            os.close(descriptor)
        with self._changed:
            if reserved.plan != self._plan.number:
                return
            if mapping is None:
                self._refused = reserved.error
                self._is_full = not reserved.error
            else:
                self._mapped[reserved.buffer] = mapping
                self._granted.append(Memory(reserved.buffer, mapping))
                if not self._unasked:
                    self._former.clear()
            is_waited_for = self.is_waited_for
            self._changed.notify_all()
        if not is_waited_for:  # new memory for the next one would take the CPU from the save that waits
            with contextlib.suppress(SaverError):  # which those that wait are told
                self._ask_for_next()

    def on_give_back(self, request: GiveBack) -> None:
        """Give a buffer back, unless it is in use."""
        with self._changed:
            kept = [memory for memory in self._granted if memory.number != request.buffer]
            if len(kept) == len(self._granted):
                return
            self._granted = deque(kept)
            self._mapped.pop(request.buffer, None)
        with contextlib.suppress(SaverError):  # which those that wait are told
            self._send(GivenBack(request.buffer))

    def lose(self, loss: Callable[[], SaverError]) -> None:
        """The saver is gone: `take` raises this from now on."""
        with self._changed:
            self._loss = loss
            self._granted.clear()
            self._mapped.clear()
            self._former.clear()
            self._changed.notify_all()
