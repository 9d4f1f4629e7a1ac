"""What scripts/bench/save compares: ways to save and to load one state, with what is installed anyway."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from _save_state import State
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

import shardckpt

__all__ = ["OWN", "Candidate", "PerRank"]

Wait = Callable[[], object]

_NEVER = 10**9  # steps


class Candidate:
    """One way to save `state`; made anew for each round, by every rank.

    Attributes:
        name: as it stands in the table.
        again: whether a second save may differ from the first, because something is kept.
        own_format: False if it writes what another candidate writes, which loads alike.
        reshards: whether it loads on another world size.
        syncs: whether what it has written is on the disk, not only in the page cache, when it says so.
        overlaps: whether training goes on while it writes.
        recalls: whether a job can load from memory what it has saved; `recall` does.
        prepares: whether it prepares its first save in the background of the first steps of training.
        needs: the environment of `scripts/bench/peers` that it needs.
    """

    name: ClassVar[str]
    again: ClassVar[bool] = False
    own_format: ClassVar[bool] = True
    reshards: ClassVar[bool] = False
    syncs: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False
    recalls: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    def __init__(self, state: State, folder: Path, layout: str) -> None:
        self.state = state
        self.folder = folder
        self.layout = layout

    def prepare(self) -> None:
        """What a training job does once, before it trains."""

    def save(self, step: int) -> Wait:
        """Save; the state may change when it returns. The result waits for the end of the save."""
        raise NotImplementedError

    def sync(self) -> None:
        """Put on the disk what was written, for a candidate that does not: each rank its share of the files."""
        if not self.syncs:
            dist.barrier()  # a rank may still have to put things in their places
            paths = sorted(self.folder.rglob("*"))
            for path in [*paths[dist.get_rank() :: dist.get_world_size()], self.folder]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def load(self) -> None:
        """Load the newest."""
        raise NotImplementedError

    def recall(self) -> str:
        """Load the newest from where it is nearest, in the job that has saved it; tells the tier."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what is kept from save to save."""


class Shardckpt(Candidate):
    name = "shardckpt"
    again = reshards = syncs = overlaps = recalls = prepares = True

    @property
    def _objects(self) -> dict[str, Any]:
        return {"model": self.state.model, "optimizer": self.state.optimizer}

    def prepare(self) -> None:
        self._manager = self._open()
        self._manager.restore(self._objects)
        self._manager.step(1, self._objects)

    def save(self, step: int) -> Wait:
        return self._manager.save(step, self._objects).wait

    def load(self) -> None:
        shardckpt.load(self.folder, self._objects)

    def recall(self) -> str:
        with self._open() as manager:
            loaded = manager.restore(self._objects)
        assert loaded is not None
        return loaded.tier

    def close(self) -> None:
        self._manager.close()
        del self._manager

    def _open(self) -> shardckpt.Checkpointer:
        return shardckpt.Checkpointer(self.folder, every_steps=_NEVER, keep_last=2)


class Dcp(Candidate):
    """torch.distributed.checkpoint. It syncs the data files, but not their folder."""

    name = "DCP sync"
    reshards = syncs = True

    def _state_dict(self) -> dict[str, Any]:
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


class PerRank(Candidate):
    """Each rank its own files; under DDP rank 0 alone. No resharding."""

    @property
    def writes(self) -> bool:
        """Whether this rank has something to save."""
        return self.layout == "fsdp" or dist.get_rank() == 0

    @property
    def source(self) -> int:
        """The rank whose files this one loads."""
        return dist.get_rank() if self.layout == "fsdp" else 0

    def apply(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Copy into the live tensors."""
        with torch.no_grad():
            for name, tensor in self.state.tensors.items():
                tensor.copy_(loaded[name])


class OneFile(PerRank):
    """No checksums, no commit."""

    suffix: ClassVar[str]

    def save(self, step: int) -> Wait:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / f"step-{step:08d}.{self.source}.{self.suffix}")
        return lambda: None

    def load(self) -> None:
        self.apply(self._read(max(self.folder.glob(f"*.{self.source}.{self.suffix}"))))

    def _write(self, path: Path) -> None:
        raise NotImplementedError

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class TorchSave(OneFile):
    name = "torch.save per rank"
    suffix = "pt"

    def _write(self, path: Path) -> None:
        torch.save(self.state.tensors, path)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = torch.load(path, mmap=True, weights_only=True)
        return loaded


class Safetensors(OneFile):
    name = "safetensors per rank"
    suffix = "safetensors"

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.state.tensors, path)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(path)


OWN: dict[str, type[Candidate]] = {
    "shardckpt": Shardckpt,
    "dcp": Dcp,
    "dcp-thread": DcpThread,
    "dcp-process": DcpProcess,
    "torch": TorchSave,
    "safetensors": Safetensors,
}
"""By the word that --only takes; "Own" as they need no environment of their own."""
