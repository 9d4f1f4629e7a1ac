"""The environment of a worker, read in this module only: each variable once, as a typed value.

docs/worker-contract.md has the variables that `launch` sets. Every function reads when it is called: a worker is
forked from a process that was started with another environment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "SAVER_LINGER",
    "SNAPSHOTS",
    "JobEnvironment",
    "checkpoint_url",
    "clock_offset",
    "drain_path",
    "drain_timeout",
    "has_one_node",
    "is_first_on_node",
    "local_world_size",
    "progress_path",
    "saver_address",
    "saver_linger",
    "snapshots",
    "subprocess_environment",
    "transfer_setting",
]

SAVER_LINGER = 60.0
"""Seconds that a saver without a launcher waits for a restarted job, unless SHARDCKPT_LINGER is set."""

SNAPSHOTS = 2
"""Snapshots that a node holds in memory, unless the script or SHARDCKPT_SNAPSHOTS says otherwise."""


# -- set by `launch`


def checkpoint_url() -> str | None:
    """LAUNCH_CKPT_URL: the URL of the run, used when a script gives none."""
    return os.environ.get("LAUNCH_CKPT_URL") or None


def saver_address() -> str | None:
    """LAUNCH_SAVER: the abstract unix socket of the saver that `launch` keeps; None without `launch`."""
    return os.environ.get("LAUNCH_SAVER")


def progress_path() -> str | None:
    """LAUNCH_PROGRESS_FILE: the file in which this rank reports its progress."""
    return os.environ.get("LAUNCH_PROGRESS_FILE") or None


def drain_path() -> str | None:
    """LAUNCH_DRAIN_FILE: the file in which `launch` asks this node's workers to save and leave."""
    return os.environ.get("LAUNCH_DRAIN_FILE") or None


def drain_timeout() -> float:
    """LAUNCH_DRAIN_TIMEOUT: seconds that `launch` waits for the saver once the workers have ended.

    Infinite if it is not set, or is no number.
    """
    try:
        return float(os.environ.get("LAUNCH_DRAIN_TIMEOUT", ""))
    except ValueError:
        return math.inf


def clock_offset() -> float | None:
    """LAUNCH_CLOCK: seconds to add to the host's monotonic clock for the time since the epoch."""
    text = os.environ.get("LAUNCH_CLOCK")
    return None if text is None else float(text)


# -- set by every launcher


def is_first_on_node() -> bool:
    """LOCAL_RANK: True for the rank that logs for its node and starts the node's saver."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_world_size() -> int:
    """LOCAL_WORLD_SIZE: ranks on this node; 1 if it is not set."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdigit() else 1


def has_one_node() -> bool:
    """GROUP_WORLD_SIZE: True if all ranks of the job are on this node, or if it is not set."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") == "1"


@dataclass(frozen=True)
class JobEnvironment:
    """The variables that the processes of one job have in common. A variable that is not set is empty.

    Attributes:
        saver: LAUNCH_SAVER.
        run_dir: LAUNCH_RUN_DIR.
        rendezvous_id: TORCHELASTIC_RUN_ID.
        slurm_cluster, slurm_job, slurm_step: SLURM_CLUSTER_NAME, SLURM_JOB_ID and SLURM_STEP_ID.
    """

    saver: str = ""
    run_dir: str = ""
    rendezvous_id: str = ""
    slurm_cluster: str = ""
    slurm_job: str = ""
    slurm_step: str = ""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> JobEnvironment:
        """Read the variables of this process, or of `environ`."""
        variables = os.environ if environ is None else environ
        return cls(
            saver=variables.get("LAUNCH_SAVER", ""),
            run_dir=variables.get("LAUNCH_RUN_DIR", ""),
            rendezvous_id=variables.get("TORCHELASTIC_RUN_ID", ""),
            slurm_cluster=variables.get("SLURM_CLUSTER_NAME", ""),
            slurm_job=variables.get("SLURM_JOB_ID", ""),
            slurm_step=variables.get("SLURM_STEP_ID", ""),
        )


# -- set by a user


def snapshots() -> int:
    """SHARDCKPT_SNAPSHOTS: snapshots that a node holds in memory, 0 to 2. Raises ValueError."""
    text = os.environ.get("SHARDCKPT_SNAPSHOTS", str(SNAPSHOTS))
    if text not in ("0", "1", "2"):
        raise ValueError(f"SHARDCKPT_SNAPSHOTS must be 0, 1 or 2; it is {text!r}")
    return int(text)


def saver_linger() -> float:
    """SHARDCKPT_LINGER: seconds that a saver without a launcher waits for a restarted job. Raises ValueError."""
    text = os.environ.get("SHARDCKPT_LINGER", str(SAVER_LINGER))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"SHARDCKPT_LINGER must be a number of seconds; it is {text!r}") from None


def transfer_setting(name: str) -> tuple[str, str]:
    """SHARDCKPT_TRANSFER_DEADLINE or SHARDCKPT_TRANSFER_LEAST_RATE, for the storage option `name`.

    Returns the name of the variable, for messages, and its text, which is empty if it is not set.
    """
    variable = f"SHARDCKPT_{name.upper()}"
    return variable, os.environ.get(variable, "")


# -- for processes that this one starts


def subprocess_environment() -> dict[str, str]:
    """This process's environment, with the folder of this package first in PYTHONPATH."""
    package = str(Path(__file__).parents[1])
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
