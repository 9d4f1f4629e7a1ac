"""`shardckpt verify`: every chunk against its checksum, and refs.json against the manifest."""

from __future__ import annotations

import argparse

from shardckpt.cli.exit_codes import CORRUPT
from shardckpt.cli.output import Progress, print_json, printable
from shardckpt.cli.storage_options import storage_options
from shardckpt.format.manifest import REFS
from shardckpt.formatting import count, size
from shardckpt.loading.verify import VerifyReport, verify_checkpoint
from shardckpt.run.places import find_place, read_manifest

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "check every chunk of a checkpoint against its checksum"
DETAILS = f"{REFS}, which Zarr readers use, is checked against the manifest too."
JSON_FIELDS = """\
  url        the checkpoint
  ok         true if there are no problems
  chunks     number of chunks checked
  bytes      their size
  problems   what is damaged, one text each
  notes      what is not right, but no damage
"""

_MOST_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint."""
    parser.add_argument("url", metavar="CKPT", help="a checkpoint or a run")


def run(options: argparse.Namespace) -> int:
    """Check the checkpoint and print the findings. Returns 0, or 4 if it is damaged."""
    (storage,) = storage_options(options, options.url)
    place = find_place(options.url, storage)
    manifest = read_manifest(place)
    with Progress("verifying") as progress:
        report = verify_checkpoint(place, manifest, progress)
    if options.json:
        document = {
            "url": place.url,
            "ok": not report.problems,
            "chunks": report.chunks,
            "bytes": report.nbytes,
            "problems": report.problems,
            "notes": report.notes,
        }
        print_json(document)
    else:
        _print(place.url, report)
    return CORRUPT if report.problems else 0


def _print(url: str, report: VerifyReport) -> None:
    what = f"{count(report.chunks, 'chunk')}, {size(report.nbytes)}"
    if report.problems:
        print(f"{url} is corrupt: {count(len(report.problems), 'problem')} in {what}")
    else:
        agrees = "" if report.notes else f"; {REFS} agrees"
        print(f"{url} is good: {what}, every checksum is right{agrees}")
    for problem in report.problems[:_MOST_SHOWN]:
        print(f"  {printable(problem)}")
    if len(report.problems) > _MOST_SHOWN:
        print(f"  ... and {len(report.problems) - _MOST_SHOWN:,} more; --json names them all")
    for note in report.notes:
        print(f"  note: {printable(note)}")
