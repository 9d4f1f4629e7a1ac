"""Snapshots in the memory of a job's nodes: find the complete ones, and open one for a load."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt.errors import SaverError
from shardckpt.format.manifest import Manifest
from shardckpt.format.save_plan import SavePlan, decode_plan
from shardckpt.loading.pack_reader import MemoryPacks
from shardckpt.ranks.world import Ranks
from shardckpt.run.proposal import Proposal
from shardckpt.saver.client import SaverClient
from shardckpt.saver.protocol import Contents, Snapshot

__all__ = ["find_snapshots", "open_snapshot"]


def find_snapshots(client: SaverClient | None, ranks: Ranks) -> list[Snapshot]:
    """The snapshots of which the job's nodes together hold every rank's pack, the newest first. Collective.

    `client` is this node's saver; None without one. A saver that does not answer holds none.
    """
    held: list[Snapshot] = []
    if client is not None:
        with suppress(SaverError):
            held = client.snapshots()
    found: dict[str, Snapshot] = {}
    packs: dict[str, set[int]] = {}
    for message in ranks.gather(msgspec.msgpack.encode(held)):
        for snapshot in msgspec.msgpack.decode(message, type=list[Snapshot]):
            info = snapshot.info
            known = found.setdefault(info.id, snapshot)
            if known.info.order < info.order:  # this node knows of a later attempt
                found[info.id] = snapshot
            packs.setdefault(info.id, set()).update(snapshot.ranks)
    complete = [snapshot for key, snapshot in found.items() if len(packs[key]) == snapshot.info.world_size]
    return sorted(complete, key=lambda snapshot: snapshot.info.order, reverse=True)


def open_snapshot(
    client: SaverClient | None, snapshot: Snapshot, url: str, ranks: Ranks
) -> tuple[Manifest, MemoryPacks] | None:
    """The manifest and the packs of a snapshot; None if a part of it is gone. Collective.

    Args:
        client: this node's saver; None without one. It keeps the packs unchanged until `client.detach()`.
        snapshot: one of those that `find_snapshots` returned.
        url: the snapshot's name in messages.
        ranks: of the job.
    """
    attached = None
    if client is not None:
        with suppress(SaverError):
            attached = client.attach(snapshot.info.id)
    contents = _joined(_gather(attached.contents if attached else Contents(), client, ranks))
    size = snapshot.info.world_size
    lacks = [len(contents.values) < size, len(contents.checksums) < size]
    is_gone, has_no_checksums = ranks.maximum([*lacks])
    if is_gone or not contents.proposal:
        return None
    plan = decode_plan(contents.plan)
    proposal = Proposal.decode(contents.proposal, plan).at(snapshot.info.path)
    checksums = np.zeros(len(plan.writer), dtype=np.int64)
    if not has_no_checksums:
        checksums = _checksums(plan, contents)
    values = [msgspec.json.decode(contents.values[rank]) for rank in range(size)]
    packs = MemoryPacks(url, attached.packs if attached else {}, has_checksums=not has_no_checksums)
    return proposal.manifest(values, checksums), packs


def _gather(own: Contents, client: SaverClient | None, ranks: Ranks) -> list[Contents]:
    """The contents that each node has, sent by one rank of the node. Collective."""
    nodes = ranks.gather((client.id if client is not None else "").encode())
    if len(set(nodes)) == 1:
        return [own]
    is_first = nodes.index(nodes[ranks.rank]) == ranks.rank
    messages = ranks.gather(msgspec.msgpack.encode(own) if is_first else b"")
    return [msgspec.msgpack.decode(message, type=Contents) for message in messages if message]


def _joined(parts: Sequence[Contents]) -> Contents:
    """The contents of all nodes in one."""
    first = next((part for part in parts if part.proposal), Contents())
    return Contents(
        first.proposal,
        first.plan,
        {rank: value for part in parts for rank, value in part.values.items()},
        {rank: sums for part in parts for rank, sums in part.checksums.items()},
    )


def _checksums(plan: SavePlan, contents: Contents) -> npt.NDArray[np.int64]:
    """The checksum of each row of the chunk table. A rank's checksums are in the order of its rows."""
    found = np.zeros(len(plan.writer), dtype=np.int64)
    columns = [contents.checksums[rank] for rank in range(plan.world.size)]
    found[plan.rows_by_rank] = list(itertools.chain(*columns))
    tied, sources = plan.tied_rows
    found[tied] = found[sources]
    return found
