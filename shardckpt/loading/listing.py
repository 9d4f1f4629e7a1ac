"""List the checkpoints of a run, complete and incomplete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from shardckpt.errors import CheckpointError, FormatError, NotACheckpointError, UnknownVersionError
from shardckpt.format.manifest import MANIFEST, ManifestHead, Pack
from shardckpt.format.manifest_codec import decode_summary
from shardckpt.run.foreign import describe_other
from shardckpt.run.index import INDEX, IndexEntry, entry_of, read_index, write_index
from shardckpt.run.places import BAD, FAILED, Place, exact_place, read_decoded, read_small
from shardckpt.run.survey import StepFolder, survey
from shardckpt.storage import Storage
from shardckpt.storage.parallel import in_parallel

__all__ = ["Row", "list_checkpoints"]

_THREADS = 16
_MANY = 8
"""Indexes and manifests; after more than these had to be read, an index of the run is left for the next time."""


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


def list_checkpoints(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> list[Row]:
    """List the checkpoints of the run at `url`, the newest last, or the one checkpoint at `url`.

    Of manifests only the summary is read and checked, and that only of checkpoints that no index in the run
    describes. If these were many, an index is left in the run, where that is permitted. Raises
    NotACheckpointError, StorageError.
    """
    exact = exact_place(url, storage_options)
    names = [] if exact.path else exact.storage.list()
    if exact.path or MANIFEST in names:
        alone = StepFolder(exact, exact.storage.sizes())
        if not names and not alone.files:
            raise NotACheckpointError(f"{exact.url}: nothing is there. Check the URL.")
        return [_look(alone).row]
    folders = survey(exact.root, names)[::-1]
    if not folders:
        found = describe_other(exact.url, names, storage_options)
        raise NotACheckpointError(
            f"{exact.url} is neither a run with checkpoints nor a checkpoint: {found}."
        )
    rows = _rows(exact.root, folders, has_index=INDEX in names)
    good = [number for number, row in enumerate(rows) if row.state == "good"]
    if good:
        rows[good[-1]] = replace(rows[good[-1]], newest=True)
    return rows


def _rows(root: Storage, folders: Sequence[StepFolder], *, has_index: bool) -> list[Row]:
    """The rows of a run's folders: from its index, else those of its attempts, else from manifests."""
    known = _right(read_index(root), folders) if has_index else {}
    left = {_attempt(f) for f in folders if f.is_committed and f.place.path not in known}
    for entries in in_parallel(lambda attempt: read_index(root.at(attempt)), sorted(left), _THREADS):
        known |= _right(entries, folders)
    looks = in_parallel(lambda f: _look(f, known.get(f.place.path)), folders, _THREADS)
    read = {f.place.path: look.entry for f, look in zip(folders, looks, strict=True) if look.has_read}
    if len(left) + len(read) > _MANY:
        write_index(root, known | {path: entry for path, entry in read.items() if entry is not None})
    return [look.row for look in looks]


def _attempt(folder: StepFolder) -> str:
    return folder.place.path.partition("/")[0]


def _right(entries: Mapping[str, IndexEntry], folders: Iterable[StepFolder]) -> dict[str, IndexEntry]:
    """Those of the entries that are of what is in the folders."""
    return {
        path: entry
        for folder in folders
        if (entry := entries.get(path := folder.place.path)) is not None and entry.is_of(folder)
    }


class _Look(NamedTuple):
    """What was found out of a checkpoint.

    Attributes:
        row: its row.
        entry: its entry for an index; None if it can have none.
        has_read: True if its manifest was read for this.
    """

    row: Row
    entry: IndexEntry | None = None
    has_read: bool = False


def _look(folder: StepFolder, entry: IndexEntry | None = None) -> _Look:
    """Make the row of a folder; without an entry for it, by its manifest."""
    place = folder.place
    attempt, step, _ = place.order
    if not folder.is_committed:
        note = _error_in(place.storage, FAILED) if folder.is_failed else ""
        state = "failed" if folder.is_failed else "unfinished"
        return _Look(Row(place.url, attempt, step, state, note=note))
    if entry is not None:
        return _Look(_good_row(folder, entry, entry.bytes), entry)
    try:
        summary = read_decoded(place, lambda data: decode_summary(data, place.url))
    except UnknownVersionError as error:
        row = Row(place.url, attempt, step, "other version", note=_about(place, error))
        return _Look(row, has_read=True)
    except CheckpointError as error:
        return _Look(Row(place.url, attempt, step, "invalid", note=_about(place, error)), has_read=True)
    row = _good_row(folder, summary, sum(pack.size for pack in summary.packs))
    if row.state == "good" and (problem := _pack_problem(folder, summary.packs)):
        row = replace(row, state="damaged", note=problem)
    made = entry_of(summary, folder.files[MANIFEST])
    return _Look(row, made if made is not None and made.is_of(folder) else None, has_read=True)


def _good_row(folder: StepFolder, head: ManifestHead, nbytes: int) -> Row:
    """The row of a committed checkpoint whose packs are right, for all that is known."""
    place = folder.place
    note = ""
    if folder.is_bad:
        note = _error_in(place.storage, BAD).removeprefix(f"{place.url}: ")
    return Row(
        url=place.url,
        attempt=place.order[0],
        step=head.step,
        state="bad" if folder.is_bad else "good",
        created=head.created,
        world_size=head.world_size,
        bytes=nbytes,
        metrics=head.metric_values,
        note=note,
    )


def _pack_problem(folder: StepFolder, packs: Sequence[Pack]) -> str:
    """Which packs are missing or have another size, here or in other steps; an empty string if none."""
    place = folder.place
    files = {place.path: folder.files}
    wrong = []
    for pack in packs:
        path = place.pack(pack)
        step = "/".join(path.split("/")[:2]) if place.path else ""
        if step not in files:
            files[step] = place.root.sizes(step)
        found = files[step].get(path.removeprefix(f"{step}/"))
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
