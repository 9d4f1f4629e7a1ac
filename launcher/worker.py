"""What a worker is told: its environment and where its output goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import clock
from launcher.config import Config
from launcher.devices import count_gpus

if TYPE_CHECKING:  # the zygote needs this module first of all, and these not at all
    from launcher.restart import History
    from launcher.run_dir import RankFiles
    from launcher.team import Plan

__all__ = ["LARGE_COPIES", "WorkerOrder", "shared_environment", "worker_orders"]

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


def worker_orders(
    config: Config,
    plan: Plan,
    history: History,
    files: Sequence[RankFiles],
    *,
    saver: str,
    drain: Path,
) -> list[WorkerOrder]:
    """The workers of a round on this node, as docs/worker-contract.md promises.

    `saver` is the saver's address, `drain` the file with the request to save and end.
    """
    shared = {
        "WORLD_SIZE": str(plan.world),
        "LOCAL_WORLD_SIZE": str(len(plan.slots)),
        "ROLE_WORLD_SIZE": str(plan.world),
        "GROUP_RANK": str(plan.node),
        "GROUP_WORLD_SIZE": str(plan.nodes),
        "ROLE_NAME": config.role,
        "MASTER_ADDR": plan.addr,
        "MASTER_PORT": str(plan.port),
        "TORCHELASTIC_RESTART_COUNT": str(history.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
        "TORCHELASTIC_RUN_ID": config.run_id or config.directory.name,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "LAUNCH_RUN_DIR": str(config.directory),
        "LAUNCH_ROUND": str(plan.number),
        "LAUNCH_CKPT_URL": config.checkpoints,
        "LAUNCH_SAVER": saver,
        "LAUNCH_DRAIN_FILE": str(drain),
        "LAUNCH_CLOCK": repr(clock.ANCHOR),
        "LAUNCH_DRAIN_TIMEOUT": f"{config.drain_timeout:g}",
        **_visible_devices(plan.slots, count_gpus()),
    }
    return [
        WorkerOrder(
            rank=of_rank.rank,
            environment={
                **shared,
                "RANK": str(of_rank.rank),
                "LOCAL_RANK": str(local_rank),
                "ROLE_RANK": str(of_rank.rank),
                "TORCHELASTIC_ERROR_FILE": str(of_rank.error),
                "LAUNCH_SLOT": str(slot),
                "LAUNCH_RANK_DIR": str(of_rank.directory),
                "LAUNCH_PROGRESS_FILE": str(of_rank.progress),
            },
            out=str(of_rank.out),
            err=str(of_rank.err),
        )
        for local_rank, (of_rank, slot) in enumerate(zip(files, plan.slots, strict=True))
    ]


def _visible_devices(
    slots: Sequence[int], gpus: int, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES where a device is left out, so that LOCAL_RANK goes on to number devices."""
    if not gpus or tuple(slots) == tuple(range(len(slots))):
        return {}
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot].strip() for slot in slots)}
