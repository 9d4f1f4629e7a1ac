"""Copy checkpoints between storages, verified on the way."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np

from shardckpt.errors import CheckpointError, CheckpointExistsError, CorruptError
from shardckpt.format.chunks import StoredChunk, content_bytes
from shardckpt.format.manifest import Manifest, Pack, pack_path, parts_of
from shardckpt.interop.progress import Counter, Progress
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.plan import coalesced
from shardckpt.run.commit import publish
from shardckpt.run.places import Place, attempt_for, exact_place, find_place, read_manifest
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.work import cleanup

__all__ = ["copy"]

_PIECE = 16 << 20
_ZEROS = memoryview(bytes(1 << 20))


def copy(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    *,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> str:
    """Copy a checkpoint to another storage.

    Every chunk is verified, and the copy exists only once it is whole: its manifest is written last. In a run, a
    checkpoint keeps the attempt and step in its path, so that training can resume from either side. Needs no
    temporary files, and memory for the parts of an upload that are under way, or a few of the largest chunks.

    A copy that fails or is interrupted leaves the packs that are complete, and the same call goes on from there:
    packs at the target are read and verified, and copied only if they are not right. Nothing is left of a
    corrupt checkpoint.

        shardckpt.copy("s3://bucket/run", "/local/run")

    Args:
        source: a checkpoint, or a run, of which the newest good checkpoint is copied.
        target: the copy's URL; if `source` is a run, the run that the copy becomes a part of.
        source_options: arguments of the fsspec file system of `source`.
        target_options: the same for `target`.
        progress: called with the bytes done and the bytes in all.

    Returns the copy's URL.

    Raises NotACheckpointError, FormatError, CorruptError, CheckpointExistsError, StateError if `target` is the
    folder of another step, StorageError; then there is no copy.
    """
    place = find_place(source, source_options)
    named = exact_place(source, source_options)
    into = open_storage(target, target_options)
    # A checkpoint that was found through its run keeps its path in the run.
    copied = Place(into) if place.path == named.path else Place(into, place.path)
    manifest = read_manifest(place)
    if copied.is_committed():
        raise CheckpointExistsError(f"{copied.url} has a checkpoint already, which is never overwritten")
    attempt = attempt_for(copied.url, manifest.step)
    made = msgspec.structs.replace(
        manifest,
        packs=tuple(Pack(pack_path(number), pack.size) for number, pack in enumerate(manifest.packs)),
        attempt=manifest.attempt if attempt is None else attempt,
    )
    fetcher = Fetcher(place, manifest)
    fetcher.check_all_sizes()  # before space is taken for a size that may be forged
    _copy_packs(fetcher, copied, made, Counter(made.stored_bytes, progress))
    publish(copied, made)
    return copied.url


def _copy_packs(source: Fetcher, copied: Place, made: Manifest, counter: Counter) -> None:
    """Copy the packs of the manifest `made` that are not at the target yet."""
    chunks = _chunks_by_pack(made)
    found = set(copied.storage.list())
    for name in found:
        if parts_of(name) is not None:  # of a save that ended here, which this is not
            copied.storage.delete_tree(name)
    target = Fetcher(copied, made)
    whole: list[str] = []
    written: list[str] = []
    try:
        for number, pack in enumerate(made.packs):
            before = counter.done
            if pack.path.partition("/")[0] not in found or not _is_right(target, chunks[number], counter):
                counter.done = before
                written.append(pack.path)
                with closing(_pieces(source, chunks[number], pack.size, counter)) as pieces:
                    copied.storage.write_pieces(pack.path, pack.size, pieces)
            whole.append(pack.path)
            counter.set(before + pack.size)
    except CheckpointError as error:  # the source is corrupt: no copy can be completed
        with cleanup(error, f"packs of it may be left at {copied.url}"):
            for path in written:
                copied.storage.delete(path)
        raise
    except BaseException as error:
        if whole:
            error.add_note(
                f"{len(whole)} of {len(made.packs)} packs are at {copied.url}, complete: the same command goes "
                "on with the others"
            )
        raise


def _pieces(
    source: Fetcher, chunks: Sequence[StoredChunk], size: int, counter: Counter
) -> Generator[memoryview]:
    """The bytes of a pack in order: verified chunks, and zeros between them."""
    groups = list(coalesced(chunks, _PIECE))
    position = 0
    with closing(source.fetch_ahead(groups)) as contents:
        for group, content in zip(groups, contents, strict=True):
            yield from _zeros(group[0].offset - position)
            yield content
            counter.add(group[0].offset + len(content) - position)
            position = group[0].offset + len(content)
    yield from _zeros(size - position)


def _zeros(count: int) -> Iterator[memoryview]:
    for start in range(0, count, len(_ZEROS)):
        yield _ZEROS[: count - start]


def _is_right(target: Fetcher, chunks: Sequence[StoredChunk], counter: Counter) -> bool:
    """True if a pack is at the target already, complete and right."""
    groups = list(coalesced(chunks, _PIECE))
    try:
        with closing(target.fetch_ahead(groups)) as contents:
            for content in contents:
                counter.add(len(content))
    except CorruptError:
        return False
    return bool(groups)


def _chunks_by_pack(manifest: Manifest) -> list[list[StoredChunk]]:
    """The chunks of each pack by offset, each once: tied tensors have rows of their own for the same bytes."""
    nbytes = np.repeat(
        [content_bytes(t.dtype, a.chunk) for t in manifest.tensors for a in t.arrays],
        np.diff(manifest.first_rows),
    )
    table = manifest.chunks
    columns = zip(
        table.pack.tolist(), table.offset.tolist(), nbytes.tolist(), table.crc32c.tolist(), strict=True
    )
    found: list[dict[int, StoredChunk]] = [{} for _ in manifest.packs]
    for row, (pack, offset, length, checksum) in enumerate(columns):
        found[pack].setdefault(offset, StoredChunk(pack, offset, row, length, checksum))
    return [sorted(chunks.values()) for chunks in found]
