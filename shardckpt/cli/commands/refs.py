"""`shardckpt refs`: write refs.json anew for where a run or a checkpoint is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardckpt.cli.output import print_json, printable
from shardckpt.format.manifest import REFS
from shardckpt.formatting import count
from shardckpt.run.refs import write_references

__all__ = ["show"]


def show(url: str, storage_options: Mapping[str, Any] | None, *, as_json: bool) -> int:
    """Write them, and print where."""
    written = write_references(url, storage_options)
    if as_json:
        print_json(
            {"url": url, "checkpoints": [{"url": at, "written": new} for at, new in written.items()]}
        )
        return 0
    print(
        f"{printable(url)}: wrote {REFS} of {sum(written.values())} of {count(len(written), 'checkpoint')}"
        f"{'' if all(written.values()) else '; the others were right'}"
    )
    return 0
