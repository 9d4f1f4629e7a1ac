"""What is at a URL where a checkpoint was expected, and what to do with it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardckpt.errors import CheckpointError
from shardckpt.format.foreign import DCP, HEAD_BYTES, ForeignFormat, recognize_file, recognize_folder
from shardckpt.format.manifest import MANIFEST
from shardckpt.storage import open_storage

__all__ = ["describe_other"]

_SHOWN = 4


def describe_other(url: str, names: Sequence[str], storage_options: Mapping[str, Any] | None) -> str:
    """Describe what is at a URL that has no checkpoint, as the end of a message, without its full stop.

    Args:
        url: where a checkpoint was expected.
        names: of the files and folders right below it; empty if it is no folder. A file at `url` is read then.
        storage_options: arguments of the fsspec file system of `url`.
    """
    if not names:
        return _describe_file(url, storage_options)
    found = recognize_folder(names)
    if found is DCP:
        return (
            f"it is a checkpoint of {DCP.name}. Load your state from it with {DCP.load}, and save that with "
            "shardckpt.save(URL, state)"
        )
    if found is not None:
        return f"it has {found.name} files. Load them with {_remedy(found)}"
    if any(name.startswith("attempt-") for name in names):
        return "jobs have begun there, and none of them has saved a checkpoint yet"
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    return f"it has {shown}, but no {MANIFEST}. Check the URL"


def _describe_file(url: str, storage_options: Mapping[str, Any] | None) -> str:
    folder, _, name = url.rstrip("/").rpartition("/")
    try:
        storage = open_storage(folder, storage_options)
        size = storage.size(name)
        head = storage.read(name, 0, min(size, HEAD_BYTES))
    except (CheckpointError, OSError):
        return "nothing is there. Check the URL"
    found = recognize_file(head, size)
    if found is None:
        return f"it is a file of {size} bytes, of no kind that is known here. Check the URL"
    return f"it is a {found.name} file. Load it with {_remedy(found)}"


def _remedy(found: ForeignFormat) -> str:
    return f"{found.load}, and save the result with shardckpt.save(URL, state)"
