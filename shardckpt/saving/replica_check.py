"""Do ranks that hold the same box hold the same content? Compared by digests.

A checkpoint stores such a box once. If its holders differ, to store one of them would silently lose the others,
so that is an error. For a new plan every byte is compared. Later saves compare a part each, in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import crc32c
import msgspec
import numpy as np
import numpy.typing as npt
import torch

from shardckpt.errors import RankMismatchError
from shardckpt.format.box import Box
from shardckpt.format.save_plan import SavePlan
from shardckpt.ranks.world import Ranks
from shardckpt.saving.staging import shard_slices
from shardckpt.state.tensors import TensorShard, as_array, dense, flat_bytes, is_plain

__all__ = ["ReplicaCheck"]

_SMALL = 64 << 10
"""Bytes up to which a box in CPU memory is compared whole at every save."""

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

_ABSENT = -(1 << 62)
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
        self._groups = [
            _Group(
                holders,
                boxes,
                [_View.of(by_name[name], box) for name, box in boxes] if rank in holders else None,
            )
            for holders, boxes in plan.replicas
        ]

    def check(self, ranks: Ranks, *, turn: int, whole: bool) -> None:
        """Raise RankMismatchError, on all ranks, if two holders of a box differ. Collective.

        Args:
            ranks: the world.
            turn: number of the save, one more each time, equal on all ranks: which part is compared.
            whole: True to compare every byte. Otherwise boxes of 64 KiB or less in CPU memory are compared whole,
                and of the others the part whose turn it is.
        """
        if not self._groups:
            return
        told: list[int] = []
        for group in self._groups:
            digest = group.digest(turn, whole=whole)
            told += [_ABSENT, _ABSENT] if digest is None else [digest, -digest]
        greatest = ranks.maximum(told)
        differ = [
            group
            for group, high, low in zip(self._groups, greatest[::2], greatest[1::2], strict=True)
            if high != -low
        ]
        if differ:  # or a box is in the memory of a GPU here and of the CPU there
            mine = [[view.checksum() for view in group.views or ()] for group in differ]
            everyone = [msgspec.msgpack.decode(data) for data in ranks.gather(msgspec.msgpack.encode(mine))]
            _raise_if_different(differ, everyone)


@dataclass(frozen=True)
class _Group:
    """Boxes that the same ranks hold, and this rank's views of them, if it is one of these."""

    holders: Sequence[int]
    boxes: Sequence[tuple[str, Box]]
    views: Sequence[_View] | None

    def digest(self, turn: int, *, whole: bool) -> int | None:
        """Return a checksum of what is compared at this turn; None if this rank does not hold the boxes."""
        if self.views is None:
            return None
        checksum = 0
        if whole:
            for view in self.views:
                checksum = view.checksum(checksum)
            return checksum
        for view in self._small:
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
        return [view for view in self.views or () if view.is_on_cpu and view.nbytes <= _SMALL]

    @cached_property
    def _large(self) -> list[_View]:
        return [view for view in self.views or () if view.is_on_cpu and view.nbytes > _SMALL]

    @cached_property
    def _on_gpu(self) -> list[_View]:
        return [view for view in self.views or () if not view.is_on_cpu]

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


@dataclass(frozen=True)
class _View:
    """A box in this rank's memory, and its bytes if they are contiguous there."""

    data: torch.Tensor
    content: npt.NDArray[np.uint8] | None

    @classmethod
    def of(cls, tensor: TensorShard, box: Box) -> _View:
        data = tensor.data[shard_slices(tensor, box)]
        return cls(data, as_array(flat_bytes(data), np.uint8) if is_plain(data) else None)

    @cached_property
    def is_on_cpu(self) -> bool:
        return self.data.device.type == "cpu"

    @cached_property
    def nbytes(self) -> int:
        return self.data.nbytes

    def checksum(self, before: int = 0) -> int:
        """Return the CRC-32C of all of the content, continued from `before`."""
        content = self.content
        if content is None:
            content = as_array(flat_bytes(dense(self.data).cpu()), np.uint8)
        return int(crc32c.crc32c(content.data, before))

    def part_checksum(self, start: int, stop: int, before: int) -> int:
        """Return the CRC-32C of a range of the content's bytes, continued from `before`."""
        if self.content is not None:
            return int(crc32c.crc32c(self.content[start:stop].data, before))
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


def _raise_if_different(groups: Sequence[_Group], checksums: Sequence[Sequence[Sequence[int]]]) -> None:
    """Raise RankMismatchError for the first box that differs.

    `checksums`: for each rank and group, the checksum of each box; none if the rank does not hold them.
    """
    found = [
        (name, box, group.holders[0], rank)
        for number, group in enumerate(groups)
        for index, (name, box) in enumerate(group.boxes)
        for rank in group.holders[1:]
        if checksums[rank][number][index] != checksums[group.holders[0]][number][index]
    ]
    if not found:
        return
    name, box, first, other = found[0]
    others = list(dict.fromkeys(f"{n!r} on rank {r}" for n, _, _, r in found[1:]))
    more = f" So it is for {', '.join(others[:_LISTED])}" if others else ""
    more += f" and {len(others) - _LISTED} others." if len(others) > _LISTED else "." if others else ""
    raise RankMismatchError(
        f"state[{name!r}] at {list(box.offsets)}, shape {list(box.shape)}, has one content on "
        f"rank {first} and another on rank {other}, and would be stored once. If every rank "
        f"has its own, wrap it in shardckpt.PerRank; if not, the ranks have drifted apart.{more}"
    )
