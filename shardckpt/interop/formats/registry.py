"""The file formats, and which of them a name selects. A new format is a module of this folder and a line here."""

from __future__ import annotations

from pathlib import PurePath

from shardckpt.interop.formats.base import Format
from shardckpt.interop.formats.safetensors import Safetensors
from shardckpt.interop.formats.torch_pt import TorchPt

__all__ = ["FORMATS", "SUFFIXES", "format_of"]

FORMATS: tuple[Format, ...] = (Safetensors(), TorchPt())

SUFFIXES = tuple(suffix for each in FORMATS for suffix in each.suffixes)
"""The ends of file names that select a format."""


def format_of(path: PurePath) -> Format:
    """The format that the name of a file selects. Raises ValueError for a suffix that selects none."""
    for each in FORMATS:
        if path.suffix in each.suffixes:
            return each
    raise ValueError(f"{path}: the name must end with {' or '.join(SUFFIXES)}, which selects the format")
