"""Export: a checkpoint of any size as one local file. Torch is imported for `.pt` only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardckpt.interop.formats.registry import SUFFIXES, format_of
from shardckpt.interop.new_file import check_target, new_file
from shardckpt.interop.progress import Counter, Progress
from shardckpt.interop.selection import select as select_tensors
from shardckpt.loading.stream import iter_boxes, slabs
from shardckpt.run.places import find_place, read_manifest
from shardckpt.storage import Storage

__all__ = ["SUFFIXES", "Merged", "merge"]


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        url: the checkpoint that was exported.
        path: the file.
        tensors: number of tensors in it.
        nbytes: size of the file in bytes.
    """

    url: str
    path: str
    tensors: int
    nbytes: int


def merge(
    url: str | os.PathLike[str] | Storage,
    out: str | os.PathLike[str],
    *,
    only: str | None = None,
    select: Sequence[str] = (),
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write a checkpoint as one local file, for inference or for other tools.

    The name of the file selects its format. `.safetensors` has tensors only, by name; tied ones are written once
    for each name. `.pt` has the whole state for `torch.load(weights_only=True)`: nested as it was saved, plain
    values in place, a list by rank for each PerRank, NumPy arrays as tensors, tied tensors tied. Memory is
    bounded by the largest tensor; for one that was saved in chunks of whole rows, by tens of megabytes.

        shardckpt.merge("s3://bucket/run", "weights.safetensors", only="model")
        model.load_state_dict(safetensors.torch.load_file("weights.safetensors"))

    Args:
        url: a checkpoint, or a run, of which the newest good checkpoint is taken.
        out: the file. It appears under this name only once it is complete, verified and durable.
        only: a path into the state, like "model": what lies there becomes the whole, and tensors are named as
            in it, so that model.load_state_dict takes them.
        select: glob patterns; only tensors whose name, below `only`, matches one. A `.pt` file is then a
            flat dict of tensors by name.
        overwrite: whether a file at `out` may be replaced, in one step.
        storage_options: arguments of the fsspec file system of `url`.
        progress: called with the bytes done and the bytes in all.

    Returns where the checkpoint was, and what the file holds.

    Raises, with nothing written: ValueError for another suffix; CheckpointExistsError; MissingKeysError if
    `only` or a pattern matches nothing; StateError for a type that the format lacks; NotACheckpointError;
    FormatError; CorruptError, which names the chunk; StorageError, StorageFullError.
    """
    path = Path(out)
    file_format = format_of(path)
    check_target(path, overwrite=overwrite)
    place = find_place(url, storage_options)
    manifest = read_manifest(place)
    selection = select_tensors(manifest, only, select, place.url)
    plan = file_format.plan(selection)
    boxes = [(tensor.name, box) for tensor in plan.tensors for box in slabs(tensor) if box.volume]
    counter = Counter(sum(tensor.nbytes for tensor in plan.tensors), progress)
    with new_file(path, plan.nbytes, overwrite=overwrite) as file:
        for nbytes in plan.write(file, iter_boxes(place, manifest, boxes)):
            counter.add(nbytes)
    return Merged(place.url, str(path), len(selection.tensors), path.stat().st_size)
