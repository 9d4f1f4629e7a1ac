"""Ranks find out whether they have the same."""

from __future__ import annotations

import pytest

from shardckpt.ranks.equality import MODULUS, all_equal, weight
from shardckpt.ranks.world import Alone
from tests.kit.worlds import ThreadRanks, run_threads


@pytest.mark.parametrize("size", [2, 3, 8])
def test_one_rank_that_differs_or_objects_is_known_to_all(size: int) -> None:
    def run(ranks: ThreadRanks) -> list[bool]:
        is_odd = ranks.rank == size - 1
        return [
            all_equal(ranks, [7, -1 << 70]),
            all_equal(ranks, [7, 8 if is_odd else 9]),
            all_equal(ranks, [7], objects=is_odd),
            all_equal(ranks, []),
        ]

    assert run_threads(size, run) == [[True, False, False, True]] * size


def test_alone_nobody_differs() -> None:
    assert all_equal(Alone(), [3])
    assert not all_equal(Alone(), [3], objects=True)


def test_the_weights_of_all_members_add_up_to_zero() -> None:
    members = [2, 5, 11, 17]
    weights = [weight(members, rank) for rank in members]
    assert sum(weights) % MODULUS == 0
    assert all(weights)
