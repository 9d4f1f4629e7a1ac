"""`shardckpt merge`: a checkpoint as one file."""

from __future__ import annotations

import argparse

from shardckpt.cli.exit_codes import UsageError
from shardckpt.cli.output import Progress, print_result
from shardckpt.cli.storage_options import storage_options
from shardckpt.formatting import count, size
from shardckpt.interop.export import SUFFIXES, merge

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "write a checkpoint as one .safetensors or .pt file"
DETAILS = """\
The file is streamed: memory is bounded by the largest tensor.

OUT.safetensors  tensors only, named as in the checkpoint
                 (model/layers.0.weight). Tensors that share memory are written
                 once for each name, since the format cannot share.
OUT.pt           the whole state as it was passed to save, {"model": {...},
                 "optimizer": {...}, ...}, for torch.load(OUT,
                 weights_only=True). PerRank values become lists by rank, NumPy
                 arrays tensors.

To export a model's weights, so that model.load_state_dict takes them:

    shardckpt merge RUN weights.safetensors --only model"""
JSON_FIELDS = """\
  url        the checkpoint
  path       the file
  tensors    number of tensors in it
  bytes      its size
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the file, and what of the state goes into it."""
    add = parser.add_argument
    add("url", metavar="CKPT", help="a checkpoint or a run")
    add("out", metavar="OUT", help=f"a local file that ends with {' or '.join(SUFFIXES)}")
    add("--only", metavar="PATH", help="write only what is at this path of the state, like model")
    add(
        "--select",
        metavar="GLOB",
        action="append",
        default=[],
        help="only tensors with names (below --only) like GLOB: '*.weight'; can be given several times",
    )
    add("--force", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> int:
    """Write the file, and print its size."""
    if "://" in options.out:
        raise UsageError(f"merge writes a local file, not {options.out}")
    if not options.out.endswith(SUFFIXES):
        raise UsageError(f"OUT must end with {' or '.join(SUFFIXES)}, not like {options.out!r}")
    (storage,) = storage_options(options, options.url)
    with Progress("merging") as progress:
        made = merge(
            options.url,
            options.out,
            only=options.only,
            select=options.select,
            overwrite=options.force,
            storage_options=storage,
            progress=progress,
        )
    document = {"url": made.url, "path": made.path, "tensors": made.tensors, "bytes": made.nbytes}
    text = f"{made.path}: {count(made.tensors, 'tensor')}, {size(made.nbytes)}"
    print_result(document, text, as_json=options.json)
    return 0
