"""The records of a checkpoint: the manifest, whose presence is the commit, and each rank's part.

Both are strict JSON with a checksum: unknown keys, types and versions are refused. `docs/format.md`
describes every field.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt import records
from shardckpt.box import Box, tiles
from shardckpt.dtypes import DTYPES, itemsize
from shardckpt.errors import FormatError, UnknownVersionError
from shardckpt.records import FORMAT
from shardckpt.values import PerRankRef, decode, iter_references

__all__ = [
    "CRC_BYTES",
    "FORMAT",
    "MANIFEST",
    "REFS",
    "Array",
    "Chunks",
    "Head",
    "Manifest",
    "Pack",
    "Part",
    "Tensor",
    "attempt_and_step",
    "chunk_bytes",
    "decode_checked",
    "decode_head",
    "decode_manifest",
    "decode_part",
    "encode_record",
    "pack_path",
    "part_path",
    "shape_problem",
    "tied_names",
]

MANIFEST = "manifest.json"
REFS = "refs.json"
_MAX_DIMENSIONS = 64
"""Of a tensor: NumPy has no more."""

CRC_BYTES = 4
"""Every chunk is followed by the little-endian CRC-32C of its bytes."""

_RUN_CHECKPOINT = re.compile(r"(?:\A|/)attempt-([0-9]+)(?:-[0-9a-f]+)?/step-([0-9]+)\Z")

_SEGMENT = r"(?!__|(?:zarr\.json|\.+)(?:/|\Z))[ -.0-\[\]-~]+"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,127}}")
"""A tensor's: what Zarr allows, in ASCII; of more segments than values are deep."""

_MAX_BYTES = (1 << 63) - 1
"""Of a tensor: NumPy counts them in 63 bits, and leaves out dimensions of size 0."""


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

    def cell(self, number: int) -> Box:
        """The box of one chunk, as `cells` has it, by its number."""
        index = [int(i) for i in np.unravel_index(number, self.grid)] if self.shape else []
        starts = [i * c for i, c in zip(index, self.chunk, strict=True)]
        return Box(
            tuple(o + i for o, i in zip(self.offset, starts, strict=True)),
            tuple(min(c, n - i) for c, n, i in zip(self.chunk, self.shape, starts, strict=True)),
        )


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
        """For each array of each tensor, the number of its first row in the chunk table. Not to be changed."""
        return self._first_chunks

    @cached_property
    def _first_chunks(self) -> npt.NDArray[np.int64]:
        counts = [math.prod(a.grid) for tensor in self.tensors for a in tensor.arrays]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def arrays(self) -> list[tuple[Tensor, Array]]:
        """Every array of every tensor, with its tensor: as many as `first_chunks` tells of."""
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


def chunk_bytes(dtype: str, chunk: Sequence[int]) -> int:
    """Bytes that a chunk takes in its pack, its checksum included."""
    return math.prod(chunk) * itemsize(dtype) + CRC_BYTES


def shape_problem(dtype: str, shape: Sequence[int]) -> str | None:
    """Why the format has no tensor of this type and shape: more than NumPy can describe; None if it has."""
    if len(shape) > _MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, and the most are {_MAX_DIMENSIONS}, as in NumPy"
    if any(n < 0 for n in shape) or math.prod(filter(None, shape)) * itemsize(dtype) > _MAX_BYTES:
        return f"has the shape {tuple(shape)}, whose bytes are no number below 2^63"
    return None


def tied_names(manifest: Manifest) -> dict[str, str]:
    """Tensors that are stored as another one's chunks, by name: the first of those with the same ones."""
    first = manifest.first_chunks().tolist()
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


def encode_record(record: Manifest | Part) -> bytes:
    """The record as it is stored: JSON in UTF-8, with its checksum."""
    return records.encode(record)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, checked so far that reading by it is safe.

    `where` is its checkpoint's URL, for messages, to know how far up a pack's path may lead, and which attempt
    and step it must be of. Raises FormatError: damaged, not JSON, a newer version, a path that leaves the
    run, a tensor whose arrays do not tile it or that the values do not name once, a chunk outside its
    pack or over another one.
    """
    manifest = _decode(data, Manifest, where, MANIFEST)
    _check_head(manifest, where)
    _check_packs(manifest, where)
    _check_names(manifest, where)
    alike = {(tensor.dtype, tensor.shape, tensor.arrays): tensor for tensor in manifest.tensors}
    for tensor in alike.values():  # the layers of a model are
        _check_tensor(tensor, where)
    _check_chunks(manifest, where)
    _check_values(manifest, where)
    return manifest


def decode_head(data: bytes, where: str) -> Head:
    """The head of the manifest in `data`, whose checksum is right, and of which nothing else is checked.

    Raises FormatError.
    """
    head = _decode(data, Head, where, MANIFEST)
    _check_head(head, where)
    _check_packs(head, where)
    return head


def decode_checked(data: bytes) -> Manifest:
    """The manifest that another process of this job has checked."""
    return msgspec.json.decode(records.open_sealed(data, MANIFEST), type=Manifest)


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


_Record = TypeVar("_Record", Manifest, Head, Part)


def _decode(data: bytes, kind: type[_Record], where: str, file: str) -> _Record:
    try:
        document = records.open_sealed(data, file)
    except FormatError as error:
        # Damage does not take the checksum off and leave good JSON: that is a version that has none.
        if (version := _version_without_checksum(data)) is not None:
            _check_version(version, where, file)
        raise FormatError(f"{where}: {error}") from error
    try:
        _check_version(msgspec.json.decode(document, type=_Version).format, where, file)
        records.check_keys(document)
        return msgspec.json.decode(document, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {file} is not a valid {FORMAT} record: {error}") from error


def _check_version(version: str, where: str, file: str) -> None:
    if version != FORMAT:
        raise UnknownVersionError(
            f"{where}: {file} has format {version[:80]!r}, and this version reads {FORMAT!r} only; "
            "read it with the shardckpt that wrote it, or a newer one"
        )


def _version_without_checksum(data: bytes) -> str | None:
    if b'"crc32c":"' in data[-32:]:
        return None
    try:
        return msgspec.json.decode(data, type=_Version).format
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _check_head(manifest: Manifest | Head, where: str) -> None:
    """Counts are counts, the folder is of this step, and metrics are numbers."""
    wrong = f"{where}: the manifest is invalid:"
    if (
        not 0 <= manifest.step < 1 << 63
        or not 0 <= manifest.attempt < 1 << 63
        or not 1 <= manifest.world_size < 1 << 63
    ):
        raise FormatError(
            f"{wrong} it has step {manifest.step}, attempt {manifest.attempt}, world size {manifest.world_size}"
        )
    folder = attempt_and_step(where)
    if folder is not None and folder != (manifest.attempt, manifest.step):
        raise FormatError(
            f"{wrong} it is of attempt {manifest.attempt}, step {manifest.step}, and lies in the folder of "
            f"attempt {folder[0]}, step {folder[1]}. Move it back, or into a folder of another name"
        )
    for name, value in manifest.metrics.items():
        if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
            raise FormatError(f"{wrong} its metric {name[:80]!r} is {value[:80]!r}, which is not a number")


def _check_packs(manifest: Manifest | Head, where: str) -> None:
    """Every pack lies in the run: below the manifest's folder, or below its run's; and is named once."""
    here = "/".join(where.rstrip("/").split("/")[-2:]) if attempt_and_step(where) else "."
    seen = set()
    for pack in manifest.packs:
        path = posixpath.normpath(posixpath.join(here, pack.path))
        outside = path.startswith(("/", "..")) or "\0" in path or "\\" in path
        if (
            outside
            or posixpath.basename(pack.path) in ("", ".", "..")
            or posixpath.normpath(pack.path) != pack.path
        ):
            raise FormatError(
                f"{where}: the manifest names the pack {pack.path[:200]!r}, which is not a plain path inside "
                "this run; do not trust where this checkpoint comes from"
            )
        if path in seen:
            raise FormatError(f"{where}: the manifest names the pack {pack.path[:200]!r} twice")
        seen.add(path)
        if pack.size < 0:
            raise FormatError(f"{where}: pack {pack.path[:200]!r} has the size {pack.size}")


def _check_names(manifest: Manifest, where: str) -> None:
    """Every tensor has a legal Zarr name of its own, and none lies inside another."""
    names = {tensor.name for tensor in manifest.tensors}
    if len(names) < len(manifest.tensors):
        twice = Counter(tensor.name for tensor in manifest.tensors).most_common(1)[0][0]
        raise FormatError(f"{where}: the manifest lists tensor {twice[:200]!r} twice")
    folders = set()
    for name in names:
        if not _NAME.fullmatch(name):
            raise FormatError(f"{where}: the manifest is invalid: {name[:200]!r} cannot be a tensor's name")
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    if inside := sorted(names & folders):
        raise FormatError(
            f"{where}: the manifest is invalid: a tensor lies inside tensor {inside[0][:200]!r}"
        )


def _check_tensor(tensor: Tensor, where: str) -> None:
    """Known type, and arrays that tile the tensor: all of it, no element twice."""
    wrong = f"{where}: the manifest is invalid: tensor {tensor.name[:200]!r}"
    if tensor.dtype not in DTYPES:
        raise FormatError(f"{wrong} has the type {tensor.dtype[:80]!r}, which this version does not know")
    if problem := shape_problem(tensor.dtype, tensor.shape):
        raise FormatError(f"{wrong} {problem}")
    for array in tensor.arrays:
        if not array.box.inside(tensor.shape):
            raise FormatError(
                f"{wrong} of shape {tensor.shape} has a box at {_shown(array.offset)} of shape "
                f"{_shown(array.shape)}, which is not inside it"
            )
        if len(array.chunk) != len(array.shape) or not all(
            1 <= c <= max(n, 1) for c, n in zip(array.chunk, array.shape, strict=True)
        ):
            raise FormatError(f"{wrong} has the chunk shape {_shown(array.chunk)} for {array.shape}")
    if tensor.is_array:
        return
    if not tiles(tensor.shape, [array.box for array in tensor.arrays]):
        raise FormatError(f"{wrong} of shape {tensor.shape} is not tiled exactly by its boxes")


def _shown(numbers: Sequence[int]) -> str:
    """The numbers, of which a forged record may have any number."""
    return str(tuple(numbers)) if len(numbers) <= _MAX_DIMENSIONS else f"{len(numbers)} dimensions"


def _check_chunks(manifest: Manifest, where: str) -> None:
    """The table has a row for each cell, every row lies in its pack, and no two overlap but tied tensors'."""
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
    try:
        length = np.repeat(np.array(lengths, dtype=np.int64), counts)
        pack = np.array(rows.pack, dtype=np.int64)
        offset = np.array(rows.offset, dtype=np.int64)
        crc = np.array(rows.crc32c, dtype=np.int64)
        sizes = np.array([p.size for p in manifest.packs], dtype=np.int64)
    except OverflowError as error:
        raise FormatError(f"{wrong} a number is out of range") from error
    if not rows.pack:
        return
    if pack.min() < 0 or pack.max() >= len(sizes) or crc.min() < 0 or crc.max() >= 1 << 32:
        raise FormatError(f"{wrong} its chunk table has a pack number or checksum out of range")
    if offset.min() < 0 or bool(np.any(offset > sizes[pack] - length)):
        row = int(np.argmax((offset < 0) | (offset > sizes[pack] - length)))
        raise FormatError(
            f"{wrong} chunk {row} lies at byte {offset[row]} of pack "
            f"{manifest.packs[pack[row]].path[:200]!r}, which has {sizes[pack[row]]} bytes"
        )
    if not _overlap(pack, offset, length):
        return
    tied = tied_names(manifest)
    of_array = [tensor.name not in tied for tensor in manifest.tensors for _ in tensor.arrays]
    own = np.repeat(np.array(of_array, dtype=np.bool_), counts)
    if _overlap(pack[own], offset[own], length[own]):
        raise FormatError(f"{wrong} two of its chunks overlap in a pack")


def _overlap(
    pack: npt.NDArray[np.int64], offset: npt.NDArray[np.int64], length: npt.NDArray[np.int64]
) -> bool:
    order = np.lexsort((offset, pack))
    pack, offset, length = pack[order], offset[order], length[order]
    return bool(np.any((pack[1:] == pack[:-1]) & (offset[1:] < offset[:-1] + length[:-1])))


def _check_values(manifest: Manifest, where: str) -> None:
    """The values are a dict that can be decoded, and refer to each tensor and per-rank value once."""
    wrong = f"{where}: the manifest is invalid:"
    unnamed = {tensor.name for tensor in manifest.tensors}
    paths: set[str] = set()

    def refer(value: Any, *, of_rank: bool) -> None:
        try:
            found = decode(value)
        except FormatError as error:
            raise FormatError(f"{wrong} {error}") from error
        for reference in iter_references(found):
            if isinstance(reference, PerRankRef):
                if of_rank or reference.path in paths:
                    how = "inside another one" if of_rank else "twice"
                    raise FormatError(
                        f"{wrong} its values have the per-rank value {reference.path[:200]!r} {how}"
                    )
                paths.add(reference.path)
            elif reference.name in unnamed:
                unnamed.remove(reference.name)
            else:
                raise FormatError(
                    f"{wrong} its values name the tensor {reference.name[:200]!r} twice, or it has none of "
                    "this name"
                )

    if len(manifest.per_rank) != manifest.world_size:
        raise FormatError(
            f"{wrong} it has the values of {len(manifest.per_rank)} ranks of {manifest.world_size}"
        )
    if not isinstance(manifest.values, dict) or any(
        key.startswith("$") and key != "$dict" for key in manifest.values
    ):
        raise FormatError(f"{wrong} its values are not a dict with text keys")
    refer(manifest.values, of_rank=False)
    for rank, values in enumerate(manifest.per_rank):
        if unknown := values.keys() - paths:
            raise FormatError(
                f"{wrong} rank {rank} has a value at {min(unknown)[:200]!r}, where its values have none"
            )
        for value in values.values():
            refer(value, of_rank=True)
    if unnamed:
        raise FormatError(f"{wrong} no value of it is the tensor {min(unnamed)[:200]!r}")
