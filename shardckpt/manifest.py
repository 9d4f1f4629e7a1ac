"""The records of a checkpoint: the manifest, whose presence is the commit, and each rank's part.

Both are strict JSON: unknown keys, types and versions are refused. `docs/format.md` describes every field.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt.box import Box, tiles
from shardckpt.dtypes import DTYPES, itemsize
from shardckpt.errors import FormatError, UnknownVersionError

__all__ = [
    "CRC_BYTES",
    "FORMAT",
    "MANIFEST",
    "REFS",
    "Array",
    "Chunks",
    "Manifest",
    "Pack",
    "Part",
    "Tensor",
    "chunk_bytes",
    "decode_checked",
    "decode_manifest",
    "decode_part",
    "encode_record",
    "pack_path",
    "part_path",
]

FORMAT = "shardckpt/1"
MANIFEST = "manifest.json"
REFS = "refs.json"
CRC_BYTES = 4
"""Every chunk is followed by the little-endian CRC-32C of its bytes."""

_RUN_CHECKPOINT = re.compile(r"(\A|/)attempt-\d+(-[0-9a-f]+)?/step-\d+\Z")


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: global shape, element type, and the arrays that make it up.

    One array that covers the tensor is stored as a Zarr array under the tensor's name. Otherwise the
    tensor is a Zarr group, and array number i is named `box-i` in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: tuple[Array, ...]

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


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
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
    tensors: tuple[Tensor, ...]
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

    def first_chunks(self) -> npt.NDArray[np.int64]:
        """For each array of each tensor, the number of its first row in the chunk table."""
        counts = [math.prod(a.grid) for tensor in self.tensors for a in tensor.arrays]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


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


def chunk_bytes(dtype: str, chunk: Sequence[int]) -> int:
    """Bytes that a chunk takes in its pack, its checksum included."""
    return math.prod(chunk) * itemsize(dtype) + CRC_BYTES


def pack_path(rank: int) -> str:
    """Where `rank` writes its chunks, relative to the checkpoint."""
    return f"rank-{rank:05d}/data.pack"


def part_path(rank: int) -> str:
    """Where `rank` records what it wrote, relative to the checkpoint."""
    return f"rank-{rank:05d}/part.json"


def encode_record(record: Manifest | Part) -> bytes:
    """The record as JSON in UTF-8."""
    return msgspec.json.encode(record)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, checked so far that reading by it is safe.

    `where` is its checkpoint's URL, for messages and to know how far up a pack's path may lead. Raises
    FormatError: not JSON, a newer version, a path that leaves the run, a tensor whose arrays do not tile
    it, a chunk outside its pack or over another one.
    """
    manifest = _decode(data, Manifest, where, MANIFEST)
    _check_head(manifest, where)
    _check_packs(manifest, where)
    _check_names(manifest, where)
    for tensor in manifest.tensors:
        _check_tensor(tensor, where)
    _check_chunks(manifest, where)
    return manifest


def decode_checked(data: bytes) -> Manifest:
    """The manifest that another process of this job has checked."""
    return msgspec.json.decode(data, type=Manifest)


def decode_part(data: bytes, where: str) -> Part:
    """The part in `data`. Raises FormatError."""
    part = _decode(data, Part, where, "part.json")
    if not len(part.chunk) == len(part.offset) == len(part.crc32c):
        raise FormatError(f"{where}: part.json has chunk columns of different lengths")
    if min(part.rank, part.size, *part.chunk, *part.offset, *part.crc32c) < 0 or any(
        crc >= 1 << 32 for crc in part.crc32c
    ):
        raise FormatError(f"{where}: part.json is invalid: a number is out of range")
    return part


class _Version(msgspec.Struct):
    format: str


_Record = TypeVar("_Record", Manifest, Part)


def _decode(data: bytes, kind: type[_Record], where: str, file: str) -> _Record:
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise UnknownVersionError(
                f"{where}: {file} has format {version!r}, and this version reads {FORMAT!r} only; "
                "read it with the shardckpt that wrote it, or a newer one"
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: {file} is not a valid {FORMAT} record: {error}") from error


def _check_head(manifest: Manifest, where: str) -> None:
    """Counts are counts, each rank has its values, and metrics are numbers."""
    wrong = f"{where}: the manifest is invalid:"
    if manifest.step < 0 or manifest.attempt < 0 or manifest.world_size < 1:
        raise FormatError(
            f"{wrong} it has step {manifest.step}, attempt {manifest.attempt}, world size {manifest.world_size}"
        )
    if len(manifest.per_rank) != manifest.world_size:
        raise FormatError(
            f"{wrong} it has the values of {len(manifest.per_rank)} ranks of {manifest.world_size}"
        )
    for name, value in manifest.metrics.items():
        if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
            raise FormatError(f"{wrong} its metric {name!r} is {value!r}, which is not a number")


def _check_packs(manifest: Manifest, where: str) -> None:
    """Every pack lies in the run: below the manifest's folder, or below its run's."""
    here = "attempt/step" if _RUN_CHECKPOINT.search(where.rstrip("/")) else "."
    for pack in manifest.packs:
        path = posixpath.normpath(posixpath.join(here, pack.path))
        outside = path.startswith(("/", "..")) or "\0" in path or "\\" in path
        if (
            outside
            or posixpath.basename(pack.path) in ("", ".", "..")
            or posixpath.normpath(pack.path) != pack.path
        ):
            raise FormatError(
                f"{where}: the manifest names the pack {pack.path!r}, which is not a plain path inside "
                "this run; do not trust where this checkpoint comes from"
            )
        if pack.size < 0:
            raise FormatError(f"{where}: pack {pack.path!r} has the size {pack.size}")


def _check_names(manifest: Manifest, where: str) -> None:
    """Every tensor has a legal Zarr name of its own, and none lies inside another."""
    names = {tensor.name for tensor in manifest.tensors}
    if len(names) < len(manifest.tensors):
        twice = next(name for name, n in Counter(t.name for t in manifest.tensors).items() if n > 1)
        raise FormatError(f"{where}: the manifest lists tensor {twice!r} twice")
    folders = set()
    for name in names:
        if not all(map(_is_segment, name.split("/"))):
            raise FormatError(f"{where}: the manifest is invalid: {name!r} cannot be a tensor's name")
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    if inside := sorted(names & folders):
        raise FormatError(f"{where}: the manifest is invalid: a tensor lies inside tensor {inside[0]!r}")


def _is_segment(text: str) -> bool:
    return (
        text.strip(".") != ""
        and text != "zarr.json"
        and not text.startswith("__")
        and text.isprintable()
        and "\\" not in text
    )


def _check_tensor(tensor: Tensor, where: str) -> None:
    """Known type, and arrays that tile the tensor: all of it, no element twice."""
    wrong = f"{where}: the manifest is invalid: tensor {tensor.name!r}"
    if tensor.dtype not in DTYPES:
        raise FormatError(f"{wrong} has the type {tensor.dtype!r}, which this version does not know")
    if any(n < 0 for n in tensor.shape) or math.prod(filter(None, tensor.shape)) >= 1 << 63:
        raise FormatError(f"{wrong} has the shape {tensor.shape}")
    for array in tensor.arrays:
        if not array.box.inside(tensor.shape):
            raise FormatError(
                f"{wrong} of shape {tensor.shape} has a box at {array.offset} of shape {array.shape}, "
                "which is not inside it"
            )
        if len(array.chunk) != len(array.shape) or not all(
            1 <= c <= max(n, 1) for c, n in zip(array.chunk, array.shape, strict=True)
        ):
            raise FormatError(f"{wrong} has the chunk shape {array.chunk} for {array.shape}")
    if not tiles(tensor.shape, [array.box for array in tensor.arrays]):
        raise FormatError(f"{wrong} of shape {tensor.shape} is not tiled exactly by its boxes")


def _check_chunks(manifest: Manifest, where: str) -> None:
    """The table has a row for each cell, every row lies in its pack, and no two overlap in part."""
    wrong = f"{where}: the manifest is invalid:"
    counts, lengths = [], []
    for tensor in manifest.tensors:
        for array in tensor.arrays:
            counts.append(math.prod(array.grid))
            lengths.append(chunk_bytes(tensor.dtype, array.chunk))
    rows = manifest.chunks
    if not sum(counts) == len(rows.pack) == len(rows.offset) == len(rows.crc32c):
        raise FormatError(
            f"{wrong} its tensors have {sum(counts)} chunks, its chunk table has "
            f"{len(rows.pack)} packs, {len(rows.offset)} offsets and {len(rows.crc32c)} checksums"
        )
    if not rows.pack:
        return
    try:
        length = np.repeat(np.array(lengths, dtype=np.int64), counts)
        pack = np.array(rows.pack, dtype=np.int64)
        offset = np.array(rows.offset, dtype=np.int64)
        crc = np.array(rows.crc32c, dtype=np.int64)
        sizes = np.array([p.size for p in manifest.packs], dtype=np.int64)
    except OverflowError as error:
        raise FormatError(f"{wrong} a number is out of range") from error
    if pack.min() < 0 or pack.max() >= len(sizes) or crc.min() < 0 or crc.max() >= 1 << 32:
        raise FormatError(f"{wrong} its chunk table has a pack number or checksum out of range")
    if offset.min() < 0 or bool(np.any(offset > sizes[pack] - length)):
        row = int(np.argmax((offset < 0) | (offset > sizes[pack] - length)))
        raise FormatError(
            f"{wrong} chunk {row} lies at byte {offset[row]} of pack "
            f"{manifest.packs[pack[row]].path!r}, which has {sizes[pack[row]]} bytes"
        )
    order = np.lexsort((length, offset, pack))
    pack, offset, length = pack[order], offset[order], length[order]
    same_pack = pack[1:] == pack[:-1]
    shared = (offset[1:] == offset[:-1]) & (length[1:] == length[:-1])
    if bool(np.any(same_pack & ~shared & (offset[1:] < offset[:-1] + length[:-1]))):
        raise FormatError(f"{wrong} two of its chunks overlap in a pack")
