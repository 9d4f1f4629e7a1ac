"""`shardckpt info`: what is in a checkpoint, readable for ten thousand tensors."""

from __future__ import annotations

import argparse
import fnmatch
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardckpt.cli.output import Column, print_fields, print_json, print_table
from shardckpt.cli.storage_options import storage_options
from shardckpt.errors import MissingKeysError
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.format.names import join_shown
from shardckpt.format.tree import PerRankRef, TensorRef, children
from shardckpt.format.value_decoding import decode_value
from shardckpt.formatting import age, count, size
from shardckpt.run.places import find_place, read_manifest

__all__ = ["DETAILS", "JSON_FIELDS", "SUMMARY", "add_arguments", "run"]

SUMMARY = "show what is in a checkpoint: tensors and values"
DETAILS = """\
Tensors of one shape and type whose names differ in numbers only share a row:
model/layers.{0..31}.weight."""
JSON_FIELDS = """\
  url            the checkpoint
  format, id     version of the format; unique id of this checkpoint
  step, attempt  training step; number of the attempt, 0 outside a run
  world_size     number of ranks that saved it
  created        seconds since 1970
  writer         the program that wrote it
  metrics        name -> number
  bytes          size of all tensors
  stored_bytes   size of all packs
  chunks         number of chunks
  packs          path and bytes of each
  tensors        name, shape, dtype, bytes and chunks of each
  values         the plain values of the state, as the manifest has them
  per_rank       the PerRank values of each rank. Both are left out if there is
                 a --select
"""

_COLUMNS = (
    Column("TENSOR", wrap=True),
    Column("SHAPE"),
    Column("DTYPE"),
    Column("TENSORS", number=True, optional=True),
    Column("SIZE", number=True),
    Column("CHUNKS", number=True),
)

_FEW_VALUES = 40
_LONG_VALUE = 70
_NUMBER = re.compile(r"\d+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and what of it is shown."""
    add = parser.add_argument
    add("url", metavar="CKPT", help="a checkpoint or a run")
    add(
        "--select",
        metavar="GLOB",
        action="append",
        default=[],
        help="only tensors and values with names like GLOB: '*.weight'; can be given several times",
    )
    add("--all", action="store_true", help="one row for each tensor, and every value")


def run(options: argparse.Namespace) -> int:
    """Print what is in the checkpoint. Raises MissingKeysError if a pattern matches nothing."""
    (storage,) = storage_options(options, options.url)
    select: Sequence[str] = options.select
    place = find_place(options.url, storage)
    manifest = read_manifest(place)
    chunks = _chunk_counts(manifest)
    tensors = [t for t in manifest.tensors if _matches(t.name, select)]
    values = [
        (path, text) for path, text in _values(decode_value(manifest.values)) if _matches(path, select)
    ]
    _check_patterns(select, [t.name for t in tensors] + [path for path, _ in values], place.url, manifest)
    if options.json:
        print_json(_document(place.url, manifest, tensors, chunks, whole=not select))
        return 0
    every = options.all or bool(select)
    print_fields(_fields(place.url, manifest, chunks))
    if tensors:
        print()
        print_table(_COLUMNS, [_cells(group, chunks) for group in _groups(tensors, every=every)])
    if values:
        shown = values if every else values[:_FEW_VALUES]
        print()
        print_table((Column("VALUE", wrap=True), Column("", wrap=True)), shown)
        if len(shown) < len(values):
            print(f"... and {len(values) - len(shown):,} more; --all shows them")
    return 0


def _fields(url: str, manifest: Manifest, chunks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Names and values that describe the checkpoint as a whole."""
    packs, stored = count(len(manifest.packs), "pack"), count(sum(chunks.values()), "chunk")
    fields = [
        ("checkpoint", url),
        ("step", str(manifest.step)),
        ("attempt", str(manifest.attempt) if manifest.attempt else ""),
        ("ranks", str(manifest.world_size)),
        ("written", f"{age(time.time() - manifest.created)} ago by {manifest.writer}"),
        ("metrics", ", ".join(f"{name} {value:.6g}" for name, value in manifest.metric_values.items())),
        ("tensors", f"{count(len(manifest.tensors), 'tensor')}, {size(manifest.nbytes)}"),
        ("stored", f"{size(manifest.stored_bytes)} in {packs}, {stored}"),
    ]
    return [(name, text) for name, text in fields if text]


def _groups(tensors: Sequence[TensorEntry], *, every: bool) -> list[list[TensorEntry]]:
    """Group tensors of one shape and type whose names differ in numbers only, in the order of each first one."""
    if every:
        return [[tensor] for tensor in tensors]
    groups: dict[object, list[TensorEntry]] = {}
    for tensor in tensors:
        key = _NUMBER.sub("#", tensor.name), tensor.shape, tensor.dtype
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def _cells(group: Sequence[TensorEntry], chunks: Mapping[str, int]) -> tuple[str, ...]:
    first = group[0]
    return (
        _pattern([tensor.name for tensor in group]),
        "x".join(map(str, first.shape)) or "scalar",
        first.dtype,
        f"{len(group):,}" if len(group) > 1 else "",
        size(sum(tensor.nbytes for tensor in group)),
        f"{sum(chunks[tensor.name] for tensor in group):,}",
    )


def _pattern(names: Sequence[str]) -> str:
    """One pattern for names that differ in numbers only: `layers.{0..31}.weight`."""
    if len(names) == 1:
        return names[0]
    parts = _NUMBER.split(names[0])
    columns = zip(*map(_NUMBER.findall, names), strict=True)
    text = parts[0]
    for part, found in zip(parts[1:], columns, strict=True):
        text += _numbers(set(found)) + part
    return text


def _numbers(found: set[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    numbers = sorted(found, key=int)
    low, high = int(numbers[0]), int(numbers[-1])
    if high - low + 1 == len(numbers):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(numbers)}}}" if len(numbers) <= 4 else f"{{{numbers[0]},..,{numbers[-1]}}}"


def _values(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every plain value as (path, text); a list of plain values counts as one."""
    if isinstance(value, TensorRef):
        return
    if isinstance(value, PerRankRef):
        yield path, "one for each rank"
    elif (isinstance(value, dict) and value) or any(
        isinstance(item, dict | list | tuple | deque | TensorRef) for _, item in children(value)
    ):
        for key, item in children(value):
            yield from _values(item, join_shown(path, key))
    elif path:
        yield path, _short(value)


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return size(len(value)) + " of bytes"
    shown = value[:20] if isinstance(value, list | tuple | str) and len(value) > 1000 else value
    try:
        text = repr(shown)
    except ValueError:  # an integer of more decimal digits than Python writes
        text = hex(value) if isinstance(value, int) else "has integers that are too long to be shown"
    if len(text) <= _LONG_VALUE:
        return text
    items = f" ({count(len(value), 'item')})" if isinstance(value, list | tuple) else ""
    return f"{text[:_LONG_VALUE]} ...{items}"


def _matches(name: str, select: Sequence[str]) -> bool:
    return not select or any(fnmatch.fnmatchcase(name, pattern) for pattern in select)


def _check_patterns(select: Sequence[str], found: Sequence[str], url: str, manifest: Manifest) -> None:
    for pattern in select:
        if not fnmatch.filter(found, pattern):
            some = ", ".join(tensor.name for tensor in manifest.tensors[:4])
            raise MissingKeysError(
                f"nothing in {url} has a name that matches {pattern!r}; it has {some} ..."
            )


def _chunk_counts(manifest: Manifest) -> dict[str, int]:
    return {t.name: sum(math.prod(array.grid) for array in t.arrays) for t in manifest.tensors}


def _document(
    url: str, manifest: Manifest, tensors: Sequence[TensorEntry], chunks: Mapping[str, int], *, whole: bool
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "url": url,
        **manifest.head(),
        "metrics": manifest.metric_values,
        "bytes": manifest.nbytes,
        "stored_bytes": manifest.stored_bytes,
        "chunks": sum(chunks.values()),
        "packs": [{"path": pack.path, "bytes": pack.size} for pack in manifest.packs],
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "bytes": tensor.nbytes,
                "chunks": chunks[tensor.name],
            }
            for tensor in tensors
        ],
    }
    if whole:
        document |= {"values": manifest.values, "per_rank": manifest.per_rank}
    return document
