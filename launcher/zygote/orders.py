"""What the zygote needs to know of each worker that it forks, and of all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.job import Config

__all__ = ["LARGE_COPIES", "WorkerOrder", "shared_environment"]


LARGE_COPIES = f"glibc.cpu.x86_non_temporal_threshold={1 << 20:#x}"
"""A setting of GLIBC_TUNABLES: copies above this many bytes bypass the cache, which halves their bus traffic.

glibc's own threshold is 3/4 of a thread's share of the last-level cache. On virtual machines it may come to
hundreds of megabytes; then copies of tensors, as in checkpoints and data loaders, take 1.7 times as long
(scripts/bench/memory).
"""


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """One worker to fork."""

    rank: int
    environment: dict[str, str]
    """Variables, added to the zygote's own."""
    out: str
    """File that its standard output is appended to."""
    err: str
    """File that its standard error is appended to."""


def shared_environment(config: Config, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the zygote, which all workers inherit: `environ` and a few defaults.

    Libraries read OMP_NUM_THREADS when they are loaded, which is in the zygote; glibc reads its tunables even
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
