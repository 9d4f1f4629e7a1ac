"""The durable tiers of a run, as its Checkpointer opens them: a local folder, and the run's URL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardckpt import environment
from shardckpt.ranks.world import Ranks
from shardckpt.run.attempts import run_of
from shardckpt.run.tiers import LOCAL, REMOTE, Tier, tier_name
from shardckpt.saving.policy import SavePolicy, SaveSchedule
from shardckpt.storage import Storage, open_storage

__all__ = ["RunTier", "check_one_node", "open_run", "open_tiers"]


@dataclass(frozen=True)
class RunTier:
    """A durable tier of a run.

    Attributes:
        tier: its name, URL, options and retention, which a saver needs to open it.
        root: the run's storage in this tier, opened by this process.
        policy: which steps `Checkpointer.step` saves here. None: none.
    """

    tier: Tier
    root: Storage
    policy: SavePolicy | None

    @property
    def name(self) -> str:
        """`LOCAL` or `REMOTE`."""
        return self.tier.name


def open_run(url: str | os.PathLike[str] | Storage | None, options: Mapping[str, Any] | None) -> Storage:
    """Open the storage of the run at `url`, or at LAUNCH_CKPT_URL if `url` is None. Reads nothing.

    Raises ValueError if there is no URL, or if it is the URL of a checkpoint in a run.
    """
    if url is None:
        url = environment.checkpoint_url()
        if url is None:
            raise ValueError(
                "Checkpointer needs a url: no url was given, and LAUNCH_CKPT_URL is not set, as it is "
                "in a worker of `launch`"
            )
    root = open_storage(url, options)
    if (run := run_of(root.url)) is not None:
        raise ValueError(
            f"{root.url} is a checkpoint in a run, and not the run: give {run}, of which the newest "
            "checkpoint is resumed; to begin with this one, load it with shardckpt.load(url, state)"
        )
    return root


def open_tiers(
    root: Storage,
    local: str | os.PathLike[str] | None,
    schedule: SaveSchedule,
    *,
    keep_last: int | None,
    options: Mapping[str, Any] | None,
) -> list[RunTier]:
    """Return the durable tiers of a run, the nearest first. Reads nothing.

    Args:
        root: the run's storage.
        local: the folder of the local tier; None: there is none.
        schedule: which saves go to which tier.
        keep_last: number of checkpoints that retention keeps in each tier; None: all.
        options: arguments of the fsspec file system with which `root` was opened.

    Raises ValueError if both tiers are the same folder.
    """
    name = tier_name(root) if local is None else REMOTE
    tiers = [RunTier(Tier(name, root.url, dict(options or {}), keep_last), root, schedule.url)]
    if local is not None:
        folder = open_storage(local)
        if folder.url == root.url:
            raise ValueError(f"local and url are the same folder, {root.url}: leave local out")
        tiers.insert(0, RunTier(Tier(LOCAL, folder.url, {}, keep_last), folder, schedule.local))
    return tiers


def check_one_node(tiers: Sequence[RunTier], ranks: Ranks) -> None:
    """Raise ValueError, on all ranks, if a run with a local tier has ranks on several nodes. Collective.

    Each node's folder would hold the parts of its own ranks only, which is no checkpoint.
    """
    if len(tiers) == 1:
        return
    nodes = set(ranks.gather(ranks.node.encode()))
    if len(nodes) > 1:
        raise ValueError(
            f"local={tiers[0].root.url!r} is for a job on one node, and this one is on "
            f"{len(nodes)}: leave it out; snapshots in memory are kept on each node"
        )
