"""Export: one file for inference, or for other tools, from a checkpoint of any size. Torch for `.pt` only."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from shardckpt.errors import (
    CheckpointExistsError,
    CredentialsError,
    MissingKeysError,
    StateError,
    StorageError,
    StorageFullError,
)
from shardckpt.format.manifest import Manifest, TensorEntry, tied_names
from shardckpt.format.names import segment
from shardckpt.format.tree import PerRankRef, TensorRef, children, rebuilt
from shardckpt.format.value_decoding import decode_value
from shardckpt.interop.formats.safetensors import encode_header, sorted_for_alignment, write_tensors
from shardckpt.loading.stream import iter_boxes, slabs
from shardckpt.run.places import find_place, read_manifest
from shardckpt.storage import Storage

__all__ = ["SUFFIXES", "Merged", "merge"]

SUFFIXES = (".safetensors", ".pt")
"""What the name of a merged file ends with, which says its format."""

Progress = Callable[[int, int], object]
"""Called with the bytes done so far, and the bytes in all."""


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        url: the checkpoint it was made from.
        path: the file.
        tensors: how many tensors it holds.
        nbytes: its size.
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
    """Write the checkpoint at `url`, or the newest good one of the run there, as one local file.

    `out` ends with `.safetensors` (tensors only, by name; tied ones are written once for each name) or
    with `.pt` (what torch.load(weights_only=True) reads: the state with its nested structure, plain values
    in place, a list by rank for each PerRank, NumPy arrays as tensors, tied tensors tied). Memory is bounded
    by the largest tensor, and for one that was saved in chunks of whole rows by tens of megabytes.

    Args:
        url: a checkpoint or a run.
        out: the file. It appears under this name only once it is complete, verified and durable.
        only: a path into the state, like "model": what lies there becomes the whole, with names as it has
            them itself, so that model.load_state_dict takes them.
        select: glob patterns; only tensors whose name, below `only`, matches one. A `.pt` file is then a
            flat dict of tensors by name.
        overwrite: whether a file at `out` may be replaced, which it is in one step.
        storage_options: arguments of the fsspec file system of `url`.
        progress: called with the bytes done and the bytes in all.

    Raises, with nothing written: ValueError for another suffix; CheckpointExistsError; MissingKeysError if
    `only` or a pattern matches nothing; StateError for a type that the format lacks; NotACheckpointError;
    FormatError; CorruptError, which names the chunk; StorageError, StorageFullError.
    """
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{out}: the name must end with .safetensors or .pt, which says in what format it is written"
        )
    _check_target(path, overwrite=overwrite)
    place = find_place(url, storage_options)
    manifest = read_manifest(place)
    state = _subtree(manifest, decode_value(manifest.values), only)
    chosen = _selected(_named(manifest, state, only), select, place.url)
    tied = tied_names(manifest)

    def content(tensors: Sequence[TensorEntry]) -> Iterator[npt.NDArray[Any]]:
        boxes = [(tensor.name, box) for tensor in tensors for box in slabs(tensor) if box.volume]
        return iter_boxes(place, manifest, boxes)

    if path.suffix == ".pt":
        from shardckpt.interop.formats.torch_pt import write_state  # torch takes seconds to import

        tree = {name: TensorRef(t.name) for name, t in chosen.items()} if select else state
        records = {tensor.name: tensor for tensor in manifest.tensors}
        used = {tied.get(name, name) for _, name in _references(tree)}
        total = sum(records[name].nbytes for name in used)
        with _new_file(path, total, overwrite=overwrite) as file:
            _report(write_state(file, tree, records, tied, content), total, progress)
    else:
        entries = sorted_for_alignment(chosen)
        header = encode_header(entries, {"format": "pt", "step": str(manifest.step)})
        total = sum(tensor.nbytes for _, tensor in entries)
        with _new_file(path, len(header) + total, overwrite=overwrite) as file:
            file.write(header)
            _report(write_tensors(file, content([tensor for _, tensor in entries])), total, progress)
    return Merged(place.url, str(path), len(chosen), path.stat().st_size)


def _report(pieces: Iterator[int], total: int, progress: Progress | None) -> None:
    done = 0
    for nbytes in pieces:
        done += nbytes
        if progress is not None:
            progress(done, total)


def _subtree(manifest: Manifest, state: Any, only: str | None) -> Any:
    """What lies at the path `only` of the state, with per-rank values as lists by rank."""
    found = _with_ranks(state, manifest)
    for number, part in enumerate(only.strip("/").split("/") if only else ()):
        below = {segment(key): value for key, value in children(found)}
        if part not in below:
            place = "/".join(str(only).strip("/").split("/")[:number])
            names = ", ".join(list(below)[:8]) + (" ..." if len(below) > 8 else "")
            there = f"{place or 'the state'} has {names or 'nothing below it'}"
            raise MissingKeysError(f"nothing is saved at {only!r}: {there}")
        found = below[part]
    return found


def _with_ranks(value: Any, manifest: Manifest) -> Any:
    if isinstance(value, PerRankRef):
        return [decode_value(values[value.path]) for values in manifest.per_rank if value.path in values]
    items = [_with_ranks(item, manifest) for _, item in children(value)]
    return rebuilt(value, items) if items else value


def _named(manifest: Manifest, state: Any, only: str | None) -> dict[str, TensorEntry]:
    """Every tensor by the name that it gets: its own, or below `only` the keys that lead to it."""
    records = {tensor.name: tensor for tensor in manifest.tensors}
    if only is None:
        return records
    named: dict[str, TensorEntry] = {}
    last = only.strip("/").rpartition("/")[2]
    for name, ref in _references(state):
        if (name or last) in named:
            raise StateError(f"two tensors below {only!r} would have the name {name!r}")
        named[name or last] = records[ref]
    return named


def _references(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[str, str]]:
    """The tensors of a tree: the keys that lead to each, and its name in the checkpoint."""
    if isinstance(value, TensorRef):
        yield "/".join(map(str, keys)), value.name
    else:
        for key, item in children(value):
            yield from _references(item, (*keys, key))


def _selected(named: Mapping[str, TensorEntry], select: Sequence[str], url: str) -> dict[str, TensorEntry]:
    chosen: dict[str, TensorEntry] = {}
    for pattern in select:
        matching = {name: tensor for name, tensor in named.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            some = ", ".join(list(named)[:4])
            raise MissingKeysError(
                f"no tensor's name matches {pattern!r}; {url} has {len(named)}, like {some or 'none at all'}"
            )
        chosen.update(matching)
    return {name: named[name] for name in named if name in chosen} if select else dict(named)


def _check_target(path: Path, *, overwrite: bool) -> None:
    with _explained("write", path):
        if not path.parent.is_dir():
            raise StorageError(f"cannot write {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise CheckpointExistsError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise CheckpointExistsError(
                f"{path} exists already; it was left as it is. Replace it with --force"
            )


@contextlib.contextmanager
def _new_file(path: Path, nbytes: int, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file to write to, which is at `path`, durable, if the block ends well; else nothing is left."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _explained("write", path, nbytes):
        system = os.statvfs(path.parent)
        if system.f_bavail * system.f_frsize < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _check_target(path, overwrite=overwrite)
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(verb: str, path: Path, wanted: int = 0) -> Iterator[None]:
    """Turn the system's refusals into this library's."""
    try:
        yield
    except (StorageError, CheckpointExistsError):
        raise
    except OSError as error:
        text = f"cannot {verb} {path}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            system = os.statvfs(path.parent)
            free = system.f_bavail * system.f_frsize
            raise StorageFullError(
                f"{text}; wanted {wanted} bytes, {free} are free. Free some, or choose another place"
            ) from error
        if isinstance(error, PermissionError):
            raise CredentialsError(f"{text}. Change the permissions, or choose another place") from error
        raise StorageError(text) from error
