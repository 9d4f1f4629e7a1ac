"""What several ranks hold is compared: all of it within a few saves, wherever the ranks have drifted apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import RankMismatchError
from shardckpt.saving.replica_check import ReplicaCheck, column_sums
from shardckpt.saving.session import SaveSession
from shardckpt.state.tensors import TensorShard, tensor_shard
from shardckpt.storage import open_storage
from tests.kit.worlds import ThreadRanks, outcomes, plan_shards, run_threads, start_save

MiB = 1 << 20


def _found_after(worlds: Sequence[Sequence[TensorShard]], turns: int) -> tuple[int, str] | None:
    """At which turn the replicas of the ranks are found to differ, and what is said; None if never."""
    plan = plan_shards(worlds)

    def run(ranks: ThreadRanks) -> tuple[int, str] | None:
        replicas = ReplicaCheck(plan, worlds[ranks.rank], ranks.rank)
        for turn in range(turns):
            try:
                replicas.start(ranks, turn=turn, whole=False)()
            except RankMismatchError as error:
                return turn, str(error)
        return None

    first, *others = outcomes(len(worlds), run)
    assert all(other == first for other in others)
    return first  # type: ignore[no-any-return]


def _ranks(make: Callable[[int], Sequence[torch.Tensor]], size: int = 2) -> list[list[TensorShard]]:
    return [[tensor_shard(t, f"t{n}") for n, t in enumerate(make(rank))] for rank in range(size)]


@pytest.mark.parametrize("place", [0, 70_000, 3 * MiB + 17, 6 * MiB - 1])
def test_one_byte_anywhere_is_found(place: int) -> None:
    """After the first save, in a tensor larger than what is compared at a time; named with its ranks."""

    def make(rank: int) -> list[torch.Tensor]:
        tensor = torch.zeros(6 * MiB, dtype=torch.uint8)
        tensor[place] = rank == 1
        return [torch.ones(8 * MiB, dtype=torch.uint8), tensor, torch.ones(100)]

    found = _found_after(_ranks(make, 3), 4)  # 14 MiB, of which 4 at a time
    assert found is not None
    assert (
        "state['t1'] at [0], shape [6291456], has one content on rank 0 and another on rank 1" in found[1]
    )


def test_any_sets_of_holders() -> None:
    """What pairs of ranks hold, and all of them: every set in which a rank differs is found, and named by all."""

    def make(rank: int, drifted: str) -> list[TensorShard]:
        pair = [f"pair{rank // 2}", f"other{rank % 3}", "all"]
        return [tensor_shard(torch.full((9,), rank == 5 and name == drifted), name) for name in pair]

    assert _found_after([make(rank, "") for rank in range(6)], 2) is None
    for name, first in (("pair2", 4), ("other2", 2), ("all", 0)):
        found = _found_after([make(rank, name) for rank in range(6)], 1)
        assert found is not None
        assert (
            f"state['{name}'] at [0], shape [9], has one content on rank {first} and another on rank 5"
            in found[1]
        )


def test_small_ones_are_compared_each_time() -> None:
    """Whatever the turn is; all that differ are named."""
    found = _found_after(
        _ranks(lambda rank: [torch.zeros(3), torch.full((9,), rank), torch.full((), rank)]), 1
    )
    assert found is not None
    assert "state['t1']" in found[1]
    assert "'t2' on rank 1" in found[1]


@pytest.mark.parametrize("number", [0, 2048, 4999])
def test_thousands_of_small_ones_are_compared_in_turn(number: int) -> None:
    def make(rank: int) -> list[torch.Tensor]:
        tensors = [torch.zeros(2) for _ in range(5000)]
        tensors[number] += rank
        return tensors

    found = _found_after(_ranks(make), 3)
    assert found is not None
    assert f"state['t{number}']" in found[1]


def test_memory_in_any_order() -> None:
    """Transposed, expanded and conjugated tensors, in as many turns; equal ones are never said to differ."""

    def make(rank: int, drift: float = 0) -> list[torch.Tensor]:
        base = torch.arange(3.0 * MiB).view(1024, -1)
        turned = (base if rank else base.T.contiguous().T).clone(memory_format=torch.preserve_format)
        turned[700, 5] += rank * drift
        pair = torch.complex(base, base + 1)
        return [
            turned,
            pair.conj() if rank else pair.conj().resolve_conj(),
            torch.ones(1, 9).expand(MiB, 9),
        ]

    assert _found_after(_ranks(make), 20) is None
    found = _found_after(_ranks(lambda rank: make(rank, 1)), 20)
    assert found is not None
    assert "state['t0']" in found[1]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40_000), st.integers(0, 7), st.integers(0, 9))
def test_sums(size: int, offset: int, seed: int) -> None:
    """Whatever its alignment is; one changed byte, or two swapped rows, change them."""
    data = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size + offset, dtype=np.uint8))
    content = data[offset:]
    sums = column_sums(content)
    assert torch.equal(column_sums(content.clone()), sums)
    changed = content.clone()
    changed[size // 3] ^= 1 << seed % 8
    assert not torch.equal(column_sums(changed), sums)
    if size >= 32 << 10:
        swapped = content.clone()
        swapped[: 32 << 10] = content[: 32 << 10].view(4, 8 << 10).flip(0).flatten()
        assert not torch.equal(column_sums(swapped), sums)


def test_the_memory_of_a_gpu_is_compared() -> None:
    """As a device that is no CPU's: tensors say so, and are compared by sums made where they are."""

    class OnDevice(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:0")

    def make(rank: int) -> list[TensorShard]:
        tensors = []
        for number in range(300):
            tensor = torch.zeros(10)
            tensor[3] = rank * (number == 277)
            held = tensor_shard(tensor, f"t{number}")
            tensors.append(
                TensorShard(held.name, held.dtype, held.shape, held.pieces, held.data.as_subclass(OnDevice))
            )
        return tensors

    found = _found_after([make(0), make(1)], math.ceil(300 / 128))
    assert found is not None
    assert "state['t277']" in found[1]


def test_drift_after_the_first_save(tmp_path: Path) -> None:
    """A tensor that was equal on all ranks at the first save, and of which one element differs at the second."""

    def run(ranks: ThreadRanks) -> str:
        tensor = torch.zeros(1 << 18)
        session = SaveSession(ranks, 60)
        start_save(session, open_storage(tmp_path / "1"), {"t": {"x": tensor}}).wait()
        tensor[70_000] = ranks.rank
        with pytest.raises(RankMismatchError) as caught:
            start_save(session, open_storage(tmp_path / "2"), {"t": {"x": tensor}})
        return str(caught.value)

    for message in run_threads(2, run):
        assert (
            "state['t/x'] at [0], shape [262144], has one content on rank 0 and another on rank 1"
            in message
        )
