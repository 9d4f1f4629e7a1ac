"""Failure markers in storage: who waits for a rank's part finds out that it will not come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from shardckpt.errors import FormatError, SaveError, SupersededError
from shardckpt.format import records
from shardckpt.format.manifest import marker_path
from shardckpt.run.places import FAILED, read_small
from shardckpt.storage import Storage

__all__ = ["raise_failure", "report_failure", "report_lost"]


def report_failure(storage: Storage, path: str, save_id: str, error: BaseException) -> None:
    """Write a failure marker for a save to `path`, so that no other process waits for it.

    Best effort: the storage may be what failed.

    Args:
        storage: the checkpoint's folder.
        path: `FAILED` for the commit, `marker_path` for a rank's part.
        save_id: the save's.
        error: why it failed.
    """
    _write_marker(storage, path, save_id, f"{type(error).__name__}: {error}")


def report_lost(storage: Storage, ranks: Iterable[int], save_id: str, reason: str) -> None:
    """Write failure markers for these ranks' parts of a save, so that no other process waits for them.

    If rank 0 is among them, nor for the commit. Best effort, as `report_failure`.
    """
    for rank in ranks:
        for path in (marker_path(save_id, rank), *([FAILED] if rank == 0 else [])):
            _write_marker(storage, path, save_id, reason)


def _write_marker(storage: Storage, path: str, save_id: str, reason: str) -> None:
    record = records.encode_report(reason, id=save_id)
    with contextlib.suppress(OSError):
        storage.write(path, record)


_STANDS = "The checkpoint before it stands."


def raise_failure(storage: Storage, path: str, save_id: str, who: str) -> None:
    """Raise SaveError if there is a failure marker of this save at `path`."""
    try:
        report = read_small(storage, path)
    except (FileNotFoundError, FormatError):
        return
    if report.get("id") == save_id:
        error = str(report.get("error")).removesuffix(f". {_STANDS}")
        kind = SupersededError if error.startswith(f"{SupersededError.__name__}: ") else SaveError
        raise kind(f"{who}: {error}. {_STANDS}")
