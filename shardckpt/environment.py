"""The environment of a worker, read in one place: docs/worker-contract.md has the variables."""

from __future__ import annotations

import os

__all__ = ["LINGER", "is_first_on_node", "linger_from_environment", "snapshots_from_environment"]


def is_first_on_node() -> bool:
    """Whether this is the rank that speaks for its node, and acts for it first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


LINGER = 60.0
"""Seconds that a saver without a launcher waits for a restarted job, unless it is told otherwise."""


_SNAPSHOTS = 2


def snapshots_from_environment() -> int:
    """How many snapshots a node holds, unless a script says."""
    text = os.environ.get("SHARDCKPT_SNAPSHOTS", str(_SNAPSHOTS))
    if text not in ("0", "1", "2"):
        raise ValueError(f"SHARDCKPT_SNAPSHOTS must be 0, 1 or 2; it is {text!r}")
    return int(text)


def linger_from_environment() -> float:
    """Seconds that a saver without launcher waits for a restarted job."""
    text = os.environ.get("SHARDCKPT_LINGER", str(LINGER))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"SHARDCKPT_LINGER must be a number of seconds; it is {text!r}") from None
