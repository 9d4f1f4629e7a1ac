"""Memory as the bytes that it holds."""

from __future__ import annotations

__all__ = ["as_bytes"]


def as_bytes(buffer: bytes | memoryview) -> memoryview:
    """A view of a contiguous buffer of any shape and type as a flat one of bytes, without a copy."""
    view = memoryview(buffer)
    # What holds nothing may have a shape that cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(bytearray())
