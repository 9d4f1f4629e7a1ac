"""Views of memory as bytes, and their cutting into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from shardckpt.storage.protocol import Before

__all__ = ["as_bytes", "blocks", "cut"]


def as_bytes(buffer: bytes | memoryview) -> memoryview:
    """A view of a contiguous buffer of any shape and type as a flat one of bytes, without a copy."""
    view = memoryview(buffer)
    # An empty array may have a shape that cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def cut(view: memoryview, size: int, before: Before | None) -> Iterator[memoryview]:
    """The bytes of a flat view in pieces of `size`, the last one shorter; `before` is called ahead of each."""
    for start in range(0, len(view), size):
        piece = view[start : start + size]
        if before is not None:
            before(start, start + len(piece))
        yield piece


def blocks(pieces: Iterable[memoryview], allocate: Callable[[], memoryview]) -> Iterator[memoryview]:
    """The bytes of all pieces, in order, in blocks that `allocate` makes; the last may be shorter."""
    block, used = memoryview(b""), 0
    for piece in pieces:
        view = as_bytes(piece)
        while view:
            if used == len(block):
                block, used = allocate(), 0
            taken = view[: len(block) - used]
            block[used : used + len(taken)] = taken
            used, view = used + len(taken), view[len(taken) :]
            if used == len(block):
                yield block
    if used < len(block):
        yield block[:used]
