"""Write refs.json anew, for where a run or a checkpoint is now, or where a commit has left it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardckpt.errors import NotACheckpointError
from shardckpt.format.manifest import REFS
from shardckpt.format.zarr_refs import are_written, encode_refs
from shardckpt.run.places import Place, exact_place, read_manifest
from shardckpt.run.survey import survey

__all__ = ["write_references"]


def write_references(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """Write the refs.json of the checkpoint at `url`, or of all of the run there, where it names another place.

    One that was left out for its size is written for a checkpoint that `url` names, and not for all of a run.

    Returns for each checkpoint's URL whether it had to be written. Raises NotACheckpointError, FormatError,
    StorageError.
    """
    exact = exact_place(url, storage_options)
    is_named = bool(exact.path) or exact.is_committed()
    places = [exact] if is_named else [folder.place for folder in survey(exact.root) if folder.is_committed]
    if not places:
        raise NotACheckpointError(f"{exact.url} is neither a checkpoint nor a run with one")
    return {place.url: _write(place, is_named=is_named) for place in places}


def _write(place: Place, *, is_named: bool) -> bool:
    manifest = read_manifest(place)
    try:
        found = place.storage.read(REFS)
    except FileNotFoundError:
        if not is_named and not are_written(manifest):
            return False
        found = b""
    content = encode_refs(manifest, place.url)
    if found != content:
        place.storage.write(REFS, content)
    return found != content
