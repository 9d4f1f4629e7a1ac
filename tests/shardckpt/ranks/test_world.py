"""The ranks of torch.distributed, from the first use of its process group to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardckpt import Checkpointer, ShardckptError
from shardckpt.ranks.world import current_ranks
from tests.kit.worlds import run_processes


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _gloo_threads() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@pytest.mark.usefixtures("world")
def test_no_thread_of_a_process_group_outlives_its_destruction(tmp_path: Path) -> None:
    """Such a thread may abort the process when the interpreter ends."""
    checkpointer = Checkpointer(tmp_path / "run", every_steps=1)
    checkpointer.step(1, {"x": torch.ones(4)})
    checkpointer.close()
    assert _gloo_threads()
    dist.destroy_process_group()
    assert _gloo_threads() == []


@pytest.mark.usefixtures("world")
def test_a_destroyed_process_group_is_told() -> None:
    ranks = current_ranks()
    dist.destroy_process_group()
    with pytest.raises(ShardckptError, match="before destroy_process_group"):
        ranks.gather(b"")
    assert current_ranks().size == 1


def _gather_and_add(
    rank: int, lengths: list[list[int]]
) -> tuple[list[list[bytes]], list[bytes], list[int]]:
    ranks = current_ranks()
    told = [ranks.gather(bytes([65 + rank]) * by_rank[rank]) for by_rank in lengths]
    sent = [ranks.broadcast(bytes([65 + rank]) * by_rank[rank]) for by_rank in lengths]
    return told, sent, ranks.total([rank + 1, -(1 << 40), 1 << 60 if rank == 2 else 0])


def test_what_ranks_gather_broadcast_and_add() -> None:
    """Every rank has what all ranks passed, whether they pass equally much or one has nearly all of it."""
    lengths = [[3, 0, 1], [0, 0, 0], [300_000, 0, 2], [0, 90_000, 90_000], [100_000, 100_001, 99_999]]
    lengths += [[length, 504, 505] for length in (503, 504, 505, 512, 513)]  # about what one message holds
    wanted = [[bytes([65 + rank]) * length for rank, length in enumerate(by_rank)] for by_rank in lengths]
    for told, sent, total in run_processes(3, _gather_and_add, lengths):
        assert told == wanted
        assert sent == [by_rank[0] for by_rank in wanted]
        assert total == [6, -3 << 40, 1 << 60]
