"""Write refs.json anew for where a run or a checkpoint is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardckpt.errors import NotACheckpointError
from shardckpt.format.manifest import REFS
from shardckpt.format.zarr_refs import encode_refs
from shardckpt.run.places import Place, exact_place, iter_places, read_manifest

__all__ = ["write_references"]


def write_references(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """Write the refs.json of the checkpoint at `url`, or of all of the run there, where it names another place.

    Returns for each checkpoint's URL whether it had to be written. Raises NotACheckpointError, FormatError,
    StorageError.
    """
    exact = exact_place(url, storage_options)
    places = (
        [exact]
        if exact.path or exact.is_committed()
        else [place for place in iter_places(exact.root) if place.is_committed()]
    )
    if not places:
        raise NotACheckpointError(f"{exact.url} is neither a checkpoint nor a run with one")
    return {place.url: _write(place) for place in places}


def _write(place: Place) -> bool:
    content = encode_refs(read_manifest(place), place.url)
    try:
        if place.storage.read(REFS) == content:
            return False
    except FileNotFoundError:
        pass
    place.storage.write(REFS, content)
    return True
