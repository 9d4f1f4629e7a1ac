"""Checkpoint formats of other tools: how a file or a folder is recognized, and what loads it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "DCP",
    "HEAD_BYTES",
    "SAFETENSORS",
    "TORCH_SAVE",
    "ForeignFormat",
    "recognize_file",
    "recognize_folder",
]

HEAD_BYTES = 16
"""Bytes at the start of a file by which its format is recognized."""

_ZIP = b"PK\x03\x04"  # torch.save since torch 1.6
_PICKLED_LONG = b"\x80\x02\x8a\x0a"  # before that


@dataclass(frozen=True)
class ForeignFormat:
    """A format of another tool.

    Attributes:
        name: as its users call it.
        load: how a user gets the state, or its tensors, out of it: the end of "Load it with ...".
    """

    name: str
    load: str


TORCH_SAVE = ForeignFormat("torch.save", "torch.load")
SAFETENSORS = ForeignFormat("safetensors", "safetensors.torch.load_file")
DCP = ForeignFormat("torch.distributed.checkpoint (DCP)", "its load()")


def recognize_file(head: bytes, size: int) -> ForeignFormat | None:
    """The format of a file.

    Args:
        head: its first `HEAD_BYTES` bytes, or all of a shorter one.
        size: its length in bytes.
    """
    if head.startswith((_ZIP, _PICKLED_LONG)):
        return TORCH_SAVE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return SAFETENSORS
    return None


def recognize_folder(names: Sequence[str]) -> ForeignFormat | None:
    """The format of a folder, by the names of what is right below it."""
    if ".metadata" in names:
        return DCP
    if any(name.endswith(".safetensors") for name in names):
        return SAFETENSORS
    return None
