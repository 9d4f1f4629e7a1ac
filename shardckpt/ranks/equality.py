"""Do ranks have the same? Found out by a sum of one number over all ranks, which costs less than any other way.

Every rank multiplies its digest by a weight of its own. The weights of all ranks add up to zero, so the sum is
zero if the digests are equal. If they differ it is so only by coincidence, once in some 10^13 cases.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from functools import lru_cache

from shardckpt.ranks.world import Ranks

__all__ = ["MODULUS", "all_equal", "digest", "weight"]

MODULUS = (1 << 44) - 17
"""Of the sum over ranks; a prime, so that a few hundred thousand of them stay below 2^63."""


def all_equal(ranks: Ranks, values: Sequence[int], *, objects: bool = False) -> bool:
    """Return True, on all ranks, if all of them have the same values, and none objects. Collective.

    With four gloo ranks on two cores this takes 0.4 ms, and the maximum of six numbers 5 ms
    (scripts/bench/agree).
    """
    if objects:
        part = 1 + secrets.randbelow(MODULUS - 1)
    else:
        part = digest(values) * _weight_in_world(ranks.size, ranks.rank) % MODULUS
    (total,) = ranks.total([part])
    return total % MODULUS == 0


def weight(members: Sequence[int], rank: int) -> int:
    """Return the number of a member; those of all members add up to 0 modulo MODULUS."""
    first, *others = members
    if rank != first:
        return digest((first, len(members), rank)) % MODULUS
    return -sum(digest((first, len(members), other)) for other in others) % MODULUS


def digest(values: Sequence[int]) -> int:
    """Return 62 bits that depend on all of the values."""
    text = ",".join(map(str, values)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2


@lru_cache(maxsize=16)
def _weight_in_world(size: int, rank: int) -> int:
    return weight(range(size), rank)
