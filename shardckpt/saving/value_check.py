"""Plain values that are stored once have to be equal on all ranks: what to raise if they are not."""

from __future__ import annotations

from typing import Any

import msgspec

from shardckpt.errors import RankMismatchError
from shardckpt.ranks.world import Ranks

__all__ = ["raise_if_values_differ"]


def raise_if_values_differ(ranks: Ranks, values: Any) -> None:
    """Raise RankMismatchError, on all ranks, that names the first value that differs from rank 0's. Collective.

    `values` are this rank's plain values, as JSON.
    """
    everyone = [msgspec.json.decode(data) for data in ranks.gather(msgspec.json.encode(values))]
    for rank, others in enumerate(everyone):
        if (found := _first_difference(everyone[0], others, "")) is not None:
            path, first, other = found
            raise RankMismatchError(
                f"state[{path!r}] is {first!r} on rank 0 and {other!r} on rank {rank}. Plain values are "
                "stored once, so they must be equal on all ranks; wrap what every rank has its own of in "
                "shardckpt.PerRank."
            )


def _first_difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any] | None:
    """Return the first place at which two JSON trees differ, with what they have there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            below = f"{path}/{key}" if path else key
            if key not in one or key not in other:
                return below, one.get(key, "absent"), other.get(key, "absent")
            if (found := _first_difference(one[key], other[key], below)) is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if (found := _first_difference(a, b, f"{path}/{number}")) is not None:
                return found
        return None
    return None if repr(one) == repr(other) else (path, one, other)  # 1, 1.0 and True differ, and -0.0
