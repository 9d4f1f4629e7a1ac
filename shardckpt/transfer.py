"""Copy checkpoints between storages, verified on the way."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import crc32c
import msgspec
import numpy as np

from shardckpt.errors import CheckpointExistsError, CorruptError
from shardckpt.manifest import MANIFEST, REFS, Manifest, Pack, chunk_bytes, encode_record, pack_path
from shardckpt.runs import Place, attempt_for, exact_place, find_place, read_manifest
from shardckpt.storage import LocalStorage, Storage, open_storage
from shardckpt.zarr_view import encode_refs

__all__ = ["copy"]

_PIECE = 16 << 20


def copy(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    *,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Copy a checkpoint to the URL `target`, or of a run its newest good one into the run `target`.

    Every chunk is verified, and the copy exists only once it is whole: its manifest is written last. A run
    keeps the attempt and step in its folders' names, so that training can resume from either side.
    `progress` is called with the bytes done and the bytes in all. Returns the copy's URL.

    Raises NotACheckpointError, CorruptError, CheckpointExistsError, StorageError; then there is no copy.
    """
    place = find_place(source, source_options)
    named = exact_place(source, source_options)
    into = open_storage(target, target_options)
    # A checkpoint that was found by its run keeps its path; one that was named itself is put right there.
    copied = Place(into) if place.path == named.path else Place(into, place.path)
    manifest = read_manifest(place)
    if copied.is_committed():
        raise CheckpointExistsError(f"{copied.url} has a checkpoint already, which is never overwritten")
    attempt = attempt_for(copied.url, manifest.step)
    checks = _chunks_by_pack(manifest)
    done = 0
    for number, pack in enumerate(manifest.packs):
        with _mapped(place, pack) as content:
            _verify(content, checks[number], f"{place.url}: pack {pack.path}")
            copied.storage.write_pack(pack_path(number), content)
        done += pack.size
        if progress is not None:
            progress(done, manifest.stored_bytes)
    packs = tuple(Pack(pack_path(number), pack.size) for number, pack in enumerate(manifest.packs))
    attempt = manifest.attempt if attempt is None else attempt
    manifest = msgspec.structs.replace(manifest, packs=packs, attempt=attempt)
    copied.storage.write(REFS, encode_refs(manifest, copied.url))
    try:
        copied.storage.create(MANIFEST, encode_record(manifest))
    except FileExistsError as error:
        raise CheckpointExistsError(f"{copied.url} was made by another writer meanwhile") from error
    return copied.url


def _chunks_by_pack(manifest: Manifest) -> list[list[tuple[int, int, int]]]:
    """For each pack, the (offset, bytes, checksum) of its chunks, in order."""
    lengths = np.repeat(
        [chunk_bytes(t.dtype, a.chunk) for t in manifest.tensors for a in t.arrays],
        np.diff(manifest.first_chunks()),
    )
    found: list[set[tuple[int, int, int]]] = [set() for _ in manifest.packs]
    table = manifest.chunks
    for pack, offset, length, checksum in zip(
        table.pack, table.offset, lengths.tolist(), table.crc32c, strict=True
    ):
        found[pack].add((offset, length, checksum))
    return [sorted(chunks) for chunks in found]


@contextmanager
def _mapped(place: Place, pack: Pack) -> Iterator[memoryview]:
    """The pack's bytes in memory that the kernel can take back: the file itself, or a temporary copy."""
    path = place.pack(pack)
    if pack.size == 0:
        yield memoryview(b"")
        return
    if isinstance(place.root, LocalStorage):
        with place.root.opened(path) as (fd, _):
            found = os.fstat(fd).st_size
            if found != pack.size:
                raise CorruptError(
                    f"{place.url}: pack {pack.path} has {found} bytes, and should have {pack.size}"
                )
            mapping = mmap.mmap(fd, pack.size, prot=mmap.PROT_READ)
    else:
        with tempfile.TemporaryFile() as file:
            os.truncate(file.fileno(), pack.size)
            mapping = mmap.mmap(file.fileno(), pack.size)
        with memoryview(mapping) as whole:
            for start in range(0, pack.size, _PIECE):
                place.root.read_into(path, start, whole[start : start + _PIECE])
    with memoryview(mapping) as content:
        yield content


def _verify(content: memoryview, chunks: list[tuple[int, int, int]], where: str) -> None:
    for offset, length, checksum in chunks:
        with content[offset : offset + length - 4] as chunk:
            found = crc32c.crc32c(chunk)
        if found != checksum:
            raise CorruptError(
                f"{where}: the chunk at byte {offset} has the checksum {found:08x}, the manifest says "
                f"{checksum:08x}. No copy was made; copy another checkpoint of this run (shardckpt ls)."
            )
