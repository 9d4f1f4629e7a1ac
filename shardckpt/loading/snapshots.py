"""Snapshots in the memory of a job's nodes: which of them are whole, and what it takes to load one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

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
    """The snapshots of which the job's nodes together hold every rank's pack, the newest first. Collective."""
    held: list[Snapshot] = []
    if client is not None:
        try:
            held = client.snapshots()
        except SaverError:
            held = []
    told = ranks.gather(msgspec.msgpack.encode(held))
    found: dict[str, Snapshot] = {}
    packs: dict[str, set[int]] = {}
    for data in told:
        for snapshot in msgspec.msgpack.decode(data, type=list[Snapshot]):
            info = snapshot.info
            if (
                found.setdefault(info.id, snapshot).info.order < info.order
            ):  # another node knows better where
                found[info.id] = snapshot
            packs.setdefault(info.id, set()).update(snapshot.ranks)
    whole = [snapshot for key, snapshot in found.items() if len(packs[key]) == snapshot.info.world_size]
    return sorted(whole, key=lambda snapshot: snapshot.info.order, reverse=True)


def open_snapshot(
    client: SaverClient | None, snapshot: Snapshot, url: str, ranks: Ranks
) -> tuple[Manifest, MemoryPacks] | None:
    """What it takes to load a snapshot; None if it is not there any more. Collective.

    Its memory stays as it is until `client.detach()`. `url` is what messages call it.
    """
    held = None
    if client is not None:
        try:
            held = client.attach(snapshot.info.id)
        except SaverError:
            held = None
    everywhere = _on_all_nodes(held.contents if held else Contents(), client, ranks)
    contents = _joined(everywhere)
    size = snapshot.info.world_size
    lacks = [len(contents.values) < size, len(contents.checksums) < size]
    is_gone, has_no_checksums = ranks.maximum([*lacks])
    if is_gone or not contents.proposal:
        return None
    plan = decode_plan(contents.plan)
    proposal = Proposal.decode(contents.proposal, plan).at(snapshot.info.path)
    checksums = _by_row(plan, contents) if not has_no_checksums else [0] * len(plan.writer)
    values = [msgspec.json.decode(contents.values[rank]) for rank in range(size)]
    packs = MemoryPacks(url, held.packs if held else {}, has_checksums=not has_no_checksums)
    return proposal.manifest(values, checksums), packs


def _on_all_nodes(mine: Contents, client: SaverClient | None, ranks: Ranks) -> list[Contents]:
    """What each node knows of the snapshot; one rank of each node tells it, if there are several."""
    nodes = ranks.gather((client.id if client is not None else "").encode())
    if len(set(nodes)) == 1:
        return [mine]
    speaks = nodes.index(nodes[ranks.rank]) == ranks.rank
    told = ranks.gather(msgspec.msgpack.encode(mine) if speaks else b"")
    return [msgspec.msgpack.decode(data, type=Contents) for data in told if data]


def _joined(parts: Sequence[Contents]) -> Contents:
    first = next((part for part in parts if part.proposal), Contents())
    return Contents(
        first.proposal,
        first.plan,
        {rank: value for part in parts for rank, value in part.values.items()},
        {rank: sums for part in parts for rank, sums in part.checksums.items()},
    )


def _by_row(plan: SavePlan, contents: Contents) -> list[int]:
    """The checksum of each row of the chunk table. A rank's chunks lie in its pack in the order of rows."""
    columns = {rank: iter(checksums) for rank, checksums in contents.checksums.items()}
    found = [0] * len(plan.writer)
    for row, writer in enumerate(plan.writer):
        if row not in plan.same_as:
            found[row] = next(columns[writer])
    for row, source in plan.same_as.items():
        found[row] = found[source]
    return found
