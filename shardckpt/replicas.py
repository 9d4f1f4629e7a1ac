"""Do ranks that hold the same box hold the same content? Small digests instead of the content.

A checkpoint stores such a box once. If the holders disagree, storing any one of them would silently
lose the others, so it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import crc32c
import msgspec

from shardckpt.box import Box
from shardckpt.errors import RankMismatchError
from shardckpt.local import LocalTensor, flat_bytes
from shardckpt.plan import SavePlan
from shardckpt.ranks import Ranks
from shardckpt.staging import local_slices

__all__ = ["check_replicas"]

_WHOLE = 64 << 10
_SAMPLE = 4 << 10
_ABSENT = -(1 << 62)


def check_replicas(
    plan: SavePlan, tensors: Mapping[str, LocalTensor], ranks: Ranks, *, whole: bool
) -> None:
    """Raise RankMismatchError, on all ranks, if two holders of a box differ. Every rank calls it.

    With `whole` every byte counts. Otherwise small boxes (64 KiB or less in CPU memory) are compared whole,
    and larger ones by samples; what lies on a GPU is left out, because looking at it would stall it.
    """
    if not plan.replicas:
        return
    mine: list[list[int]] = []
    told: list[int] = []
    for holders, boxes in plan.replicas:
        if ranks.rank not in holders:
            mine.append([])
            told += [_ABSENT, _ABSENT]
            continue
        digests = [_digest(tensors[name], box, whole=whole) for name, box in boxes]
        mine.append(digests)
        combined = crc32c.crc32c(msgspec.msgpack.encode(digests))
        told += [combined, -combined]
    greatest = ranks.maximum(told)
    if all(high == -low for high, low in zip(greatest[::2], greatest[1::2], strict=True)):
        return
    everyone = [msgspec.msgpack.decode(data) for data in ranks.gather(msgspec.msgpack.encode(mine))]
    for group, (holders, boxes) in enumerate(plan.replicas):
        first = everyone[holders[0]][group]
        for rank in holders[1:]:
            for number, (name, box) in enumerate(boxes):
                if everyone[rank][group][number] != first[number]:
                    raise RankMismatchError(
                        f"state[{name!r}] at {list(box.offsets)}, shape {list(box.shape)}, has one content on "
                        f"rank {holders[0]} and another on rank {rank}, and would be stored once. If every rank "
                        "has its own, wrap it in shardckpt.PerRank; if not, the ranks have drifted apart."
                    )
    raise AssertionError("digests differ, but no box does")


def _digest(tensor: LocalTensor, box: Box, *, whole: bool) -> int:
    """A checksum of the box's content, or of samples of it."""
    data = tensor.data[local_slices(tensor, box)]
    if not whole and data.device.type != "cpu":
        return 0
    if not data.is_contiguous() or data.device.type != "cpu":
        data = data.contiguous().cpu()
    content = flat_bytes(data.resolve_conj().resolve_neg()).numpy()
    if whole or content.nbytes <= _WHOLE:
        return int(crc32c.crc32c(content.data))
    middle = content.nbytes // 2
    checksum = 0
    for start in (0, middle, content.nbytes - _SAMPLE):
        checksum = crc32c.crc32c(content[start : start + _SAMPLE].data, checksum)
    return checksum
