"""Sharded checkpoints that load on any world size, in any layout.

    shardckpt.save(url, state)              one checkpoint; save_async(...) -> handle.wait()
    shardckpt.load(url, state)              in place, any world size and layout
    shardckpt.open(url)                     look into a checkpoint, without torch
    shardckpt.Checkpointer(url, ...)        a run: save every so often, resume, keep the newest
    shardckpt.copy, merge, reshard          to another storage, into one file, for another world size

Most names are imported when they are first used, so that looking into a checkpoint does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardckpt.errors import ShardckptError
from shardckpt.loading.checkpoint import Checkpoint
from shardckpt.loading.checkpoint import open_checkpoint as open
from shardckpt.version import __version__

if TYPE_CHECKING:
    from shardckpt.checkpointer import Checkpointer
    from shardckpt.drain import Drained
    from shardckpt.interop.copy import copy
    from shardckpt.interop.export import merge
    from shardckpt.interop.reshard import reshard
    from shardckpt.loading.load import Loaded, load
    from shardckpt.saving.session import SaveHandle, save, save_async
    from shardckpt.state.flatten import PerRank

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Drained",
    "Loaded",
    "PerRank",
    "SaveHandle",
    "ShardckptError",
    "__version__",
    "copy",
    "load",
    "merge",
    "open",
    "reshard",
    "save",
    "save_async",
]

_LATER = {
    "Checkpointer": "checkpointer",
    "Drained": "drain",
    "Loaded": "loading.load",
    "PerRank": "state.flatten",
    "SaveHandle": "saving.session",
    "copy": "interop.copy",
    "load": "loading.load",
    "merge": "interop.export",
    "reshard": "interop.reshard",
    "save": "saving.session",
    "save_async": "saving.session",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'shardckpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shardckpt.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
