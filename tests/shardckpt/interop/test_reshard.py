"""A checkpoint for another world size: bit-equal, all or nothing."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    CorruptError,
    NotACheckpointError,
    StorageFullError,
)
from shardckpt.format.box import Box
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest import MANIFEST, tied_names
from shardckpt.interop.export import merge
from shardckpt.interop.reshard import reshard
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.servers import S3Server
from tests.shardckpt.interop.helpers import (
    damaged,
    make_state,
    names,
    same,
    write_checkpoint,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_loads_bit_equal(saved: str, tmp_path: Path, state: dict[str, Any], world_size: int) -> None:
    """With all values, metrics and the step; and plain Zarr reads the same."""
    made = reshard(saved, tmp_path / "out", world_size)
    found, source = shardckpt.open(made.url), shardckpt.open(saved)
    assert (found.step, found.metrics) == (7, {"loss": 1.5, "worst": float("inf")})
    assert found.manifest.world_size == world_size == len(found.manifest.packs)
    assert found.manifest.values == source.manifest.values
    assert list(found.tensors) == list(source.tensors)
    assert made.dropped == ()
    found.verify()
    for name in source.tensors:
        one, other = found.read(name), source.read(name)
        assert one.tobytes() == other.tobytes() and one.dtype == other.dtype, name
    assert np.array_equal(found.zarr()["model/block.weight"][:], source.read("model/block.weight"))
    loaded = make_state()
    for module in (loaded["model"],):
        nn.init.zeros_(module.block.weight)
    loaded["rng"].value["state"].zero_()
    shardckpt.load(made.url, loaded)
    assert same(loaded["model"].block.weight.data, state["model"].block.weight.data)
    assert loaded["rng"].value["state"].tolist() == list(range(7))


def test_is_what_fully_shard_would_have_saved(tmp_path: Path) -> None:
    """The same boxes, on the same ranks, at the same places of their packs."""
    one, two = f"{tmp_path}/one", f"{tmp_path}/two"
    command = [sys.executable, "-c", SAVE_SHARDED]
    ranks = [subprocess.Popen([*command, str(rank), f"{tmp_path}/meet", one, two]) for rank in range(2)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    found = shardckpt.open(reshard(one, tmp_path / "out", 2).url).manifest
    wanted = shardckpt.open(two).manifest
    assert found.tensors == wanted.tensors
    assert found.packs == wanted.packs
    assert np.array_equal(found.chunks.pack, wanted.chunks.pack)
    assert np.array_equal(found.chunks.offset, wanted.chunks.offset)
    assert found.values == wanted.values


def test_tied_tensors_are_stored_once(saved: str, tmp_path: Path) -> None:
    reshard(saved, tmp_path / "out", 3)
    manifest = shardckpt.open(tmp_path / "out").manifest
    assert tied_names(manifest) == {"model/head.weight": "model/embedding.weight"}


def test_twice_is_the_same_as_once(saved: str, tmp_path: Path) -> None:
    reshard(saved, tmp_path / "3", 3)
    reshard(tmp_path / "3", tmp_path / "3-2", 2)
    reshard(saved, tmp_path / "2", 2)
    for rank in range(2):
        pack = f"rank-{rank:05d}/data.pack"
        assert (tmp_path / "3-2" / pack).read_bytes() == (tmp_path / "2" / pack).read_bytes()


def test_per_rank_values_stay_with_their_rank(tmp_path: Path) -> None:
    """A smaller world has no place for the last ones, and says so; a larger one has none for the new."""
    values = [{"rng": {"n": rank, "t": {"$tensor": f"rng/rank-{rank:05d}/t"}}} for rank in range(3)]
    arrays = {f"rng/rank-{rank:05d}/t": np.full(2, rank) for rank in range(3)}
    layouts = [[_whole(name, arrays[name])] for name in arrays]
    write_checkpoint(tmp_path / "3", arrays, layouts, values={"rng": {"$per_rank": "rng"}}, per_rank=values)
    smaller = reshard(tmp_path / "3", tmp_path / "2", 2)
    assert smaller.dropped == (2,)
    found = shardckpt.open(smaller.url)
    assert [value["n"] for value in found.per_rank("rng")] == [0, 1]
    assert list(found.tensors) == ["rng/rank-00000/t", "rng/rank-00001/t"]
    assert found.manifest.packs[1].size == 2 * 8 + 4
    larger = reshard(smaller.url, tmp_path / "4", 4)
    assert larger.dropped == ()
    found = shardckpt.open(larger.url)
    assert [value["n"] for value in found.per_rank("rng")] == [0, 1]
    assert found.manifest.per_rank[2:] == [{}, {}]
    merge(larger.url, tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [value["t"].tolist() for value in merged["rng"]] == [[0, 0], [1, 1]]


def test_into_a_run(saved: str, tmp_path: Path) -> None:
    """The new checkpoint knows its attempt from where it is."""
    reshard(saved, tmp_path / "run/attempt-0004/step-00000007", 2)
    assert shardckpt.open(tmp_path / "run").manifest.attempt == 4


def test_reports_progress_to_the_end(saved: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    reshard(saved, tmp_path / "out", 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    seen.clear()
    merged = merge(saved, tmp_path / "out.pt", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] <= merged.nbytes


def test_never_onto_anything(saved: str, tmp_path: Path) -> None:
    reshard(saved, tmp_path / "out", 1)
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(CheckpointExistsError, match="has a checkpoint already"):
        reshard(saved, tmp_path / "out", 2)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(CheckpointExistsError, match="is not empty: it has file"):
        reshard(saved, tmp_path / "other", 2)


def test_damage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="the chunk of 'c' at"):
        reshard(damaged(tmp_path / "checkpoint"), tmp_path / "out", 2)
    assert names(tmp_path) == ["checkpoint"]


def test_a_failure_at_any_call_leaves_nothing(saved: str) -> None:
    """Whatever the storage refuses, there is no checkpoint afterwards; and with no refusal there is."""
    for call in range(1, 100):
        url = f"memory://reshard-{uuid.uuid4().hex}"
        storage = FaultyStorage(open_storage(url), call, StorageFullError("no space"))
        try:
            reshard(saved, storage, 2)
        except StorageFullError:
            with pytest.raises(NotACheckpointError):
                shardckpt.open(url)
            continue
        shardckpt.open(url).verify()
        break
    assert call > 5


def test_to_and_from_s3(saved: str, tmp_path: Path, moto_s3: S3Server) -> None:
    url = moto_s3.url("reshard")
    made = reshard(saved, url, 3, out_storage_options=moto_s3.options)
    assert made.url == url
    back = reshard(url, tmp_path / "back", 1, storage_options=moto_s3.options)
    direct = reshard(saved, tmp_path / "direct", 1)
    packs = [Path(place.url, "rank-00000/data.pack").read_bytes() for place in (back, direct)]
    assert packs[0] == packs[1]
    merge(url, tmp_path / "out.pt", only="model", storage_options=moto_s3.options)
    assert "block.bias" in torch.load(tmp_path / "out.pt", weights_only=True)


SAVE_SHARDED = """
import sys
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
import shardckpt

def state(shard):
    # Rows that two ranks share evenly, unevenly, and not at all.
    model = nn.Sequential(nn.Embedding(101, 16), nn.Linear(16, 33), nn.LayerNorm(33), nn.Linear(33, 1))
    if shard:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}

if __name__ == "__main__":
    rank, rendezvous, one, two = sys.argv[1:]
    if rank == "0":
        shardckpt.save(one, state(False))
    torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=int(rank), world_size=2)
    shardckpt.save(two, state(True))
    torch.distributed.destroy_process_group()
"""


def _whole(name: str, array: np.ndarray[Any, Any]) -> Layout:
    return Layout(name, str(array.dtype), array.shape, (Box.whole(array.shape),))
