"""`shardckpt refs`: write refs.json again, for where a run or a checkpoint is now."""

from __future__ import annotations

import argparse

from shardckpt.cli.output import print_result
from shardckpt.cli.storage_options import storage_options
from shardckpt.format.manifest import REFS
from shardckpt.formatting import count
from shardckpt.run.refs import write_references

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "update refs.json, for Zarr readers, after a run was moved or copied"
DETAILS = """\
shardckpt itself does not read refs.json, and finds a moved run without it."""
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
