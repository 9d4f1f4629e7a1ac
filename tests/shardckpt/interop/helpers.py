"""States, layouts and checkpoints that the tests of exports and reshards share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import shardckpt
from shardckpt.format.box import Box, split_evenly
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest import MANIFEST, Manifest, Part
from shardckpt.format.manifest_codec import decode_manifest
from shardckpt.format.save_plan import plan_save
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience
from shardckpt.run.pack_writer import persist
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.storage import open_storage

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.block(self.embedding(tokens)))
        return out


def make_state() -> dict[str, Any]:
    """One of everything that a state can hold."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "types": {name: some(name) for name in DTYPES},
        "plain": {"none": None, "nan": float("nan"), "bytes": b"\0\xff", "big": 2**70, 1: [True, (1, "ü")]},
        "odd": [torch.tensor(2.5), torch.zeros(0, 4), torch.zeros(3, 0), np.arange(6).reshape(2, 3)],
        "rng": shardckpt.PerRank({"state": torch.arange(7), "count": 3}),
        "a/b": {"c/d": torch.ones(2)},
    }


def some(dtype: str) -> torch.Tensor:
    """Every bit pattern of one byte, as elements of this type."""
    if dtype == "bool":
        return torch.tensor([[True, False, True]])
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(4, -1)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def split(shape: Sequence[int], dims: Sequence[int], world: int) -> list[tuple[Box, ...]]:
    """For each of `world * world` ranks, its box of a tensor split over two dimensions of a mesh."""
    boxes = []
    for rank in range(world * world):
        runs = [((0, n),) for n in shape]
        for dim, index in zip(dims, divmod(rank, world), strict=True):
            if shape:
                runs[dim % len(shape)] = split_evenly(runs[dim % len(shape)], world, index)  # type: ignore[call-overload]
        if all(runs):
            boxes.append((Box(tuple(r[0][0] for r in runs), tuple(r[0][1] - r[0][0] for r in runs)),))
        else:
            boxes.append(())
    return boxes


def write_checkpoint(
    url: Any,
    arrays: dict[str, np.ndarray[Any, Any]],
    layouts: list[list[Layout]],
    *,
    values: Any = None,
    per_rank: list[dict[str, Any]] | None = None,
) -> Manifest:
    """Save as ranks with these layouts would, in one process."""
    plan = plan_save(layouts)
    place = Place(open_storage(url))
    tree = {name: {"$tensor": name} for name in arrays} if values is None else values
    proposal = Proposal(SaveInfo(uuid.uuid4().hex, "", 1, 0, len(plan.pack_sizes)), {}, tree, plan)
    packs = []
    for rank, nbytes in enumerate(plan.pack_sizes):
        content = memoryview(bytearray(nbytes))
        for write in plan.writes(rank):
            chunk = np.zeros(write.chunk, numpy_dtype(write.dtype))
            chunk[tuple(slice(0, n) for n in write.box.shape)] = arrays[write.name][write.box.slices]
            _, offset, nbytes = write.location
            content[offset : offset + nbytes] = chunk.tobytes()
        values_of = per_rank[rank] if per_rank else {}
        packs.append(persist(place.storage, content, plan.locations(rank), rank=rank, per_rank=values_of))
    commit(place, proposal, Patience(5), Part(id=proposal.info.id, packs=packs))
    return decode_manifest(place.storage.read(MANIFEST), place.url)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def damaged(folder: Path) -> str:
    """A checkpoint with a flipped bit in its last tensor, 'c'."""
    shardckpt.save(folder, {name: torch.zeros(40 << 18) for name in "abc"})
    offset = shardckpt.open(folder).manifest.chunks.offset[-3]
    with open(folder / "rank-00000/data.pack", "r+b") as file:
        file.seek(offset + 5)
        file.write(b"\x01")
    return str(folder)
