"""The ranks of a world and their collectives: one seam, over torch.distributed or for a world of one."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist

from shardckpt import errors
from shardckpt.errors import RankMismatchError, ShardckptError
from shardckpt.memory import writable

__all__ = ["Alone", "Ranks", "TorchRanks", "acting_as", "agree", "agreement", "current_ranks"]

_log = logging.getLogger("shardckpt")

_LATE = timedelta(seconds=10)  # after which a rank that waits for others logs for which
_PADDED = 64 << 10  # bytes that a gather may pad without asking whether another way moves fewer
_HEAD = 512  # bytes that every rank sends first
_LENGTH = 8  # of these, for the length of its message
_TO_ANSWER = 1.0  # seconds in which the other ranks that wait say so in the job's store


class Ranks(Protocol):
    """A world of ranks that call each method together, in the same order.

    Attributes:
        rank: this rank's number, from 0.
        size: number of ranks.
        node: equal for two ranks only if they are on the same machine.
    """

    rank: int
    size: int
    node: str

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's `data`, by rank, on every rank."""

    def broadcast(self, data: bytes) -> bytes:
        """Return rank 0's `data`, on every rank."""

    def maximum(self, values: Sequence[int], doing: str = "") -> list[int]:
        """Return the elementwise maximum over all ranks.

        Args:
            values: 64-bit integers, equally many on all ranks.
            doing: the call that is logged if other ranks are late.
        """

    def total(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise sum over all ranks of 64-bit integers, equally many on all. It must fit, too."""

    def start_total(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Start `total` in the background, as `start_maximum` does."""

    def start_maximum(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Start `maximum` in the background. Returns a function that waits for the result, to be called once.

        Other methods may be called in between. It is safe never to call the function.
        """

    def exchange(
        self, sends: Sequence[tuple[int, memoryview]], receives: Sequence[tuple[int, memoryview]]
    ) -> None:
        """Send bytes to other ranks, and fill buffers with what they send. Collective, also without messages.

        Args:
            sends: rank to send to, and its bytes, at least one.
            receives: rank to receive from, and a writable buffer. The i-th buffer for a rank is filled with the
                i-th message of that rank to this one, and as long.
        """


class Alone:
    """A world of one."""

    rank = 0
    size = 1
    node = ""

    def gather(self, data: bytes) -> list[bytes]:
        """See Ranks."""
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        """See Ranks."""
        return data

    def maximum(self, values: Sequence[int], doing: str = "") -> list[int]:  # noqa: ARG002
        """See Ranks."""
        return list(values)

    def total(self, values: Sequence[int]) -> list[int]:
        """See Ranks."""
        return list(values)

    def start_total(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """See Ranks."""
        return lambda: list(values)

    def start_maximum(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """See Ranks."""
        return lambda: list(values)

    def exchange(
        self, sends: Sequence[tuple[int, memoryview]], receives: Sequence[tuple[int, memoryview]]
    ) -> None:
        """See Ranks. There is no other rank."""
        if sends or receives:
            raise ValueError("a world of one has no other rank to exchange anything with")


class TorchRanks:
    """The ranks of a torch.distributed process group that can move CPU tensors.

    It refers to the group weakly, so that `destroy_process_group` ends the group's threads. One that is alive
    when the interpreter ends may abort the process: it needs the interpreter's lock to free a tensor.
    """

    def __init__(self, group: Any) -> None:
        self._group_ref = weakref.ref(group)
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.node = _machine()
        self._calls = 0

    @property
    def _group(self) -> Any:
        group = self._group_ref()
        if group is None:
            raise ShardckptError(
                "the process group of these ranks is destroyed: call shardckpt, and close its Checkpointers, "
                "before destroy_process_group"
            )
        return group

    def gather(self, data: bytes) -> list[bytes]:
        """See Ranks."""
        heads = torch.zeros(self.size * _HEAD, dtype=torch.uint8)
        dist.all_gather(list(heads.chunk(self.size)), _head(data), group=self._group)
        received = [_of_head(head) for head in heads.chunk(self.size)]
        lengths = [length for length, _ in received]
        longest = max(lengths)
        if longest <= _HEAD - _LENGTH:
            return [content for _, content in received]
        own = _tensor(memoryview(data)) if data else torch.zeros(0, dtype=torch.uint8)
        if longest * self.size > 2 * sum(lengths) + _PADDED:  # a few ranks have nearly all of it
            starts = list(itertools.accumulate(lengths, initial=0))
            gathered = torch.zeros(starts[-1], dtype=torch.uint8)
            gathered[starts[self.rank] : starts[self.rank + 1]] = own
            dist.all_reduce(gathered, group=self._group)
        else:
            starts = [rank * longest for rank in range(self.size)]
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = own
            gathered = torch.empty(longest * self.size, dtype=torch.uint8)
            dist.all_gather(list(gathered.chunk(self.size)), mine, group=self._group)
        content = gathered.numpy()
        return [
            content[start : start + length].tobytes()
            for start, length in zip(starts, lengths, strict=False)
        ]

    def broadcast(self, data: bytes) -> bytes:
        """See Ranks."""
        head = _head(data)
        dist.broadcast(head, group=self._group, group_src=0)
        length, received = _of_head(head)
        if length <= _HEAD - _LENGTH:
            return received
        content = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            content = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        dist.broadcast(content, group=self._group, group_src=0)
        return content.numpy().tobytes()

    def maximum(self, values: Sequence[int], doing: str = "") -> list[int]:
        """See Ranks."""
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if doing:
            self._wait(work, doing)
        work.wait()
        return [int(value) for value in tensor.tolist()]

    def total(self, values: Sequence[int]) -> list[int]:
        """See Ranks."""
        return self.start_total(values)()

    def _wait(self, work: Any, doing: str) -> None:
        """Wait for the other ranks. If they are late, log which, and go on waiting."""
        self._calls += 1
        try:
            work.wait(_LATE)
        except RuntimeError as error:
            if work.is_completed():  # so it is not for the others' being late
                raise RankMismatchError(
                    f"rank {self.rank} calls {doing}, and others are not there: {error}. A rank has ended, "
                    "or is in another collective operation: all ranks of a job have to make the same calls of a "
                    "Checkpointer, at the same steps"
                ) from error
        else:
            return
        missing = self._missing()
        who = "other ranks" if not missing else f"rank {missing[0]}"
        if len(missing) > 1:
            who = f"ranks {', '.join(map(str, missing))}"
        _log.warning(
            "rank %d waits in %s, which all ranks have to call: for %s since %g s",
            self.rank,
            doing,
            who,
            _LATE.total_seconds(),
        )

    def _missing(self) -> list[int]:
        """Return the ranks that do not wait in the same call as this one, as far as the job's store knows."""
        try:
            store = dist.distributed_c10d._get_default_store()
            names = [f"shardckpt/{self._calls}/{rank}" for rank in range(self.size)]
            store.set(names[self.rank], "waits")
            time.sleep(_TO_ANSWER)
            return [rank for rank, name in enumerate(names) if not store.check([name])]
        except Exception as error:
            _log.debug("it is not known which ranks are late: %s", error)
            return []

    def start_total(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """See Ranks."""
        return self._start(values, dist.ReduceOp.SUM)

    def start_maximum(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """See Ranks."""
        return self._start(values, dist.ReduceOp.MAX)

    def _start(self, values: Sequence[int], operation: Any) -> Callable[[], list[int]]:
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, op=operation, group=self._group, async_op=True)

        def finish() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return finish

    def exchange(
        self, sends: Sequence[tuple[int, memoryview]], receives: Sequence[tuple[int, memoryview]]
    ) -> None:
        """See Ranks."""
        operations = [
            dist.P2POp(kind, _tensor(buffer), None, self._group, number, peer)
            for kind, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, number, buffer in _numbered(messages)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()


def _head(data: bytes) -> torch.Tensor:
    """The length of a message and, if there is room, all of it: short messages take one collective, not two."""
    content = data if len(data) <= _HEAD - _LENGTH else b""
    head = len(data).to_bytes(_LENGTH, "little") + content
    return torch.frombuffer(bytearray(head.ljust(_HEAD, b"\0")), dtype=torch.uint8)


def _of_head(head: torch.Tensor) -> tuple[int, bytes]:
    """The length of a message, and the message, if it is in the head."""
    received = head.numpy().tobytes()
    length = int.from_bytes(received[:_LENGTH], "little")
    return length, received[_LENGTH : _LENGTH + length]


def _machine() -> str:
    """Name this machine, also where several have one host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _tensor(buffer: memoryview) -> torch.Tensor:
    return torch.from_numpy(writable(np.frombuffer(buffer, dtype=np.uint8)))


def _numbered(messages: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, int, memoryview]]:
    """Number the messages of each peer: the number is the tag by which a send finds its receive."""
    numbers: Counter[int] = Counter()
    for peer, buffer in messages:
        yield peer, numbers[peer], buffer
        numbers[peer] += 1


_ranks_of: weakref.WeakKeyDictionary[Any, TorchRanks] = weakref.WeakKeyDictionary()
"""By the world's process group, while it exists."""


def current_ranks() -> Ranks:
    """Return the world of torch.distributed, or Alone where it is not initialized.

    Where the default process group cannot move CPU tensors (NCCL), this makes a gloo group beside it, once. So
    all ranks have to make the first call together.
    """
    if (ranks := getattr(_thread, "ranks", None)) is not None:
        return cast("Ranks", ranks)
    if not dist.is_available() or not dist.is_initialized():
        return Alone()
    world = dist.group.WORLD
    if world not in _ranks_of:
        backend = str(dist.get_backend_config(world))
        group = world if "cpu" in backend or "gloo" in backend else dist.new_group(backend="gloo")
        _ranks_of[world] = TorchRanks(group)
    return _ranks_of[world]


_thread = threading.local()


@contextmanager
def acting_as(ranks: Ranks) -> Iterator[None]:
    """Have `current_ranks` return `ranks` to this thread in the block.

    For a world that torch.distributed does not know, such as one of threads.
    """
    _thread.ranks = ranks
    try:
        yield
    finally:
        _thread.ranks = None


def agree(ranks: Ranks, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error. Collective.

    The lowest rank that has one raises its own; the others raise one of the same class and text, so that all can
    handle it alike. Without this, ranks without an error would wait for the others forever.
    """
    if not any(ranks.maximum([error is not None])):
        return
    told = "" if error is None else f"{_kind(error)}:{error}"
    reports = ranks.gather(told.encode(errors="replace"))
    rank, report = next((r, report.decode()) for r, report in enumerate(reports) if report)
    if error is not None and rank == ranks.rank:
        raise error
    name, _, message = report.partition(":")
    raise getattr(errors, name)(f"rank {rank}: {message}") from error


@contextmanager
def agreement(ranks: Ranks) -> Iterator[None]:
    """Run a block on all ranks; at its end, raise on every rank if the block raised on any, as `agree` does."""
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    agree(ranks, error)


def _kind(error: Exception) -> str:
    """Return the name of the library's class that is nearest to an error's."""
    names = (kind.__name__ for kind in type(error).__mro__)
    return next((name for name in names if name in errors.__all__), errors.ShardckptError.__name__)
