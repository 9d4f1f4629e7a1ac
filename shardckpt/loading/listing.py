"""List the checkpoints of a run, complete and incomplete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

from shardckpt.errors import CheckpointError, FormatError, NotACheckpointError, UnknownVersionError
from shardckpt.format.manifest import MANIFEST, Pack
from shardckpt.format.manifest_codec import decode_summary
from shardckpt.run.foreign import describe_other
from shardckpt.run.places import (
    BAD,
    FAILED,
    Place,
    exact_place,
    iter_places,
    read_decoded,
    read_small,
)
from shardckpt.storage import Storage
from shardckpt.storage.parallel import in_parallel

__all__ = ["Row", "list_checkpoints"]


@dataclass(frozen=True)
class Row:
    """One checkpoint of a run, or a save that has not become one.

    Attributes:
        url: the checkpoint's URL.
        attempt: by the folder's name; 0 outside a run.
        step: by the manifest, or else by the folder's name.
        state: "good" (its packs are there, with the right length); "bad" (marked by a reader whose verification
            failed); "damaged" (a pack is missing, or has another length); "unfinished" (under way, or given
            up); "failed" (the writer said so); "invalid" (its manifest cannot be read); "other version".
        newest: True for the newest good one, which `restore` loads.
        created: seconds since the epoch; None without a manifest.
        world_size: ranks that saved it; None without a manifest.
        bytes: bytes of its packs; None without a manifest.
        metrics: by name.
        note: the error or the damage that is known.
    """

    url: str
    attempt: int
    step: int
    state: str
    newest: bool = False
    created: float | None = None
    world_size: int | None = None
    bytes: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


def list_checkpoints(url: str, storage_options: Mapping[str, Any] | None = None) -> list[Row]:
    """List the checkpoints of the run at `url`, the newest last, or the one checkpoint at `url`.

    Of manifests only the summary is read and checked. Raises NotACheckpointError, StorageError.
    """
    exact = exact_place(url, storage_options)
    names = exact.storage.list()
    sizes = lru_cache(maxsize=None)(exact.root.sizes)
    if exact.path or MANIFEST in names:
        if not names:
            raise NotACheckpointError(f"{exact.url}: nothing is there. Check the URL.")
        return [_row(exact, sizes)]
    places = sorted(iter_places(exact.root), key=lambda place: place.order)
    if not places:
        found = describe_other(exact.url, names, storage_options)
        raise NotACheckpointError(
            f"{exact.url} is neither a run with checkpoints nor a checkpoint: {found}."
        )
    rows = in_parallel(partial(_row, sizes=sizes), places)
    good = [number for number, row in enumerate(rows) if row.state == "good"]
    if good:
        rows[good[-1]] = Row(**{**asdict(rows[good[-1]]), "newest": True})
    return rows


def _row(place: Place, sizes: Callable[[str], dict[str, int]]) -> Row:
    attempt, step, _ = place.order
    storage = place.storage
    names = storage.list()
    if MANIFEST not in names:
        note = _error_in(storage, FAILED) if FAILED in names else ""
        return Row(place.url, attempt, step, "failed" if FAILED in names else "unfinished", note=note)
    try:
        summary = read_decoded(place, lambda data: decode_summary(data, place.url))
    except UnknownVersionError as error:
        return Row(place.url, attempt, step, "other version", note=_about(place, error))
    except CheckpointError as error:
        return Row(place.url, attempt, step, "invalid", note=_about(place, error))
    state, note = "good", ""
    if BAD in names:
        state, note = "bad", _error_in(storage, BAD).removeprefix(f"{place.url}: ")
    elif problem := _pack_problem(place, summary.packs, sizes):
        state, note = "damaged", problem
    return Row(
        url=place.url,
        attempt=attempt,
        step=summary.step,
        state=state,
        created=summary.created,
        world_size=summary.world_size,
        bytes=sum(pack.size for pack in summary.packs),
        metrics=summary.metric_values,
        note=note,
    )


def _pack_problem(place: Place, packs: Sequence[Pack], sizes: Callable[[str], dict[str, int]]) -> str:
    """Which packs are missing or have another size, by a listing of their folders; an empty string if none."""
    wrong = []
    for pack in packs:
        path = place.pack(pack)
        folder = "/".join(path.split("/")[:2]) if place.path else ""
        found = sizes(folder).get(path.removeprefix(f"{folder}/"))
        if found != pack.size:
            lack = "is missing" if found is None else f"has {found} bytes"
            wrong.append(f"{pack.path} {lack}, and should have {pack.size}")
    more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
    return f"the pack {wrong[0]}{more}" if wrong else ""


def _error_in(storage: Storage, name: str) -> str:
    """The error in a report that a reader or a writer has written to the checkpoint's folder."""
    try:
        return str(read_small(storage, name).get("error", ""))
    except (FormatError, FileNotFoundError) as error:
        return str(error)


def _about(place: Place, error: Exception) -> str:
    """The message without the checkpoint's URL, which the row shows."""
    return str(error).removeprefix(f"{place.url}: ")
