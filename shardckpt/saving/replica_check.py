"""Do ranks that hold the same box hold the same content? Compared by digests.

A checkpoint stores such a box once. If its holders differ, to store one of them would silently lose the others,
so that is an error. For a new plan every byte is compared. Later saves compare a part each, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import crc32c
import msgspec
import numpy as np
import torch

from shardckpt.errors import RankMismatchError
from shardckpt.format.box import Box
from shardckpt.format.save_plan import SavePlan
from shardckpt.memory import bytes_at
from shardckpt.ranks.equality import MODULUS, weight
from shardckpt.ranks.equality import digest as digest_of
from shardckpt.ranks.world import Ranks
from shardckpt.saving.staging import box_data
from shardckpt.state.tensors import TensorShard, as_array, dense, flat_bytes, is_plain

__all__ = ["ReplicaCheck"]

_SMALL = 64 << 10
"""Bytes up to which a box in CPU memory is compared whole, and not in parts."""

_SMALL_BOXES = 2048
"""Boxes of up to that size compared at a save, in turn where there are more: about a millisecond."""

_PER_BOX = 20 << 10
"""Bytes compared at a save for each larger box: takes less time than three samples of 4 KiB (bench/replicas)."""

_AT_LEAST = 4 << 20
"""Bytes compared at a save, of all larger boxes that the same ranks hold: a fraction of a millisecond
(bench/replicas --tensors 8)."""

_MOST_SAVES = 128
"""Saves after which every byte in CPU memory was compared, however large the boxes are."""

_GPU_BOXES = 128
"""Boxes in GPU memory compared at a save: each takes the time to launch a kernel, and little more."""

_WORDS = 1021
"""Columns that words in GPU memory are summed in: a prime, so that rows of data fall into different ones."""

_LISTED = 8


class ReplicaCheck:
    """Compares what several ranks hold. Prepared once, for any number of saves.

    Args:
        plan: the save's plan, equal on all ranks.
        tensors: this rank's tensors.
        rank: this rank's number.
    """

    def __init__(self, plan: SavePlan, tensors: Sequence[TensorShard], rank: int) -> None:
        by_name = {tensor.name: tensor for tensor in tensors}
        self._is_needed = plan.has_shared
        self._rank = rank
        self._groups = [
            _Group(holders, boxes, [_View(box_data(by_name[name], box)) for name, box in boxes])
            for holders, boxes in plan.shared_by(rank)
        ]
        self._weights = [weight(group.holders, rank) for group in self._groups]

    def start(self, ranks: Ranks, *, turn: int, whole: bool) -> Callable[[], None]:
        """Compare in the background what holders of the same box hold. Collective.

        Returns a function that waits for the result, which all ranks call: it raises RankMismatchError on all of
        them if two holders of a box differ. What is compared is read before this returns.

        One number is reduced over all ranks, however many sets of ranks hold the same boxes.

        Args:
            ranks: the world.
            turn: number of the save, one more each time, equal on all ranks: which part is compared.
            whole: True to compare every byte. Otherwise up to 2,048 boxes of 64 KiB or less in CPU memory are
                compared, and of the others the part whose turn it is.
        """
        if not self._is_needed:
            return lambda: None
        digests = [group.digest(turn, whole=whole) for group in self._groups]
        weighted = sum(digest * weight for digest, weight in zip(digests, self._weights, strict=True))
        wait = ranks.start_total([weighted % MODULUS])

        def finish() -> None:
            (total,) = wait()
            if total % MODULUS:
                self._find_difference(ranks, digests)

        return finish

    def _find_difference(self, ranks: Ranks, digests: Sequence[int]) -> None:
        """Raise RankMismatchError, on all ranks, for the boxes that differ. Collective."""
        own = [_Digest(group.key, digest) for group, digest in zip(self._groups, digests, strict=True)]
        found: dict[int, set[int]] = {}
        for told in ranks.gather(msgspec.msgpack.encode(own)):
            for key, digest in msgspec.msgpack.decode(told, type=list[_Digest]):
                found.setdefault(key, set()).add(digest)
        mine = [
            _Compared(
                group.key,
                [view.checksum() for view in group.views],
                group.boxes if group.holders[0] == self._rank else (),
            )
            for group in self._groups
            if len(found[group.key]) > 1
        ]
        everyone = [
            msgspec.msgpack.decode(told, type=list[_Compared])
            for told in ranks.gather(msgspec.msgpack.encode(mine))
        ]
        _raise_if_different(everyone)  # or a box is in the memory of a GPU here and of the CPU there


class _Digest(NamedTuple):
    """A digest of what is compared of a group at this turn."""

    group: int
    digest: int


class _Compared(msgspec.Struct, frozen=True, array_like=True):
    """The checksum of each box of a group on one rank. The first holder also names the boxes."""

    group: int
    checksums: list[int]
    boxes: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class _Group:
    """Boxes that the same ranks hold, this rank among them, and its views of them."""

    holders: Sequence[int]
    boxes: tuple[tuple[str, Box], ...]
    views: Sequence[_View]

    @cached_property
    def key(self) -> int:
        """Equal on two ranks for the same group only."""
        return digest_of(self.holders)

    def digest(self, turn: int, *, whole: bool) -> int:
        """Return a checksum of what is compared at this turn."""
        checksum = 0
        if whole:
            for view in self.views:
                checksum = view.checksum(checksum)
            return checksum
        several = min(_MOST_SAVES, max(1, -(-len(self._small) // _SMALL_BOXES)))
        for view in self._small[turn % several :: several]:
            checksum = view.checksum(checksum)
        for view, start, stop in self._due(turn):
            checksum = view.part_checksum(start, stop, checksum)
        if self._on_gpu:
            several = -(-len(self._on_gpu) // _GPU_BOXES)
            due = self._on_gpu[turn % several :: several]
            sums = torch.cat([column_sums(flat_bytes(dense(view.data))) for view in due]).cpu()
            checksum = int(crc32c.crc32c(sums.numpy().data, checksum))
        return checksum

    @cached_property
    def _small(self) -> list[_View]:
        return [view for view in self.views if view.is_on_cpu and view.nbytes <= _SMALL]

    @cached_property
    def _large(self) -> list[_View]:
        return [view for view in self.views if view.is_on_cpu and view.nbytes > _SMALL]

    @cached_property
    def _on_gpu(self) -> list[_View]:
        return [view for view in self.views if not view.is_on_cpu]

    def _due(self, turn: int) -> Iterator[tuple[_View, int, int]]:
        """Yield the larger boxes that are compared at this turn, each with its range of bytes."""
        total = sum(view.nbytes for view in self._large)
        size = max(_PER_BOX * len(self._large), _AT_LEAST, -(-total // _MOST_SAVES))
        parts = max(1, -(-total // size))
        first, end = turn % parts * size, (turn % parts + 1) * size
        begin = 0
        for view in self._large:
            start, stop = max(first - begin, 0), min(end - begin, view.nbytes)
            if start < stop:
                yield view, start, stop
            begin += view.nbytes


class _View:
    """A box in this rank's memory.

    Attributes:
        data: its elements.
        is_on_cpu: True if they are in CPU memory.
        nbytes: their bytes.
        content: these bytes, if they are contiguous in CPU memory.
    """

    __slots__ = ("content", "data", "is_on_cpu", "nbytes")

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.is_on_cpu = data.device.type == "cpu"
        self.nbytes = data.nbytes
        self.content = bytes_at(data.data_ptr(), data.nbytes) if is_plain(data) else None

    def checksum(self, before: int = 0) -> int:
        """Return the CRC-32C of all of the content, continued from `before`."""
        if self.content is not None:
            return int(crc32c.crc32c(self.content, before))
        content = as_array(flat_bytes(dense(self.data).cpu()), np.uint8)
        return int(crc32c.crc32c(content.data, before))

    def part_checksum(self, start: int, stop: int, before: int) -> int:
        """Return the CRC-32C of a range of the content's bytes, continued from `before`."""
        if self.content is not None:
            return int(crc32c.crc32c(self.content[start:stop], before))
        row = self.nbytes // self.data.shape[0]  # a box without dimensions is small
        first = start // row
        rows = dense(self.data[first : -(-stop // row)])
        content = as_array(flat_bytes(rows), np.uint8)[start - first * row : stop - first * row]
        return int(crc32c.crc32c(content.data, before))


def column_sums(content: torch.Tensor) -> torch.Tensor:
    """Return the sums, modulo 2^64, of 64-bit words in 1021 columns, with the bytes left over in the first ones.

    The device that has the content computes them, at the speed of its memory. Contents that differ have equal
    sums only by coincidence.
    """
    rows = content.numel() // 8 // _WORDS
    body, left = content[: rows * _WORDS * 8], content[rows * _WORDS * 8 :]
    rest = content.new_zeros((_WORDS + 1) * 8)
    rest[: left.numel()] = left
    sums = rest.view(torch.int64)
    if rows:
        if body.storage_offset() % 8 or body.data_ptr() % 8:
            body = body.clone()
        sums[:_WORDS] += body.view(torch.int64).view(rows, _WORDS).sum(0)
    return sums


def _raise_if_different(everyone: Sequence[Sequence[_Compared]]) -> None:
    """Raise RankMismatchError for the first box that differs, by what each rank found of its groups."""
    first: dict[int, tuple[int, _Compared]] = {}
    found = []
    for rank, groups in enumerate(everyone):
        for group in groups:
            holder, known = first.setdefault(group.group, (rank, group))
            for place, one, other in zip(known.boxes, known.checksums, group.checksums, strict=True):
                if one != other:
                    found.append((*place, holder, rank))
    if not found:
        return
    name, box, holder, other = found[0]
    others = list(dict.fromkeys(f"{n!r} on rank {r}" for n, _, _, r in found[1:]))
    more = f" So it is for {', '.join(others[:_LISTED])}" if others else ""
    more += f" and {len(others) - _LISTED} others." if len(others) > _LISTED else "." if others else ""
    raise RankMismatchError(
        f"state[{name!r}] at {list(box.offsets)}, shape {list(box.shape)}, has one content on "
        f"rank {holder} and another on rank {other}, and would be stored once. If every rank "
        f"has its own, wrap it in shardckpt.PerRank; if not, the ranks have drifted apart.{more}"
    )
