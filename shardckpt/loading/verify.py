"""Verify a checkpoint: every chunk against its checksum, and refs.json against the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from shardckpt.errors import CheckpointError, CorruptError, FormatError, StorageError, finding
from shardckpt.format.box import Box
from shardckpt.format.manifest import REFS, Manifest
from shardckpt.format.zarr_refs import TEMPLATES, are_written, encode_refs
from shardckpt.formatting import count
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.plan import ChunkRead, plan_reads
from shardckpt.run.places import Place, exact_place, read_manifest

__all__ = ["VerifyReport", "verify_checkpoint"]


_BATCH = 64 << 20
"""Bytes that are verified together; if they are damaged, their chunks are verified one by one."""


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        chunks: number of chunks.
        nbytes: bytes of their elements.
        problems: damage.
        notes: what is worth knowing, and no damage.
    """

    chunks: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_checkpoint(
    place: Place, manifest: Manifest, progress: Callable[[int, int], object]
) -> VerifyReport:
    """Read every chunk and refs.json, and report all damage. Raises StorageError.

    Args:
        place: of the checkpoint.
        manifest: its manifest.
        progress: called with the bytes done and all bytes.
    """
    report = VerifyReport()
    boxes = [(t.name, box) for t in manifest.tensors if (box := Box.whole(t.shape)).volume]
    reads = [
        next(same) for _, same in groupby(plan_reads(manifest, boxes), key=lambda read: read.stored[:2])
    ]
    total = sum(read.stored.nbytes for read in reads)
    for pack, group in groupby(reads, key=lambda read: read.stored.pack):
        of_pack = list(group)
        if not _is_whole(place, manifest, pack) and (damage := _damage(place, manifest, of_pack)):
            report.problems.append(damage)
            report.nbytes += sum(read.stored.nbytes for read in of_pack)
            progress(report.nbytes, total)
            continue
        for batch in _batches(of_pack):
            if _damage(place, manifest, batch):
                report.problems += filter(None, (_damage(place, manifest, [read]) for read in batch))
            report.nbytes += sum(read.stored.nbytes for read in batch)
            progress(report.nbytes, total)
    report.chunks = len(reads)
    _check_refs(place, manifest, report)
    return report


def _is_whole(place: Place, manifest: Manifest, pack: int) -> bool:
    record = manifest.packs[pack]
    try:
        return place.root.size(place.pack(record)) == record.size
    except FileNotFoundError:
        return False


def _damage(place: Place, manifest: Manifest, reads: list[ChunkRead]) -> str:
    """What is wrong with these chunks; an empty string if nothing is."""
    try:
        Fetcher(place, manifest).verify(reads)
    except CorruptError as error:
        return finding(error).removeprefix(f"{place.url}: ")
    return ""


def _batches(reads: list[ChunkRead]) -> Iterator[list[ChunkRead]]:
    batch: list[ChunkRead] = []
    nbytes = 0
    for read in reads:
        if batch and nbytes + read.stored.nbytes > _BATCH:
            yield batch
            batch, nbytes = [], 0
        batch.append(read)
        nbytes += read.stored.nbytes
    if batch:
        yield batch


def _check_refs(place: Place, manifest: Manifest, report: VerifyReport) -> None:
    written = f"`shardckpt refs {place.url}` updates it"
    try:
        found = _Refs(json.loads(place.storage.read(REFS)))
    except FileNotFoundError:
        if not are_written(manifest):
            report.notes.append(
                f"{REFS} is left out, as always for that many chunks: `shardckpt refs {place.url}` writes it, "
                "for plain Zarr; shardckpt does not need it"
            )
            return
        report.problems.append(f"{REFS} is missing: plain Zarr cannot open it; shardckpt can")
        return
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, FormatError) as error:
        report.problems.append(f"{REFS} is not a reference file: {error!r}")
        return
    expected = _Refs(json.loads(encode_refs(manifest, place.url)))
    wrong = sorted(
        key
        for key in {*found.entries, *expected.entries}
        if not _same_entry(found.entries.get(key), expected.entries.get(key))
    )
    if wrong:
        report.problems.append(
            f"{REFS} disagrees with the manifest about {count(len(wrong), 'key')}, like {wrong[0]!r}: plain "
            f"Zarr would read something else; {written}"
        )
    elif found.templates != expected.templates:
        there = found.templates.get("u", "another place")
        if not _is_consistent(found.templates, expected.templates):
            report.problems.append(
                f"{REFS} names packs at places that do not belong together: plain Zarr would read something "
                f"else; {written}"
            )
        elif (other := _id_there(there)) not in (None, manifest.id):
            report.problems.append(
                f"{REFS} is for {there}, where there is another checkpoint now ({other!r}), which plain Zarr "
                f"would read; {written}"
            )
        elif not _is_same_folder(there, place.url):
            report.notes.append(
                f"{REFS} points to {there}: the checkpoint was moved or copied from there. Zarr readers would "
                f"look there, shardckpt does not; {written}"
            )


class _Refs:
    """A reference file: its templates, and its entries by key: a node's JSON text, or [URL, offset, bytes]."""

    def __init__(self, content: Any) -> None:
        if set(content) != {"version", "templates", "refs"} or content["version"] != 1:
            raise ValueError("it is not one of version 1 with templates and refs, and nothing else")
        self.templates: dict[str, str] = {str(k): str(v) for k, v in content["templates"].items()}
        self.entries: dict[str, Any] = dict(content["refs"])


def _same_entry(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        try:
            return _same_node(json.loads(one), json.loads(other))
        except (ValueError, RecursionError):
            return False
    return bool(one == other and type(one) is type(other))


def _same_node(one: Any, other: Any) -> bool:
    """True if two nodes' metadata are equal, apart from a consolidated list of nodes that only one has."""
    if isinstance(one, dict) and isinstance(other, dict):
        for node, than in ((one, other), (other, one)):
            if "consolidated_metadata" not in than:
                node.pop("consolidated_metadata", None)
    return bool(one == other)


def _is_consistent(found: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """True if the templates are the folder of one checkpoint, wherever it lies, and the folders above it."""
    folder = found.get("u", "").rstrip("/")
    return set(found) == set(expected) and all(
        found[name] == folder.rsplit("/", ups)[0] for ups, name in enumerate(TEMPLATES) if name in found
    )


def _id_there(url: str) -> str | None:
    """The id of the checkpoint in a local folder; None if there is none, or `url` is not local."""
    if "://" in url:
        return None
    try:
        return read_manifest(exact_place(url)).id
    except (CheckpointError, StorageError):
        return None


def _is_same_folder(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False
