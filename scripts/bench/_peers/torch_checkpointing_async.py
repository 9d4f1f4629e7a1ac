"""torch_checkpointing."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from _peers.base import Candidate, Wait

__all__ = ["TorchCheckpointing"]


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
