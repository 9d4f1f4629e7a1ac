"""`shardckpt ls`: a run's checkpoints, the newest last."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shardckpt.cli.output import Column, age, print_json, print_table, size
from shardckpt.errors import CheckpointError, FormatError, NotACheckpointError, UnknownVersionError
from shardckpt.fetch import in_parallel
from shardckpt.manifest import MANIFEST, decode_head
from shardckpt.runs import (
    BAD,
    FAILED,
    Place,
    exact_place,
    iter_places,
    read_decoded,
    read_small,
)
from shardckpt.storage import Storage

__all__ = ["Row", "list_checkpoints", "show"]

_COLUMNS = (
    Column(""),
    Column("ATTEMPT", number=True),
    Column("STEP", number=True),
    Column("AGE", number=True),
    Column("RANKS", number=True),
    Column("SIZE", number=True),
    Column("STATE"),
    Column("METRICS", wrap=True),
    Column("NOTE", wrap=True, style="dim"),
)

_STYLES = {
    "bad": "red",
    "invalid": "red",
    "failed": "yellow",
    "unfinished": "yellow",
    "other version": "yellow",
}

_NOTE = 100


@dataclass(frozen=True)
class Row:
    """One checkpoint of a run, or a save that did not become one.

    Attributes:
        url: where it is.
        attempt: from the folder's name; 0 outside a run.
        step: from the manifest, or the folder's name.
        state: "good"; "bad" (marked by a reader whose verification failed); "unfinished" (under way, or
            given up); "failed" (the writer said so); "invalid" (its manifest cannot be read); "other version".
        newest: whether it is the newest good one, which `restore` takes.
        note: what is known of a failure.
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
    """The checkpoints of the run at `url`, the newest last, or the one at `url`.

    Manifests are not checked beyond what the rows say. Raises NotACheckpointError, StorageError.
    """
    exact = exact_place(url, storage_options)
    names = exact.storage.list()
    if exact.path or MANIFEST in names:
        if not names:
            raise NotACheckpointError(f"{exact.url}: nothing is there")
        return [_row(exact)]
    places = sorted(iter_places(exact.root), key=lambda place: place.order)
    if not places:
        found = (
            f"it has {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            if names
            else "nothing is there"
        )
        raise NotACheckpointError(
            f"{exact.url} is neither a run with checkpoints nor a checkpoint: {found}"
        )
    rows = in_parallel(_row, places)
    good = [number for number, row in enumerate(rows) if row.state == "good"]
    if good:
        rows[good[-1]] = Row(**{**asdict(rows[good[-1]]), "newest": True})
    return rows


def show(url: str, storage_options: Mapping[str, Any] | None, *, as_json: bool) -> int:
    """Print the list."""
    rows = list_checkpoints(url, storage_options)
    if as_json:
        print_json({"url": url, "checkpoints": [asdict(row) for row in rows]})
        return 0
    now = time.time()
    cells = [
        (
            "*" if row.newest else "",
            str(row.attempt) if row.attempt else "-",
            str(row.step),
            "-" if row.created is None else age(now - row.created),
            "-" if row.world_size is None else str(row.world_size),
            "-" if row.bytes is None else size(row.bytes),
            row.state,
            ", ".join(f"{name} {value:.6g}" for name, value in row.metrics.items()),
            row.note if len(row.note) <= _NOTE else row.note[:_NOTE] + " ...",
        )
        for row in rows
    ]
    styles = ["bold green" if row.newest else _STYLES.get(row.state, "") for row in rows]
    print_table(_COLUMNS, cells, styles)
    return 0


def _row(place: Place) -> Row:
    attempt, step, _ = place.order
    storage = place.storage
    names = storage.list()
    if MANIFEST not in names:
        note = _error_in(storage, FAILED) if FAILED in names else ""
        return Row(place.url, attempt, step, "failed" if FAILED in names else "unfinished", note=note)
    try:
        head = read_decoded(place, lambda data: decode_head(data, place.url))
    except UnknownVersionError as error:
        return Row(place.url, attempt, step, "other version", note=_about(place, error))
    except CheckpointError as error:
        return Row(place.url, attempt, step, "invalid", note=_about(place, error))
    state, note = "good", ""
    if BAD in names:
        state, note = "bad", _error_in(storage, BAD).removeprefix(f"{place.url}: ")
    return Row(
        url=place.url,
        attempt=attempt,
        step=head.step,
        state=state,
        created=head.created,
        world_size=head.world_size,
        bytes=sum(pack.size for pack in head.packs),
        metrics=head.metric_values,
        note=note,
    )


def _error_in(storage: Storage, name: str) -> str:
    """The error in a report that a reader or writer has left."""
    try:
        return str(read_small(storage, name).get("error", ""))
    except (FormatError, FileNotFoundError) as error:
        return str(error)


def _about(place: Place, error: Exception) -> str:
    return str(error).removeprefix(f"{place.url}: ")
