"""`shardckpt ls`: a run's checkpoints, the newest last."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from shardckpt.cli.output import Column, print_json, print_table
from shardckpt.cli.storage_options import storage_options
from shardckpt.formatting import age, size
from shardckpt.loading.listing import Row, list_checkpoints

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "list a run's checkpoints, the newest last"
DETAILS = "* marks the newest good one, which a restore takes."
JSON_FIELDS = """\
  url            the run
  checkpoints    one for each, the newest last:
    url          where it is
    attempt      number of its attempt; 0 outside a run
    step         training step
    state        good, bad (failed a verification), damaged (a pack is missing
                 or has another length), unfinished, failed, invalid (its
                 manifest cannot be read) or "other version"
    newest       true for the newest good one, which a restore takes
    created      seconds since 1970; null, as the next two, if not committed
    world_size   number of ranks that saved it
    bytes        size of its packs
    metrics      name -> number
    note         what is known of a failure
"""

_COLUMNS = (
    Column(""),
    Column("ATTEMPT", number=True),
    Column("STEP", number=True),
    Column("AGE", number=True),
    Column("RANKS", number=True),
    Column("SIZE", number=True),
    Column("STATE"),
    Column("METRICS", wrap=True, optional=True),
    Column("NOTE", optional=True, below=True, style="dim"),
)

_STYLES = {
    "bad": "red",
    "damaged": "red",
    "invalid": "red",
    "failed": "yellow",
    "unfinished": "yellow",
    "other version": "yellow",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("url", metavar="RUN", help="a run, or one checkpoint")


def run(options: argparse.Namespace) -> int:
    """Print the list."""
    (storage,) = storage_options(options, options.url)
    rows = list_checkpoints(options.url, storage)
    if options.json:
        print_json({"url": options.url, "checkpoints": [asdict(row) for row in rows]})
        return 0
    now = time.time()
    styles = ["bold green" if row.newest else _STYLES.get(row.state, "") for row in rows]
    print_table(_COLUMNS, [_cells(row, now) for row in rows], styles)
    return 0


def _cells(row: Row, now: float) -> tuple[str, ...]:
    return (
        "*" if row.newest else "",
        str(row.attempt) if row.attempt else "-",
        str(row.step),
        "-" if row.created is None else age(now - row.created),
        "-" if row.world_size is None else str(row.world_size),
        "-" if row.bytes is None else size(row.bytes),
        row.state,
        ", ".join(f"{name} {value:.6g}" for name, value in row.metrics.items()),
        row.note,
    )
