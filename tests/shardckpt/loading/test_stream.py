"""A checkpoint read in bounded memory, box after box."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np

from shardckpt.format.box import Box
from shardckpt.format.layouts import Layout
from shardckpt.loading.stream import iter_boxes, slabs
from shardckpt.run.places import Place
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.shardckpt.interop.helpers import (
    split,
    write_checkpoint,
)


def test_slabs_cut_no_chunk_and_cover_all(tmp_path: Path) -> None:
    """A tensor of several slabs: each is a run of whole rows, and they read as the tensor."""
    array = np.arange(40 << 18, dtype=np.float64).reshape(-1, 64)  # 80 MiB
    layouts = [[Layout("t", "float64", array.shape, boxes)] for boxes in split(array.shape, (0, 1), 2)]
    manifest = write_checkpoint(tmp_path / "in", {"t": array}, layouts)
    (tensor,) = manifest.tensors
    cut = slabs(tensor)
    assert len(cut) > 1
    assert [box.shape[1] for box in cut] == [64] * len(cut)
    place = Place(open_storage(tmp_path / "in"))
    pieces = list(iter_boxes(place, manifest, [("t", box) for box in cut]))
    assert np.array_equal(np.concatenate(pieces), array)


def test_each_chunk_is_read_once() -> None:
    """Also where boxes lie across chunks: a remote checkpoint is fetched once, not once for each rank."""
    array = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    storage = FaultyStorage(open_storage(f"memory://{uuid.uuid4().hex}"))
    columns = [[Layout("t", "float32", (64, 64), boxes)] for boxes in split((64, 64), (1, 1), 2)]
    manifest = write_checkpoint(storage, {"t": array}, columns)
    storage.calls.clear()
    rows = [("t", Box((start, 0), (1, 64))) for start in range(64)]
    assert np.array_equal(np.concatenate(list(iter_boxes(Place(storage), manifest, rows))), array)
    assert len([call for call in storage.calls if call[0] == "read_into"]) == 4
