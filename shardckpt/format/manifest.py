"""The records of a checkpoint: the manifest, whose presence is the commit, and the parts of its writers.

Both are strict JSON with a checksum (`shardckpt.format.records`): unknown keys, types and versions are refused.
docs/format.md describes every field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt.format.box import Box
from shardckpt.format.dtypes import itemsize
from shardckpt.format.records import FORMAT

__all__ = [
    "MANIFEST",
    "MAX_DIMENSIONS",
    "REFS",
    "ArrayEntry",
    "Chunks",
    "Manifest",
    "ManifestHead",
    "ManifestSummary",
    "Pack",
    "Part",
    "TensorEntry",
    "WrittenPack",
    "attempt_and_step",
    "marked_rank",
    "marker_path",
    "pack_path",
    "part_path",
    "parts_folder",
    "parts_of",
    "shape_problem",
    "tied_names",
]

MANIFEST = "manifest.json"
REFS = "refs.json"
MAX_DIMENSIONS = 64
"""Dimensions of a tensor: NumPy's limit."""

_RUN_CHECKPOINT = re.compile(r"(?:\A|/)attempt-([0-9]+)(?:-[0-9a-f]+)?/step-([0-9]+)\Z")

_PARTS = "parts-"
_MARKER = re.compile(r"rank-([0-9]{5,})\.failed\.json")

_MAX_BYTES = (1 << 63) - 1
"""Bytes of a tensor: NumPy counts them in 63 bits, leaving out dimensions of size 0."""


class ArrayEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One Zarr array: a part of a tensor, or all of it, cut into a regular grid of chunks.

    A chunk at the far edge is stored in full; its elements outside the array are zero.

    Attributes:
        offset: where the part begins in the tensor, by dimension.
        shape: the part's shape.
        chunk: the shape of a chunk.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The part of the tensor that the array holds."""
        return Box(self.offset, self.shape)

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each dimension; one of them is 0 for an array without elements."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def cells(self) -> Iterator[Box]:
        """The part of the tensor that each chunk holds, padding left out, in C order."""
        return self.box.cells(self.chunk)

    def cell(self, number: int) -> Box:
        """The part of the tensor that chunk `number` holds, counted in C order."""
        index = [int(i) for i in np.unravel_index(number, self.grid)] if self.shape else []
        starts = [i * c for i, c in zip(index, self.chunk, strict=True)]
        return Box(
            tuple(o + i for o, i in zip(self.offset, starts, strict=True)),
            tuple(min(c, n - i) for c, n, i in zip(self.chunk, self.shape, starts, strict=True)),
        )


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a checkpoint.

    One array that covers the tensor is a Zarr array under the tensor's name. Otherwise the tensor is a Zarr
    group, in which array number i is named `box-i`.

    Attributes:
        name: its path in the state.
        dtype: the name of its element type (`shardckpt.format.dtypes`).
        shape: its global shape.
        arrays: the arrays that make it up; no two have an element in common.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: tuple[ArrayEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def is_array(self) -> bool:
        """True if the tensor is one Zarr array, False if it is a group of boxes."""
        return len(self.arrays) == 1 and self.arrays[0].box == Box.whole(self.shape)


class Pack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of chunks: its path relative to the checkpoint's folder, and its size in bytes."""

    path: str
    size: int


class Chunks:
    """The chunk table, as columns. Its rows follow the tensors, their arrays, and the arrays' cells in C order.

    Args:
        pack: the number of the chunk's pack.
        offset: the chunk's first byte in the pack.
        crc32c: the CRC-32C of its elements, padding included.

    Raises OverflowError for a number of more than 63 bits.
    """

    __slots__ = ("crc32c", "offset", "pack")

    def __init__(self, pack: npt.ArrayLike, offset: npt.ArrayLike, crc32c: npt.ArrayLike) -> None:
        self.pack = np.asarray(pack, dtype=np.int64)
        self.offset = np.asarray(offset, dtype=np.int64)
        self.crc32c = np.asarray(crc32c, dtype=np.int64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chunks):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.pack)


class ManifestHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, without what is in it.

    Attributes:
        format: name and version of the format.
        id: 32 hexadecimal digits, drawn for the save.
        step: optimizer steps done when it was saved.
        attempt: the number of the attempt that saved it; 0 outside a run.
        world_size: ranks that saved it.
        created: seconds since the epoch.
        writer: name and version of the program.
        metrics: name -> number; those that JSON lacks are "nan", "inf" or "-inf".
    """

    format: str = FORMAT
    id: str
    step: int
    attempt: int
    world_size: int
    created: float
    writer: str
    metrics: dict[str, float | str]

    def head(self) -> dict[str, Any]:
        """These members, in this order, as JSON has them."""
        return {name: getattr(self, name) for name in ManifestHead.__struct_fields__}

    @property
    def metric_values(self) -> dict[str, float]:
        """The metrics as floats."""
        return {name: float(value) for name, value in self.metrics.items()}


class ManifestSummary(ManifestHead, frozen=True, kw_only=True):
    """What a list of checkpoints shows of a manifest, decoded without its tables."""

    packs: tuple[Pack, ...]


class Manifest(ManifestHead, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """One checkpoint. It exists if and only if this record does.

    Attributes:
        values: everything in the state that is not a tensor, in the JSON form of
            `shardckpt.format.value_encoding`.
        per_rank: by rank, path -> the form of the value that differs between ranks.
        packs: the files of chunks.
        tensors: in the order of the chunk table.
        chunks: the chunk table.
    """

    values: Any
    per_rank: list[dict[str, Any]]
    packs: tuple[Pack, ...]
    tensors: tuple[TensorEntry, ...]
    chunks: Chunks

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' elements."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packs."""
        return sum(pack.size for pack in self.packs)

    @cached_property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """The first row of each array in the chunk table, in the order of `arrays`, then the number of all rows.

        Read-only.
        """
        counts = [math.prod(a.grid) for tensor in self.tensors for a in tensor.arrays]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def arrays(self) -> list[tuple[TensorEntry, ArrayEntry]]:
        """Every array of every tensor, with its tensor, in the order of the chunk table."""
        return [(tensor, array) for tensor in self.tensors for array in tensor.arrays]


class WrittenPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank wrote.

    Attributes:
        rank: the rank.
        size: bytes of its pack.
        chunk: the rows of the chunk table that it wrote, in the order of its pack.
        offset: each chunk's first byte in the pack.
        crc32c: each chunk's checksum.
        values: path -> the form of this rank's own value.
    """

    rank: int
    size: int
    chunk: list[int]
    offset: list[int]
    crc32c: list[int]
    values: dict[str, Any]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one process wrote, for some or all ranks of its node.

    Attributes:
        id: the save's, as in the manifest.
        packs: one for each of these ranks; they are durable.
    """

    format: str = FORMAT
    id: str
    packs: list[WrittenPack]


def shape_problem(dtype: str, shape: Sequence[int]) -> str | None:
    """Why the format has no tensor of this type and shape: NumPy could not describe it. None if it has."""
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, and the most are {MAX_DIMENSIONS}, as in NumPy"
    if any(n < 0 for n in shape) or math.prod(filter(None, shape)) * itemsize(dtype) > _MAX_BYTES:
        return f"has the shape {tuple(shape)}, whose bytes are no number below 2^63"
    return None


def tied_names(manifest: Manifest) -> dict[str, str]:
    """Tied tensors: name -> the first tensor that is stored as the same chunks. That one itself is left out."""
    first = manifest.first_rows.tolist()
    rows = manifest.chunks
    seen: dict[object, str] = {}
    tied: dict[str, str] = {}
    number = 0
    for tensor in manifest.tensors:
        start, stop = first[number], first[number + len(tensor.arrays)]
        number += len(tensor.arrays)
        if start == stop:
            continue
        chunks = rows.pack[start:stop].tobytes(), rows.offset[start:stop].tobytes()
        name = seen.setdefault((tensor.dtype, tensor.shape, tensor.arrays, chunks), tensor.name)
        if name != tensor.name:
            tied[tensor.name] = name
    return tied


def attempt_and_step(url: str) -> tuple[int, int] | None:
    """(attempt, step) of the checkpoint at this URL by its folders' names; None if it is in no run."""
    folder = _RUN_CHECKPOINT.search(url.rstrip("/"))
    return (int(folder[1]), int(folder[2])) if folder else None


def pack_path(rank: int) -> str:
    """The path of a rank's pack, relative to the checkpoint."""
    return f"rank-{rank:05d}/data.pack"


def parts_folder(save_id: str) -> str:
    """The folder of a save's parts and of its ranks' failure markers, relative to the checkpoint."""
    return f"{_PARTS}{save_id}"


def parts_of(folder: str) -> str | None:
    """The id of the save whose parts are in this folder of a checkpoint; None for other folders."""
    return folder.removeprefix(_PARTS) if folder.startswith(_PARTS) else None


def part_path(save_id: str, rank: int) -> str:
    """The path of a part, relative to the checkpoint; `rank` is the lowest of those that it covers."""
    return f"{parts_folder(save_id)}/rank-{rank:05d}.json"


def marker_path(save_id: str, rank: int) -> str:
    """The path of the marker that a rank's pack will not come, relative to the checkpoint."""
    return f"{parts_folder(save_id)}/rank-{rank:05d}.failed.json"


def marked_rank(name: str) -> int | None:
    """The rank of which this file in a folder of parts is the failure marker; None if it is none."""
    found = _MARKER.fullmatch(name)
    return int(found[1]) if found else None
