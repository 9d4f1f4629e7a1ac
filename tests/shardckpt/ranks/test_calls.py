"""Ranks that make different calls are told so, instead of waiting for each other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import RankMismatchError
from tests.kit.worlds import Checkpoints, ThreadRanks, outcomes, run_processes


def state_at(step: int) -> dict[str, Any]:
    return {"t": torch.full((100,), float(step))}


Act = Callable[[Checkpointer], object]


def save(step: int) -> Act:
    return lambda checkpointer: checkpointer.save(step, state_at(step))


def step(number: int) -> Act:
    return lambda checkpointer: checkpointer.step(number, state_at(number))


def restore(checkpointer: Checkpointer) -> None:
    checkpointer.restore(state_at(0))


def step_and_save(checkpointer: Checkpointer) -> None:
    checkpointer.step(7, state_at(7))
    checkpointer.save(8, state_at(8))


def step_and_close(checkpointer: Checkpointer) -> None:
    checkpointer.step(7, state_at(7))
    checkpointer.close()


@pytest.mark.parametrize(
    ("first", "second", "one", "other"),
    [
        (save(100), save(101), r"save\(100, ...\)", r"save\(101, ...\)"),
        (save(0), save(1 << 41), r"save\(0, ...\)", r"save\(\d+, ...\)"),
        (save(10), step(10), r"save\(10, ...\)", r"step\(10, ...\), which saves"),
        (step(10), step(20), r"step\(10, ...\), which saves", r"step\(20, ...\), which saves"),
        (save(10), restore, r"save\(10, ...\)", "restore"),
        (save(8), step(7), r"save\(8, ...\)", r"step\(7, ...\)"),
        (step_and_save, step_and_close, r"save\(8, ...\)", "close, which saves step 7"),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_different_calls(size: int, first: Act, second: Act, one: str, other: str, tmp_path: Path) -> None:
    """All ranks raise, and each names itself and one of those that differ."""

    def train(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(tmp_path, ranks, every_steps=10)
        (first if ranks.rank == 0 else second)(checkpointer)

    errors = outcomes(size, train)
    assert all(type(error) is RankMismatchError for error in errors), errors
    last = size - 1
    assert re.search(rf"^rank 0 calls {one}, while rank {last} calls {other}\.", str(errors[0])), errors[0]
    assert re.search(rf"^rank {last} calls {other}, while rank 0 calls {one}\.", str(errors[last])), errors[
        last
    ]
    assert "have rank 0 decide and tell the others, or use every_steps" in str(errors[0])


def _by_own_clock(rank: int, folder: Path) -> tuple[str, float]:
    """A rank that saves when a clock of its own says so."""
    checkpointer = Checkpointer(folder, snapshots=0)
    checkpointer.restore(state_at(0))
    due = {0: 3, 1: 5}[rank]
    try:
        for number in range(1, 10):
            if number == due:
                started = time.monotonic()
                checkpointer.save(number, state_at(number))
    except RankMismatchError as error:
        return str(error), time.monotonic() - started
    raise AssertionError("nothing was told")


def test_clocks_of_their_own(tmp_path: Path) -> None:
    """Real ranks: an error on both, within seconds, with ranks and steps."""
    (first, waited), (second, _) = run_processes(2, _by_own_clock, tmp_path)
    assert first.startswith("rank 0 calls save(3, ...), while rank 1 calls save(5, ...).")
    assert second.startswith("rank 1 calls save(5, ...), while rank 0 calls save(3, ...).")
    assert waited < 60


def _one_call_fewer(rank: int, folder: Path) -> None:
    checkpointer = Checkpointer(folder, snapshots=0)
    checkpointer.save(1, state_at(1)).join()
    if rank == 1:
        dist.destroy_process_group()
        return
    with pytest.raises(
        RankMismatchError, match=r"^rank 0 calls save\(2, ...\).*A rank has ended, or is in another"
    ):
        checkpointer.save(2, state_at(2))
    dist.barrier = lambda: None  # the other rank is gone


def test_a_rank_that_is_gone(tmp_path: Path) -> None:
    """Where nobody would come any more, the error says so."""
    with pytest.raises(AssertionError, match="rank 1 failed"):  # in the barrier at its end
        run_processes(2, _one_call_fewer, tmp_path)
