"""`shardckpt ls`: a run's checkpoints, the newest last."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shardckpt.cli.output import Column, print_json, print_table
from shardckpt.formatting import age, size
from shardckpt.loading.listing import list_checkpoints

__all__ = ["show"]

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
    "damaged": "red",
    "invalid": "red",
    "failed": "yellow",
    "unfinished": "yellow",
    "other version": "yellow",
}

_NOTE = 100


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
