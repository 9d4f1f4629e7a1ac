"""What scripts/bench/save compares: ways to save and to load one state."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from _kit.state import State

__all__ = ["Candidate", "PerRank", "Wait"]

Wait = Callable[[], object]


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
