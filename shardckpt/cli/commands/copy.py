"""`shardckpt copy`: a checkpoint in another storage."""

from __future__ import annotations

import argparse

from shardckpt.cli.output import Progress, print_result
from shardckpt.cli.storage_options import storage_options
from shardckpt.interop.copy import copy

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "copy a checkpoint to another storage, verified on the way"
DETAILS = """\
A copy that was interrupted goes on where it stopped if the same command is
run again."""
JSON_FIELDS = """\
  source     the checkpoint or run, as given
  url        the copy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and the copy."""
    parser.add_argument("url", metavar="CKPT", help="a checkpoint or a run")
    parser.add_argument(
        "out",
        metavar="URL",
        help="the copy; if CKPT is a run, the run that its newest checkpoint goes into",
    )


def run(options: argparse.Namespace) -> int:
    """Copy it, and print the copy's URL."""
    source, target = storage_options(options, options.url, options.out)
    with Progress("copying") as progress:
        url = copy(
            options.url, options.out, source_options=source, target_options=target, progress=progress
        )
    print_result({"source": options.url, "url": url}, url, as_json=options.json)
    return 0
