"""DLRover's flash checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from _kit.processes import MARK, remove_leftovers

from _peers.base import PerRank, Wait

__all__ = ["Dlrover"]


class Dlrover(PerRank):
    """Its flash checkpoint, without DTensors: each rank's tensors are its own."""

    name = "dlrover flash per rank"
    again = overlaps = recalls = True
    needs = "dlrover"

    def prepare(self) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        # What it names its shared memory and its sockets after; the world's mark lets them be cleaned up.
        os.environ["TORCHELASTIC_RUN_ID"] = f"{os.environ[MARK]}-{self.folder.name}"
        shards = dist.get_world_size() if self.layout == "fsdp" else 1
        self._checkpointer = DdpCheckpointer(
            str(self.folder), local_shard_num=shards, global_shard_num=shards, comm_backend="gloo"
        )

    def save(self, step: int) -> Wait:
        path = self.folder / f"{step}" / f"rank_{self.source}.pt"
        self._checkpointer.save_checkpoint(step, self.state.tensors, str(path))
        return lambda: self._wait(step)

    def load(self) -> None:
        loaded = torch.load(max(self.folder.glob(f"*/rank_{self.source}.pt")), mmap=True, weights_only=True)
        self.apply(_tensors(loaded))

    def recall(self) -> str:
        self.apply(_tensors(self._checkpointer.load_checkpoint()))
        return "memory"

    def close(self) -> None:
        self._checkpointer._engine.close()
        for process in multiprocessing.active_children():  # its saver, which it never ends itself
            process.kill()
        dist.barrier()
        if dist.get_rank() == 0:
            remove_leftovers(os.environ["TORCHELASTIC_RUN_ID"])

    def _wait(self, step: int) -> None:
        """Its own way to wait looks every three seconds."""
        done = self.folder / "dlrover_latest.txt"
        while not done.exists() or done.read_text() != str(step):
            time.sleep(0.01)


def _tensors(loaded: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    return loaded.get("model_states", loaded)
