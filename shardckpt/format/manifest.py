"""The records of a checkpoint: the manifest, whose presence is the commit, and each rank's part.

Both are strict JSON with a checksum: unknown keys, types and versions are refused. `docs/format.md`
describes every field.
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
    "FORMAT",
    "MANIFEST",
    "MAX_DIMENSIONS",
    "NAME",
    "REFS",
    "ArrayEntry",
    "Chunks",
    "Head",
    "Manifest",
    "Pack",
    "Part",
    "TensorEntry",
    "Version",
    "attempt_and_step",
    "pack_path",
    "part_path",
    "shape_problem",
    "tied_names",
]

MANIFEST = "manifest.json"
REFS = "refs.json"
MAX_DIMENSIONS = 64
"""Of a tensor: NumPy has no more."""


_RUN_CHECKPOINT = re.compile(r"(?:\A|/)attempt-([0-9]+)(?:-[0-9a-f]+)?/step-([0-9]+)\Z")

_SEGMENT = r"(?!__|(?:zarr\.json|\.+)(?:/|\Z))[ -.0-\[\]-~]+"
NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,127}}")
"""A tensor's: what Zarr allows, in ASCII; of more segments than values are deep."""

_MAX_BYTES = (1 << 63) - 1
"""Of a tensor: NumPy counts them in 63 bits, and leaves out dimensions of size 0."""


class ArrayEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One Zarr array: the part of a tensor at `offset` with `shape`, in chunks of shape `chunk`.

    A chunk at the far edge of the array is stored whole; what lies outside the array is zero.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Where the array lies in its tensor."""
        return Box(self.offset, self.shape)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks in each dimension; has a 0 for an array without elements."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def cells(self) -> Iterator[Box]:
        """The box of each chunk in the tensor's coordinates, clipped to the array, in C order."""
        return self.box.cells(self.chunk)

    def cell(self, number: int) -> Box:
        """The box of one chunk, as `cells` has it, by its number."""
        index = [int(i) for i in np.unravel_index(number, self.grid)] if self.shape else []
        starts = [i * c for i, c in zip(index, self.chunk, strict=True)]
        return Box(
            tuple(o + i for o, i in zip(self.offset, starts, strict=True)),
            tuple(min(c, n - i) for c, n, i in zip(self.chunk, self.shape, starts, strict=True)),
        )


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: global shape, element type, and the arrays that make it up.

    One array that covers the tensor is stored as a Zarr array under the tensor's name. Otherwise the
    tensor is a Zarr group, and array number i is named `box-i` in it.
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
        """Whether the tensor is one Zarr array, and not a group of boxes."""
        return len(self.arrays) == 1 and self.arrays[0].box == Box.whole(self.shape)


class Pack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of chunks: its path relative to the manifest's folder, and its size in bytes."""

    path: str
    size: int


class Chunks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chunk table, as columns. Row order: tensors, their arrays, their cells in C order."""

    pack: list[int]
    offset: list[int]
    crc32c: list[int]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """One checkpoint. It exists if and only if this record does."""

    format: str = FORMAT
    id: str
    step: int
    attempt: int
    world_size: int
    created: float
    writer: str
    metrics: dict[str, float | str]
    values: Any
    per_rank: list[dict[str, Any]]
    packs: tuple[Pack, ...]
    tensors: tuple[TensorEntry, ...]
    chunks: Chunks

    @property
    def metric_values(self) -> dict[str, float]:
        """The metrics as floats; JSON has those that are not finite as text."""
        return {name: float(value) for name, value in self.metrics.items()}

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


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a list of checkpoints needs of a manifest, whose tables are passed over."""

    step: int
    attempt: int
    world_size: int
    created: float
    metrics: dict[str, float | str]
    packs: tuple[Pack, ...]

    @property
    def metric_values(self) -> dict[str, float]:
        """The metrics as floats; JSON has those that are not finite as text."""
        return {name: float(value) for name, value in self.metrics.items()}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank wrote: which rows of the chunk table, where, and with which checksums."""

    format: str = FORMAT
    id: str
    rank: int
    size: int
    chunk: list[int]
    offset: list[int]
    crc32c: list[int]
    values: dict[str, Any]


def shape_problem(dtype: str, shape: Sequence[int]) -> str | None:
    """Why the format has no tensor of this type and shape: more than NumPy can describe; None if it has."""
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, and the most are {MAX_DIMENSIONS}, as in NumPy"
    if any(n < 0 for n in shape) or math.prod(filter(None, shape)) * itemsize(dtype) > _MAX_BYTES:
        return f"has the shape {tuple(shape)}, whose bytes are no number below 2^63"
    return None


def tied_names(manifest: Manifest) -> dict[str, str]:
    """Tensors that are stored as another one's chunks, by name: the first of those with the same ones."""
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
        chunks = tuple(rows.pack[start:stop]), tuple(rows.offset[start:stop])
        name = seen.setdefault((tensor.dtype, tensor.shape, tensor.arrays, chunks), tensor.name)
        if name != tensor.name:
            tied[tensor.name] = name
    return tied


def attempt_and_step(url: str) -> tuple[int, int] | None:
    """Of which attempt and step a checkpoint is that lies at this URL in a run; None if it lies alone."""
    folder = _RUN_CHECKPOINT.search(url.rstrip("/"))
    return (int(folder[1]), int(folder[2])) if folder else None


def pack_path(rank: int) -> str:
    """Where `rank` writes its chunks, relative to the checkpoint."""
    return f"rank-{rank:05d}/data.pack"


def part_path(rank: int) -> str:
    """Where `rank` records what it wrote, relative to the checkpoint."""
    return f"rank-{rank:05d}/part.json"


class Version(msgspec.Struct):
    format: str
