"""`shardckpt reshard`: a checkpoint for another number of ranks."""

from __future__ import annotations

import argparse
import sys

from shardckpt.cli.output import Progress, print_result
from shardckpt.cli.storage_options import storage_options
from shardckpt.formatting import count, size
from shardckpt.interop.reshard import reshard

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "rewrite a checkpoint for another number of ranks"
DETAILS = """\
Loading on another number of ranks does not need this: every load reshards as
it reads. Use it for fewer, larger packs, or for tools that read packs by rank."""
JSON_FIELDS = """\
  source          the checkpoint it was made from
  url             the new one
  world_size      its number of ranks
  bytes           size of its packs
  dropped_ranks   ranks of the source whose PerRank values are not in it
"""

_MOST_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the new one, and its number of ranks."""
    add = parser.add_argument
    add("url", metavar="CKPT", help="a checkpoint or a run")
    add("out", metavar="URL", help="the new checkpoint, where nothing is yet")
    add("--world-size", metavar="N", type=_positive, required=True, help="number of ranks")


def run(options: argparse.Namespace) -> int:
    """Write the new checkpoint; warn about PerRank values that it has no rank for."""
    source, target = storage_options(options, options.url, options.out)
    with Progress("resharding") as progress:
        made = reshard(
            options.url,
            options.out,
            options.world_size,
            storage_options=source,
            out_storage_options=target,
            progress=progress,
        )
    document = {
        "source": made.source,
        "url": made.url,
        "world_size": made.world_size,
        "bytes": made.nbytes,
        "dropped_ranks": list(made.dropped),
    }
    text = f"{made.url}: {count(made.world_size, 'rank')}, {size(made.nbytes)}"
    print_result(document, text, as_json=options.json)
    if made.dropped:
        ranks = ", ".join(map(str, made.dropped[:_MOST_SHOWN]))
        more = " ..." if len(made.dropped) > _MOST_SHOWN else ""
        print(
            f"shardckpt: the PerRank values of {'rank' if len(made.dropped) == 1 else 'ranks'} {ranks}{more} "
            f"are left out: the new checkpoint has {count(made.world_size, 'rank')}",
            file=sys.stderr,
        )
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return number
