"""What scripts/bench/save compares: ways to save that `scripts/bench/peers` has to install first."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _processes import MARK, remove_leftovers
from _save_candidates import OWN, Candidate, PerRank, Wait
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

__all__ = ["CANDIDATES"]


class Torchsnapshot(PerRank):
    """Its async mode, without DTensors, which it does not know: each rank's tensors are its own."""

    name = "torchsnapshot per rank"
    overlaps = True
    needs = "torchsnapshot"

    def save(self, step: int) -> Wait:
        from torchsnapshot import Snapshot

        return Snapshot.async_take(
            str(self.folder / f"step-{step:08d}"), self._objects(write=self.writes)
        ).wait

    def load(self) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(max(self.folder.iterdir()))).restore(self._objects(write=True))

    def _objects(self, *, write: bool) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"state": StateDict(**self.state.tensors)} if write else {}


class Orbax(PerRank):
    """Its async checkpointer over NumPy views of the tensors; each rank is a JAX process of its own."""

    name = "orbax per rank"
    again = overlaps = True
    needs = "orbax"

    def prepare(self) -> None:
        import orbax.checkpoint as ocp

        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def save(self, step: int) -> Wait:
        import orbax.checkpoint as ocp

        if not self.writes:
            return lambda: None
        path = (self.folder / f"{self.source}" / f"step-{step:08d}").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(self._arrays()))
        return self._checkpointer.wait_until_finished

    def load(self) -> None:
        import orbax.checkpoint as ocp

        path = max((self.folder / f"{self.source}").iterdir()).absolute()
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in self.state.tensors}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            loaded = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        self.apply({name: torch.from_numpy(array) for name, array in loaded.items()})

    def close(self) -> None:
        self._checkpointer.close()

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.state.tensors.items()}


class TorchCheckpointing(Candidate):
    """Its async mode as its notes for CPU say; buffered I/O, since its direct I/O fails on ext4.

    The stall ends when its lock, which it wants taken around optimizer.step(), could be taken. It is given no
    resharder, since the metadata of resharding are exchanged through CUDA tensors, whatever the state is on.
    """

    name = "torch_checkpointing"
    again = overlaps = True
    needs = "torch_checkpointing"

    def prepare(self) -> None:
        self._manager = self._build()

    def save(self, step: int) -> Wait:
        future = self._manager.save(str(self.folder / f"step-{step:08d}"), self._state_dict())
        assert isinstance(future, Future)
        with self._manager.lock():
            return future.result

    def load(self) -> None:
        manager = self._build(asynchronous=False)
        loaded = self._state_dict()
        manager.load(max(self.folder.iterdir()), into=loaded)
        set_state_dict(
            self.state.model,
            self.state.optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        manager.close()

    def close(self) -> None:
        self._manager.close()

    def _build(self, *, asynchronous: bool = True) -> Any:
        import torch_checkpointing as tc
        from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        saver = (
            AsyncCheckpointSaverConfig(staging_config=staging)
            if asynchronous
            else SyncCheckpointSaverConfig()
        )
        return tc.CheckpointManager.Config(
            save=saver,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()

    def _state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.state.model, self.state.optimizer)
        return {"model": model, "optimizer": optimizer}


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


CANDIDATES: dict[str, type[Candidate]] = {
    **OWN,
    "torchsnapshot": Torchsnapshot,
    "orbax": Orbax,
    "torch-checkpointing": TorchCheckpointing,
    "dlrover": Dlrover,
}
"""By the word that --only takes."""
