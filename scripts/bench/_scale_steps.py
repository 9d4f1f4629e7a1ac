"""What scripts/bench/scale times: one process of a large world at a time, each in a process of its own.

The messages of all other ranks are made before the clock starts.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shardckpt.format.box import Box, split_evenly
from shardckpt.format.layouts import OWN, Layout, RankLayout, Split
from shardckpt.format.manifest import MANIFEST, REFS, Part, WrittenPack, pack_path
from shardckpt.format.manifest_codec import decode_checked, encode_checked
from shardckpt.format.save_plan import decode_plan, encode_plan, plan_save
from shardckpt.loading.plan import plan_reads
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience
from shardckpt.run.parts import write_part
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.storage import open_storage

__all__ = ["LAYOUTS", "STEPS", "Case", "Figures", "measure"]

LAYOUTS = ("fsdp", "hsdp", "pipeline")
_REPLICAS = 8
_STAGES = 8
_NODE = 8  # ranks
_TIMEOUT = 60.0  # seconds
_ID = "ab" * 16


@dataclass(frozen=True)
class Case:
    """A world: how many ranks hold how many tensors, and how they are laid out."""

    layout: str
    ranks: int
    tensors: int

    def holds(self, rank: int) -> RankLayout:
        """What a rank holds: its shards, and a random generator's state of its own."""
        shape = {
            "fsdp": (self.ranks,),
            "hsdp": (_REPLICAS, self.ranks // _REPLICAS),
            "pipeline": (self.ranks // _STAGES,),
        }[self.layout]
        splits = (Split(0, shape[-1], len(shape) - 1),)
        own = (Layout(f"rng{OWN}", "uint8", (5056,), (Box.whole((5056,)),)),)
        tensors = [
            Layout(name, "float32", size, (), mesh=0, splits=splits)
            for number, (name, size) in enumerate(self.shapes())
            if self.layout != "pipeline" or number % _STAGES == self._stage(rank)
        ]
        return RankLayout((shape,), self._place(rank), (*tensors, None), own)

    def _stage(self, rank: int) -> int:
        return rank * _STAGES // self.ranks if self.layout == "pipeline" else 0

    def _place(self, rank: int) -> tuple[int, ...]:
        if self.layout == "hsdp":
            return divmod(rank, self.ranks // _REPLICAS)
        return (rank if self.layout == "fsdp" else rank % (self.ranks // _STAGES),)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes: a weight, its bias, a larger one, a norm, each of which every rank has a part of."""
        sizes = [(4 * self.ranks, 1024), (4 * self.ranks,), (11 * self.ranks + 1, 1024), (self.ranks, 8)]
        for number in range(self.tensors):
            yield f"model/layers.{number // 4}/w{number % 4}", sizes[number % 4]

    def messages(self) -> Callable[[bytes], Sequence[bytes]]:
        """What gathering returns to a rank, call after call, as if all other ranks took part."""
        first: dict[int, tuple[int, RankLayout]] = {}  # by stage, its first rank and what that holds
        digests = []
        for rank in range(self.ranks):
            if self._stage(rank) not in first:
                first[self._stage(rank)] = rank, self.holds(rank)
            digest = first[self._stage(rank)][1].digest  # but for the place, which it ends with
            place = np.array(self._place(rank), dtype="<i4").tobytes()
            digests.append(digest[: -len(place)] + place)
        contents = [b""] * self.ranks
        for rank, held in first.values():
            contents[rank] = _told_by(held, rank, digests)
        answers = iter([digests, contents])
        return lambda _: next(answers)


def _told_by(held: RankLayout, rank: int, digests: Sequence[bytes]) -> bytes:
    """What a rank passes to the second gathering."""
    told: list[bytes] = []

    def gather(data: bytes) -> Sequence[bytes]:
        told.append(data)
        return digests if len(told) == 1 else told[1:]

    held.share(rank, gather)
    return told[1]


@dataclass
class Figures:
    """What a step took.

    Attributes:
        chunks: of the checkpoint.
        seconds: by part of the step, and "all".
        memory: bytes by which the process grew at its peak.
        sizes: bytes of what is passed on or stored.
    """

    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time a block."""
        begun = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - begun


def plan_one_rank(case: Case) -> Figures:
    """What each rank does for a save of a new structure: all but the copy."""
    rank = case.ranks // 2
    held, gather, figures = case.holds(rank), case.messages(), Figures()
    with _memory_of(figures), figures.timed("all"):
        with figures.timed("layouts"):
            digest = held.digest
            world = held.share(rank, gather)
        with figures.timed("plan"):
            plan = plan_save(world)
            fingerprint = plan.fingerprint
        with figures.timed("own chunks"):
            plan.writes(rank)
            plan.shared_by(rank)
    assert fingerprint
    figures.chunks = len(plan.writer)
    figures.sizes = {"digest": len(digest), "layout": len(msgspec.msgpack.encode(held.common))}
    return figures


def commit_world(case: Case) -> Figures:
    """What the committer does once all parts are there: from the encoded plan to the manifest."""
    plan = plan_save(case.holds(0).share(0, case.messages()))
    encoded, figures = encode_plan(plan), Figures()
    figures.chunks = len(plan.writer)
    values = {f"v{number}": {"$tensor": tensor.name} for number, tensor in enumerate(plan.tensors)}
    info = SaveInfo(_ID, "attempt-0001/step-00000001", 1, 1, case.ranks)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(open_storage(folder), info.path)
        _write_parts(plan, place, Path(folder) / info.path)
        del plan
        gc.collect()
        with _memory_of(figures), figures.timed("all"):
            with figures.timed("plan"):
                decoded = decode_plan(encoded)
                assert len(decoded.offset)
            with figures.timed("commit"):
                commit(place, Proposal(info, {}, values, decoded), Patience(_TIMEOUT))
        figures.sizes = {"plan": len(encoded)}
        for name in (MANIFEST, REFS):
            if (path := Path(folder) / info.path / name).exists():
                figures.sizes[name] = path.stat().st_size
    return figures


def _write_parts(plan: Any, place: Place, folder: Path) -> None:
    """A part for each node, and packs that have their sizes and no content."""
    drawn = np.random.default_rng(0)
    for first in range(0, plan.world.size, _NODE):
        packs = []
        for rank in range(first, min(first + _NODE, plan.world.size)):
            locations = plan.locations(rank)
            sums = drawn.integers(0, 1 << 32, len(locations)).tolist()
            rows, offsets = ([getattr(chunk, name) for chunk in locations] for name in ("row", "offset"))
            packs.append(WrittenPack(rank, plan.pack_sizes[rank], rows, offsets, sums, {}))
            path = folder / pack_path(rank)
            path.parent.mkdir(parents=True)
            path.touch()
            os.truncate(path, plan.pack_sizes[rank])
        write_part(place.storage, Part(id=_ID, packs=packs))


def plan_load(case: Case) -> Figures:
    """What each rank does for a load once rank 0 has checked and passed on the manifest: all but reading."""
    plan = plan_save(case.holds(0).share(0, case.messages()))
    info = SaveInfo(_ID, "", 1, 0, case.ranks)
    values = {f"v{number}": {"$tensor": tensor.name} for number, tensor in enumerate(plan.tensors)}
    sums = np.random.default_rng(0).integers(0, 1 << 32, len(plan.writer))
    shared = encode_checked(Proposal(info, {}, values, plan).manifest([{}] * case.ranks, sums))
    world, rank = case.ranks * 3 // 4, case.ranks // 2  # another number of ranks than have saved
    wanted = []
    for tensor in plan.tensors[: case.tensors]:
        for start, stop in split_evenly(((0, tensor.shape[0]),), world, rank):
            offsets = (start, *(0 for _ in tensor.shape[1:]))
            wanted.append((tensor.name, Box(offsets, (stop - start, *tensor.shape[1:]))))
    figures = Figures(chunks=len(plan.writer), sizes={"message": len(shared)})
    del plan, sums
    gc.collect()
    with _memory_of(figures), figures.timed("all"):
        with figures.timed("decode"):
            manifest = decode_checked(shared)
        with figures.timed("plan"):
            reads = plan_reads(manifest, wanted)
    assert len(reads) >= len(wanted)
    return figures


def plan_dcp(case: Case) -> Figures:
    """What DCP's coordinator does with the plans of all ranks, once it has gathered them."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    boxes = plan_save(case.holds(0).share(0, case.messages()))
    shapes = {tensor.name: tensor.shape for tensor in boxes.tensors}
    plans, chunks = [], 0
    for rank in range(case.ranks):
        items = []
        for write in boxes.writes(rank):
            offsets, sizes = torch.Size(write.box.offsets), torch.Size(write.box.shape)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=torch.float32),
                size=torch.Size(shapes[write.name]),
            )
            items.append(
                WriteItem(MetadataIndex(write.name, offsets), WriteItemType.SHARD, tensor_data=data)
            )
        plans.append(SavePlan(items))
        chunks += len(items)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({}, None, is_coordinator=True)
    figures = Figures(chunks=chunks)
    with _memory_of(figures), figures.timed("all"):
        planner.create_global_plan(plans)
    return figures


STEPS: dict[str, Callable[[Case], Figures]] = {
    "rank": plan_one_rank,
    "committer": commit_world,
    "load": plan_load,
    "dcp": plan_dcp,
}


@contextmanager
def _memory_of(figures: Figures) -> Iterator[None]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    yield
    figures.memory = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    line = Path("/proc/self/status").read_text().partition(f"{name}:")[2]
    return int(line.split()[0]) << 10


def _run(step: str, case: Case) -> Figures:
    return STEPS[step](case)


def measure(step: str, case: Case, repeat: int) -> Figures:
    """The figures of a step, each run in a new process: the fastest run."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(_run, (step, case)) for _ in range(repeat)]
    return min(runs, key=lambda figures: figures.seconds["all"])
