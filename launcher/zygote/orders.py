"""What the zygote is told of each worker that it forks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.config.job import Config

if TYPE_CHECKING:  # the zygote needs this module first of all, and these not at all
    pass

__all__ = ["LARGE_COPIES", "WorkerOrder", "shared_environment"]


LARGE_COPIES = f"glibc.cpu.x86_non_temporal_threshold={1 << 20:#x}"
"""Of GLIBC_TUNABLES: bytes from which on memcpy goes past the cache, which halves its traffic on the memory bus.

glibc's own choice is 3/4 of a thread's share of the last cache. On virtual machines that may come out as
hundreds of megabytes, and copies of tensors, as checkpoints and data loaders make them, take 1.7 times as long
(scripts/bench/memory).
"""


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """One worker to fork: `environment` is added to the zygote's own."""

    rank: int
    environment: dict[str, str]
    out: str
    err: str


def shared_environment(config: Config, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What all workers, and the zygote before it imports anything, find in their environment.

    Libraries read OMP_NUM_THREADS when they are loaded, hence in the zygote; glibc reads its tunables
    before that.
    """
    environment = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if config.nproc > 1:
        environment["OMP_NUM_THREADS"] = "1"  # as torchrun does
    environment.update(environ)
    tunables = environ.get("GLIBC_TUNABLES", "")
    if LARGE_COPIES.partition("=")[0] not in tunables:
        environment["GLIBC_TUNABLES"] = f"{tunables}:{LARGE_COPIES}" if tunables else LARGE_COPIES
    return environment
