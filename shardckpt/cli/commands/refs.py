"""`shardckpt refs`: write refs.json, for where a run or a checkpoint is now, or where it was left out."""

from __future__ import annotations

import argparse

from shardckpt.cli.output import print_result
from shardckpt.cli.storage_options import storage_options
from shardckpt.format.manifest import REFS
from shardckpt.format.zarr_refs import MAX_CHUNKS
from shardckpt.formatting import count
from shardckpt.run.refs import write_references

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "write refs.json, for Zarr readers, after a run was moved or copied"
DETAILS = f"""\
shardckpt itself does not read refs.json, and finds a moved run without it.
Saves of more than {MAX_CHUNKS:,} chunks leave it out: name the checkpoint, and not
its run, to have it written."""
JSON_FIELDS = """\
  url          the run or checkpoint
  checkpoints  one for each:
    url        where it is
    written    true if its refs.json was not right, and was written
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("url", metavar="RUN", help="a run, or one checkpoint, where it is now")


def run(options: argparse.Namespace) -> int:
    """Write what is out of date, and print how many files that were."""
    (storage,) = storage_options(options, options.url)
    written = write_references(options.url, storage)
    rows = [{"url": url, "written": is_written} for url, is_written in written.items()]
    text = (
        f"{options.url}: wrote {REFS} of {sum(written.values())} of {count(len(written), 'checkpoint')}"
        f"{'' if all(written.values()) else '; the others were right'}"
    )
    print_result({"url": options.url, "checkpoints": rows}, text, as_json=options.json)
    return 0
