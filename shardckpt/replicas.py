"""Do ranks that hold the same box hold the same content? Small digests instead of the content.

A checkpoint stores such a box once. If the holders disagree, storing any one of them would silently
lose the others, so it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import crc32c
import msgspec
import numpy as np
import numpy.typing as npt
import torch

from shardckpt.box import Box
from shardckpt.errors import RankMismatchError
from shardckpt.local import LocalTensor, as_array, flat_bytes, is_plain
from shardckpt.plan import SavePlan
from shardckpt.ranks import Ranks
from shardckpt.staging import local_slices

__all__ = ["Replicas"]

_WHOLE = 64 << 10
_SAMPLE = 4 << 10
_ABSENT = -(1 << 62)


class Replicas:
    """What this rank holds that others hold too: worked out once, for any number of saves."""

    def __init__(self, plan: SavePlan, tensors: Sequence[LocalTensor], rank: int) -> None:
        by_name = {tensor.name: tensor for tensor in tensors}
        self._groups = [
            _Group(
                holders,
                boxes,
                [_View.of(by_name[name], box) for name, box in boxes] if rank in holders else None,
            )
            for holders, boxes in plan.replicas
        ]

    def check(self, ranks: Ranks, *, whole: bool) -> None:
        """Raise RankMismatchError, on all ranks, if two holders of a box differ. Every rank calls it.

        With `whole` every byte counts. Otherwise small boxes (64 KiB or less in CPU memory) are compared whole,
        and larger ones by samples; what lies on a GPU is left out, because looking at it would stall it.
        """
        if not self._groups:
            return
        told: list[int] = []
        for group in self._groups:
            checksum = 0
            for view in group.views or ():
                checksum = view.digest(checksum, whole=whole)
            told += [_ABSENT, _ABSENT] if group.views is None else [checksum, -checksum]
        greatest = ranks.maximum(told)
        if all(high == -low for high, low in zip(greatest[::2], greatest[1::2], strict=True)):
            return
        mine = [[view.digest(0, whole=whole) for view in group.views or ()] for group in self._groups]
        everyone = [msgspec.msgpack.decode(data) for data in ranks.gather(msgspec.msgpack.encode(mine))]
        for number, group in enumerate(self._groups):
            self._raise_if_different(group, [digests[number] for digests in everyone])
        raise AssertionError("digests differ, but no box does")

    @staticmethod
    def _raise_if_different(group: _Group, digests: Sequence[Sequence[int]]) -> None:
        first, *others = group.holders
        for rank in others:
            for number, (name, box) in enumerate(group.boxes):
                if digests[rank][number] != digests[first][number]:
                    raise RankMismatchError(
                        f"state[{name!r}] at {list(box.offsets)}, shape {list(box.shape)}, has one content on "
                        f"rank {first} and another on rank {rank}, and would be stored once. If every rank "
                        "has its own, wrap it in shardckpt.PerRank; if not, the ranks have drifted apart."
                    )


@dataclass(frozen=True)
class _Group:
    """Boxes that the same ranks hold, and this rank's views of them, if it is one of these."""

    holders: Sequence[int]
    boxes: Sequence[tuple[str, Box]]
    views: Sequence[_View] | None


@dataclass(frozen=True)
class _View:
    """A box in this rank's memory; its bytes, where they lie there one after another."""

    data: torch.Tensor
    content: npt.NDArray[np.uint8] | None

    @classmethod
    def of(cls, tensor: LocalTensor, box: Box) -> _View:
        data = tensor.data[local_slices(tensor, box)]
        return cls(data, as_array(flat_bytes(data), np.uint8) if is_plain(data) else None)

    def digest(self, checksum: int, *, whole: bool) -> int:
        """A checksum of what came before and the content, or samples of it."""
        content = self.content
        if content is None:
            if not whole and self.data.device.type != "cpu":
                return checksum
            content = flat_bytes(self.data.resolve_conj().resolve_neg().contiguous().cpu()).numpy()
        if whole or content.nbytes <= _WHOLE:
            return int(crc32c.crc32c(content.data, checksum))
        for start in (0, content.nbytes // 2, content.nbytes - _SAMPLE):
            checksum = crc32c.crc32c(content[start : start + _SAMPLE].data, checksum)
        return checksum
