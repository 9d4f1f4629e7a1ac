"""What is at a URL where a checkpoint was expected: other formats, told by their first bytes or file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardckpt.errors import CheckpointError
from shardckpt.format.manifest import MANIFEST
from shardckpt.storage import open_storage

__all__ = ["describe_other"]

_SAVE_IT = "and save what it gives with shardckpt.save(URL, state)"
_TORCH = f"it is a file of torch.save. Load it with torch.load, {_SAVE_IT}"
_SAFETENSORS = f"it is a safetensors file. Load it with safetensors.torch.load_file, {_SAVE_IT}"
_DCP = (
    "it is a checkpoint of torch.distributed.checkpoint (DCP). Load your state from it with its load(), "
    "and save that with shardckpt.save(URL, state)"
)
_SHOWN = 4
_LONGEST_START = 16  # bytes by which a file's format is told


def describe_other(url: str, names: Sequence[str], storage_options: Mapping[str, Any] | None) -> str:
    """What is at a URL that is no checkpoint, and what to do with it; `names` is what it has as a folder."""
    if not names:
        return _describe_file(url, storage_options)
    if ".metadata" in names:
        return _DCP
    if any(name.endswith(".safetensors") for name in names):
        return f"it has safetensors files. Load them with safetensors.torch.load_file, {_SAVE_IT}"
    if any(name.startswith("attempt-") for name in names):
        return "jobs have begun there, and none of them has saved a checkpoint yet"
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    return f"it has {shown}, but no {MANIFEST}. Check the URL"


def _describe_file(url: str, storage_options: Mapping[str, Any] | None) -> str:
    folder, _, name = url.rstrip("/").rpartition("/")
    try:
        storage = open_storage(folder, storage_options)
        size = storage.size(name)
        start = storage.read(name, 0, min(size, _LONGEST_START))
    except (CheckpointError, OSError):
        return "nothing is there. Check the URL"
    if start.startswith((b"PK\x03\x04", b"\x80\x02\x8a\x0a")):  # since torch 1.6, and before that
        return _TORCH
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return _SAFETENSORS
    return f"it is a file of {size} bytes, of no kind that is known here. Check the URL"
