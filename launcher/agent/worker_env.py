"""The environment and the output files of each worker (docs/worker-contract.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import clock
from launcher.config.job import Config
from launcher.zygote.orders import WorkerOrder

if TYPE_CHECKING:
    from launcher.rendezvous.team import RankAssignment
    from launcher.round.restart import History
    from launcher.run_dir import RankFiles

__all__ = ["worker_orders"]


def worker_orders(
    config: Config,
    plan: RankAssignment,
    history: History,
    files: Sequence[RankFiles],
    *,
    saver: str,
    drain: Path,
) -> list[WorkerOrder]:
    """The orders for the workers of a round on this node.

    Args:
        config: The job.
        plan: The ranks and slots of this node, and where the workers meet.
        history: For the number of restarts.
        files: The files of each rank, in the order of the slots.
        saver: Name of the saver's abstract unix socket.
        drain: The file that holds the request to save and leave.
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
        **_visible_devices(plan.slots, config.gpus or 0),
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
    """CUDA_VISIBLE_DEVICES if a device is left out, so that LOCAL_RANK still numbers the devices."""
    if not gpus or tuple(slots) == tuple(range(len(slots))):
        return {}
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot].strip() for slot in slots)}
