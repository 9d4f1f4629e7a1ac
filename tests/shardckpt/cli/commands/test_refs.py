"""`shardckpt refs`, and checkpoints that have no refs.json for their size."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import crc32c
import numpy as np
import pytest
import zarr

from shardckpt.format.manifest import (
    REFS,
    ArrayEntry,
    Chunks,
    Manifest,
    Pack,
    TensorEntry,
    pack_path,
)
from shardckpt.format.zarr_refs import MAX_CHUNKS
from shardckpt.run.commit import publish
from shardckpt.run.places import Place
from shardckpt.storage import open_storage
from tests.shardckpt.cli.helpers import Call

STEP = "attempt-0001/step-00000007"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A run with a checkpoint of one chunk more than have a refs.json, of which a failed save had left one."""
    count = MAX_CHUNKS + 1
    pack = b"\1" + struct.pack("<I", crc32c.crc32c(b"\1"))
    manifest = Manifest(
        id="x",
        step=7,
        attempt=1,
        world_size=1,
        created=0.0,
        writer="a test",
        metrics={},
        values={"w": {"$tensor": "w"}},
        per_rank=[{}],
        packs=(Pack(pack_path(0), len(pack) * count),),
        tensors=(TensorEntry("w", "int8", (count,), (ArrayEntry((0,), (count,), (1,)),)),),
        chunks=Chunks(
            pack=[0] * count,
            offset=list(range(0, len(pack) * count, len(pack))),
            crc32c=[crc32c.crc32c(b"\1")] * count,
        ),
    )
    place = Place(open_storage(tmp_path / "run"), STEP)
    place.storage.write(pack_path(0), pack * count)
    place.storage.write(REFS, b"{}")
    publish(place, manifest)
    return tmp_path / "run"


def test_a_large_checkpoint_has_none_until_it_is_asked_for(large: Path, call: Call) -> None:
    """What `refs` writes for it, if it is named, is what plain Zarr reads."""
    checkpoint = large / STEP
    assert not (checkpoint / REFS).exists()
    assert "good" in call("ls", large)[1]
    code, out, _ = call("refs", large, "--json")
    assert [row["written"] for row in json.loads(out)["checkpoints"]] == [False]
    code, out, _ = call("refs", checkpoint)
    assert (code, "wrote refs.json of 1 of 1 checkpoint" in out) == (0, True)
    group = zarr.open_group(f"reference::{checkpoint / REFS}", mode="r")
    array = group["w"]
    assert isinstance(array, zarr.Array)
    assert np.asarray(array[MAX_CHUNKS - 1 :]).tolist() == [1, 1]
    moved = large.rename(large.parent / "moved")
    code, out, _ = call("refs", moved, "--json")
    assert [row["written"] for row in json.loads(out)["checkpoints"]] == [True]


def test_that_it_is_left_out_is_no_damage(large: Path, call: Call) -> None:
    (large / STEP / pack_path(0)).unlink()  # which is one problem, so that no chunk need be read
    code, out, _ = call("verify", large / STEP, "--json")
    report = json.loads(out)
    assert (code, len(report["problems"])) == (4, 1)
    assert REFS not in report["problems"][0]
    (note,) = report["notes"]
    assert note.startswith(
        f"refs.json is left out, as always for that many chunks: `shardckpt refs {large / STEP}`"
    )
