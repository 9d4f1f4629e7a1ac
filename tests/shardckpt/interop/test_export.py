"""One file from any checkpoint: bit-equal, streamed, all or nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    CorruptError,
    MissingKeysError,
    NotACheckpointError,
    StorageError,
    StorageFullError,
)
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.layouts import Layout
from shardckpt.interop.export import merge
from shardckpt.interop.reshard import reshard
from tests.shardckpt.interop.helpers import (
    damaged,
    names,
    split,
    write_checkpoint,
)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"only": "modell"}, MissingKeysError, r"'modell': the state has model, optimizer"),
        ({"only": "model/blok.weight"}, MissingKeysError, r"model has embedding\.weight"),
        ({"only": "plain/none/x"}, MissingKeysError, r"plain/none has nothing below it"),
        ({"select": ["*.weight", "none*"]}, MissingKeysError, r"'none\*'; .* has 43, like"),
        ({"out": "x.bin"}, ValueError, r"must end with \.safetensors or \.pt"),
        ({"out": "no/x.pt"}, StorageError, r"there is no folder .*/no"),
        ({"url": "nothing"}, NotACheckpointError, "nothing is there"),
    ],
)
def test_merge(
    saved: str,
    tmp_path: Path,
    arguments: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    url, out = arguments.pop("url", saved), arguments.pop("out", "x.pt")
    with pytest.raises(error, match=text):
        merge(url if url == saved else tmp_path / url, tmp_path / out, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_on_demand(saved: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("mine")
    with pytest.raises(CheckpointExistsError, match=r"out\.pt exists already"):
        merge(saved, out)
    assert out.read_text() == "mine"
    merge(saved, out, only="model", overwrite=True)
    assert "block.bias" in torch.load(out, weights_only=True)
    with pytest.raises(CheckpointExistsError, match="is a folder"):
        (tmp_path / "folder.pt").mkdir()
        merge(saved, tmp_path / "folder.pt", overwrite=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damage_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    """A bit flip in the last tensor is found after most was written."""
    url = damaged(tmp_path / "checkpoint")
    out = tmp_path / f"out{suffix}"
    out.write_text("mine")
    with pytest.raises(CorruptError, match=r"the chunk of 'c' at \[0\].*is corrupt"):
        merge(url, out, overwrite=True)
    assert out.read_text() == "mine"
    assert names(tmp_path) == ["checkpoint", out.name]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_found_before_anything_is_written(
    small_disk: Path, tmp_path: Path, suffix: str
) -> None:
    state = {name: torch.zeros(3 << 20, dtype=torch.uint8) for name in "ab"}
    shardckpt.save(tmp_path / "checkpoint", state)

    def progress(done: int, _: int) -> None:
        raise AssertionError(f"{done} bytes were written")

    with pytest.raises(StorageFullError, match=r"wanted 62\d{5} bytes, 4\d{6} are free"):
        merge(tmp_path / "checkpoint", small_disk / f"out{suffix}", progress=progress)
    with pytest.raises(StorageFullError, match="are free"):
        reshard(tmp_path / "checkpoint", small_disk / "out", 2, progress=progress)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_world_sizes_that_are_none(saved: str, tmp_path: Path, number: Any) -> None:
    with pytest.raises(ValueError, match="whole number of 1 or more"):
        reshard(saved, tmp_path / "out", number)
    assert not list(tmp_path.iterdir())


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=3),
            st.tuples(st.integers(0, 2), st.integers(0, 2)),
            st.sampled_from(["bfloat16", "float8_e5m2", "int64", "bool", "float32"]),
        ),
        min_size=1,
        max_size=4,
    ),
    world=st.integers(1, 3),
    other=st.integers(1, 7),
)
def test_any_layout_merges_and_reshards(
    tmp_path: Path, tensors: list[tuple[list[int], tuple[int, int], str]], world: int, other: int
) -> None:
    """Boxes of one and two split dimensions, also uneven, empty ones, scalars, and any new world size."""
    folder = tmp_path / uuid.uuid4().hex
    arrays, layouts = {}, [[] for _ in range(world * world)]  # type: ignore[var-annotated]
    for number, (shape, dims, dtype) in enumerate(tensors):
        count = int(np.prod(shape, dtype=int))
        content = np.arange(1, count * numpy_dtype(dtype).itemsize + 1).astype(np.uint8)
        content &= 1 if dtype == "bool" else 0x7F
        name = f"t{number}"
        arrays[name] = content.view(numpy_dtype(dtype)).reshape(shape)
        for rank, boxes in enumerate(split(shape, dims, world)):
            layouts[rank].append(Layout(name, dtype, tuple(shape), boxes))
    write_checkpoint(folder / "in", arrays, layouts)
    reshard(folder / "in", folder / "out", other)
    found = shardckpt.open(folder / "out")
    assert found.manifest.world_size == other
    for url in (folder / "in", folder / "out"):
        merge(url, folder / "out.safetensors", overwrite=True)
        merge(url, folder / "out.pt", overwrite=True)
        merged = safetensors.torch.load_file(folder / "out.safetensors")
        state = torch.load(folder / "out.pt", weights_only=True)
        for name, array in arrays.items():
            for tensor in (merged[name], state[name]):
                assert tuple(tensor.shape) == array.shape
                assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    for name, array in arrays.items():
        assert found.read(name).tobytes() == array.tobytes()
        if array.ndim and array.size:  # as fully_shard splits, row after row
            rows = -(-array.shape[0] // other)
            assert found.tensors[name].arrays[0].chunk == (rows, *array.shape[1:])


@pytest.mark.parametrize(
    "work",
    [
        "merge(source, target + '.safetensors')",
        "merge(source, target + '.pt')",
        "reshard(source, target, 3)",
    ],
)
def test_memory_is_bounded_by_the_largest_tensor(big: str, tmp_path: Path, work: str) -> None:
    """A checkpoint of 240 MiB in tensors of 24 MiB takes less than half of it."""
    code = f"""
        import resource, sys
        source, target = sys.argv[1:]
        from shardckpt.interop.export import merge
        from shardckpt.interop.reshard import reshard
        import shardckpt.interop.formats.torch_pickle
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        {work}
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), big, str(tmp_path / "out")]
    kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert kib < 110 << 10
