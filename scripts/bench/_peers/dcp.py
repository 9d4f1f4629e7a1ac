"""torch.distributed.checkpoint: its synchronous mode, and both of its asynchronous ones."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from _peers.base import Candidate, Wait

__all__ = ["Dcp", "DcpProcess", "DcpThread"]


class Dcp(Candidate):
    """torch.distributed.checkpoint. It syncs the data files, but not their folder."""

    name = "DCP sync"
    reshards = syncs = True

    def _state_dict(self) -> dict[str, Any]:
        if "model" not in self.state.objects:
            return dict(self.state.objects)
        model, optimizer = get_state_dict(self.state.model, self.state.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> Wait:
        save(self._state_dict(), checkpoint_id=self._path(step))
        return lambda: None

    def load(self) -> None:
        loaded = self._state_dict()
        newest = max(path for path in self.folder.iterdir() if (path / ".metadata").exists())
        load(loaded, checkpoint_id=newest)
        self._apply(loaded)

    def _apply(self, loaded: dict[str, Any]) -> None:
        if "model" not in loaded:  # tensors alone are filled in place
            return
        set_state_dict(
            self.state.model,
            self.state.optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


class DcpThread(Dcp):
    """Its best mode: a stager that keeps its buffers, and a process group of its own."""

    name = "DCP async thread"
    again = overlaps = True
    own_format = False
    kind = AsyncCheckpointerType.THREAD
    shared_memory = False

    def prepare(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, self.shared_memory, False, False))
        self._group = dist.new_group(backend="gloo")

    def save(self, step: int) -> Wait:
        future = async_save(
            self._state_dict(),
            checkpoint_id=self._path(step),
            process_group=self._group,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        assert isinstance(future, Future)
        return future.result

    def close(self) -> None:
        self._stager.close()
        dist.destroy_process_group(self._group)


class DcpProcess(DcpThread):
    name = "DCP async process"
    kind = AsyncCheckpointerType.PROCESS
    shared_memory = True

    def close(self) -> None:
        super().close()
        _async_process_executor._CHECKPOINT_PROCESS = None  # ends it, so that others do not pay for it
        gc.collect()
