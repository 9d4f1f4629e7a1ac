"""What a session keeps from save to save: its plan, its buffer, its check of replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    RankMismatchError,
)
from shardckpt.ranks.world import Alone
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage
from tests.kit.states import assert_equal
from tests.kit.worlds import ThreadRanks, run_threads, start_save


def test_a_state_that_changes_between_saves(place: Storage) -> None:
    """The plan of the save before is used only as long as it fits: other shapes, types, names, ties."""
    session = SaveSession(Alone(), 60)
    shared = torch.arange(4.0)
    states: list[dict[str, Any]] = [
        {"t": torch.zeros(4)}, {"t": torch.ones(4)}, {"t": torch.ones(5)},
        {"t": torch.ones(5, dtype=torch.int32)}, {"u": torch.ones(5)}, {"t": torch.ones(5), "u": torch.zeros(2)},
        {"t": shared, "u": shared}, {"t": shared, "u": shared.clone()}, {"v": 1}, {"t": torch.ones(4)},
    ]  # fmt: skip
    for number, state in enumerate(states):
        folder = place.at(f"{number}")
        start_save(session, folder, state, step=number).wait()
        loaded = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
        shardckpt.load(folder, loaded)
        assert_equal(loaded, state)


def test_one_rank_changes_its_structure(place: Storage) -> None:
    """If the structure changes on one rank only, all ranks plan anew."""

    def run(ranks: ThreadRanks) -> None:
        session = SaveSession(ranks, 60)
        for number in range(3):
            own = torch.full((1 + number * ranks.rank,), number)
            state = {"own": shardckpt.PerRank(own), "t": torch.full((5,), number)}
            start_save(session, place.at(f"{number}"), state).wait()

    run_threads(2, run)
    for number in range(3):
        checkpoint = shardckpt.open(place.at(f"{number}"))
        checkpoint.verify()
        assert checkpoint.read("own/rank-00001").tolist() == [number] * (1 + number)
        assert checkpoint.read("t").tolist() == [number] * 5


def test_a_mismatch_found_once_is_found_again(place: Storage) -> None:
    """Replicas that differ where samples would not show it are an error each time they are saved."""

    def run(ranks: ThreadRanks) -> None:
        session = SaveSession(ranks, 60)
        tensor = torch.zeros(1 << 20)
        tensor[1 << 18] = ranks.rank
        for number in range(2):
            with pytest.raises(RankMismatchError, match=r"'t'.*rank 0.*rank 1"):
                start_save(session, place.at(f"{number}"), {"t": tensor})

    run_threads(2, run)
    assert place.list() == []
