"""`shardckpt verify`: every chunk against its checksum, and refs.json against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardckpt.cli.output import Progress, print_json, printable
from shardckpt.format.manifest import REFS
from shardckpt.formatting import count, size
from shardckpt.loading.verify import check
from shardckpt.run.places import find_place, read_manifest

__all__ = ["show"]

_MOST_SHOWN = 20


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
        print(
            f"{place.url} is good: {what}, every checksum is right{'' if report.notes else f'; {REFS} agrees'}"
        )
    for problem in report.problems[:_MOST_SHOWN]:
        print(f"  {printable(problem)}")
    if len(report.problems) > _MOST_SHOWN:
        print(f"  ... and {len(report.problems) - _MOST_SHOWN:,} more; --json names them all")
    for note in report.notes:
        print(f"  note: {printable(note)}")
    return code
