"""`shardckpt verify`: every chunk against its checksum, and refs.json against the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from shardckpt.box import Box
from shardckpt.cli.output import Progress, count, print_json, printable, size
from shardckpt.errors import CorruptError, finding
from shardckpt.fetch import Fetcher
from shardckpt.manifest import REFS, Manifest
from shardckpt.reads import Read, plan_reads
from shardckpt.runs import Place, find_place, read_manifest
from shardckpt.zarr_view import encode_refs

__all__ = ["Report", "check", "show"]

_BATCH = 64 << 20
_MOST_SHOWN = 20
_TEMPLATE = re.compile(r"\{\{\w+\}\}/")


@dataclass
class Report:
    """What a check found: `problems` are damage, `notes` are not."""

    chunks: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(place: Place, manifest: Manifest, progress: Callable[[int, int], object]) -> Report:
    """Read every chunk, and refs.json; go on after damage, to name all of it. Raises StorageError."""
    report = Report()
    boxes = [(t.name, box) for t in manifest.tensors if (box := Box.whole(t.shape)).volume]
    reads = [
        next(same) for _, same in groupby(plan_reads(manifest, boxes), key=lambda r: (r.pack, r.offset))
    ]
    total = sum(read.nbytes for read in reads)
    for pack, group in groupby(reads, key=lambda read: read.pack):
        of_pack = list(group)
        if not _is_whole(place, manifest, pack):
            report.problems.append(_damage(place, manifest, of_pack))
            report.nbytes += sum(read.nbytes for read in of_pack)
            progress(report.nbytes, total)
            continue
        for batch in _batches(of_pack):
            if _damage(place, manifest, batch):
                report.problems += filter(None, (_damage(place, manifest, [read]) for read in batch))
            report.nbytes += sum(read.nbytes for read in batch)
            progress(report.nbytes, total)
    report.chunks = len(reads)
    _check_refs(place, manifest, report)
    return report


def show(url: str, storage_options: Mapping[str, Any] | None, *, as_json: bool) -> int:
    """Check the checkpoint, and print what was found. Returns 0, or 4 if it is damaged."""
    place = find_place(url, storage_options)
    manifest = read_manifest(place)
    with Progress("verifying") as progress:
        report = check(place, manifest, progress)
    code = 4 if report.problems else 0
    if as_json:
        print_json(
            {
                "url": place.url,
                "ok": not report.problems,
                "chunks": report.chunks,
                "bytes": report.nbytes,
                "problems": report.problems,
                "notes": report.notes,
            }
        )
        return code
    what = f"{count(report.chunks, 'chunk')}, {size(report.nbytes)}"
    if report.problems:
        print(f"{place.url} is corrupt: {count(len(report.problems), 'problem')} in {what}")
    else:
        print(f"{place.url} is good: {what}, every checksum is right; {REFS} agrees")
    for problem in report.problems[:_MOST_SHOWN]:
        print(f"  {printable(problem)}")
    if len(report.problems) > _MOST_SHOWN:
        print(f"  ... and {len(report.problems) - _MOST_SHOWN:,} more; --json names them all")
    for note in report.notes:
        print(f"  note: {printable(note)}")
    return code


def _is_whole(place: Place, manifest: Manifest, pack: int) -> bool:
    record = manifest.packs[pack]
    try:
        return place.root.size(place.pack(record)) == record.size
    except FileNotFoundError:
        return False


def _damage(place: Place, manifest: Manifest, reads: list[Read]) -> str:
    """What is wrong with these chunks; the empty string if nothing is."""
    try:
        Fetcher(place, manifest).verify(reads)
    except CorruptError as error:
        return finding(error).removeprefix(f"{place.url}: ")
    return ""


def _batches(reads: list[Read]) -> Iterator[list[Read]]:
    batch: list[Read] = []
    nbytes = 0
    for read in reads:
        if batch and nbytes + read.nbytes > _BATCH:
            yield batch
            batch, nbytes = [], 0
        batch.append(read)
        nbytes += read.nbytes
    if batch:
        yield batch


def _check_refs(place: Place, manifest: Manifest, report: Report) -> None:
    expected = json.loads(encode_refs(manifest, place.url))
    try:
        found = json.loads(place.storage.read(REFS))
        refs, templates = dict(found["refs"]), dict(found.get("templates", {}))
    except FileNotFoundError:
        report.problems.append(f"{REFS} is missing: plain Zarr cannot open it; shardckpt can")
        return
    except (ValueError, TypeError, KeyError) as error:
        report.problems.append(f"{REFS} is not a reference file: {error!r}")
        return
    wrong = sorted(
        key
        for key in {*refs, *expected["refs"]}
        if not _same_reference(refs.get(key), expected["refs"].get(key))
    )
    if wrong:
        report.problems.append(
            f"{REFS} disagrees with the manifest about {count(len(wrong), 'key')}, like {wrong[0]!r}: plain "
            "Zarr would read something else"
        )
    elif templates != expected["templates"]:
        report.notes.append(
            f"{REFS} names the packs below {templates.get('u', 'another place')!r}: the checkpoint was moved "
            "or copied. Plain Zarr readers give the template 'u' themselves; shardckpt needs nothing"
        )


def _same_reference(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 3:
        return one[1:] == other[1:] and _same_pack(str(one[0]), str(other[0]))
    if isinstance(one, str) and isinstance(other, str):
        try:
            return bool(_node(one) == _node(other))
        except ValueError:
            return False
    return False


def _same_pack(one: str, other: str) -> bool:
    """Whether two URLs name one pack, as far as can be told when the checkpoint may have been moved."""
    if one == other:
        return True
    plain, templated = sorted((one, other), key=lambda url: bool(_TEMPLATE.match(url)))
    if _TEMPLATE.match(plain):
        return False
    return "/".join(plain.split("/")[-2:]) == "/".join(_TEMPLATE.sub("", templated).split("/")[-2:])


def _node(text: str) -> Any:
    """A node's metadata; which nodes the root lists beside is a matter of the writer's version."""
    node = json.loads(text)
    if isinstance(node, dict):
        node.pop("consolidated_metadata", None)
    return node
