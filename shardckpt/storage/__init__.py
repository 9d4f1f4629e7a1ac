"""Where checkpoints live: folders of files or objects behind one protocol. Imports the lowest layer only."""

from __future__ import annotations

from shardckpt.storage.local import LocalStorage
from shardckpt.storage.protocol import Storage
from shardckpt.storage.url import open_storage

__all__ = ["LocalStorage", "Storage", "open_storage"]
