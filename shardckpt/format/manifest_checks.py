"""What must hold in a manifest, so that reading by it is safe whoever wrote it.

Each check raises FormatError, which begins with `where`, the checkpoint's URL, and names what does not hold.
"""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardckpt.errors import FormatError
from shardckpt.format.box import tiles
from shardckpt.format.chunks import chunk_bytes
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.manifest import (
    MAX_DIMENSIONS,
    Manifest,
    ManifestHead,
    Pack,
    TensorEntry,
    attempt_and_step,
    shape_problem,
    tied_names,
)
from shardckpt.format.names import TENSOR_NAME
from shardckpt.format.tree import PerRankRef, iter_references
from shardckpt.format.value_decoding import decode_value

__all__ = [
    "check_chunks",
    "check_head",
    "check_names",
    "check_packs",
    "check_tensor",
    "check_values",
]


def check_head(manifest: ManifestHead, where: str) -> None:
    """Step, attempt and world size are in range, the folder's name agrees with them, and metrics are numbers."""
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


def check_packs(packs: Sequence[Pack], where: str) -> None:
    """Every pack lies in the checkpoint's folder, or in its run, and is named once."""
    here = "/".join(where.rstrip("/").split("/")[-2:]) if attempt_and_step(where) else "."
    seen = set()
    for pack in packs:
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


def check_names(manifest: Manifest, where: str) -> None:
    """Every tensor has a legal Zarr name of its own, and none lies inside another."""
    names = {tensor.name for tensor in manifest.tensors}
    if len(names) < len(manifest.tensors):
        twice = Counter(tensor.name for tensor in manifest.tensors).most_common(1)[0][0]
        raise FormatError(f"{where}: the manifest lists tensor {twice[:200]!r} twice")
    folders = set()
    for name in names:
        if not TENSOR_NAME.fullmatch(name):
            raise FormatError(f"{where}: the manifest is invalid: {name[:200]!r} cannot be a tensor's name")
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    if inside := sorted(names & folders):
        raise FormatError(
            f"{where}: the manifest is invalid: a tensor lies inside tensor {inside[0][:200]!r}"
        )


def check_tensor(tensor: TensorEntry, where: str) -> None:
    """The type is known, the arrays lie inside the tensor, and each element is in one of them."""
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
    """The numbers as text; their count only where a forged record has too many."""
    return str(tuple(numbers)) if len(numbers) <= MAX_DIMENSIONS else f"{len(numbers)} dimensions"


def check_chunks(manifest: Manifest, where: str) -> None:
    """The table has a row for each cell, chunks lie inside their packs, and overlap for tied tensors only."""
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
        sizes = np.array([p.size for p in manifest.packs], dtype=np.int64)
    except OverflowError as error:
        raise FormatError(f"{wrong} a number is out of range") from error
    pack, offset, crc = rows.pack, rows.offset, rows.crc32c
    if not len(pack):
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


def check_values(manifest: Manifest, where: str) -> None:
    """The values are a dict that can be decoded, and refer to each tensor and each per-rank value once."""
    wrong = f"{where}: the manifest is invalid:"
    unnamed = {tensor.name for tensor in manifest.tensors}
    paths: set[str] = set()

    def refer(value: Any, *, of_rank: bool) -> None:
        try:
            found = decode_value(value)
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
